"""What the README tells people to type exists."""

import re
import shlex
from pathlib import Path

import typer

import tflite_export
import updp_tf
from updp_tf.cli import app

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands


def blocks(language: str = "") -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [content for found, content in fences if found == language]


def test_the_demo_command_stands_alone_on_a_line():
    assert "python -m pip install uv && uv run --frozen --no-dev updp-tf demo\n" in blocks()


def test_the_python_start_is_valid_short_and_public():
    start, *others = blocks("python")
    assert len(start.splitlines()) <= 20
    for code in (start, *others):
        compile(code, "README.md", "exec")
    for package in (updp_tf, tflite_export):
        for code in (start, *others):
            used = set(re.findall(rf"\b{package.__name__}\.(\w+)", code))
            assert used <= set(package.__all__)
            assert used or code != start


def test_the_command_lines_use_commands_and_options_that_exist():
    lines = [line for block in blocks() for line in block.splitlines() if line.startswith("updp-tf ")]
    named = {"blocks", "prune", "export", "evaluate", "bench", "latency", "sweep", "report"}
    assert {shlex.split(line)[1] for line in lines} == named
    for line in lines:
        _, command, *words = shlex.split(line)
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


def test_every_command_is_named_and_every_link_leads_somewhere():
    for name in COMMANDS:
        assert f"updp-tf {name}" in README or f"`{name}`" in README
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).resolve().parents[2] / target).is_file(), target

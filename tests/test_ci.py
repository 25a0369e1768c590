"""What people are told to run is what the gate runs."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands(path: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return [line for line in lines if line.startswith("python -m pip install uv &&")]


def test_the_gate_runs_the_test_command_of_the_readme_word_for_word():
    (in_gate,) = commands(".ci/run")
    in_readme = [line for line in commands("README.md") if "pytest" in line]
    assert in_readme == [in_gate]
    assert commands(".github/CONTRIBUTING.md") == [in_gate]


def test_the_gate_ends_with_the_tests_and_can_be_run():
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == commands(".ci/run")[0]
    assert os.access(ROOT / ".ci/run", os.X_OK)

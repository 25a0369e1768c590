"""Run directories: locks, arguments, stages, checkpoints and logs, with real processes that are killed."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from updp_tf.errors import OutputError, RunError
from updp_tf.runs import SILENT_SECONDS, RunDir, RunWarning

ROOT = Path(__file__).resolve().parents[2]
ASKED = {"budget": {"macs": 0.7}, "seed": 0}


def names(folder):
    return sorted(one.name for one in folder.iterdir())


# Stages


def test_a_finished_stage_is_read_and_not_computed_again(tmp_path):
    for turn in range(2):
        with RunDir(tmp_path / "deep" / "run", arguments=ASKED) as run:
            assert run.is_finished("scores") == bool(turn)
            scores = run.json("scores", lambda turn=turn: {"a": 0.1, "n": (1, turn)})
            assert scores == {"a": 0.1, "n": [1, 0]}, "what was read back, in both runs"
    assert names(tmp_path / "deep" / "run") == ["arguments.json", "lock.json", "scores"]
    document = json.loads((tmp_path / "deep" / "run" / "arguments.json").read_text())
    assert document["arguments"] == ASKED and set(document["versions"]) == {"updp-tf", "numpy"}


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    def write(value, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("no more")

    with RunDir(tmp_path, arguments=ASKED) as run:
        with pytest.raises(RuntimeError, match="no more"):
            run.stage("scores", lambda: 1, write=write, read=lambda folder: 1)
        assert not run.is_finished("scores")
        assert run.json("scores", lambda: 2) == 2
    assert names(tmp_path) == ["arguments.json", "lock.json", "scores"]


def test_checkpoints_are_kept_until_the_stage_is_finished(tmp_path):
    with RunDir(tmp_path, arguments=ASKED) as run:
        assert run.last_checkpoint("train") is None
        for step in (5, 10, 100):
            run.checkpoint("train", step, lambda folder, step=step: (folder / "w").write_text(str(step)))
        run.checkpoint("train", 100, lambda folder: (folder / "w").write_text("again"))
        found = run.last_checkpoint("train")
        assert (found.step, (found.path / "w").read_text()) == (100, "100")
        assert len(names(tmp_path / "train.checkpoints")) == 2
        run.json("train", lambda: 1)
        assert run.last_checkpoint("train") is None
    assert names(tmp_path) == ["arguments.json", "lock.json", "train"]


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_names_of_stages_stay_in_the_folder(tmp_path, name):
    with RunDir(tmp_path, arguments=ASKED) as run, pytest.raises(RunError, match="letters, digits"):
        run.json(name, lambda: 1)


# Logs


def test_a_log_is_cut_back_to_the_checkpoint_that_the_work_goes_on_from(tmp_path):
    with RunDir(tmp_path, arguments=ASKED) as run:
        log = run.log("train", ("step", "loss"))
        for step in range(6):
            log.append(step=step, loss=step / 4)
        with open(log.path, "a") as file:
            file.write("6,0.")  # killed in the middle of a row
        log = run.log("train", ("step", "loss"), after=3)
        log.append(step=4, loss=9.5)
        assert log.path.read_text() == "step,loss\n0,0.0\n1,0.25\n2,0.5\n3,0.75\n4,9.5\n"
        assert log.rows()[-1] == {"step": "4", "loss": "9.5"}
        assert run.log("train", ("step", "loss")).rows() == []
        log.append(step=1, loss=1)
        with pytest.raises(RunError, match=r"'.*train.csv' has the columns \['step', 'loss'\], not \['step', 'kl'\]"):
            run.log("train", ("step", "kl"), after=3)
        with pytest.raises(RunError, match="Received: .*'loss', 'extra'"):
            log.append(step=1, loss=1, extra=2)
        with pytest.raises(RunError, match="first column of a log is 'step'"):
            run.log("other", ("epoch",))


# Arguments


def test_other_arguments_are_refused_and_named(tmp_path):
    with RunDir(tmp_path, arguments={**ASKED, "forms": ("conv3", "remove")}) as run:
        run.json("scores", lambda: 1)
    RunDir(tmp_path, arguments={"seed": 0, "forms": ["conv3", "remove"], "budget": {"macs": 0.7}}).__enter__().__exit__(
        None, None, None
    )
    with pytest.raises(RunError) as caught:
        with RunDir(tmp_path, arguments={"budget": {"macs": 0.6}, "seed": 0, "width": True}):
            pass
    told = str(caught.value)
    assert told.startswith(f"'{tmp_path}' is a run with other arguments: 'budget' was {{\"macs\": 0.7}} and is {{")
    assert (
        """'forms' was ["conv3", "remove"] and is "(not given)"; 'width' was "(not given)" and is true. Give""" in told
    )
    with RunDir(tmp_path, arguments={**ASKED, "forms": ["conv3", "remove"]}):
        pass  # the lock was given back


def test_other_versions_are_told(tmp_path):
    with RunDir(tmp_path, arguments=ASKED):
        pass
    path = tmp_path / "arguments.json"
    path.write_text(path.read_text().replace('"numpy": "', '"numpy": "0.'))
    with pytest.warns(RunWarning, match=r"other packages than it began with: 'numpy' was \"0\..* and is"):
        with RunDir(tmp_path, arguments=ASKED):
            pass


def test_what_is_no_run_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="is no run directory: it holds 'thesis.tex' and no 'arguments.json'"):
        RunDir(tmp_path, arguments=ASKED).__enter__()
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunError, match="thesis.tex' is a file: give a folder"):
        RunDir(tmp_path / "thesis.tex", arguments=ASKED).__enter__()
    with pytest.raises(RunError, match="what JSON can hold"):
        RunDir(tmp_path / "run", arguments={"model": object()})
    run = tmp_path / "run"
    run.mkdir()
    (run / "arguments.json").write_text("{")
    with pytest.raises(RunError, match="arguments.json' cannot be read"):
        RunDir(run, arguments=ASKED).__enter__()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs /proc to be refused anything")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(OutputError, match="Cannot write to '/proc/self/run'"):
        RunDir("/proc/self/run", arguments=ASKED).__enter__()


# Locks

HOLD = """
import sys, time
from updp_tf.runs import RunDir
with RunDir(sys.argv[1], arguments={"budget": {"macs": 0.7}, "seed": 0}):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_process_is_named_and_a_dead_one_is_taken_over(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(RunError, match=rf"is in use by process {process.pid} on '.+'\. Wait for its end"):
            RunDir(tmp_path, arguments=ASKED).__enter__()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert str(process.pid) in (tmp_path / "lock.json").read_text(), "it had no time to take its name out"
    with RunDir(tmp_path, arguments=ASKED):
        with pytest.raises(RunError, match=f"in use by process {os.getpid()} on"):
            RunDir(tmp_path, arguments=ASKED).__enter__()


def _sleep(seconds):
    time.sleep(seconds)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    run = RunDir(tmp_path, arguments=ASKED)
    with run:
        child = multiprocessing.get_context("fork").Process(target=_sleep, args=(30,))
        child.start()
    try:
        with RunDir(tmp_path, arguments=ASKED):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_a_process_of_another_machine_counts_as_alive_while_it_shows_itself(tmp_path):
    with RunDir(tmp_path, arguments=ASKED):
        pass
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"pid": 77, "host": "node-b", "boot": "x"}))
    with pytest.raises(RunError, match=r"in use by process 77 on 'node-b', which showed itself \d s ago"):
        RunDir(tmp_path, arguments=ASKED).__enter__()
    long_ago = time.time() - SILENT_SECONDS - 5
    os.utime(lock, (long_ago, long_ago))
    with RunDir(tmp_path, arguments=ASKED):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_lock_shows_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("updp_tf.runs.HEARTBEAT_SECONDS", 0.02)
    lock = tmp_path / "lock.json"
    with RunDir(tmp_path, arguments=ASKED):
        os.utime(lock, (1, 1))
        deadline = time.monotonic() + 20
        while lock.stat().st_mtime < 1e9 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lock.stat().st_mtime > 1e9


# Killed at any moment

WORK = """
import json, random, sys, time
from pathlib import Path
from updp_tf.runs import RunDir

folder, trace, pause = Path(sys.argv[1]), open(sys.argv[2], "a"), float(sys.argv[3])

def work(what):
    print(what, file=trace, flush=True)
    time.sleep(pause)

def train(run):
    state = {"step": 0, "random": 1, "weight": 0.0}
    if (found := run.last_checkpoint("train")) is not None:
        state = json.loads((found.path / "state.json").read_text())
    log = run.log("train-log", ("step", "weight"), after=state["step"])
    while state["step"] < 60:
        state["step"] += 1
        state["random"] = state["random"] * 48271 % 2147483647
        state["weight"] += state["random"] / 2147483647
        log.append(step=state["step"], weight=state["weight"])
        work(f"step {state['step']}")
        if state["step"] % 10 == 0:
            run.checkpoint("train", state["step"], lambda to: (to / "state.json").write_text(json.dumps(state)))
    return state

def compute(what, value):
    work(what)
    return value

with RunDir(folder, arguments={"seed": 1}) as run:
    scores = run.json("scores", lambda: compute("scores", {"a": 0.1 + 0.2}))
    plan = run.json("plan", lambda: compute("plan", {"chosen": scores["a"] * 3}))
    weights = run.json("train", lambda: train(run))
    run.json("merged", lambda: compute("merged", {"plan": plan, "weight": weights["weight"]}))
"""


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock.json"
    }


def test_killed_twenty_times_it_ends_as_the_unbroken_run(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(WORK))

    def command(folder, pause):
        return [sys.executable, str(script), str(tmp_path / folder), str(tmp_path / f"{folder}.trace"), str(pause)]

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command("whole", 0), check=True, env=environment)
    draw = random.Random(0)
    trace = tmp_path / "broken.trace"
    trace.touch()
    kills = 0
    while kills < 20 and len(set(trace.read_text().split("\n"))) < 64:
        process = subprocess.Popen(command("broken", 0.01), env=environment)
        # somewhere after the next few pieces of work, in the middle of a piece
        before = trace.read_text().count("\n")
        wanted = before + draw.randrange(1, 14)
        while trace.read_text().count("\n") < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.012))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    subprocess.run(command("broken", 0), check=True, env=environment)
    assert kills >= 6
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    done = trace.read_text().split("\n")[:-1]
    wanted = (tmp_path / "whole.trace").read_text().split("\n")[:-1]
    assert set(done) == set(wanted) and len(wanted) == 63
    # at most an interval of ten steps and the one at work is repeated for each kill
    assert len(done) - len(wanted) <= 10 * kills

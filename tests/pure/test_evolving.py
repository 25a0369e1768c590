"""Genetic search over a space whose every plan can be listed, stopped, killed and shared."""

import functools
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest

from tests.pure.test_searching import REST, all_within
from updp_tf.errors import BudgetError, RunError
from updp_tf.evolving import Genetic, evolve
from updp_tf.searching import Space
from updp_tf.structure import Candidate, Cost

ROOT = Path(__file__).resolve().parents[2]


def parts(n_blocks):
    draw = random.Random(3)
    blocks = {f"b{index}": Cost(draw.randint(80, 120), 10, 1) for index in range(n_blocks)}
    items = [
        Candidate((name,), form, draw.random(), Cost(draw.randint(5, 70), draw.randint(1, 9), 1))
        for name in blocks
        for form in ("conv", "thin")
    ]
    items += [Candidate((f"b{i}", f"b{i + 1}"), "span", draw.random(), Cost(40, 5, 1)) for i in range(n_blocks - 1)]
    return items, blocks


def make_space(n_blocks=5, budget=None):
    items, blocks = parts(n_blocks)
    return Space.within(items, blocks=blocks, rest=REST, budget=budget or {"macs": 0.7})


@functools.cache
def every_plan(n_blocks=5, key="macs", value=0.7, more=()):
    """Every plan within a budget, listed by brute force."""
    space = make_space(n_blocks, {key: value, **dict(more)})
    items, blocks = parts(n_blocks)
    by_key = {item.key: item for item in items}
    return [
        space.closest_to([by_key[name] for name in names])
        for _, names in all_within(items, blocks, {key: value, **dict(more)})
    ]


def loss_of(solution) -> float:
    """No sum: what goes well alone may go badly together."""
    keys = sorted(item.key for item in solution.chosen)
    together = sum(random.Random(a + b).uniform(-1, 1) for a in keys for b in keys if a < b)
    return solution.score + together


def search(space, seen=None, **settings):
    known = []

    def loss(one):
        if seen is not None:
            seen.append(tuple(item.key for item in one.chosen))
        return loss_of(one)

    found = evolve(space, Genetic(**settings), loss, lambda one, value: known.append((one, value)))
    return found, known


def test_the_best_of_all_plans_is_found():
    space = make_space()
    everything = every_plan()
    assert len(everything) > 50
    best = min(everything, key=loss_of)
    assert best != space.solution, "the sum of scores would do"
    for warm_start in (True, False):
        found, _ = search(space, trials=200, population=12, warm_start=warm_start)
        assert loss_of(found) == pytest.approx(loss_of(best), abs=0.05 * np.ptp([loss_of(one) for one in everything]))


def test_it_learns_from_generation_to_generation():
    space, seen = make_space(n_blocks=9), []
    evolve(space, Genetic(trials=160, population=16), lambda one: seen.append(loss_of(one)) or seen[-1], print)
    assert np.mean(seen[-32:]) < np.mean(seen[:32]) - 0.3
    assert len(seen) == 160


@pytest.mark.parametrize("budget", [{"macs": 0.6, "params": 0.8}, {"merged": 3}], ids=str)
def test_every_plan_that_is_measured_is_within_the_budget(budget):
    space, seen = make_space(budget=budget), []
    evolve(space, Genetic(trials=30, population=6), lambda one: seen.append(one) or loss_of(one), print)
    (key, value), *more = budget.items()
    within = {tuple(item.key for item in one.chosen) for one in every_plan(5, key, value, tuple(more))}
    assert {tuple(item.key for item in one.chosen) for one in seen} <= within


def test_stopped_and_continued_it_is_the_unbroken_search(tmp_path):
    space, whole, broken = make_space(), [], []
    unbroken, _ = search(space, whole, trials=30, population=6)
    storage = f"sqlite:///{tmp_path}/search.db"
    for trials in (4, 5, 20, 30):
        found, known = search(space, broken, trials=trials, population=6, storage=storage)
    assert broken == whole and found == unbroken
    assert [loss_of(one) for one, _ in known] == [value for _, value in known] and len(known) == 20
    again, known = search(space, broken, trials=30, population=6, storage=storage)
    assert again == unbroken and len(known) == 30 and len(broken) == 30, "nothing is measured again"


def test_a_study_of_other_plans_is_refused(tmp_path):
    storage = f"sqlite:///{tmp_path}/search.db"
    search(make_space(), trials=2, storage=storage)
    with pytest.raises(RunError, match="'updp-tf' was made for other blocks, forms or another budget"):
        search(make_space(n_blocks=4), trials=2, storage=storage)
    search(make_space(n_blocks=4), trials=2, storage=storage, study="other")


@pytest.mark.parametrize("settings", [{"trials": 0}, {"population": 1}, {"trials": 2.5}], ids=str)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(BudgetError, match="of a search is a whole number"):
        Genetic(**settings)


WORKER = """
import sys, time
sys.path.insert(0, {root!r})
from tests.pure.test_evolving import loss_of, make_space
from updp_tf.evolving import Genetic, evolve

def loss(one):
    print("at work", flush=True)
    time.sleep(float(sys.argv[2]))
    return loss_of(one)

found = evolve(make_space(), Genetic(trials=24, population=6, storage=sys.argv[1]), loss, lambda one, value: None)
print(sorted(item.key for item in found.chosen))
"""


def start(storage, pause):
    code = WORKER.format(root=str(ROOT))
    return subprocess.Popen([sys.executable, "-c", code, storage, str(pause)], stdout=subprocess.PIPE, text=True)


def finished(storage):
    (study,) = optuna.get_all_study_names(storage) and [optuna.load_study(study_name="updp-tf", storage=storage)]
    return [one for one in study.get_trials() if one.state == optuna.trial.TrialState.COMPLETE]


def test_killed_it_goes_on_as_if_it_had_not_been(tmp_path):
    storage = f"sqlite:///{tmp_path}/search.db"
    for n in (3, 8):
        process = start(storage, 0.05)
        for _ in range(n):
            assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    process = start(storage, 0)
    *_, told = process.communicate(timeout=120)[0].splitlines()
    seen = []
    unbroken, _ = search(make_space(), seen, trials=24, population=6)
    assert told == str(sorted(item.key for item in unbroken.chosen))
    assert [one.values[0] for one in finished(storage)] == [pytest.approx(loss_of_keys(keys)) for keys in seen]


def loss_of_keys(keys):
    return loss_of(next(one for one in every_plan() if tuple(item.key for item in one.chosen) == keys))


def test_two_processes_share_one_study(tmp_path):
    storage = f"sqlite:///{tmp_path}/search.db"
    search(make_space(), trials=1, population=6, storage=storage)  # makes the tables
    both = [start(storage, 0.1) for _ in range(2)]
    outputs = [process.communicate(timeout=180)[0].splitlines() for process in both]
    measured = [len(lines) - 1 for lines in outputs]
    assert min(measured) >= 4, "one did all the work"
    assert sum(measured) == 23 and len(finished(storage)) == 24

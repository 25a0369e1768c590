"""Genetic search: NSGA-II over what is measured of a plan and what it costs.

A genome says for every block whether it is kept, which form it takes, or which span begins there. One that breaks the
budget stands for the closest plan that does not, so that no measurement is spent on plans that cannot be taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from updp_tf.errors import BudgetError, RunError
from updp_tf.partitioning import Solution
from updp_tf.searching import Space
from updp_tf.structure import Candidate

KEEP = "keep"

SPACE, WORKER = "updp-tf space", "updp-tf worker"  # attributes of a study and of a trial


@dataclass(frozen=True)
class Genetic:
    """NSGA-II (Optuna) over the measured loss of a plan and its MACs.

    Attributes:
        trials: plans that are measured in all, those of other machines and of earlier, stopped calls included.
        population: of a generation.
        seed: of the genomes; with one machine at a time, a search that was stopped ends as an unbroken one.
        storage: an Optuna storage or its URL (`sqlite:///search.db`), which several machines may share; in memory
            where None.
        study: name of the study in the storage.
        warm_start: begin with the plans of the smallest sums of scores, as many as half a population; else with random
            ones.
    """

    trials: int = 200
    population: int = 20
    seed: int = 0
    storage: Any = None
    study: str = "updp-tf"
    warm_start: bool = True
    name = "genetic"
    measures = True

    def __post_init__(self) -> None:
        for key, least in (("trials", 1), ("population", 2)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BudgetError(f"'{key}' of a search is a whole number, {least} or more. Received: {value!r}.")


def evolve(space: Space, method: Genetic, loss: Callable[[Solution], float], measured: Callable[..., None]) -> Solution:
    """Return the plan of the smallest loss that was found.

    Args:
        space: of the plans within the budget.
        method: how long, and with which storage.
        loss: measures a plan.
        measured: called with each plan and its loss that the storage knows already.

    Raises:
        RunError: the study in the storage is of another space.
    """
    import optuna

    genes = _genes(space)
    first = _first_genomes(space, genes, method)
    with _quiet(optuna):
        study = optuna.create_study(
            study_name=method.study,
            storage=method.storage,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        _check_space(study, genes)
        _close_dead_trials(study, optuna.trial.TrialState)
        best: tuple[float, Solution] | None = None
        for trial in _finished(study, optuna.trial.TrialState):
            found = _decoded(space, genes, trial.params)
            measured(found, trial.values[0])
            best = _better(best, trial.values[0], found)
        while (n := _n_begun(study, optuna.trial.TrialState)) < method.trials:
            study.sampler = _sampler(optuna, genes, method, n, first[n] if n < len(first) else None)
            trial = study.ask()
            trial.set_user_attr(WORKER, _me())
            genome = {name: trial.suggest_categorical(name, list(choices)) for name, choices in genes.items()}
            found = _decoded(space, genes, genome)
            value = loss(found)
            study.tell(trial, [value, float(found.cost.macs)])
            best = _better(best, value, found)
    if best is None:
        raise RunError(f"The study '{method.study}' has {method.trials} trials and none of them is finished.")
    return best[1]


def _better(best: tuple[float, Solution] | None, value: float, found: Solution) -> tuple[float, Solution]:
    return (value, found) if best is None or value < best[0] else best


def _genes(space: Space) -> dict[str, tuple[str, ...]]:
    """Return what each block may be: kept, or an item that begins with it."""
    genes: dict[str, list[str]] = {}
    for item in space.items:
        genes.setdefault(item.blocks[0], [KEEP]).append(item.key)
    return {name: tuple(genes[name]) for name in space.names if name in genes}


def _genome(genes: dict[str, tuple[str, ...]], chosen: Sequence[Candidate]) -> dict[str, str]:
    by_block = {item.blocks[0]: item.key for item in chosen}
    return {name: by_block.get(name, KEEP) for name in genes}


def _decoded(space: Space, genes: dict[str, tuple[str, ...]], genome: dict[str, str]) -> Solution:
    """Return the plan a genome stands for; where spans overlap, the one that begins first counts."""
    items = {item.key: item for item in space.items}
    covered: set[str] = set()
    wished: list[Candidate] = []
    for name in genes:
        item = items.get(genome[name])
        if item is not None and not covered & set(item.blocks):
            wished.append(item)
            covered |= set(item.blocks)
    return space.closest_to(wished)


def _first_genomes(space: Space, genes: dict[str, tuple[str, ...]], method: Genetic) -> list[dict[str, str]]:
    warm = space.best(method.population // 2) if method.warm_start else ()
    rng = np.random.default_rng(method.seed)
    drawn = [space.random(rng) for _ in range(method.population - len(warm))]
    return [_genome(genes, one.chosen) for one in (*warm, *drawn)]


def _sampler(
    optuna: Any, genes: dict[str, tuple[str, ...]], method: Genetic, n: int, genome: dict[str, str] | None
) -> Any:
    """Return a sampler for one trial: what it draws follows from its number and the trials before it alone."""
    space = {name: optuna.distributions.CategoricalDistribution(choices) for name, choices in genes.items()}

    class Sampler(optuna.samplers.NSGAIISampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return space

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            drawn = super().sample_relative(study, trial, search_space)  # which counts the generation, too
            return drawn if genome is None else genome

        def get_parent_population(self, study: Any, generation: int) -> Any:
            # in one order, whether they were selected now or by a process that was killed since
            return sorted(super().get_parent_population(study, generation), key=lambda one: one.number)

    return Sampler(population_size=method.population, seed=method.seed * 1_000_003 + n)


def _check_space(study: Any, genes: dict[str, tuple[str, ...]]) -> None:
    mine = hashlib.sha256(json.dumps(genes).encode()).hexdigest()
    known = study.user_attrs.get(SPACE)
    if known is None:
        study.set_user_attr(SPACE, mine)
    elif known != mine:
        raise RunError(
            f"The study '{study.study_name}' was made for other blocks, forms or another budget: give another `study` "
            "or `storage`."
        )


def _finished(study: Any, states: Any) -> list[Any]:
    return list(study.get_trials(deepcopy=False, states=(states.COMPLETE,)))


def _n_begun(study: Any, states: Any) -> int:
    """Count the trials that are finished, and those that others are at."""
    running = study.get_trials(deepcopy=False, states=(states.RUNNING,))
    return len(_finished(study, states)) + sum(WORKER in one.user_attrs for one in running)


def _close_dead_trials(study: Any, states: Any) -> None:
    """Mark as failed what processes of this machine were at that are gone: it is measured again."""
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and worker["host"] == socket.gethostname() and not _is_alive(worker["pid"]):
            study.tell(trial.number, state=states.FAIL)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna tells of every trial on standard error; progress is shown by the caller."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)

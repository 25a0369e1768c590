"""How long the exact solver takes: 200 blocks x 5 forms x 2 budgets, 50 instances of each kind.

    uv run --frozen python tests/bench/bench_searching.py

`independent`: scores and costs know nothing of each other. `related`: a form that saves more costs more accuracy,
give or take a fifth, as measured forms do: harder, because more choices come close to the best.
"""

import os
import statistics
import time

import numpy as np

from updp_tf.searching import solve
from updp_tf.structure import Candidate, Cost

N_BLOCKS, N_FORMS, N_INSTANCES = 200, 5, 50


def instance(seed: int, kind: str) -> tuple[list[Candidate], dict[str, Cost], dict[str, float]]:
    draw = np.random.default_rng(seed)
    blocks, candidates = {}, []
    for index in range(N_BLOCKS):
        name = f"b{index}"
        blocks[name] = Cost(int(draw.integers(10**6, 2 * 10**7)), int(draw.integers(10**4, 10**6)), 1)
        weight = draw.uniform(0.05, 0.5)
        for number in range(N_FORMS):
            macs, params = draw.uniform(0.05, 1.0, 2)
            saved = weight * (2 - macs - params) / 2
            score = draw.uniform() if kind == "independent" else saved * draw.uniform(0.8, 1.2)
            cost = Cost(int(blocks[name].macs * macs), int(blocks[name].params * params), 1)
            candidates.append(Candidate((name,), f"form{number}", float(score), cost))
    fractions = draw.uniform(0.45, 0.85, 2)
    return candidates, blocks, {"macs": float(fractions[0]), "params": float(fractions[1])}


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for kind in ("independent", "related"):
        seconds = []
        for seed in range(N_INSTANCES):
            candidates, blocks, budget = instance(seed, kind)
            start = time.perf_counter()
            solve(candidates, blocks=blocks, rest=Cost(10**7, 10**5, 1), budget=budget)
            seconds.append(time.perf_counter() - start)
        print(f"{kind}: n {len(seconds)}, median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s")


if __name__ == "__main__":
    main()

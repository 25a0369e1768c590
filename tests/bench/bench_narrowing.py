"""Time and memory of grouping and narrowing a large network without images.

    uv run --frozen python tests/bench/bench_narrowing.py [ConvNeXtBase]

Run it on a machine that does nothing else; CPU seconds stand beside. Memory is what the process gained, over the
size of the model's weights.
"""

import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras

from updp_tf.expansions import expand
from updp_tf.graph import read_graph
from updp_tf.isomorphic.dependency import find_dependencies
from updp_tf.narrowing import narrow


def main(name: str = "ConvNeXtBase") -> None:
    model = getattr(keras.applications, name)(weights=None)
    size = model.count_params() * 4 / 2**20
    started_with = resident()
    print(f"{name}: weights {size:.0f} MiB, process {started_with:.0f} MiB, load {os.getloadavg()[0]:.1f} before")
    timed("grouping", lambda: print(len(find_dependencies(expand(read_graph(model))).groups), "groups"))
    timed("narrowing to a budget", lambda: narrow(model, budget={"macs": 0.7}, verbose=False))
    gained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - started_with
    print(f"memory gained: {gained:.0f} MiB, {gained / size:.2f} times the weights")
    timed("narrowing by a ratio", lambda: narrow(model, ratio=0.25, verbose=False))


def timed(what: str, run) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    print(f"{what}: {time.perf_counter() - wall:.1f} s, {time.process_time() - cpu:.1f} CPU s", flush=True)


def resident() -> float:
    """MiB of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main(*sys.argv[1:])

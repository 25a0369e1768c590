"""Stands in for the vendor's `benchmark_model`, which cannot be had everywhere: runs the file with LiteRT for real,
takes the flags that the package gives, and prints a report in the newer dialect. What the vendor's own prints is
tested on real logs.
"""

import pathlib
import statistics
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter

KNOWN = (
    "graph num_threads num_runs min_secs max_secs warmup_runs warmup_min_secs use_xnnpack use_gpu use_nnapi "
    "input_layer input_layer_shape input_layer_value_files output_filepath enable_op_profiling"
).split()


def info(line: str) -> None:
    print(f"INFO: {line}", flush=True)


def flags_of(arguments: list[str]) -> dict[str, str]:
    flags = dict(one.removeprefix("--").split("=", 1) for one in arguments)
    unknown = [name for name in flags if name not in KNOWN]
    if unknown:
        print("WARNING: Unconsumed cmdline flags: " + " ".join(f"--{name}={flags[name]}" for name in unknown))
    return flags


def timed(interpreter: Interpreter, n: int, seconds: float, most: float) -> list[float]:
    info(
        f"Running benchmark for at least {n} iterations and at least {seconds:g} seconds but terminate if exceeding "
        f"{most:g} seconds."
    )
    times, start = [], time.perf_counter()
    while len(times) < n or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        interpreter.invoke()
        times.append(1e6 * (time.perf_counter() - before))
    if len(times) == 1:
        info(f"count=1 curr={times[0]:.0f}\n")
        return times
    p5, median, p95 = np.percentile(times, [5, 50, 95])
    info(
        f"count={len(times)} first={times[0]:.0f} curr={times[-1]:.0f} min={min(times):.0f} max={max(times):.0f} "
        f"avg={statistics.mean(times):g} std={statistics.pstdev(times):.0f} p5={p5:.0f} median={median:.0f} "
        f"p95={p95:.0f}\n"
    )
    return times


def main() -> None:
    flags = flags_of(sys.argv[1:])
    info("STARTING!")
    info("Log parameter values verbosely: [0]")
    info(f"Num threads: [{flags['num_threads']}]")
    info(f"Graph: [{flags['graph']}]")
    graph = pathlib.Path(flags["graph"])
    if flags.get("use_gpu") == "true":
        print("ERROR: Following operations are not supported by GPU delegate:")
        print("CONV_2D: OP is supported, but tensor type/shape isn't compatible.")
        print("No operations will run on the GPU, and all 4 operations will run on the CPU.")
        info("Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.")
    start = time.perf_counter()
    interpreter = Interpreter(str(graph), num_threads=int(flags["num_threads"]))
    interpreter.allocate_tensors()
    info(f"Loaded model {graph}")
    print("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", file=sys.stderr)
    init_us = 1e6 * (time.perf_counter() - start)
    info(f"The input model file size (MB): {graph.stat().st_size / 1e6:g}")
    info(f"Initialized session in {init_us / 1000:g}ms.")
    details = interpreter.get_input_details()
    if "input_layer" in flags:
        assert flags["input_layer"].split(",") == [detail["name"] for detail in details]
        for detail, item in zip(details, flags["input_layer_value_files"].split(","), strict=True):
            name, _, path = item.replace("::", "\0").partition(":")
            assert name.replace("\0", ":") == detail["name"]
            values = np.frombuffer(pathlib.Path(path).read_bytes(), detail["dtype"]).reshape(detail["shape"])
            interpreter.set_tensor(detail["index"], values)
    most = float(flags.get("max_secs", 150))
    warm = timed(interpreter, int(flags["warmup_runs"]), float(flags["warmup_min_secs"]), most)
    runs = timed(interpreter, int(flags["num_runs"]), float(flags["min_secs"]), most)
    info(
        f"Inference timings in us: Init: {init_us:.0f}, First inference: {warm[0]:.0f}, "
        f"Warmup (avg): {statistics.mean(warm):g}, Inference (avg): {statistics.mean(runs):g}"
    )
    info("Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.25")
    if "output_filepath" in flags:
        outputs = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
        pathlib.Path(flags["output_filepath"]).write_bytes(b"".join(output.tobytes() for output in outputs))
    if flags.get("enable_op_profiling") == "true":
        mean_ms = statistics.mean(runs) / 1000
        info("Operator-wise Profiling Info for Regular Benchmark Runs:")
        info("============================== Run Order ==============================")
        print("\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]")
        print(f"\tXNNPACK\t{mean_ms:.3f}\t{mean_ms:.3f}\t100.000%\t100.000%\t0.000\t1\tDelegate/all:0")


main()

"""The command line: parse, call one public function, print, exit code.

Standard output carries the result and nothing else; progress, logs and whatever libraries print go to standard
error. Exit code 0: done; 1: one of our errors, as one sentence; 2: a command line that cannot be read.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tflite_export.post_training import DEFAULT_STEPS, STEPS
from updp_tf.run_dir import write_atomically
from updp_tf.terminal import (
    QUIET,
    calibration_array,
    floats,
    import_keras,
    load_array,
    load_model,
    maybe_written,
    numbers,
    progress_shown,
    read_lines,
    require_keras_output,
    step_names,
    timed_like,
    training_data,
    working,
)

app = typer.Typer(
    help="Make trained Keras 3 vision models faster: merge blocks into single layers, export .tflite files, time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Start(StrEnum):
    """How merged layers get their first weights."""

    least_squares = "least_squares"
    gaussian = "gaussian"
    identity = "identity"


class Mode(StrEnum):
    """How a plan is trained in."""

    direct = "direct"
    whole = "whole"
    expanded = "expanded"


class Precision(StrEnum):
    """Schemes of `export`."""

    float32 = "float32"
    float16 = "float16"
    dynamic = "dynamic"
    int8 = "int8"
    int16x8 = "int16x8"


class TablePrecision(StrEnum):
    """Schemes that a latency table can be measured in."""

    float32 = "float32"
    float16 = "float16"
    dynamic = "dynamic"
    int8 = "int8"


class InputNormalization(StrEnum):
    """What `export` does with Rescaling and Normalization behind the input."""

    fold = "fold"
    keep = "keep"


class Target(StrEnum):
    """Accelerators that `export` writes for."""

    edgetpu = "edgetpu"


KerasFile = Annotated[Path, typer.Argument(metavar="MODEL.keras", help="A trained model, as `model.save` writes it.")]
KerasOutput = Annotated[Path, typer.Option("-o", "--output", metavar="OUT.keras", help="Where the new model goes.")]
Int8File = Annotated[Path, typer.Argument(metavar="MODEL.tflite", help="As `export --quantize int8` writes it.")]
CompiledOutput = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="OUT.tflite", help="Where the compiled file goes.")
]
Images = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="IMAGES",
        help="Unlabelled images as the model reads them: FILE.npy, FILE.npz, or FILE.npz:KEY.",
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--latency", metavar="TABLE.csv", help="What blocks take on a device, as `updp-tf latency` writes it."
    ),
]
Kept = Annotated[list[str] | None, typer.Option("--keep", metavar="BLOCK", help="A block never to touch; repeatable.")]
Forms = Annotated[
    list[str] | None, typer.Option("--form", metavar="FORM", help="A form to consider; repeatable; default: all.")
]
Threads = Annotated[int, typer.Option(min=1, help="That one inference may use.")]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to run: local, adb or adb:SERIAL, ssh:user@host[:port], edgetpu, ethos-u55-256 (an estimate), "
        "or file:LOGS of benchmark_model.",
    ),
]
DelegateName = Annotated[str, typer.Option("--delegate", help="What runs the operators: cpu, gpu, nnapi or edgetpu.")]
Tool = Annotated[
    Path | None,
    typer.Option("--benchmark-model", metavar="BINARY", help="The vendor's tool, built for the device."),
]
BoardPython = Annotated[str, typer.Option("--python", metavar="PYTHON", help="The Python of a board.")]
SshConfig = Annotated[Path | None, typer.Option("--ssh-config", metavar="FILE", help="In place of ~/.ssh/config.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Replace output files that exist.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Run the command line."""
    # before anything imports TensorFlow
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", QUIET)
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        names = ("updp-tf", "keras", "tensorflow", "ai-edge-litert", "numpy")
        typer.echo("\n".join(f"{name} {importlib.metadata.version(name)}" for name in names))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def blocks(model: KerasFile, as_json: Json = False, debug: Debug = False) -> None:
    """List the blocks that could be merged, and what was refused and why."""
    with working(debug) as show:
        loaded = load_model(model)
        import updp_tf

        found = updp_tf.find_blocks(loaded)
        document = {
            "model": loaded.name,
            "blocks": [
                {
                    "name": block.name,
                    "entry_shape": block.entry_shape[1:],
                    "exit_shape": block.exit_shape[1:],
                    "skip": block.skip_kind,
                    "kernel_size": None if block.geometry is None else block.geometry.kernel_size,
                    "nodes": block.nodes,
                    "macs": block.cost.macs,
                    "params": block.cost.params,
                }
                for block in found
            ],
            "skipped": [asdict(refusal) for refusal in found.skipped],
        }
        show(document if as_json else str(found))


@app.command()
def prune(
    model: KerasFile,
    output: KerasOutput,
    calibration: Images = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What to keep: macs=0.7, params_max=200000, merged=5, with a table latency=0.6, latency_ms=1.2, "
            "bytes_max=2000000; several hold together.",
        ),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(metavar="agreement=VALUE", help="Instead: how many answers may change, e.g. agreement=0.02."),
    ] = None,
    keep: Kept = None,
    form: Forms = None,
    start: Annotated[
        Start | None, typer.Option(help="Default: least_squares with calibration images, gaussian without.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to search: additive, exact (measures plans on images), genetic, random, uniform.")
    ] = "additive",
    latency: Table = None,
    width: Annotated[
        bool, typer.Option("--width", help="Cut channels as well; how much of the saving is whose is tried on images.")
    ] = False,
    round_to: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --width: layers keep a multiple of so many channels.")
    ] = 8,
    device: Annotated[
        str | None,
        typer.Option(help="With --width and a budget in time: where narrower networks are timed; the table's device."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="FILE.npy", help="Train the result on these images, with the original as the teacher."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE.npy", help="Labels of the training images; half of the loss then.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Training images at a time.")] = 64,
    mode: Annotated[
        Mode, typer.Option(help="Train the merged network (direct), or blend the plan in while training.")
    ] = Mode.direct,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keeps stages and checkpoints: the same command goes on there.")
    ] = None,
    plan_out: Annotated[Path | None, typer.Option(metavar="PLAN.json", help="Where the plan goes.")] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Merge blocks into single layers, cut channels where asked, and train the result where there are images for it."""
    limits = numbers(budget or [], "--budget") or None
    drops = numbers([max_drop], "--max-drop") if max_drop is not None else None
    require_keras_output(output, model)
    if train is None and (labels is not None or run_dir is not None):
        raise typer.BadParameter("--labels and --run-dir belong to --train.", param_hint="--train")
    with (
        working(debug) as show,
        write_atomically(output, force=force) as file,
        maybe_written(plan_out, force=force) as plan_file,
    ):
        images = calibration_array(calibration)
        data = training_data(train, labels)
        loaded = load_model(model)
        import updp_tf

        small = updp_tf.prune(
            loaded,
            calibration=images,
            budget=limits,
            max_drop=drops,
            keep=keep or (),
            forms=form or None,
            method=method,
            latency=latency,
            target=None if device is None else timed_like(latency, device),
            width=updp_tf.Width(round_to=round_to) if width else False,
            train=data,
            training=None if data is None else updp_tf.Training(epochs=epochs, batch_size=batch_size, mode=mode.value),
            run_dir=run_dir,
            options=None if start is None else updp_tf.Options(start=start.value),
        )
        small.save(file)
        if plan_file is not None:
            plan_file.write_text(small.pruning.plan.to_json(), encoding="utf-8")
        document = {"output": str(output), **small.pruning.as_json()}
        show(document if as_json else updp_tf.summary(loaded, small))


@app.command()
def sweep(
    model: KerasFile,
    calibration: Images = None,
    latency: Table = None,
    unit: Annotated[
        str | None, typer.Option(help="Of the budgets; default: latency with a table, macs without.")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(metavar="FRACTION", help="Of the original; repeatable; default: 0.95 to 0.3.")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Merge every plan and compare its answers on held-out images.")
    ] = False,
    keep: Kept = None,
    form: Forms = None,
    csv: Annotated[Path | None, typer.Option(metavar="ROWS.csv", help="Write the table there, too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PLOT.png", help="Draw it: .png, .svg or .pdf.")] = None,
    plans: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder for the plans, as JSON.")] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """List the best plan for each of many budgets, from one set of scores."""
    with working(debug) as show, maybe_written(csv, force=force) as csv_file:
        images = calibration_array(calibration)
        loaded = load_model(model)
        import updp_tf

        options: dict[str, Any] = {} if not budget else {"budgets": budget}
        found = updp_tf.sweep(
            loaded,
            calibration=images,
            unit=unit,
            agreement=agreement,
            keep=keep or (),
            forms=form or None,
            latency=latency,
            **options,
        )
        if csv_file is not None:
            csv_file.write_text(found.as_csv(), encoding="utf-8")
        if plot is not None:
            found.plot(plot, force=force)
        if plans is not None:
            found.save_plans(plans, force=force)
        show(found.as_json() if as_json else str(found))


@app.command()
def merge(
    model: KerasFile,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="As `prune --plan-out` or `Plan.save` writes it.")],
    output: KerasOutput,
    calibration: Images = None,
    start: Annotated[Start | None, typer.Option(help="As for `prune`; gaussian and identity need no images.")] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Apply a saved plan: with the arrays beside it, or fitted anew to calibration images."""
    require_keras_output(output, model)
    with working(debug) as show, write_atomically(output, force=force) as file:
        images = calibration_array(calibration)
        loaded = load_model(model)
        import updp_tf
        from updp_tf.blocks import network_cost, prepared_graph

        small = updp_tf.merge(
            loaded, plan, calibration=images, options=None if start is None else updp_tf.Options(start=start.value)
        )
        small.save(file)
        costs = {
            key: network_cost(prepared_graph(one)).as_json() for key, one in (("before", loaded), ("after", small))
        }
        document = {"output": str(output), "plan": str(plan), **costs}
        show(document if as_json else updp_tf.summary(loaded, small))


@app.command()
def export(
    model: KerasFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.tflite", help="Where the file goes.")],
    quantize: Annotated[Precision, typer.Option(help="int8 and int16x8 need calibration images.")] = Precision.float32,
    calibration: Images = None,
    target: Annotated[Target | None, typer.Option(help="Write int8 as this accelerator's compiler takes it.")] = None,
    input_normalization: Annotated[
        InputNormalization, typer.Option(help="Fold Rescaling and Normalization into the first layer where exact.")
    ] = InputNormalization.fold,
    clean: Annotated[
        bool, typer.Option(help="Rewrite the network first, exactly, into operators that run best.")
    ] = True,
    post_training: Annotated[
        str, typer.Option(metavar="STEPS", help=f"For int8, with commas: {', '.join(STEPS)}; or none.")
    ] = ",".join(DEFAULT_STEPS) or "none",
    float_below_db: Annotated[
        float | None,
        typer.Option(metavar="DB", help="For int8: keep noisier operators in float, if that helps."),
    ] = None,
    float_copy: Annotated[
        Path | None, typer.Option(metavar="FLOAT.tflite", help="Write what int8 was quantized from, for `compare`.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="LABELS.txt", help="Names of the classes, one a line, told in the file.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="M[,M,M]", help="With --std: the model reads (pixel - mean) / std; told too.")
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="S[,S,S]", help="See --mean.")] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a model as a .tflite file, read it back, and compare it with the model."""
    if (mean is None) != (std is None):
        raise typer.BadParameter("give both or none.", param_hint="--mean / --std")
    with working(debug) as show, progress_shown() as progress:
        import tflite_export

        images = calibration_array(calibration)
        result = tflite_export.export(
            model,
            output,
            quantize=quantize.value,
            calibration=images,
            target=target.value if target else None,
            input_normalization=input_normalization.value,
            clean=clean,
            post_training=step_names(post_training),
            float_below_db=float_below_db,
            float_copy=float_copy,
            labels=None if labels is None else read_lines(labels),
            normalization=None if mean is None or std is None else (floats(mean, "--mean"), floats(std, "--std")),
            force=force,
            progress=progress,
        )
        show(result.as_json() if as_json else str(result))


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT.tflite", help="As `export --float-copy` writes it.")],
    model: Annotated[Path, typer.Argument(metavar="INT8.tflite", help="The file that was quantized from it.")],
    images: Annotated[str, typer.Option(metavar="IMAGES", help="FILE.npy, FILE.npz, or FILE.npz:KEY; 20 tell enough.")],
    plot: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Draw the errors.")] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Show which layers of an int8 file are off, against the float file it was made from."""
    with working(debug) as show, progress_shown() as progress:
        import tflite_export

        result = tflite_export.compare(reference, model, load_array(images, "images"), progress=progress)
        if plot is not None:
            result.plot(plot, force=force)
        show(result.as_json() if as_json else str(result))


@app.command()
def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="A.tflite B.tflite ...", help="Ratios are to the first.")
    ] = None,
    threads: Threads = 1,
    device: DeviceName = "local",
    delegate: DelegateName = "cpu",
    benchmark_model: Tool = None,
    python: BoardPython = "python3",
    ssh_config: SshConfig = None,
    min_seconds: Annotated[float, typer.Option(min=0, help="Least running time of each file.")] = 3.0,
    check_outputs: Annotated[
        bool, typer.Option(help="Compare the outputs there with those on this machine first.")
    ] = True,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="ROWS.csv", help="Write the rows there, too; whatever happens, what was measured stays."),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Time .tflite files against each other, in turns: here, on a phone, on a board."""
    with working(debug) as show, progress_shown() as progress:
        import tflite_export

        table = tflite_export.benchmark(
            files or [],
            device=device,
            options=tflite_export.DeviceOptions(
                delegate=delegate, benchmark_model=benchmark_model, python=python, ssh_config=ssh_config
            ),
            threads=threads,
            min_seconds=min_seconds,
            check_outputs=check_outputs,
            out=csv,
            force=force,
            progress=progress,
        )
        show(table.as_json() if as_json else str(table))


@app.command("latency")
def measure_latencies(
    model: KerasFile,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="TABLE.csv",
            help="Rows go there while they are measured; one that exists goes on.",
        ),
    ],
    precision: Annotated[TablePrecision, typer.Option(help="Of the files that are timed.")] = TablePrecision.float32,
    threads: Threads = 1,
    device: DeviceName = "local",
    delegate: DelegateName = "cpu",
    benchmark_model: Tool = None,
    python: BoardPython = "python3",
    ssh_config: SshConfig = None,
    form: Annotated[
        list[str] | None, typer.Option(metavar="FORM", help="A form to time; repeatable; default: all.")
    ] = None,
    spans: Annotated[int, typer.Option(min=1, help="Up to how many blocks in a row one form may replace.")] = 1,
    networks: Annotated[int, typer.Option(min=0, help="Whole networks that the sum of parts is corrected by.")] = 6,
    max_seconds: Annotated[float, typer.Option(min=1, help="Of timing; what is not settled then is noisy.")] = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time every block and every form it can take on a device: the table that `prune --latency` reads."""
    with working(debug) as show:
        loaded = load_model(model)
        import tflite_export
        import updp_tf

        table = updp_tf.measure_latency(
            loaded,
            out=output,
            device=device,
            device_options=tflite_export.DeviceOptions(
                delegate=delegate, benchmark_model=benchmark_model, python=python, ssh_config=ssh_config
            ),
            precision=precision.value,
            threads=threads,
            forms=form or None,
            spans=spans,
            networks=networks,
            max_seconds=max_seconds,
        )
        rows = [row.as_json() for row in table.rows]
        document = {"output": str(output), "rows": rows, "correction": str(table.correction)}
        show(document if as_json else str(table))


@app.command()
def estimate(
    model: KerasFile,
    device: Annotated[str, typer.Option(metavar="PHONE", help="Of which times were published.")] = "Pixel 1",
    precision: Annotated[Precision, typer.Option(help="float32 or int8.")] = Precision.float32,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what published times of phones suggest for a model. Nothing is measured."""
    with working(debug) as show:
        loaded = load_model(model)
        import updp_tf

        found = updp_tf.estimate_latency(loaded, device=device, precision=precision.value)
        show({"nature": "estimate", **asdict(found)} if as_json else str(found))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL.tflite", help="A classifier.")],
    images: Annotated[str, typer.Option(metavar="IMAGES", help="FILE.npy, FILE.npz, or FILE.npz:KEY.")],
    labels: Annotated[str, typer.Option(metavar="LABELS", help="Class indices or one-hot rows, in such a file.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the accuracy of a .tflite file on labelled images."""
    with working(debug) as show, progress_shown() as progress:
        import tflite_export

        result = tflite_export.evaluate(
            model, load_array(images, "images"), load_array(labels, "labels"), progress=progress
        )
        show(result.as_json() if as_json else str(result))


@app.command()
def edgetpu(
    model: Int8File,
    compile_too: Annotated[
        bool,
        typer.Option("--compile", help="Run the vendor's compiler (x86-64 Linux) instead of checking by its rules."),
    ] = False,
    output: CompiledOutput = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """List which operators run on the Edge TPU and why the others do not; or compile for it."""
    if output is not None and not compile_too:
        raise typer.BadParameter("an output needs --compile: the check writes nothing.", param_hint="--output")
    with working(debug) as show:
        import tflite_export

        result: Any = (
            tflite_export.compile_edgetpu(model, output, force=force)
            if compile_too
            else tflite_export.check_edgetpu(model)
        )
        show(result.as_json() if as_json else str(result))


@app.command()
def ethosu(
    model: Int8File,
    accelerator: Annotated[str, typer.Option(help="The NPU and its number of multipliers.")] = "ethos-u55-256",
    output: CompiledOutput = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Compile for an Arm Ethos-U NPU; list what stays on the CPU and the compiler's estimates."""
    with working(debug) as show:
        import tflite_export

        result = tflite_export.compile_ethosu(model, accelerator, output, force=force)
        show(result.as_json() if as_json else str(result))


@app.command()
def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="With what prune, sweep, bench, latency and training wrote.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where it goes; default: RUN_DIR.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; default: the model's name.")] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page, and the same as Markdown, from the records in a folder."""
    with working(debug) as show:
        import tflite_export

        result = tflite_export.write_report(run_dir, out=output, title=title, force=force)
        show(result.as_json() if as_json else str(result))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files it makes.")] = Path("updp-tf-demo"),
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Train a small MobileNetV2 on handwritten digits, prune it, and measure before and after. Offline."""
    with working(debug) as show:
        import_keras()
        from updp_tf.demo import run_demo

        result = run_demo(out, force=force, say=lambda line: typer.echo(line, err=True))
        show(result.as_json() if as_json else str(result))


if __name__ == "__main__":
    main()

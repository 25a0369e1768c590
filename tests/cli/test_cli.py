"""The command line as a user meets it: exit codes, what is on which stream, what is left on the disk."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import updp_tf

from .conftest import CLASSES, environment, run_all
from .conftest import updp_tf as updp_tf_command

N_BLOCKS = 3


@pytest.fixture(scope="module")
def pruned(files):
    """The main command in a process of its own."""
    out, plan = files.folder / "pruned.keras", files.folder / "plan.json"
    done = updp_tf_command(
        *("prune", files.model, "-o", out, "--calibration", files.x, "--plan-out", plan, "--json"),
        *("--budget", "macs=0.95", "--budget", "merged=2", "--keep", "add1", "--form", "conv3"),
        cwd=files.folder,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def ran(files, pruned):
    """Many command lines in one process, by name."""
    folder, model = files.folder, files.model
    (folder / "there.keras").write_text("old")
    (folder / "there.csv").write_text("old")
    (folder / "broken.json").write_text("{")
    images = ["--calibration", files.x]
    table, forms, run = folder / "table.csv", ["--form", "conv3", "--form", "remove"], folder / "run"
    run.mkdir()
    training = ["--budget", "merged=1", "--train", files.x, "--epochs", "2", "--batch-size", "20"]

    def prune(name, *options, of=model):
        return ["prune", of, "-o", folder / f"{name}.keras", *options]

    commands = {
        # usage
        "budget without number": prune("u1", "--budget", "macs=little"),
        "budget without key": prune("u2", "--budget", "=1"),
        "budget twice": prune("u3", "--budget", "macs=0.5", "--budget", "macs=0.6"),
        "output is the model": ["prune", model, "-o", model, "--force"],
        "output of another kind": ["prune", model, "-o", folder / "x.h5"],
        "no such option": ["blocks", model, "--colour"],
        "labels of nothing": prune("u5", "--labels", files.y),
        "no such start": prune("u4", "--start", "magic"),
        # before any model is read
        "output exists": ["prune", files.missing, "-o", folder / "there.keras"],
        "csv exists": ["bench", files.missing, "--csv", folder / "there.csv"],
        "no folder": ["prune", files.missing, "-o", folder / "nowhere" / "x.keras"],
        "model missing": prune("m1", of=files.missing),
        "model cut": prune("m2", of=files.cut),
        "model is text": ["blocks", files.text],
        "images missing": prune("m3", "--calibration", folder / "none.npy"),
        "images are a model": prune("m4", "--calibration", files.model),
        "images are text": prune("m5", "--calibration", files.text),
        "no such array": prune("m6", "--calibration", f"{files.npz}:test"),
        "which array": prune("m7", "--calibration", files.npz),
        # with a model
        "model damaged": ["blocks", files.damaged],
        "model needs a class": ["blocks", files.custom],
        "images of another shape": prune("i1", "--calibration", files.small_x),
        "images with nan": prune("i2", "--calibration", files.nan),
        "no images": prune("i3", "--start", "least_squares"),
        "budget too small": prune("b1", *images, "--budget", "macs=0.05"),
        "budget of nothing": prune("b2", *images, "--budget", "milk=0.5"),
        "two sides": prune("b3", *images, "--budget", "macs=0.9", "--max-drop", "agreement=0.1"),
        "no such block": prune("k1", *images, "--keep", "add7"),
        "no such form": prune("k2", *images, "--form", "blob"),
        "disk full": prune("full", *images, "--force"),
        "time without a table": prune("b4", *images, "--budget", "latency=0.5"),
        "device without a table": prune("b7", *images, "--width", "--budget", "latency=0.5", "--device", "local"),
        "no latency table": prune("b5", *images, "--budget", "latency=0.5", "--latency", folder / "there.csv"),
        "sweep of nothing": ["sweep", model, *images, "--unit", "merged", "--form", "conv3"],
        "report of nothing": ["report", folder / "nowhere"],
        "too few labels": prune("t1", "--train", files.x, "--labels", files.few),
        "broken plan": ["merge", model, folder / "broken.json", "-o", folder / "p1.keras"],
        "plan without arrays": ["merge", model, folder / "plan.json", "-o", folder / "p2.keras"],
        # what works
        "prune": prune("there", "--calibration", f"{files.npz}:calibration", "--force"),
        "train": prune("trained", *images, *training, "--labels", files.y, "--run-dir", folder / "trained", "--json"),
        "train again": prune("again", *images, *training, "--labels", files.y, "--run-dir", folder / "trained"),
        "prune without images": prune("gaussian", "--form", "conv3"),
        "prune width": prune("both", "--width", "--round-to", "4", "--budget", "macs=0.4", "--json"),
        "latency": ["latency", model, "-o", table, *forms, "--max-seconds", "3", "--networks", "0", "--json"],
        "width in time": prune(
            *("timed", *images, *forms, "--width", "--budget", "merged=1", "--budget", "latency_ms=1000"),
            *("--latency", table, "--device", "local", "--json"),
        ),
        "no row": prune("b6", *images, "--form", "pointwise", "--latency", table),
        "sweep": [
            *("sweep", model, *images, *forms, "--latency", table, "--budget", "0.99", "--budget", "0.001", "--json"),
            *("--csv", run / "swept.csv", "--plot", run / "sweep.svg", "--plans", run),
        ],
        "estimate": ["estimate", model, "--json"],
        "no such phone": ["estimate", model, "--device", "Pixel 99"],
        "sweep text": ["sweep", model, *images, *forms, "--budget", "0.9", "--agreement"],
        "merge": ["merge", model, folder / "plan.json", "-o", folder / "merged.keras", *images, "--json"],
        "blocks": ["blocks", model],
        "export": ["export", model, "-o", folder / "float32.tflite", "--json"],
        "export int8": ["export", folder / "pruned.keras", "-o", folder / "int8.tflite", "--quantize", "int8", *images],
        "export again": ["export", model, "-o", folder / "float32.tflite"],
        "evaluate": ["evaluate", folder / "float32.tflite", "--images", files.x, "--labels", files.y, "--json"],
        "evaluate text": ["evaluate", folder / "int8.tflite", "--images", files.x, "--labels", f"{files.npz}:labels"],
        "edgetpu": ["edgetpu", folder / "int8.tflite", "--json"],
        "edgetpu text": ["edgetpu", folder / "float32.tflite"],
        "edgetpu of a model": ["edgetpu", model],
        "edgetpu of nothing": ["edgetpu", files.missing],
        "edgetpu output": ["edgetpu", folder / "int8.tflite", "-o", folder / "tpu.tflite"],
        "ethosu": ["ethosu", folder / "int8.tflite", "-o", folder / "npu.tflite", "--json"],
        "ethosu text": [
            "ethosu",
            folder / "int8.tflite",
            "-o",
            folder / "npu65.tflite",
            "--accelerator",
            "ethos-u65-256",
        ],
        "report": ["report", run, "--json"],
        "report again": ["report", run],
        "ethosu again": ["ethosu", folder / "int8.tflite", "-o", folder / "npu.tflite"],
        "no such accelerator": ["ethosu", folder / "int8.tflite", "--accelerator", "ethos-u1"],
        "evaluate too few": ["evaluate", folder / "float32.tflite", "--images", files.x, "--labels", files.nan],
    }
    return run_all(commands, cwd=folder, file_limits={"disk full": 20_000})


def test_help_is_quick_and_names_all_commands(files):
    done = updp_tf_command(
        "--help", cwd=files.folder, script="import atexit, sys; atexit.register(lambda: print(*sys.modules))"
    )
    assert done.returncode == 0
    text, modules = done.stdout.rsplit("\n", 2)[0], done.stdout.split()
    for name in (
        "blocks",
        "prune",
        "merge",
        "export",
        "bench",
        "evaluate",
        "edgetpu",
        "ethosu",
        "latency",
        "sweep",
        "report",
        "demo",
    ):
        assert f" {name} " in text
    for slow in ("keras", "tensorflow", "matplotlib", "sklearn", "scipy"):
        assert slow not in modules


def test_the_script_is_installed_and_tells_versions(files):
    script = Path(sys.executable).with_name("updp-tf")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, cwd=files.folder, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("updp-tf ") and "\nkeras 3" in done.stdout


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_prints_one_document_and_nothing_else(pruned, files):
    report = json.loads(pruned.stdout)
    assert report["output"] == str(files.folder / "pruned.keras")
    assert [block["name"] for block in report["blocks"]] == ["add0", "add2"]
    assert {block["form"] for block in report["blocks"]} == {"conv3"}
    assert report["after"]["macs"] <= 0.95 * report["before"]["macs"]
    assert "oneDNN" not in pruned.stderr and "cuda" not in pruned.stderr.lower()


def test_prune_writes_the_model_and_the_plan_and_leaves_nothing_else(pruned, files):
    report = json.loads(pruned.stdout)
    plan, arrays = updp_tf.Plan.load(files.folder / "plan.json")
    assert arrays is None
    assert json.loads(plan.to_json()) == report["plan"]
    assert plan.budget == {"macs": 0.95, "merged": 2}
    assert not list(files.folder.glob(".tmp-*"))


WITHOUT_UPDP_TF = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("updp_tf", "tflite_export"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
try:
    import updp_tf
except ImportError:
    import keras, numpy
    model = keras.saving.load_model(sys.argv[1])
    numpy.save(sys.argv[3], model(numpy.load(sys.argv[2])))
"""


def test_the_pruned_file_loads_where_updp_tf_cannot_be_imported(pruned, files):
    outputs = files.folder / "outputs.npy"
    command = [sys.executable, "-c", WITHOUT_UPDP_TF, files.folder / "pruned.keras", files.x, outputs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.folder, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    small = updp_tf.prune(
        files.network,
        calibration=files.images,
        budget={"macs": 0.95, "merged": 2},
        keep=["add1"],
        forms=["conv3"],
        verbose=False,
    )
    expected = np.asarray(small(files.images))
    assert expected.std(axis=0).min() > 0.01  # outputs that depend on the image, else equality says nothing
    # Two processes: the same sums in another order, twice through float32 (a solve and the network).
    np.testing.assert_allclose(np.load(outputs), expected, atol=1e-4)


def test_prune_prints_a_table_for_people(ran, files):
    done = ran["prune"]
    assert done.code == 0, done.err
    assert "MACs (M)" in done.out and "blocks merged, MACs" in done.out
    assert files.folder.joinpath("there.keras").read_bytes().startswith(b"PK")  # --force replaced it


def test_prune_trains_and_goes_on_from_its_run_directory(ran, files):
    assert ran["train"].code == 0, ran["train"].err
    assert json.loads(ran["train"].out)["blocks"]
    first, again = (files.folder.joinpath(f"{name}.keras") for name in ("trained", "again"))
    assert ran["train again"].code == 0, ran["train again"].err
    nets = [keras.saving.load_model(path) for path in (first, again)]
    for a, b in zip(*(net.get_weights() for net in nets), strict=True):
        np.testing.assert_array_equal(a, b)
    log = next(files.folder.joinpath("trained").rglob("training_*.csv")).read_text().splitlines()
    assert len(log) == 3 and log[0].startswith("step,blend,loss")


def test_without_images_the_blocks_own_norms_are_used(ran):
    done = ran["prune without images"]
    assert done.code == 0, done.err
    assert "linearized" in done.out


def test_depth_and_width_share_a_budget(ran):
    done = ran["prune width"]
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["after"]["macs"] <= 0.4 * found["before"]["macs"]
    assert {group["after"] % 4 for group in found["narrowing"]["groups"]} == {0}


def test_depth_and_width_share_a_budget_in_time(ran):
    done = ran["width in time"]
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert len(found["blocks"]) == 1 and found["narrowing"] is None
    assert 0 < found["after"]["latency_ns"] < 10**9 and found["before"]["latency_ns"] > 0


# --- the other commands ----------------------------------------------------------------------------------------------


NOISE = """
import ctypes, os, keras
load = keras.saving.load_model
def noisy(*args, **kwargs):
    ctypes.CDLL(None).printf(b"from C, buffered until the process ends\\n")
    os.write(1, b"from a library\\n")
    print("from Python")
    return load(*args, **kwargs)
keras.saving.load_model = noisy
"""


def test_blocks_keeps_standard_output_clean_whatever_libraries_print(files):
    done = updp_tf_command("blocks", files.model, "--json", cwd=files.folder, script=NOISE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [block["name"] for block in found["blocks"]] == ["add0", "add1", "add2"]
    assert found["blocks"][0]["skip"] == "identity" and found["blocks"][0]["kernel_size"] == [3, 3]
    for line in ("from C", "from a library", "from Python"):
        assert line in done.stderr


def test_blocks_prints_a_table(ran):
    assert ran["blocks"].code == 0
    assert len([line for line in ran["blocks"].out.splitlines() if line.startswith("add")]) == N_BLOCKS


def test_merge_applies_the_plan_to_the_same_cost(ran, pruned, files):
    assert ran["merge"].code == 0, ran["merge"].err
    report, merged = json.loads(pruned.stdout), json.loads(ran["merge"].out)
    assert merged["after"] == report["after"] and merged["before"] == report["before"]
    assert (files.folder / "merged.keras").is_file()


def test_export_and_evaluate(ran, files):
    assert ran["export"].code == 0, ran["export"].err
    exported = json.loads(ran["export"].out)
    assert exported["quantize"] == "float32"
    assert exported["size_bytes"] == (files.folder / "float32.tflite").stat().st_size
    assert ran["export int8"].code == 0, ran["export int8"].err
    assert "int8.tflite: int8," in ran["export int8"].out
    labels = np.arange(60) % CLASSES
    answers = np.argmax(files.network(files.images), axis=1)
    evaluation = json.loads(ran["evaluate"].out)
    assert evaluation["accuracy"]["1"] == pytest.approx(np.mean(answers == labels))
    assert evaluation["n"] == 60
    assert "top-1" in ran["evaluate text"].out and "60 images" in ran["evaluate text"].out


def test_edgetpu_and_ethosu(ran, files):
    for name in ("edgetpu", "edgetpu text", "ethosu", "ethosu text"):
        assert ran[name].code == 0, ran[name].err
    report = json.loads(ran["edgetpu"].out)
    assert report["fully_mapped"] and {operator["name"] for operator in report["operators"]} >= {"CONV_2D", "ADD"}
    assert "Operation is working on an unsupported data type" in ran["edgetpu text"].out
    compiled = json.loads(ran["ethosu"].out)
    assert compiled["cpu_operators"] == [] and compiled["estimated_ms"] > 0
    assert (files.folder / "npu.tflite").is_file() and (files.folder / "npu65.tflite").is_file()
    assert "compiler's estimate, not measured" in ran["ethosu text"].out


def test_bench(ran, files):
    rows = files.folder / "rows.csv"
    tflite = [files.folder / name for name in ("float32.tflite", "int8.tflite")]
    done = updp_tf_command("bench", *tflite, "--csv", rows, "--min-seconds", "0.1", "--json", cwd=files.folder)
    assert done.returncode == 0, done.stderr
    assert "oneDNN" not in done.stderr
    table = json.loads(done.stdout)
    assert [row["name"] for row in table] == ["float32", "int8"]
    assert table[0]["ratio"] == 1 and table[1]["ratio_low"] <= table[1]["ratio"] <= table[1]["ratio_high"]
    with rows.open() as file:
        assert [row["sha256"] for row in csv.DictReader(file)] == [row["sha256"] for row in table]


def test_latency_sweep_and_report(ran, files):
    for name in ("latency", "sweep", "sweep text", "report"):
        assert ran[name].code == 0, ran[name].err
    rows = json.loads(ran["latency"].out)["rows"]
    kinds = [row["key"].partition(":")[0] for row in rows]
    assert kinds == ["empty", "keep", "conv3", "network"]  # three equal blocks share their rows
    assert (files.folder / "table.csv").is_file() and all(row["latency_us"] >= 0 for row in rows)
    swept = json.loads(ran["sweep"].out)
    assert swept["measured_on"].startswith("float32 on ") and len(swept["rows"]) == 2
    assert "the fastest plan takes" in swept["rows"][1]["note"] and swept["rows"][1]["forms"] == ""
    run = files.folder / "run"
    with (run / "swept.csv").open() as file:
        assert [row["budget"] for row in csv.DictReader(file)] == ["latency=0.99", "latency=0.001"]
    assert "<svg" in (run / "sweep.svg").read_text() and list(run.glob("plan-*.json"))
    assert "agreement" in ran["sweep text"].out and "macs 0.9" in ran["sweep text"].out
    estimate = json.loads(ran["estimate"].out)
    assert estimate["nature"] == "estimate" and estimate["ms"] > 0 and estimate["outside"]
    told = json.loads(ran["report"].out)
    assert Path(told["html"]).is_file() and "Accuracy against time" in told["sections"] and told["unread"] == []


# --- errors ----------------------------------------------------------------------------------------------------------

USAGE = {
    "budget without number": "'macs=little' is not of the form KEY=NUMBER",
    "budget without key": "'=1' has no key",
    "budget twice": "'macs=0.6' has no key, or one that was given before",
    "output is the model": "is the model itself",
    "output of another kind": "does not end in .keras",
    "no such option": "No such option",
    "labels of nothing": "--labels and --run-dir belong to --train",
    "no such start": "'magic' is not one of",
    "edgetpu output": "an output needs --compile",
}


@pytest.mark.parametrize("name", USAGE)
def test_a_command_line_that_cannot_be_read_ends_with_2(ran, name):
    assert ran[name].code == 2, ran[name].err
    assert USAGE[name].replace(" ", "") in "".join(ran[name].err.replace("│", "").split())
    assert ran[name].out == ""


OURS = {
    "output exists": "there.keras' exists already: .*--force",
    "csv exists": "there.csv' exists already: .*--force",
    "no folder": "nowhere' does not exist",
    "model missing": "There is no file '.*missing.keras'",
    "model cut": "cut.keras' is no .keras file, or is cut short: save the model again",
    "model is text": "text.keras' is no .keras file",
    "images missing": "There is no file '.*none.npy' to read the calibration images from",
    "images are a model": "model.keras' holds the arrays .*: name the calibration images as",
    "images are text": "text.keras' cannot be read as .npy or .npz",
    "no such array": r"images.npz' holds the arrays \['calibration', 'labels'\]: name the calibration images as",
    "which array": r"images.npz' holds the arrays \['calibration', 'labels'\]: name the calibration images as",
    "model damaged": "Keras cannot load '.*damaged.keras' .*save it again",
    "model needs a class": "Keras cannot load '.*custom.keras' .*Doubled.*load it in Python",
    "images of another shape": r"has shape \(60, 8, 12, 3\); the model reads images of shape \(12, 12, 3\)",
    "images with nan": "NaN or infinite",
    "too few labels": r"few.npy' holds 59 labels for 60 training images",
    "no images": "Least squares needs calibration images",
    "budget too small": r"macs 0.05 cannot be met: the smallest plan has 0\.\d+",
    "budget of nothing": "A budget cannot be in 'milk'",
    "two sides": "either `budget` or `max_drop`",
    "time without a table": r"in 'latency' needs a latency table: .*--latency TABLE.csv",
    "device without a table": "--device .* goes with --latency TABLE.csv",
    "no latency table": "there.csv' is no latency table: the column 'key' is missing",
    "no row": r"table.csv' \(float32 on .* lacks 1 of the 3 rows for 'small': pointwise for 'add0' .*updp-tf latency",
    "sweep of nothing": "A sweep goes over fractions of macs, .*, not of 'merged'",
    "no such phone": r"no estimate for 'Pixel 99' in float32: there are Pixel 1",
    "report of nothing": "there is no run directory",
    "report again": "report.html' exists already",
    "no such block": "No block is named 'add7'; the blocks are: add0, add1, add2",
    "no such form": "blob",
    "disk full": "full.keras': the disk or its quota is full",
    "broken plan": "broken.json': this is no plan",
    "plan without arrays": "no fitted arrays beside it: give calibration images",
    "export again": "float32.tflite' exists already",
    "evaluate too few": "labels must be class indices",
    "edgetpu of a model": "model.keras' is no .tflite file",
    "edgetpu of nothing": "cannot read '.*missing.keras'",
    "ethosu again": "npu.tflite' exists already",
    "no such accelerator": "no accelerator 'ethos-u1': choose one of ethos-u55-32",
}


@pytest.mark.parametrize("name", OURS)
def test_our_errors_end_with_1_and_one_sentence(ran, name):
    assert ran[name].code == 1, ran[name].err
    (line,) = [line for line in ran[name].err.splitlines() if line.startswith("Error: ")]
    assert re.search(OURS[name], line), line
    assert "Traceback" not in ran[name].err
    assert ran[name].out == ""


def test_what_was_refused_is_as_it_was(ran, files):
    assert (files.folder / "there.csv").read_text() == "old"
    for stem in ("m1", "m2", "i1", "b1", "full", "p2"):
        assert not (files.folder / f"{stem}.keras").exists()
    assert not list(files.folder.glob(".*"))


def test_debug_shows_the_traceback_and_a_process_ends_with_1(files):
    done = updp_tf_command("blocks", files.missing, "--debug", cwd=files.folder)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ModelError: There is no file" in done.stderr
    assert done.stdout == ""

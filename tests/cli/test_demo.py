"""The demo: in a small form by default, whole where asked for."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from updp_tf import demo
from updp_tf.demo import FILES, run_demo
from updp_tf.errors import OutputError

from .conftest import updp_tf


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of seconds, and the lines it said."""
    said: list[str] = []
    folder = tmp_path_factory.mktemp("demo") / "made"
    result = run_demo(
        folder, epochs=1, n_train=128, budget={"merged": 2}, min_seconds=0.02, say=said.append, verbose=False
    )
    return result, said


def test_all_files_are_there_and_nothing_else(small):
    result, _ = small
    assert sorted(path.name for path in result.folder.iterdir()) == sorted(FILES)
    assert result.plot.read_bytes().startswith(b"\x89PNG") and result.plot.stat().st_size > 20_000


def test_the_table_says_what_was_measured(small):
    result, _ = small
    assert [(row.network, row.precision) for row in result.rows] == [
        ("original", "float32"),
        ("pruned", "float32"),
        ("original", "int8"),
        ("pruned", "int8"),
    ]
    before, after = result.rows[0], result.rows[1]
    assert before.macs == result.report.before.macs > after.macs == result.report.after.macs
    assert len(result.report.blocks) == 2
    for row in result.rows:
        assert row.n == 600 and 0 < row.accuracy < 1
        assert row.standard_error == pytest.approx(np.sqrt(row.accuracy * (1 - row.accuracy) / 600))
        assert row.size_bytes == (result.folder / row.file).stat().st_size
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.p10_ms <= row.median_ms <= row.p90_ms
    assert result.rows[0].ratio == result.rows[2].ratio == 1
    # the int8 pair has a ratio of its own, not that to float32
    assert result.rows[2].ratio_to_float32 != 1 and result.rows[3].ratio != result.rows[3].ratio_to_float32
    text = str(result)
    assert "600 test images" in text and "128 training images" in text and "1 thread" in text


def test_csv_and_json_hold_the_rows(small):
    result, _ = small
    with (result.folder / "demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [row.file for row in result.rows]
    assert float(rows[3]["accuracy"]) == result.rows[3].accuracy
    document = json.loads((result.folder / "demo.json").read_text())
    assert document["pruning"]["after"]["macs"] == result.rows[1].macs


def test_it_tells_each_step(small):
    _, said = small
    for word in ("training a network", "epoch 1 of 1", "pruning", "exporting", "evaluating", "timing", "wrote"):
        assert any(word in line for line in said), word


def test_a_second_run_is_refused_before_any_work(small, monkeypatch):
    result, _ = small
    monkeypatch.setattr(demo, "load_digits", lambda: pytest.fail("it worked"))
    with pytest.raises(OutputError, match=r"holds 'original.keras' of an earlier run: .*--force"):
        run_demo(result.folder)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Cannot make the folder '.*file/inside'"):
        run_demo(tmp_path / "file" / "inside")


def test_the_split_is_honest():
    (x_train, y_train), (x_test, y_test) = demo.load_digits()
    assert x_train.shape == (1197, 32, 32, 1) and x_test.shape == (600, 32, 32, 1)
    assert x_train.min() == -1 and x_train.max() == 1
    together = {image.tobytes() for image in x_train} & {image.tobytes() for image in x_test}
    assert not together
    for digit in range(10):
        assert abs(np.mean(y_test == digit) - np.mean(y_train == digit)) < 0.003


@pytest.mark.parametrize(
    "low, high, verdict",
    [(0.8, 0.9, "faster"), (0.9, 1.1, "no measurable difference"), (1.1, 1.2, "slower")],
)
def test_a_pruned_network_that_is_not_faster_is_not_called_so(small, low, high, verdict):
    result, _ = small
    row = dataclasses.replace(result.rows[1], ratio=(low + high) / 2, ratio_low=low, ratio_high=high)
    assert row.verdict == verdict
    assert f"{low:.3f} to {high:.3f})  {verdict}" in str(dataclasses.replace(result, rows=(result.rows[0], row)))


@pytest.mark.slow
def test_the_whole_demo_is_right_and_faster(tmp_path):
    done = updp_tf("demo", "--out", tmp_path / "whole", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    original, pruned, _, pruned_int8 = rows
    assert original["accuracy"] >= 0.95
    assert pruned["accuracy"] >= original["accuracy"] - 0.03
    assert pruned["verdict"] == pruned_int8["verdict"] == "faster"
    assert "epoch 6 of 6" in done.stderr

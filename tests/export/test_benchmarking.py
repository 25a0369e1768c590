"""Times of real files: the protocol, the record, and an interval that is honest."""

import csv
import io
import json
import math

import keras
import numpy as np
import pytest

from tests.export.conftest import randomise
from tflite_export import DeviceError, FlatbufferError, OptionError, benchmark, read_flatbuffer
from tflite_export.benchmarking import SITTINGS, ratio_interval
from tflite_export.devices import DEVICES, open_device


@pytest.fixture(scope="module")
def two_sizes(worker, tmp_path_factory):
    """A convolution, and the same three times in a row: three times the work."""
    import tflite_export

    folder = tmp_path_factory.mktemp("sizes")
    paths = []
    for depth in (1, 3):
        layers = [keras.layers.Conv2D(32, 3, padding="same", name=f"conv{i}") for i in range(depth)]
        model = randomise(keras.Sequential([keras.Input((32, 32, 32)), *layers], name=f"depth{depth}"))
        paths.append(tflite_export.export(model, folder / f"depth{depth}.tflite", worker=worker).path)
    return paths


@pytest.fixture(scope="module")
def table(two_sizes):
    return benchmark(two_sizes, min_seconds=0.3, min_runs=40)


def test_three_times_the_work_takes_about_three_times_as_long(table):
    one, three = table.rows
    assert (one.ratio, one.ratio_low, one.ratio_high) == (1, 1, 1)
    assert 2 < three.ratio < 4  # the activations are read and written once per layer; overhead is small
    assert three.ratio_low < three.ratio < three.ratio_high
    assert three.ratio == pytest.approx(three.median_ms / one.median_ms, rel=0.3)
    assert 0 < one.p10_ms <= one.median_ms <= one.p90_ms


def test_each_file_gets_its_runs_and_its_time(table, two_sizes):
    for row in table.rows:
        assert row.n >= 40
        assert row.n * row.p90_ms > 0.2 * 1000  # at least 0.3 s in all, with room for the spread
    few = benchmark(two_sizes[:1], min_seconds=0, min_runs=30)
    assert few.rows[0].n >= 30
    short = benchmark(two_sizes, min_runs=10**6, max_seconds=0.2)
    assert SITTINGS <= short.rows[0].n < 10**6


def test_the_record_is_whole(table, two_sizes):
    records = json.loads(json.dumps(table.as_json()))
    for record, path in zip(records, two_sizes, strict=True):
        assert record["path"] == str(path) and record["name"] == path.stem
        assert record["sha256"] == read_flatbuffer(path).sha256
        assert record["size_bytes"] == path.stat().st_size
        assert record["delegate"] == "XNNPACK"
        assert record["device_name"] == "local" and record["threads"] == 1
        assert record["device_runtime"].startswith("ai-edge-litert ")
        assert record["device_description"] and record["device_system"]
        assert record["date"].endswith("+00:00")
    rows = list(csv.DictReader(io.StringIO(table.as_csv())))
    assert [row["sha256"] for row in rows] == [record["sha256"] for record in records]
    assert float(rows[1]["ratio"]) == records[1]["ratio"]


def test_the_table_is_plain_text(table):
    lines = str(table).splitlines()
    assert lines[0].split() == "file median ms p10 p90 runs ratio 95 % interval bytes".split()
    assert lines[1].startswith("depth1 ") and lines[2].startswith("depth3 ")
    assert "1 thread;" in lines[3] and "XNNPACK" in lines[3]


def test_files_of_one_name_are_told_apart(two_sizes, tmp_path):
    copy = tmp_path / two_sizes[0].name
    copy.write_bytes(two_sizes[0].read_bytes())
    names = [row.name for row in benchmark([two_sizes[0], copy], min_seconds=0, min_runs=1).rows]
    assert names[0] != names[1] and all(name.endswith("depth1.tflite") for name in names)


def test_progress_is_told_by_sitting(two_sizes):
    seen = []
    benchmark(two_sizes[:1], min_seconds=0, min_runs=1, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(SITTINGS))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, spread, n = math.log(0.8), 0.02, 2000
    hits = 0
    for _ in range(n):
        _, low, high = ratio_interval(rng.normal(truth, spread, SITTINGS))
        hits += low <= 0.8 <= high
    assert abs(hits / n - 0.95) < 0.015  # three standard errors of 2000 draws


def test_a_file_against_itself_is_near_one(two_sizes):
    """The short form of the check below: nothing favours the first file or the second."""
    row = benchmark([two_sizes[1], two_sizes[1]], min_seconds=0.5, min_runs=50).rows[1]
    assert row.ratio_low / 1.05 < 1 < row.ratio_high * 1.05


@pytest.mark.bench
def test_the_interval_of_a_file_against_itself_covers_one_in_nine_of_ten_runs(two_sizes):
    rows = [benchmark([two_sizes[1], two_sizes[1]]).rows[1] for _ in range(10)]
    assert sum(row.ratio_low <= 1 <= row.ratio_high for row in rows) >= 9
    # On an idle machine the interval is also narrow; on a loaded one the row says so.
    assert all(
        row.noisy or 0.98 < row.ratio_low and row.ratio_high < 1.02 for row in rows if row.device.load_average < 1
    )


def test_bad_input(two_sizes, tmp_path):
    with pytest.raises(OptionError, match="at least one .tflite file"):
        benchmark([])
    with pytest.raises(OptionError, match="must be at least 1"):
        benchmark(two_sizes, threads=0)
    with pytest.raises(DeviceError, match=r"no device kind 'toaster': use one of \['local'"):
        benchmark(two_sizes, device="toaster")
    with pytest.raises(DeviceError, match="'local' takes no address"):
        benchmark(two_sizes, device="local:0")
    with pytest.raises(FlatbufferError, match="No such file"):
        benchmark([tmp_path / "none.tflite"])
    (tmp_path / "half.tflite").write_bytes(two_sizes[0].read_bytes()[:1000])
    with pytest.raises(FlatbufferError, match="damaged"):
        benchmark([two_sizes[0], tmp_path / "half.tflite"])


@pytest.mark.parametrize("kind", sorted(DEVICES))
def test_every_device_keeps_the_contract(kind, two_sizes):
    device = open_device(kind)
    info = device.describe()
    assert info.name == kind and info.description and info.runtime
    first, second = device.load(two_sizes[0], threads=1), device.load(two_sizes[0], threads=2)
    for model in (first, second):
        times = model.time_runs(7)
        assert len(times) == 7 and all(0 < time < 1000 for time in times)
        assert isinstance(model.delegate, str)

"""Times of real files: the protocol, the record, and an interval that is honest."""

import csv
import io
import json
import math

import numpy as np
import pytest

from tests.networks import conv_network
from tflite_export import (
    BenchmarkTable,
    DeviceError,
    FlatbufferError,
    OptionError,
    OutputError,
    benchmark,
    read_flatbuffer,
)
from tflite_export.benchmark_rows import ratio_interval
from tflite_export.benchmarking import SITTINGS
from tflite_export.devices.local import LocalDevice
from tflite_export.outputs import fixed_inputs, output_difference


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    """A convolution, and three in a row: three times the work."""
    folder = tmp_path_factory.mktemp("sizes")
    paths = [folder / f"depth{depth}.tflite" for depth in (1, 3)]
    for path, depth in zip(paths, (1, 3), strict=True):
        path.write_bytes(conv_network(depth, shape=(32, 32, 32), filters=32))
    return paths


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "int8.tflite"
    path.write_bytes(conv_network(3, dtype="int8"))
    return path


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
    assert all(row.output_difference == 0 and row.init_ms > 0 and row.nature == "measured" for row in table.rows)
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


def test_a_ratio_of_any_two_files(two_sizes):
    one, three = two_sizes
    table = benchmark([one, three, three], min_seconds=0.2, min_runs=24)
    same, back = table.ratio(2, 1), table.ratio(0, 1)
    assert same.low / 1.1 < 1 < same.high * 1.1 and same.value == pytest.approx(1, abs=0.15)
    assert back.value * table.rows[1].ratio == pytest.approx(1)
    assert back.low == pytest.approx(1 / table.rows[1].ratio_high)
    assert str(back).startswith(f"{back.value:.3f} (")
    # Turns that are next to each other are compared: a drift of both leaves their ratio alone.
    drifting = [((5.0 * k, 5.5 * k), (1.0 * k, 1.1 * k), (2.0 * k, 2.2 * k)) for k in (1, 2, 4)]
    drift = BenchmarkTable(table.rows, tuple(drifting)).ratio(2, 1)
    assert (drift.value, drift.low, drift.high, drift.noisy) == pytest.approx((2, 2, 2, False))


class Unreliable(LocalDevice):
    """This machine, until it goes away."""

    def __init__(self, sittings: int, error: BaseException) -> None:
        self.left, self.error, self.closed = sittings, error, 0

    def run(self, paths, **options):
        if not self.left:
            raise self.error
        self.left -= 1
        return super().run(paths, **options)


@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_what_was_measured_stays_when_the_device_goes(two_sizes, tmp_path, name):
    lost, out = DeviceError("the cable is out."), tmp_path / name
    with pytest.raises(DeviceError, match=rf"the cable is out. The rows of 5 sittings are in '.*{name}'"):
        benchmark(two_sizes, device=Unreliable(5, lost), out=out, min_seconds=0, min_runs=24)
    rows = json.loads(out.read_text()) if name.endswith("json") else list(csv.DictReader(io.StringIO(out.read_text())))
    assert [int(row["sittings"]) for row in rows] == [5, 5] and float(rows[1]["ratio"]) > 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(KeyboardInterrupt):
        benchmark(two_sizes, device=Unreliable(1, KeyboardInterrupt()), out=out, force=True, min_seconds=0, min_runs=1)
    assert "NaN" not in out.read_text() and ",nan" not in out.read_text()  # one sitting has no interval
    with pytest.raises(OutputError, match=f"{name}' exists already"):
        benchmark(two_sizes, out=out)
    with pytest.raises(DeviceError, match="the cable is out.$"):
        benchmark(two_sizes, device=Unreliable(0, lost), out=tmp_path / "none.csv", min_seconds=0, min_runs=1)
    assert not (tmp_path / "none.csv").exists()


class Wrong(LocalDevice):
    """This machine, with outputs that are off."""

    def __init__(self, change) -> None:
        self.change = change

    def fetch(self, path, inputs, *, threads):
        answer = super().fetch(path, inputs, threads=threads)
        return type(answer)(tuple(self.change(output) for output in answer.outputs), answer.log)


def test_outputs_that_differ_stop_it_and_rounding_does_not(two_sizes, int8):
    quick = {"min_seconds": 0, "min_runs": 1}
    table = benchmark(two_sizes[:1], device=Wrong(lambda x: x * (1 + 1e-5)), **quick)
    assert 1e-6 < table.rows[0].output_difference < 1e-4
    for change in (lambda x: 1.01 * x, lambda x: x + 0.1, lambda x: np.roll(x, 1), lambda x: np.full_like(x, np.nan)):
        with pytest.raises(DeviceError, match="computes something else on 'local' than on this machine"):
            benchmark(two_sizes[:1], device=Wrong(change), **quick)
        benchmark(two_sizes[:1], device=Wrong(change), check_outputs=False, **quick)
    step = benchmark([int8], device=Wrong(lambda x: np.clip(x.astype(int) + 1, -128, 127).astype("int8")), **quick)
    assert step.rows[0].output_difference > 0  # kernels of other processors round to a neighbour
    with pytest.raises(DeviceError, match="for quantized"):
        benchmark([int8], device=Wrong(lambda x: x[..., ::-1].copy()), **quick)


def test_how_far_outputs_are_from_each_other():
    rng = np.random.default_rng(0)
    here = rng.normal(3, 2, 10_000)
    assert output_difference(here, here, ()) == (0, 0)
    assert output_difference(here + rng.normal(0, 0.02, here.shape), here, ())[0] == pytest.approx(0.01, rel=0.05)
    assert output_difference(rng.normal(3, 2, here.shape), here, ())[0] == pytest.approx(math.sqrt(2), rel=0.05)
    assert output_difference(here + 0.5, here, (0.25,))[1] == pytest.approx(2)
    with_nan = np.where(here > 4, np.nan, here)
    assert output_difference(with_nan, with_nan, ())[0] == 0
    assert math.isnan(output_difference(with_nan, here, ())[0])
    infinite = np.where(here > 4, np.inf, here)
    assert output_difference(infinite, infinite, ())[0] == 0
    assert output_difference(np.full(4, 2.0), np.full(4, 1.0), ())[0] == 1  # constant: part of its size


def test_inputs_are_the_same_each_time_and_fill_their_type(two_sizes, int8):
    for path, name, limits in ((two_sizes[0], "float32", (-6, 6)), (int8, "int8", (-128, 127))):
        model = read_flatbuffer(path)
        (first,), (second,) = fixed_inputs(model), fixed_inputs(model)
        assert (first == second).all() and first.shape == model.inputs[0].shape and first.dtype.name == name
        assert limits[0] <= first.min() < limits[0] / 2 and limits[1] / 2 < first.max() <= limits[1]


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
    sittings = [done for done, _, what in seen if what.startswith("timing")]
    assert sittings in (list(range(SITTINGS)), list(range(SITTINGS + SITTINGS // 2)))  # more where it was noisy
    assert seen[0][2].startswith("checking the outputs of 'depth1'")


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
    with pytest.raises(DeviceError, match=r"no device kind 'toaster': use one of \['adb'"):
        benchmark(two_sizes, device="toaster")
    with pytest.raises(DeviceError, match="'local' takes no address"):
        benchmark(two_sizes, device="local:0")
    with pytest.raises(OptionError, match="no row 'depth7': the names are"):
        BenchmarkTable(()).ratio("depth7", 0)
    with pytest.raises(OutputError, match="no folder"):
        benchmark(two_sizes, out=tmp_path / "none" / "rows.csv")
    with pytest.raises(FlatbufferError, match="No such file"):
        benchmark([tmp_path / "none.tflite"])
    (tmp_path / "half.tflite").write_bytes(two_sizes[0].read_bytes()[:1000])
    with pytest.raises(FlatbufferError, match="damaged"):
        benchmark([two_sizes[0], tmp_path / "half.tflite"])

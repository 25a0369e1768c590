"""Latency tables: real files in the real interpreter, honest intervals, and rows that survive."""

import math

import keras
import numpy as np
import pytest

from tflite_export import DataError, DeviceError, LatencyItem, LatencyTable, OptionError
from tflite_export.devices.local import LocalDevice
from tflite_export.latency_fits import fit_correction, levels
from tflite_export.latency_rows import Conditions, LatencyRow
from tflite_export.latency_visit import EMPTY, _in_a_row

CONDITIONS = Conditions("measured", "a board", "Linux armv7l", "litert 2", "cpu", "int8", 1)


def row(key, latency_us, *, parts=(), noisy=False, date="2026-01-01", conditions=CONDITIONS, size_bytes=100):
    return LatencyRow(
        key, tuple(parts), latency_us, 0.99 * latency_us, 1.01 * latency_us, noisy, 9, 1, size_bytes, "ab", "XNNPACK",
        "adb:1", "schedutil", "4-7", date, conditions,
    )  # fmt: skip


def conv(filters: int, n: int = 1, size: int = 24) -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((size, size, filters))
    x = image
    for _ in range(n):
        x = keras.layers.Conv2D(filters, 3, padding="same", bias_initializer="normal")(x)
    return keras.Model(image, x)


# --- levels ----------------------------------------------------------------------------------------------------------


def test_the_drift_of_a_device_is_taken_out():
    """Ten models, twelve sittings on a device that slows down by half: made with other means than `levels` uses."""
    rng = np.random.default_rng(3)
    true_us = np.geomspace(5, 5000, 10)
    drift = np.linspace(0, math.log(1.5), 12)
    times = {
        i: {s: math.log(true_us[i]) + drift[s] + rng.normal(0, 0.01) for s in range(12) if i % 3 or s < 6}
        for i in range(10)  # every third model left after six sittings, while the device was fast
    }
    found = levels(times)
    centers = np.array([found[i].center for i in range(10)])
    slowdown = centers - np.log(true_us)
    assert np.ptp(slowdown) < 0.02  # against 0.2 between the models that left and those that stayed
    assert abs(np.mean(slowdown) - np.mean(drift)) < 0.01
    assert all(one.width < 0.05 for one in found.values())  # not widened by the drift of a half


def test_the_interval_of_a_level_covers_it():
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(100):
        drift = rng.normal(0, 0.1, 8)
        times = {i: {s: i + drift[s] + rng.normal(0, 0.03) for s in range(8)} for i in range(12)}
        found = levels(times)
        shift = np.mean(drift)
        covered += [abs(one.center - i - shift) <= one.half for i, one in found.items()]
    assert np.mean(covered) > 0.9  # 95 % but for the drift, which is estimated from twelve models


# --- corrections -----------------------------------------------------------------------------------------------------


def test_a_correction_is_found_again():
    sums = np.array([1000.0, 1500, 2200, 2900, 4000])
    found = fit_correction([(x, 1.1 * x + 80) for x in sums])
    assert (found.scale, found.offset_us) == pytest.approx((1.1, 80), rel=1e-6)
    assert found.n == 5 and found.error < 1e-9 < found.error_before


def test_nothing_is_corrected_where_it_does_not_help():
    rng = np.random.default_rng(0)
    sums = rng.uniform(900, 1100, 5)
    found = fit_correction([(x, x * (1 + rng.normal(0, 0.03))) for x in sums])
    assert (found.scale, found.offset_us) == (1, 0) and found.error >= found.error_before
    assert "not corrected" in str(found)
    assert fit_correction([(100.0, 130.0)] * 2).scale == 1  # two networks tell too little
    assert fit_correction([]).n == 0


def test_the_rest_of_a_network_is_what_its_parts_leave():
    table = LatencyTable(
        (
            row("a", 10.0, size_bytes=1000),
            row("b", 4.0, size_bytes=300),
            row("network:n", 30.0, parts=("a", "a"), size_bytes=2500),
            row("network:1", 27.5, parts=("rest:n", "a", "b")),
            row("network:2", 20.0, parts=("rest:n", "b", "b")),
            row("network:3", 16.0, parts=("rest:n", "b")),
        )
    )
    assert table.latency_us("rest:n") == 10 and table.size_bytes("rest:n") == 500
    assert "rest:n" in table and "rest:m" not in table
    sums = {"network:1": 24.0, "network:2": 18.0, "network:3": 14.0, "network:n": 30.0}
    correction = table.correction
    assert correction.n == 3
    for key, total in sums.items():
        parts = table[key].parts if key != "network:n" else ("rest:n", "a", "a")
        assert table.predict_us(parts) == pytest.approx(correction.scale * total + correction.offset_us)
        assert table.predict_us(parts) == pytest.approx(table[key].latency_us, rel=0.1)
    with pytest.raises(DataError, match=r"int8 on a board .* has no row 'c'"):
        table.latency_us("c")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_table_survives_its_file(tmp_path):
    rows = (row("a", 10.25), row("network:x,y", 1e5, parts=("a", "b c".split()[0]), noisy=True))
    table = LatencyTable((*rows, LatencyRow(**{**vars(row("c", 1.5)), "low_us": math.nan, "high_us": math.nan})))
    table.save(tmp_path / "t.csv")
    again = LatencyTable.load(tmp_path / "t.csv", precision="int8", device="adb:1")
    assert again.rows[:2] == rows
    assert math.isnan(again["c"].low_us) and again.as_csv() == table.as_csv()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("latency_us", "size"), "'.*' is no latency table: the column 'latency_us' is missing"),
        (("10.25", "soon"), "line 2: 'latency_us' is no number. Received: 'soon'"),
        (("10.25", "-1"), "line 2: the row has no key or no time"),
        (("10.25", "inf"), "line 2: the row has no key or no time"),
        ((",9,1,", ",9.5,1,"), "line 2: 'sittings' is no whole number. Received: '9.5'"),
        (("int8,1\n", "int8,2\n"), "mixes rows of int8 .*2 threads.* and of int8 .*1 thread"),
        (("b,,", "a,,"), "has two rows 'a'"),
    ],
)
def test_damaged_tables_are_named(tmp_path, change, message):
    path = tmp_path / "t.csv"
    text = LatencyTable((row("a", 10.25), row("b", 3.0))).as_csv()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    with pytest.raises(DataError, match=message):
        LatencyTable.load(path)


def test_no_table_and_an_empty_one(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        LatencyTable.load(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text(LatencyTable((row("a", 1.0),)).as_csv().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="holds no rows"):
        LatencyTable.load(tmp_path / "empty.csv")


def test_another_precision_or_device_is_refused_with_both_named(tmp_path):
    table = LatencyTable((row("a", 1.0),))
    table.save(tmp_path / "t.csv")
    with pytest.raises(DataError, match="was measured in int8, but float32 is asked for"):
        LatencyTable.load(tmp_path / "t.csv", precision="float32")
    with pytest.raises(DataError, match="was measured on 'adb:1', but 'local' is asked for"):
        LatencyTable.load(tmp_path / "t.csv", device="local")
    other = LatencyTable((row("b", 1.0, conditions=Conditions("measured", "b", "c", "d", "cpu", "float32", 4)),), "T")
    with pytest.raises(DataError, match=r"\(int8 on a board .*1 thread\).*\(float32 on b .*4 threads\)\) do not go"):
        table.joined(other)


def test_joined_tables_keep_the_quiet_and_the_new_rows():
    old = LatencyTable((row("a", 1.0), row("b", 2.0, noisy=True), row("c", 3.0)))
    new = LatencyTable((row("a", 1.5, noisy=True, date="2026-02-01"), row("b", 2.5), row("c", 3.5, date="2026-02-01")))
    for joined in (old.joined(new), new.joined(old)):
        assert {one.key: one.latency_us for one in joined.rows} == {"a": 1.0, "b": 2.5, "c": 3.5}


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory, worker):
    out = tmp_path_factory.mktemp("table") / "t.csv"
    items = [("one", conv(16)), ("three", conv(16, 3)), ("small", conv(2, size=6)), ("one", conv(16))]
    items.append(LatencyItem("network:x", conv(16, 4), ("one", "three")))
    return LatencyTable.measure(items, out=out, worker=worker, max_seconds=8), out


def test_times_follow_the_work(measured):
    table, out = measured
    assert [one.key for one in table.rows] == [EMPTY, "one", "three", "small", "network:x"]
    one, three, whole = (table.latency_us(key) for key in ("one", "three", "network:x"))
    assert 2.2 < three / one < 4 and 2.8 < whole / one < 5.5  # three and four equal layers
    assert table.latency_us("small") < one / 3
    assert table["one"].low_us < one < table["one"].high_us
    assert table["small"].series > 1 and table["one"].series == 1
    # a file with one layer of 16 x 16 x 9 weights and 16 biases, less the empty model's
    assert abs(table.size_bytes("one") - 4 * (16 * 16 * 9 + 16)) < 1500
    assert LatencyTable.load(out) == LatencyTable(table.rows, f"'{out}'")
    assert table.conditions.precision == "float32" and table["one"].ran_by == "XNNPACK"
    assert "one" in str(table) and "float32 on " in str(table)


def test_what_is_known_is_not_measured_again(measured, monkeypatch):
    table, out = measured
    quiet = LatencyTable(tuple(LatencyRow(**{**vars(one), "noisy": False}) for one in table.rows))
    monkeypatch.setattr(LocalDevice, "run", None)  # nothing may run
    again = LatencyTable.measure([("one", conv(16)), ("three", conv(16, 3))], known=quiet)
    assert again.rows == quiet.rows


def test_a_device_that_goes_away_leaves_its_rows(tmp_path, monkeypatch, worker):
    out, run, calls = tmp_path / "t.csv", LocalDevice.run, []

    def unplugged(self, paths, **options):
        calls.append(len(paths))
        if len(calls) > 2:  # the pilot for short models, one sitting, and the cable comes out
            raise DeviceError("'phone' went away.")
        return run(self, paths, **options)

    monkeypatch.setattr(LocalDevice, "run", unplugged)
    with pytest.raises(
        DeviceError, match=r"went away. The 3 rows measured so far are in '.*t.csv': the same call goes"
    ):
        LatencyTable.measure([("one", conv(16)), ("three", conv(16, 3))], out=out, worker=worker)
    assert [one.key for one in LatencyTable.load(out).rows] == [EMPTY, "one", "three"]
    assert all(one.noisy for one in LatencyTable.load(out).rows)  # one sitting tells no interval
    monkeypatch.undo()
    done = LatencyTable.measure([("one", conv(16)), ("three", conv(16, 3))], out=out, worker=worker, max_seconds=2)
    assert all(one.sittings > 1 for one in done.rows)


def test_a_table_is_not_gone_on_from_under_other_conditions(measured, tmp_path):
    table, out = measured
    with pytest.raises(DataError, match=rf"'{out}' is of float32 on .*, but what would be measured is int8 on"):
        LatencyTable.measure([("one", conv(16))], precision="int8", out=out)


def test_options_are_checked():
    with pytest.raises(OptionError, match="not of 'int4'"):
        LatencyTable.measure([], precision="int4")
    with pytest.raises(OptionError, match="threads must be at least 1"):
        LatencyTable.measure([], threads=0)


def test_integers_are_measured_as_integers(worker):
    table = LatencyTable.measure([("one", conv(16))], precision="int8", worker=worker, max_seconds=2)
    assert table.conditions.precision == "int8"
    assert abs(table.size_bytes("one") - 16 * 16 * 9) < 2000


def test_a_series_computes_its_model_again_and_again():
    model = conv(2, size=6)
    image = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype("float32")
    before = len(model.layers[1]._inbound_nodes)
    row_of_three = _in_a_row(model, 3)
    want = image
    for _ in range(3):
        want = model(want)
    np.testing.assert_allclose(row_of_three(image), want, rtol=1e-5, atol=1e-6)
    assert len(model.layers[1]._inbound_nodes) == before  # the model itself has no call more

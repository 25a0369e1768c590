"""Estimates for phones, against times that were published and that a fit did not see."""

import csv

import numpy as np
import pytest

from tflite_export import DeviceError, OptionError, estimate_phone, phones
from tflite_export.estimates import DATA

ROWS = list(csv.DictReader(DATA.read_text(encoding="utf-8").splitlines()))


def test_every_row_has_its_source():
    assert len(ROWS) > 50
    for row in ROWS:
        assert row["source"].startswith("github.com/") and float(row["latency_ms"]) > 0
        assert 0 <= float(row["depthwise_macs_m"]) < float(row["dense_macs_m"])


@pytest.mark.parametrize("phone", phones(), ids=lambda phone: f"{phone.device} {phone.precision}")
def test_estimates_are_near_what_was_published(phone):
    own = [row for row in ROWS if (row["device"], row["precision"]) == (phone.device, phone.precision)]
    assert phone.n == len(own) >= 5
    errors = []
    for row in own:
        dense, depthwise = (1e6 * float(row[key]) for key in ("dense_macs_m", "depthwise_macs_m"))
        found = estimate_phone(dense + depthwise, depthwise, device=phone.device, precision=phone.precision)
        errors.append(abs(found.ms / float(row["latency_ms"]) - 1))
        assert not found.outside
    assert np.median(errors) <= phone.error <= phone.worst_error  # what is left out is met less well
    assert phone.error < 0.15


def test_the_least_squares_are_the_least():
    """Against a plain search: no coefficients near the fitted ones have a smaller relative squared error."""
    phone = next(one for one in phones() if (one.device, one.precision) == ("Pixel 1", "float32"))
    own = [row for row in ROWS if (row["device"], row["precision"]) == ("Pixel 1", "float32")]
    macs = np.array([[float(row["dense_macs_m"]), float(row["depthwise_macs_m"]), 1] for row in own])
    times = np.array([float(row["latency_ms"]) for row in own])
    best = np.array([phone.ms_per_dense_mac, phone.ms_per_depthwise_mac, phone.constant_ms])
    assert (best >= 0).all()

    def loss(coefficients):
        return float(np.sum((macs @ coefficients / times - 1) ** 2))

    rng = np.random.default_rng(0)
    for _ in range(300):
        other = np.maximum(best * (1 + rng.normal(0, 0.05, 3)) + [0, 0, rng.normal(0, 0.1)], 0)
        assert loss(best) <= loss(other) + 1e-12


def test_an_estimate_says_what_it_is():
    found = estimate_phone(300e6, 20e6)
    assert str(found).startswith("estimate: ") and "nothing was measured" in str(found)
    assert 40 < found.ms < 110  # MobileNetV2 was published with 73.8 ms
    assert "outside the range" in str(estimate_phone(5e9, 1e8))
    assert estimate_phone(300e6, 60e6).ms > found.ms  # depthwise MACs are dearer on phones


def test_unknown_phones_and_impossible_numbers():
    with pytest.raises(DeviceError, match=r"no estimate for 'Pixel 9' in float32: there are Pixel 1 \(float32\), "):
        estimate_phone(1e6, 0, device="Pixel 9")
    with pytest.raises(OptionError, match="are those of no network"):
        estimate_phone(1e6, 2e6)

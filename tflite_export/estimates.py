"""Estimates for phones that are not at hand, from published times of other networks. Always an estimate.

The time of a network is a sum: its MACs in depthwise convolutions times one number, its other MACs times another, and
a constant. The numbers are fitted, by relative error and never below zero, to what vendors published for their own
networks (`data/phone_latencies.csv`, with sources). How far off networks are that were left out of the fit is a part
of each estimate. A latency table that was measured tells more.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tflite_export.errors import DeviceError, OptionError

DATA = Path(__file__).parent / "data" / "phone_latencies.csv"
MIN_NETWORKS = 5


@dataclass(frozen=True)
class Phone:
    """A phone's CPU in one precision, and what its published times say.

    Attributes:
        device: the phone.
        precision: "float32" or "int8".
        threads: that ran one inference.
        ms_per_dense_mac: milliseconds for a million MACs that are not depthwise.
        ms_per_depthwise_mac: the same of depthwise ones.
        constant_ms: of any network.
        n: number of networks.
        error: median relative error of networks left out of the fit in turn.
        worst_error: the largest of these errors.
        macs_range: least and most MACs (millions) of the networks.
        sources: where the times were published.
    """

    device: str
    precision: str
    threads: int
    ms_per_dense_mac: float
    ms_per_depthwise_mac: float
    constant_ms: float
    n: int
    error: float
    worst_error: float
    macs_range: tuple[float, float]
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.device}, CPU, {self.threads} thread{'s' if self.threads > 1 else ''}, {self.precision}: "
            f"{self.ms_per_dense_mac:.4f} ms per M MACs, {self.ms_per_depthwise_mac:.4f} per M depthwise MACs, "
            f"{self.constant_ms:.1f} ms; {self.n} networks of {self.macs_range[0]:.0f} to {self.macs_range[1]:.0f} M "
            f"MACs, error of those left out: median {100 * self.error:.0f} %, worst {100 * self.worst_error:.0f} %"
        )


@dataclass(frozen=True)
class Estimate:
    """A time that nobody measured.

    Attributes:
        ms: milliseconds.
        phone: what it was estimated with.
        outside: whether the network is smaller or larger than all that were published.
    """

    ms: float
    phone: Phone
    outside: bool

    def __str__(self) -> str:
        phone = self.phone
        threads = f"{phone.threads} thread{'s' if phone.threads > 1 else ''}"
        outside = "; outside the range of the networks it was fitted to" if self.outside else ""
        return (
            f"estimate: {self.ms:.3g} ms on {phone.device} (CPU, {threads}, {phone.precision}), typically off by "
            f"{100 * phone.error:.0f} %, at worst by {100 * phone.worst_error:.0f} % on {phone.n} published "
            f"networks{outside}; nothing was measured"
        )


def phones() -> tuple[Phone, ...]:
    """Return the phones with enough published networks."""
    return tuple(_phones())


def estimate_phone(
    macs: float, depthwise_macs: float, *, device: str = "Pixel 1", precision: str = "float32"
) -> Estimate:
    """Return how long a network may take on a phone's CPU.

    Args:
        macs: multiply-accumulate operations of one image, all of them.
        depthwise_macs: those of depthwise convolutions.
        device: name of the phone.
        precision: "float32" or "int8".

    Raises:
        DeviceError: nothing was published for the phone in this precision; the message lists what was.
        OptionError: numbers below zero, or more depthwise MACs than MACs.
    """
    if not 0 <= depthwise_macs <= macs < math.inf:
        raise OptionError(f"{macs} MACs, {depthwise_macs} of them depthwise, are those of no network.")
    known = [phone for phone in _phones() if (phone.device, phone.precision) == (device, precision)]
    if not known:
        told = ", ".join(f"{phone.device} ({phone.precision})" for phone in _phones())
        raise DeviceError(f"there is no estimate for '{device}' in {precision}: there are {told}; or measure a device.")
    phone = known[0]
    dense_m, depthwise_m = (macs - depthwise_macs) / 1e6, depthwise_macs / 1e6
    ms = phone.ms_per_dense_mac * dense_m + phone.ms_per_depthwise_mac * depthwise_m + phone.constant_ms
    low, high = phone.macs_range
    return Estimate(ms, phone, not low <= macs / 1e6 <= high)


@cache
def _phones() -> tuple[Phone, ...]:
    return tuple(_fitted())


def _fitted() -> Iterator[Phone]:
    with DATA.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for key in dict.fromkeys((row["device"], row["precision"], row["threads"]) for row in rows):
        own = [row for row in rows if (row["device"], row["precision"], row["threads"]) == key]
        if len(own) < MIN_NETWORKS:
            continue
        macs = np.array([[float(row["dense_macs_m"]), float(row["depthwise_macs_m"]), 1.0] for row in own])
        times = np.array([float(row["latency_ms"]) for row in own])
        errors = []
        for index in range(len(own)):
            others = np.arange(len(own)) != index
            errors.append(abs(float(macs[index] @ _coefficients(macs[others], times[others])) / times[index] - 1))
        dense, depthwise, constant = _coefficients(macs, times)
        totals = macs[:, :2].sum(axis=1)
        yield Phone(
            device=key[0],
            precision=key[1],
            threads=int(key[2]),
            ms_per_dense_mac=float(dense),
            ms_per_depthwise_mac=float(depthwise),
            constant_ms=float(constant),
            n=len(own),
            error=float(np.median(errors)),
            worst_error=max(errors),
            macs_range=(float(totals.min()), float(totals.max())),
            sources=tuple(dict.fromkeys(row["source"] for row in own)),
        )


def _coefficients(macs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return what MACs and a constant cost, not below zero, by least squares of the relative error."""
    from scipy.optimize import nnls

    return np.asarray(nnls(macs / times[:, None], np.ones(len(times)))[0])

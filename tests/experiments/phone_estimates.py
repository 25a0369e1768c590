"""Published times of phones, with depthwise and other MACs apart: what `tflite_export.estimates` is fitted to.

    uv run --frozen python -m tests.experiments.phone_estimates make
    uv run --frozen python -m tests.experiments.phone_estimates report

The first writes `tflite_export/data/phone_latencies.csv` from the published table, counting the MACs of each network
in Keras; the second prints the errors of networks that are left out of the fit.
"""

import csv
import sys

import keras

from tests.experiments.records import SHARED_DATA
from updp_tf.blocks import prepared_graph
from updp_tf.timing import depthwise_macs

SOURCES = {
    "1": "github.com/tensorflow/models research/slim/nets/mobilenet/README.md",
    "2": "github.com/tensorflow/tpu models/official/efficientnet/lite/README.md",
}
CPUS = {"CPU large core": 1, "CPU 4 threads": 4}
COLUMNS = (
    "model",
    "input",
    "device",
    "threads",
    "precision",
    "dense_macs_m",
    "depthwise_macs_m",
    "latency_ms",
    "source",
)


def lite(width: float, depth: float, size: int) -> tuple[float, float]:
    """MACs (M) of EfficientNet-lite: no squeeze-and-excitation, stem and head of fixed width, first and last stage of
    fixed depth. Counted by hand, since Keras has none."""

    def wide(filters: int) -> int:
        scaled = max(8, int(filters * width + 4) // 8 * 8)
        return scaled + 8 if scaled < 0.9 * filters * width else scaled

    stages = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
    stages += ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
    size = -(-size // 2)
    dense, depthwise, c_in = 9 * 3 * 32 * size**2, 0, 32
    for number, (expansion, kernel, stride, filters, repeats) in enumerate(stages):
        fixed = number in (0, len(stages) - 1)
        for block in range(repeats if fixed else -int(-repeats * depth // 1)):
            inner, c_out = expansion * c_in, wide(filters)
            dense += (c_in * inner if expansion > 1 else 0) * size**2
            size = -(-size // (stride if block == 0 else 1))
            depthwise += kernel**2 * inner * size**2
            dense += inner * c_out * size**2
            c_in = c_out
    return (dense + c_in * 1280 * size**2 + 1280 * 1000) / 1e6, depthwise / 1e6


LITE = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}


def macs_of(name: str, size: int) -> tuple[float, float]:
    """Dense and depthwise MACs in millions."""
    if name.startswith("efficientnet_lite"):
        return lite(*LITE[int(name[-1])], size)
    family, *rest = name.removeprefix("mobilenet_").split("_")
    shape = {"input_shape": (size, size, 3), "weights": None}
    if family == "v2":
        model = keras.applications.MobileNetV2(alpha=float(rest[0]), **shape)
    else:
        make = keras.applications.MobileNetV3Large if rest[0] == "large" else keras.applications.MobileNetV3Small
        minimalistic = rest[1] == "minimalistic"
        model = make(alpha=1.0 if minimalistic else float(rest[1]), minimalistic=minimalistic, **shape)
    whole, depthwise = depthwise_macs(prepared_graph(model))
    return (whole - depthwise) / 1e6, depthwise / 1e6


def make() -> None:
    from tflite_export.estimates import DATA

    with open(SHARED_DATA / "device" / "published_latency.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["processor"] in CPUS]
    records = []
    counted: dict[tuple[str, int], tuple[float, float]] = {}
    for row in rows:
        key = row["model"], int(row["input"])
        if key not in counted:
            counted[key] = macs_of(*key)
            dense, depthwise = counted[key]
            if abs((dense + depthwise) / float(row["macs_m"]) - 1) > 0.06:
                print(f"{key}: counted {dense + depthwise:.0f} M MACs, published {row['macs_m']} M")
        dense, depthwise = counted[key]
        values = (*key, row["device"], CPUS[row["processor"]], row["precision"], f"{dense:.1f}", f"{depthwise:.1f}")
        records.append((*values, row["latency_ms"], SOURCES[row["source"]]))
    with open(DATA, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(records)


def report() -> None:
    from tflite_export.estimates import phones

    for phone in phones():
        print(phone)


if __name__ == "__main__":
    {"make": make, "report": report}[sys.argv[1]]()

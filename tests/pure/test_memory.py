"""Arrays that go to disk, and calibration data of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from updp_tf.errors import CalibrationError
from updp_tf.memory import Memory, calibration_images, image_batches

SHAPE = (None, 4, 5, 3)
IMAGES = np.random.default_rng(0).normal(size=(10, 4, 5, 3)).astype("float32")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.bin"))


# Where arrays live


def test_arrays_live_in_memory_up_to_the_limit(folder: Path) -> None:
    with Memory(1000) as memory:
        first = memory.allocate((100,))  # 400 bytes
        second = memory.allocate((150,))  # 600: just fits
        third = memory.allocate((1,))
        assert not isinstance(first, np.memmap) and not isinstance(second, np.memmap)
        assert isinstance(third, np.memmap) and len(files(folder)) == 1
        memory.release(second)
        assert not isinstance(memory.allocate((150,)), np.memmap)
        memory.release(third)
        assert files(folder) == []
    assert list(folder.iterdir()) == []


def test_arrays_on_disk_hold_what_is_written() -> None:
    with Memory(0) as memory:
        arrays = [memory.allocate((3, 4), dtype) for dtype in ("float32", "float64", "int64")]
        for number, array in enumerate(arrays):
            array[:] = number
        assert [(array.dtype.name, float(array.mean())) for array in arrays] == [
            ("float32", 0.0),
            ("float64", 1.0),
            ("int64", 2.0),
        ]


def test_files_go_with_an_error(folder: Path) -> None:
    with pytest.raises(KeyError), Memory(0) as memory:
        memory.allocate((3,))
        assert files(folder)
        raise KeyError
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 500, 10**9])
@pytest.mark.parametrize("cuts", [(10,), (3, 3, 3, 1), (1,) * 10])
def test_collecting_is_concatenating(limit: int, cuts: tuple[int, ...]) -> None:
    with Memory(limit) as memory:
        parts = np.split(IMAGES, np.cumsum(cuts)[:-1])
        found = memory.collect(iter(parts))
        assert found.dtype == np.float32 and isinstance(found, np.memmap) == (limit < IMAGES.nbytes)
        np.testing.assert_array_equal(found, IMAGES)


def test_collecting_holds_one_batch_at_a_time(folder: Path) -> None:
    seen = []

    def batches():
        for start in range(0, 10, 2):
            seen.append(sum(path.stat().st_size for path in files(folder)))
            yield IMAGES[start : start + 2]

    with Memory(0) as memory:
        memory.collect(batches())
    assert seen == [n * 2 * 4 * 5 * 3 * 4 for n in range(5)]


def test_batches_of_different_sizes_are_refused() -> None:
    with Memory() as memory, pytest.raises(CalibrationError, match=r"of shape \(4, 5, 3\) and \(4, 6, 3\); give one"):
        memory.collect([IMAGES, np.zeros((2, 4, 6, 3), "float32")])


def test_a_float32_array_is_not_copied() -> None:
    with Memory() as memory:
        assert calibration_images(IMAGES, shape=SHAPE, memory=memory) is IMAGES
        assert calibration_images([IMAGES], shape=SHAPE, memory=memory) is not IMAGES
        with pytest.raises(CalibrationError, match="NaN"):
            calibration_images(np.full_like(IMAGES, np.nan), shape=SHAPE, memory=memory)


# Calibration data


class Sequence:
    """As a Keras PyDataset: indexing past the end does not stop, so that iterating would go on for ever."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return IMAGES[(3 * index) % 10 : 3 * index % 10 + 3], np.zeros(3)


SOURCES = {
    "array": lambda: IMAGES,
    "float64": lambda: IMAGES.astype("float64"),
    "list of batches": lambda: [IMAGES[:3], IMAGES[3:]],
    "tuple of batches": lambda: (IMAGES[:3], IMAGES[3:]),
    "generator": lambda: (IMAGES[i : i + 4] for i in range(0, 10, 4)),
    "images and labels": lambda: [(IMAGES[:7], np.arange(7)), [IMAGES[7:], np.arange(3)]],
    "sequence": Sequence,
    "empty batches between": lambda: [IMAGES[:0], IMAGES, IMAGES[:0]],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_kind_of_calibration_data(source) -> None:
    batches = list(image_batches(source(), shape=SHAPE, batch_size=4))
    assert all(batch.dtype == np.float32 and len(batch) for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_numbers_become_float32(dtype: str) -> None:
    images = np.random.default_rng(0).integers(0, 200, (5, 4, 5, 3)).astype(dtype)
    (batch,) = image_batches(images, shape=SHAPE)
    assert batch.dtype == np.float32
    np.testing.assert_array_equal(batch, images)


def test_an_array_is_cut_into_batches() -> None:
    assert [len(batch) for batch in image_batches(IMAGES, shape=SHAPE, batch_size=4)] == [4, 4, 2]


def test_dynamic_axes_take_any_size() -> None:
    images = np.zeros((2, 9, 7, 3))
    assert next(image_batches(images, shape=(None, None, None, 3))).shape == (2, 9, 7, 3)


def _with(value: float) -> np.ndarray:
    images = IMAGES.copy()
    images[7, 1, 2, 0] = value
    return images


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (IMAGES[0], r"The calibration images have shape \(4, 5, 3\); the model reads rank 4, batch axis first"),
        (IMAGES[:, :3], r"has shape \(10, 3, 5, 3\); the model reads images of shape \(4, 5, 3\)"),
        (IMAGES[..., :1], r"has shape \(10, 4, 5, 1\); the model reads images of shape \(4, 5, 3\)"),
        (list(IMAGES), r"A calibration batch has shape \(4, 5, 3\)"),
        ([IMAGES, IMAGES[:, :2]], r"has shape \(10, 2, 5, 3\)"),
        (IMAGES.astype(str), "Calibration images have dtype <U32; numbers are needed"),
        (IMAGES.astype(bool), "Calibration images have dtype bool; numbers are needed"),
        (IMAGES.astype(complex), "Calibration images have dtype complex128; numbers are needed"),
        (_with(np.nan), "hold NaN or infinite values; remove or repair those images"),
        (_with(np.inf), "hold NaN or infinite values"),
        ([IMAGES, _with(-np.inf)], "hold NaN or infinite values"),
        (IMAGES[:0], "The calibration data holds no images"),
        ([], "The calibration data holds no images"),
        (iter(()), "The calibration data holds no images"),
        ("images.npy", "is an array of images or an iterable of batches. Received: str"),
        ({"images": IMAGES}, "Received: dict"),
        (None, "Received: NoneType"),
        (7, "Received: int"),
    ],
    ids=range(18),
)
def test_bad_calibration_data_is_refused(source, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(image_batches(source, shape=SHAPE))

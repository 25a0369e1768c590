"""Seeds, quiet logs, Hypothesis settings and the shared data, for every test."""

import os

# before anything imports Keras or TensorFlow
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # other rounding from run to run of the same model
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MPLBACKEND", "agg")
# small solves between TensorFlow calls: BLAS threads that wait for each other cost 30 times more than they save
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # as many processes as cores run already
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest

BYTES_PER_WORKER = 6 * 2**30
"""Memory for each process that runs tests: TensorFlow, a converter beside it, and room."""

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Warnings are errors (pyproject.toml), but for these, which are not ours to mend.
FOREIGN_WARNINGS = (
    # keras/src/backend/tensorflow/core.py calls np.array(variable) while saving; TensorFlow's variables lack `copy`
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Spread a run of all tests over the cores; what is named on the command line, or measures times, runs alone."""
    runs_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    measures = "bench" in config.option.markexpr.replace("not bench", "")
    if not runs_all or measures:
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(os.cpu_count() or 1, memory // BYTES_PER_WORKER)


LONG_FILES = (
    "test_training.py",
    "test_fuzzer.py",
    "test_pruning.py",
    "test_merging.py",
    "test_progress.py",
    "test_convert.py",
    "test_fuzz.py",
    "test_choosing.py",
    "test_supernet.py",
    "test_evolving.py",
)
"""Files of more than about a minute. They start first: the one that starts last decides when the run ends."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files in front, each whole and the rest in order."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    """Add the exceptions after the rule, where pytest lets the last one win."""
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


hypothesis.settings.register_profile(
    "updp",
    deadline=None,  # the first example pays for imports
    derandomize=True,  # the same examples on every machine
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile("updp")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state; Keras is seeded where it is loaded."""
    random.seed(0)
    np.random.seed(0)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights beside the repository; tests that ask for it are skipped without."""
    if not (SHARED_DATA / "load.py").is_file():
        pytest.skip(f"needs the real images and weights, which are not in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shared_loader(shared_data: Path) -> ModuleType:
    """The module `load.py` of that folder: arrays and Keras models. Imports Keras."""
    spec = importlib.util.spec_from_file_location("shared_data_load", shared_data / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

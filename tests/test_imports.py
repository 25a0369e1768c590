"""What importing a module loads, asked in fresh processes."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
PURE_MODULES = next(
    c["source_modules"] for c in CONTRACTS if set(c.get("forbidden_modules", ())) == {"keras", "tensorflow"}
)
MOST_SECONDS = 0.3  # measured: 0.01 to 0.05; scipy.optimize would add 0.4, Keras 5
PACKAGES = ("updp_tf", "tflite_export")


def run_python(code: str) -> dict:
    """Run code in a fresh process and return what it prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IMPORT = """
import json, sys, time
import numpy, scipy.linalg, scipy.special
start = time.process_time()
import {module}
seconds = time.process_time() - start
heavy = [name for name in ("keras", "tensorflow", "tf_keras", "torch", "jax") if name in sys.modules]
print(json.dumps({{"heavy": heavy, "seconds": seconds}}))
"""


@pytest.mark.parametrize("module", sorted({*PURE_MODULES, "updp_tf.activations"}))
def test_pure_modules_load_neither_keras_nor_tensorflow(module):
    result = run_python(IMPORT.format(module=module))
    assert result["heavy"] == []
    # processor time, so that a busy machine does not matter, beyond that of the libraries the pure half stands on
    assert result["seconds"] < MOST_SECONDS


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_alone_loads_neither_keras_nor_tensorflow(package):
    result = run_python(IMPORT.format(module=package))
    assert result["heavy"] == []
    assert result["seconds"] < MOST_SECONDS


PUBLIC_NAMES = """
import importlib, json, pkgutil, types
import {package} as package
first = {{name: getattr(package, name) for name in package.__all__}}
for found in pkgutil.walk_packages(package.__path__, "{package}."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
again = {{name: getattr(package, name) for name in package.__all__}}
print(json.dumps({{
    "names": list(first),
    "changed": [name for name in first if first[name] is not again[name]],
    "modules": [name for name in again if isinstance(again[name], types.ModuleType)],
    "hidden": [name for name in first if name not in dir(package)],
}}))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_stay_what_they_are_once_every_module_is_loaded(package):
    # importing the module `updp_tf.x` sets the attribute `x` of the package: a function of that name would be gone
    result = run_python(PUBLIC_NAMES.format(package=package))
    assert result["names"]
    assert len(result["names"]) == len(set(result["names"]))
    assert result["changed"] == result["modules"] == result["hidden"] == []

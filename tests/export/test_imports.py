"""Importing is cheap, and every public name stays what it is."""

import subprocess
import sys

import pytest

import tflite_export


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".errors",
        ".flatbuffer",
        ".interpreter",
        ".evaluation",
        ".benchmarking",
        ".devices.local",
        ".convert",
        ".edgetpu",
        ".edgetpu_compiler",
        ".ethosu",
    ],
)
def test_importing_loads_neither_keras_nor_tensorflow(module):
    code = f"import sys, tflite_export{module}; print(sorted({{'keras', 'tensorflow', 'updp_tf'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_public_name_can_be_used_twice_in_any_order():
    code = (
        "import tflite_export\n"
        "for turn in range(2):\n"
        "    for name in tflite_export.__all__:\n"
        "        value = getattr(tflite_export, name)\n"
        "        assert callable(value), (name, value)\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fine"


def test_lazy_names_are_those_written_out():
    assert sorted(tflite_export.__all__) == sorted(tflite_export._MODULE_BY_NAME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tflite_export.nothing  # noqa: B018

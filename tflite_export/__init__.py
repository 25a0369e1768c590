"""Keras 3 models to `.tflite` files that are checked, evaluated and measured.

The names below are loaded when they are first used: importing this package loads neither Keras nor TensorFlow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tflite_export.benchmarking import BenchmarkRow, BenchmarkTable, benchmark
    from tflite_export.convert import ExportResult, export, export_many
    from tflite_export.errors import (
        DataError,
        DeviceError,
        ExportError,
        FlatbufferError,
        ModelError,
        OptionError,
        OutputError,
        TfliteExportError,
    )
    from tflite_export.evaluation import Evaluation, evaluate, run_tflite
    from tflite_export.flatbuffer import TfliteModel, read_flatbuffer
    from tflite_export.worker import ExportWorker

__all__ = [
    "BenchmarkRow",
    "BenchmarkTable",
    "DataError",
    "DeviceError",
    "Evaluation",
    "ExportError",
    "ExportResult",
    "ExportWorker",
    "FlatbufferError",
    "ModelError",
    "OptionError",
    "OutputError",
    "TfliteExportError",
    "TfliteModel",
    "benchmark",
    "evaluate",
    "export",
    "export_many",
    "read_flatbuffer",
    "run_tflite",
]

_MODULE_BY_NAME = {
    "BenchmarkRow": "benchmarking",
    "BenchmarkTable": "benchmarking",
    "DataError": "errors",
    "DeviceError": "errors",
    "Evaluation": "evaluation",
    "ExportError": "errors",
    "ExportResult": "convert",
    "ExportWorker": "worker",
    "FlatbufferError": "errors",
    "ModelError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "TfliteExportError": "errors",
    "TfliteModel": "flatbuffer",
    "benchmark": "benchmarking",
    "evaluate": "evaluation",
    "export": "convert",
    "export_many": "convert",
    "read_flatbuffer": "flatbuffer",
    "run_tflite": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

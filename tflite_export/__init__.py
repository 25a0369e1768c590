"""Keras 3 models to `.tflite` files that are checked, evaluated and measured.

The names below are loaded when they are first used: importing this package loads neither Keras nor TensorFlow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tflite_export.benchmark_model import BenchmarkLog, read_benchmark_log
    from tflite_export.benchmark_rows import BenchmarkRow, BenchmarkTable
    from tflite_export.benchmarking import benchmark
    from tflite_export.comparing import Comparison, LayerError, compare
    from tflite_export.convert import ExportResult, export, export_many
    from tflite_export.devices import DeviceOptions, open_device
    from tflite_export.edgetpu import EdgeTpuReport, check_edgetpu
    from tflite_export.edgetpu_compiler import (
        EdgeTpuCompilation,
        EdgeTpuLog,
        compile_edgetpu,
        parse_edgetpu_output,
        read_edgetpu_log,
    )
    from tflite_export.errors import (
        CompilerError,
        DataError,
        DeviceError,
        ExportError,
        FlatbufferError,
        ModelError,
        OptionError,
        OutputError,
        TfliteExportError,
    )
    from tflite_export.estimates import Estimate, estimate_phone, phones
    from tflite_export.ethosu import EthosUCompilation, compile_ethosu
    from tflite_export.evaluation import Evaluation, evaluate, run_tflite
    from tflite_export.flatbuffer import TfliteModel, read_flatbuffer
    from tflite_export.latency import LatencyTable
    from tflite_export.latency_rows import LatencyRow
    from tflite_export.latency_visit import LatencyItem
    from tflite_export.qat import QatResult, quantize_aware
    from tflite_export.report import Report, write_report
    from tflite_export.steps import Step
    from tflite_export.worker import ExportWorker

__all__ = [
    "BenchmarkLog",
    "BenchmarkRow",
    "BenchmarkTable",
    "Comparison",
    "CompilerError",
    "DataError",
    "DeviceError",
    "DeviceOptions",
    "EdgeTpuCompilation",
    "EdgeTpuLog",
    "EdgeTpuReport",
    "Estimate",
    "EthosUCompilation",
    "Evaluation",
    "ExportError",
    "ExportResult",
    "ExportWorker",
    "FlatbufferError",
    "LatencyItem",
    "LatencyRow",
    "LatencyTable",
    "LayerError",
    "ModelError",
    "OptionError",
    "OutputError",
    "QatResult",
    "Report",
    "Step",
    "TfliteExportError",
    "TfliteModel",
    "benchmark",
    "check_edgetpu",
    "compare",
    "compile_edgetpu",
    "compile_ethosu",
    "estimate_phone",
    "evaluate",
    "export",
    "export_many",
    "open_device",
    "parse_edgetpu_output",
    "phones",
    "quantize_aware",
    "read_benchmark_log",
    "read_edgetpu_log",
    "read_flatbuffer",
    "run_tflite",
    "write_report",
]

_MODULE_BY_NAME = {
    "BenchmarkLog": "benchmark_model",
    "BenchmarkRow": "benchmark_rows",
    "BenchmarkTable": "benchmark_rows",
    "Comparison": "comparing",
    "CompilerError": "errors",
    "DataError": "errors",
    "DeviceError": "errors",
    "DeviceOptions": "devices",
    "EdgeTpuCompilation": "edgetpu_compiler",
    "EdgeTpuLog": "edgetpu_compiler",
    "EdgeTpuReport": "edgetpu",
    "Estimate": "estimates",
    "EthosUCompilation": "ethosu",
    "Evaluation": "evaluation",
    "ExportError": "errors",
    "ExportResult": "convert",
    "ExportWorker": "worker",
    "FlatbufferError": "errors",
    "LatencyItem": "latency_visit",
    "LatencyRow": "latency_rows",
    "LatencyTable": "latency",
    "LayerError": "comparing",
    "ModelError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "QatResult": "qat",
    "Report": "report",
    "Step": "steps",
    "TfliteExportError": "errors",
    "TfliteModel": "flatbuffer",
    "benchmark": "benchmarking",
    "check_edgetpu": "edgetpu",
    "compare": "comparing",
    "compile_edgetpu": "edgetpu_compiler",
    "compile_ethosu": "ethosu",
    "estimate_phone": "estimates",
    "evaluate": "evaluation",
    "export": "convert",
    "export_many": "convert",
    "open_device": "devices",
    "parse_edgetpu_output": "edgetpu_compiler",
    "phones": "estimates",
    "quantize_aware": "qat",
    "read_benchmark_log": "benchmark_model",
    "read_edgetpu_log": "edgetpu_compiler",
    "read_flatbuffer": "flatbuffer",
    "run_tflite": "evaluation",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

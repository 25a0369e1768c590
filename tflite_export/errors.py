"""The errors this package raises; each also inherits the fitting builtin, so that `except ValueError` works."""


class TfliteExportError(Exception):
    """Base of everything this package raises on purpose."""


class OptionError(TfliteExportError, ValueError):
    """An option with a value that is not known, or that does not go with another."""


class ModelError(TfliteExportError, ValueError):
    """A Keras model that has no `.tflite` form: not Keras 3, without inputs, of dynamic size, or unreadable."""


class ExportError(TfliteExportError, RuntimeError):
    """A conversion that failed, or a converted file that does not compute what the model does."""


class DataError(TfliteExportError, ValueError):
    """Calibration or test images that are missing, of the wrong shape, or not finite."""


class FlatbufferError(TfliteExportError, ValueError):
    """A file that is no `.tflite` file, is cut short, or contradicts itself."""


class OutputError(TfliteExportError, OSError):
    """An output file that exists already or cannot be written."""


class DeviceError(TfliteExportError, RuntimeError):
    """A device that is unknown, absent, or unable to run a file."""


class CompilerError(TfliteExportError, RuntimeError):
    """A vendor's compiler that is not installed or failed, a log that is none, or a file that is compiled already."""

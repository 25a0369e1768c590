"""The errors this package raises; each also inherits the fitting builtin, so that `except ValueError` works."""


class UpdpError(Exception):
    """Base of everything this package raises on purpose."""


class ModelError(UpdpError, ValueError):
    """A model that cannot be read, or that has nothing to prune."""


class ShapeError(UpdpError, ValueError):
    """Arrays or layers whose shapes do not fit together."""


class CalibrationError(UpdpError, ValueError):
    """Calibration images that do not fit the model, or that are missing where a fit needs them."""


class BudgetError(UpdpError, ValueError):
    """A budget that is malformed, or that no plan meets."""


class MissingLatencyError(UpdpError, KeyError):
    """A latency table without a row that is needed."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show its message in quotes


class PlanError(UpdpError, ValueError):
    """A plan that is malformed, or that was made for another model."""


class FormError(UpdpError, ValueError):
    """A form that is unknown, registered twice, or asked to do what it refuses."""


class RuleError(UpdpError, ValueError):
    """A registered rule that is malformed, or that does not compute what its layer does."""


class ScheduleError(UpdpError, ValueError):
    """A schedule that is malformed, or that does not fit the training."""


class TrainingError(UpdpError, RuntimeError):
    """A training that went wrong, or data that do not fit it."""


class MergeError(UpdpError, RuntimeError):
    """A merged model that does not compute what its plan says."""


class OutputError(UpdpError, OSError):
    """An output file that exists already or cannot be written."""


class RunError(UpdpError, RuntimeError):
    """A run directory that is in use, or that was made with other arguments."""

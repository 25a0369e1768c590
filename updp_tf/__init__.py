"""Make trained Keras 3 vision models shallower and narrower: merge whole blocks into single layers, cut channels.

The names below are loaded when they are first used: importing this package, or its pure modules, loads no Keras.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from updp_tf.affine import AffineConv
    from updp_tf.augmenting import Augmentation
    from updp_tf.blocks import Blocks, find_blocks
    from updp_tf.choosing import Additive, Exact, Random, Uniform
    from updp_tf.errors import (
        BudgetError,
        CalibrationError,
        FormError,
        MergeError,
        MissingLatencyError,
        ModelError,
        OutputError,
        PlanError,
        RuleError,
        RunError,
        ScheduleError,
        ShapeError,
        TrainingError,
        UpdpError,
    )
    from updp_tf.evolving import Genetic
    from updp_tf.expansions import register_expansion
    from updp_tf.forms import register_form
    from updp_tf.isomorphic.coupling import Coupling, per_channel
    from updp_tf.isomorphic.couplings import register_coupling
    from updp_tf.isomorphic.ranking import Width
    from updp_tf.learning import Learned
    from updp_tf.measuring import Target, estimate_latency, measure_latency
    from updp_tf.mending import fold_norms, reestimate_norms, refit
    from updp_tf.narrowing import narrow
    from updp_tf.planning import Plan
    from updp_tf.progress import linearize, progressive
    from updp_tf.pruning import Options, merge, prune, search
    from updp_tf.reporting import NarrowingReport, PruningReport, summary
    from updp_tf.rules import Unsupported, register_activation, register_linear
    from updp_tf.runs import RunDir, RunWarning
    from updp_tf.schedule import Schedule
    from updp_tf.scoring import CalibrationWarning
    from updp_tf.searching import SearchReport
    from updp_tf.supernet import Supernet
    from updp_tf.sweeping import Sweep, sweep
    from updp_tf.training import BlendSchedule, Training

_MODULE_BY_NAME = {
    "AffineConv": "affine",
    "Blocks": "blocks",
    "find_blocks": "blocks",
    "Additive": "choosing",
    "Exact": "choosing",
    "Genetic": "evolving",
    "Learned": "learning",
    "Random": "choosing",
    "Uniform": "choosing",
    "BudgetError": "errors",
    "CalibrationError": "errors",
    "FormError": "errors",
    "MergeError": "errors",
    "MissingLatencyError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "PlanError": "errors",
    "RuleError": "errors",
    "RunError": "errors",
    "ScheduleError": "errors",
    "ShapeError": "errors",
    "TrainingError": "errors",
    "UpdpError": "errors",
    "register_expansion": "expansions",
    "register_form": "forms",
    "Coupling": "isomorphic.coupling",
    "per_channel": "isomorphic.coupling",
    "register_coupling": "isomorphic.couplings",
    "Width": "isomorphic.ranking",
    "Target": "measuring",
    "estimate_latency": "measuring",
    "measure_latency": "measuring",
    "fold_norms": "mending",
    "reestimate_norms": "mending",
    "refit": "mending",
    "NarrowingReport": "reporting",
    "narrow": "narrowing",
    "Plan": "planning",
    "linearize": "progress",
    "progressive": "progress",
    "Options": "pruning",
    "PruningReport": "reporting",
    "merge": "pruning",
    "prune": "pruning",
    "search": "pruning",
    "summary": "reporting",
    "Unsupported": "rules",
    "register_activation": "rules",
    "register_linear": "rules",
    "RunDir": "runs",
    "RunWarning": "runs",
    "CalibrationWarning": "scoring",
    "SearchReport": "searching",
    "Sweep": "sweeping",
    "sweep": "sweeping",
    "Schedule": "schedule",
    "Augmentation": "augmenting",
    "BlendSchedule": "training",
    "Training": "training",
    "Supernet": "supernet",
}

__all__ = [
    "Additive",
    "AffineConv",
    "Augmentation",
    "BlendSchedule",
    "Blocks",
    "BudgetError",
    "CalibrationError",
    "CalibrationWarning",
    "Coupling",
    "Exact",
    "FormError",
    "Genetic",
    "Learned",
    "MergeError",
    "MissingLatencyError",
    "ModelError",
    "NarrowingReport",
    "Options",
    "OutputError",
    "Plan",
    "PlanError",
    "PruningReport",
    "Random",
    "RuleError",
    "RunDir",
    "RunError",
    "RunWarning",
    "SearchReport",
    "Schedule",
    "ScheduleError",
    "ShapeError",
    "Supernet",
    "Uniform",
    "Sweep",
    "Target",
    "Training",
    "TrainingError",
    "Unsupported",
    "UpdpError",
    "Width",
    "estimate_latency",
    "find_blocks",
    "fold_norms",
    "measure_latency",
    "linearize",
    "merge",
    "narrow",
    "per_channel",
    "progressive",
    "prune",
    "reestimate_norms",
    "refit",
    "register_activation",
    "register_coupling",
    "register_expansion",
    "register_form",
    "register_linear",
    "search",
    "summary",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'updp_tf' has no attribute '{name}'")
    return getattr(import_module(f"updp_tf.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

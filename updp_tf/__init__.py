"""Make trained Keras 3 vision models shallower: merge whole blocks into single layers.

The names below are loaded when they are first used: importing this package, or its pure modules, loads no Keras.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from updp_tf.blocks import Blocks, find_blocks
    from updp_tf.errors import (
        BudgetError,
        CalibrationError,
        FormError,
        MergeError,
        ModelError,
        OutputError,
        PlanError,
        ShapeError,
        UpdpError,
    )
    from updp_tf.forms import register_form
    from updp_tf.mending import fold_norms, reestimate_norms, refit
    from updp_tf.planning import Plan
    from updp_tf.pruning import Options, merge, prune, search
    from updp_tf.reporting import PruningReport, summary
    from updp_tf.scoring import CalibrationWarning

_MODULE_BY_NAME = {
    "Blocks": "blocks",
    "find_blocks": "blocks",
    "BudgetError": "errors",
    "CalibrationError": "errors",
    "FormError": "errors",
    "MergeError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "PlanError": "errors",
    "ShapeError": "errors",
    "UpdpError": "errors",
    "register_form": "forms",
    "fold_norms": "mending",
    "reestimate_norms": "mending",
    "refit": "mending",
    "Plan": "planning",
    "Options": "pruning",
    "PruningReport": "reporting",
    "merge": "pruning",
    "prune": "pruning",
    "search": "pruning",
    "summary": "reporting",
    "CalibrationWarning": "scoring",
}

__all__ = [
    "Blocks",
    "BudgetError",
    "CalibrationError",
    "CalibrationWarning",
    "FormError",
    "MergeError",
    "ModelError",
    "Options",
    "OutputError",
    "Plan",
    "PlanError",
    "PruningReport",
    "ShapeError",
    "UpdpError",
    "find_blocks",
    "fold_norms",
    "merge",
    "prune",
    "reestimate_norms",
    "refit",
    "register_form",
    "search",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'updp_tf' has no attribute '{name}'")
    return getattr(import_module(f"updp_tf.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What is known of each kind of call about channels.

A kind without a rule is a boundary: what it reads keeps its channels.
"""

from __future__ import annotations

from updp_tf import _keras
from updp_tf.errors import RuleError
from updp_tf.isomorphic.coupling import Coupling
from updp_tf.isomorphic.weighted import WEIGHTED
from updp_tf.isomorphic.weightless import WEIGHTLESS

COUPLINGS: dict[str, Coupling] = {**WEIGHTED, **WEIGHTLESS}
"""Rules by `Node.kind`: the class name of a stock layer or operation, the full name of any other."""


def register_coupling(layer_type: type, coupling: Coupling) -> None:
    """Teach this package how channels pass through a layer of your own.

    Args:
        layer_type: class of the layer.
        coupling: its rule; `per_channel(...)` and `ELEMENTWISE` cover most layers.

    Raises:
        RuleError: `layer_type` is Keras' own or has a rule already, or `coupling` is no `Coupling`.
    """
    if not isinstance(layer_type, type):
        raise RuleError(f"A rule is registered for a class of layers. Received: {layer_type!r}.")
    kind = _keras.kind_of(layer_type)
    if not isinstance(coupling, Coupling):
        raise RuleError(f"The rule of '{kind}' is a Coupling. Received: {type(coupling).__name__}.")
    if kind in COUPLINGS:
        raise RuleError(f"'{kind}' has a rule already.")
    COUPLINGS[kind] = coupling

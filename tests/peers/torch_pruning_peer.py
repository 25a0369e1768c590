"""What torch-pruning makes of two networks, for `tests/isomorphic/test_peer.py` to compare with.

    uv run --group peers python -m tests.peers.torch_pruning_peer

Writes torch_pruning.json beside this file: the groups of each network with their members, which of them torch-pruning
ranks together (isomorphic pruning), and which channels it keeps, by L1, of convolutions and dense layers alone. The
networks are those of keras.applications with the random weights of the test, rebuilt call by call in torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import keras
import numpy as np

from tests import zoo
from updp_tf.graph import read_graph
from updp_tf.structure import Ref

JSON = Path(__file__).with_name("torch_pruning.json")

SIZE = 64
RATIO = 0.4
ROUND_TO = 8
NETWORKS = ("ResNet50", "MobileNetV2")


def network(name: str) -> keras.Model:
    """A family of keras.applications with random weights; the same ones every time."""
    keras.utils.clear_session(free_memory=False)
    model = getattr(keras.applications, name)(weights=None, input_shape=(SIZE, SIZE, 3), classes=10)
    return zoo.randomise(model, seed=0)


def as_torch(model: keras.Model):
    """The same network as a torch module whose layers have Keras' names."""
    import torch
    from torch import nn

    graph = read_graph(model)

    def array(variable) -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(variable))

    def tensor(variable):
        return nn.Parameter(torch.tensor(array(variable)))

    def layer_of(node):
        layer, shape = node.layer, None if node.is_input else graph.shape(node.inputs[0])
        if node.kind in ("Conv2D", "DepthwiseConv2D"):
            depthwise = node.kind == "DepthwiseConv2D"
            filters, groups = (shape[-1], shape[-1]) if depthwise else (layer.filters, 1)
            padding = layer.kernel_size[0] // 2 if layer.padding == "same" else 0
            made = nn.Conv2d(
                shape[-1], filters, layer.kernel_size, layer.strides, padding, groups=groups, bias=layer.use_bias
            )
            kernel = array(layer.kernel)
            made.weight = tensor(kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(3, 2, 0, 1))
            if layer.use_bias:
                made.bias = tensor(layer.bias)
            return made
        if node.kind == "BatchNormalization":
            made = nn.BatchNorm2d(shape[-1], eps=layer.epsilon)
            made.weight, made.bias = tensor(layer.gamma), tensor(layer.beta)
            return made
        if node.kind == "Dense":
            made = nn.Linear(shape[-1], layer.units)
            made.weight, made.bias = nn.Parameter(torch.tensor(array(layer.kernel).T)), tensor(layer.bias)
            return made
        if node.kind == "ZeroPadding2D":
            (top, bottom), (left, right) = layer.padding
            return nn.ZeroPad2d((left, right, top, bottom))
        if node.kind == "MaxPooling2D":
            return nn.MaxPool2d(layer.pool_size, layer.strides)
        if node.kind in ("ReLU", "Activation"):
            return nn.ReLU6() if getattr(layer, "max_value", None) == 6.0 else nn.ReLU()
        if node.kind == "GlobalAveragePooling2D":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if node.kind == "Add" or node.is_input:
            return None
        raise ValueError(f"'{node.name}' is a {node.kind}, which is not rebuilt here.")

    class Rebuilt(nn.Module):
        def __init__(self):
            super().__init__()
            for node in graph:
                if (one := layer_of(node)) is not None:
                    self.add_module(node.name, one)

        def forward(self, x):
            values = {graph.input_refs[0]: x}
            for node in graph:
                if node.is_input:
                    continue
                read = [values[ref] for ref in node.inputs]
                values[Ref(node.name)] = read[0] + read[1] if node.kind == "Add" else getattr(self, node.name)(*read)
            return values[graph.output_refs[0]]

    return Rebuilt().eval()


def described(model: keras.Model) -> dict:
    """Groups, classes and kept channels of one network."""
    import torch
    import torch_pruning as peer
    from torch import nn

    rebuilt = as_torch(model)
    example = torch.zeros(1, 3, SIZE, SIZE)
    last = model.layers[-1].name
    importance = peer.importance.GroupMagnitudeImportance(p=1, target_types=[nn.Conv2d, nn.Linear])
    pruner = peer.pruner.BasePruner(
        rebuilt,
        example,
        importance,
        pruning_ratio=RATIO,
        global_pruning=True,
        isomorphic=True,
        round_to=ROUND_TO,
        ignored_layers=[getattr(rebuilt, last)],
    )
    name_of = {module: name for name, module in rebuilt.named_modules()}
    found: dict[str, dict] = {}
    classes: dict[tuple, int] = {}
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=[nn.Conv2d, nn.Linear]
    ):
        members, pattern = set(), []
        for dependency, _ in group:
            is_out = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
            source, target = dependency.source.module, dependency.target.module
            pattern.append((type(source).__name__, type(target).__name__, is_out))
            if target in name_of and list(target.parameters()):
                members.add((name_of[target], "out" if is_out else "in"))
        root, places = group[0]
        found[name_of[root.target.module]] = {
            "size": len(places),
            "members": sorted(map(list, members)),
            "class": classes.setdefault(tuple(pattern), len(classes)),
        }
    cut: dict[str, set[int]] = {}
    for group in pruner.step(interactive=True):
        root, places = group[0]
        cut.setdefault(name_of[root.target.module], set()).update(places)
    for name, one in found.items():
        kept = np.array([place not in cut.get(name, ()) for place in range(one["size"])])
        one["kept"] = np.packbits(kept).tobytes().hex()
    return found


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")}
    settings = {"size": SIZE, "ratio": RATIO, "round_to": ROUND_TO}
    networks = {name: described(network(name)) for name in NETWORKS}
    JSON.write_text(json.dumps({"versions": versions, "settings": settings, "networks": networks}, indent=1) + "\n")


if __name__ == "__main__":
    main()

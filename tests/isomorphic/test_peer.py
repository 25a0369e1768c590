"""The same groups, classes and kept channels as torch-pruning, whose answers `tests/peers` holds as JSON.

Differences, each of which the tests below pin down:

- The classes there look at every call on the way, so that a convolution behind a padding is of another class than one
  without; here they look at the layers that lose weights. So MobileNetV2's expansions of stride 2, whose padding is a
  layer of its own, are ranked apart there and with the others here.
- There, an order of discovery that differs between equal streams makes classes of their own.
- Scores there leave depthwise kernels out, sizes are rounded down, ties all go, and a group that would lose all its
  channels is left whole (here it keeps `round_to` of them). `chosen_as_there` does so.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.peers.torch_pruning_peer import JSON, RATIO, ROUND_TO, network
from updp_tf.graph import read_graph
from updp_tf.isomorphic.dependency import Group, find_dependencies
from updp_tf.isomorphic.importance import group_scores

PEER = json.loads(JSON.read_text())["networks"]


SLOW = ("ResNet50",)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PEER]
)
def both(request):
    """Our dependencies, and for each of our groups what is said of it there."""
    dependencies = find_dependencies(read_graph(network(request.param)))
    theirs = {frozenset(map(tuple, one["members"])): {**one, "name": name} for name, one in PEER[request.param].items()}
    return request.param, dependencies, theirs


def members_of(group: Group) -> frozenset[tuple[str, str]]:
    return frozenset((one.node.name, "in" if one.role == "in" else "out") for one in group.members)


def test_the_groups_are_the_same(both):
    _, dependencies, theirs = both
    ours = {members_of(group): group.size for group in dependencies.groups}
    assert ours == {members: one["size"] for members, one in theirs.items()}


def test_the_classes_are_the_same_but_for_what_stands_between_layers(both):
    name, dependencies, theirs = both
    pairs = {(str(group.signature), theirs[members_of(group)]["class"]) for group in dependencies.groups}
    ours_by_theirs: dict[int, set[str]] = {}
    for signature, number in pairs:
        ours_by_theirs.setdefault(number, set()).add(signature)
    # what is one class there is one class here
    assert {number: len(found) for number, found in ours_by_theirs.items()} == dict.fromkeys(ours_by_theirs, 1)
    split = [signature for signature in {one for one, _ in pairs} if sum(one == signature for one, _ in pairs) > 1]
    padded = [
        group.name
        for group in dependencies.groups
        if str(group.signature) in split
        and any(
            dependencies.graph.by_name[ref.node].kind == "ZeroPadding2D" for m in group.members for ref in m.node.inputs
        )
    ]
    if name == "MobileNetV2":
        assert len(padded) == 4
    else:
        assert not split


def chosen_as_there(dependencies, scores, classes) -> dict[str, np.ndarray]:
    """Positions that are kept in each group: one threshold per class, all ties go, sizes rounded down, never to 0."""
    kept = {}
    for number in set(classes.values()):
        groups = [group for group in dependencies.groups if classes[group.name] == number]
        every = np.sort(np.concatenate([scores[group.name] for group in groups]))
        n = len(every) - int(len(every) * (1 - RATIO))
        for group in groups:
            own = scores[group.name]
            keep = int((own > every[n - 1]).sum())
            if keep < group.size:
                keep = keep - keep % ROUND_TO or group.size
            kept[group.name] = np.sort(np.argsort(own, kind="stable")[group.size - keep :])
    return kept


def test_the_kept_channels_are_the_same(both):
    _, dependencies, theirs = both
    told = {group.name: theirs[members_of(group)] for group in dependencies.groups}
    plain = tuple(
        replace(
            group,
            members=tuple(m for m in group.members if m.node.kind in ("Conv2D", "Dense") and m.role in ("in", "out")),
        )
        for group in dependencies.groups
    )
    scores = group_scores(replace(dependencies, groups=plain), "l1")
    kept = chosen_as_there(dependencies, scores, {name: one["class"] for name, one in told.items()})
    for group in dependencies.groups:
        bits = np.frombuffer(bytes.fromhex(told[group.name]["kept"]), dtype=np.uint8)
        there = np.flatnonzero(np.unpackbits(bits)[: group.size])
        assert len(kept[group.name]) == len(there), group.name
        # sums in float32 there may swap two channels whose scores are equal to six digits
        swapped = np.setxor1d(kept[group.name], there)
        assert len(swapped) in (0, 2), group.name
        np.testing.assert_allclose(scores[group.name][swapped[:1]], scores[group.name][swapped[1:]], rtol=1e-5)

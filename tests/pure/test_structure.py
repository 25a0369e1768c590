"""Graphs and candidates as frozen values, without Keras."""

from __future__ import annotations

import subprocess
import sys

import pytest

from updp_tf.errors import ModelError
from updp_tf.structure import Candidate, Cost, ModelGraph, Node, Ref, Refusal, map_refs, refs_in

SHAPE = (None, 8, 8, 4)


def node(name: str, *reads: Ref | str, kind: str = "Conv2D", layer=None, n_outputs: int = 1, **kwargs) -> Node:
    refs = tuple(Ref(read) if isinstance(read, str) else read for read in reads)
    return Node(name, layer or object(), kind, refs, kwargs, (SHAPE,) * n_outputs, ("float32",) * n_outputs)


def graph(*nodes: Node, outputs=None) -> ModelGraph:
    source = node("in", kind="InputLayer")
    return ModelGraph("g", (source, *nodes), Ref("in"), Ref(nodes[-1].name) if outputs is None else outputs)


def test_pure_modules_load_no_keras() -> None:
    modules = (
        "activations",
        "affine",
        "cost",
        "errors",
        "forms",
        "memory",
        "moments",
        "planning",
        "samples",
        "searching",
        "partitioning",
    )
    code = f"import sys\nfor m in {(*modules, 'structure')}: __import__('updp_tf.' + m)\n"
    code += "sys.exit(' '.join({'keras', 'tensorflow', 'rich'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refs_in_nested_data() -> None:
    data = ([Ref("a"), 3], {"z": Ref("b", 1), "k": (Ref("c"), "a")}, None)
    assert refs_in(data) == (Ref("a"), Ref("c"), Ref("b", 1))  # dicts by sorted key, as Keras flattens them
    assert map_refs(data, str) == (["a", 3], {"z": "b:1", "k": ("c", "a")}, None)
    assert refs_in("a") == ()


def test_a_node_knows_what_it_reads() -> None:
    one = Node("n", None, "Add", ([Ref("a"), Ref("b")],), {"mask": Ref("c")}, (SHAPE,), ("float32",))
    assert one.inputs == (Ref("a"), Ref("b"), Ref("c")) and not one.is_input


def test_readers_and_shared_layers() -> None:
    layer = object()
    one = graph(node("a", "in", layer=layer), node("b", "a", layer=layer), node("c", "a", "b", "a"))
    assert one.readers == {Ref("in"): ("a",), Ref("a"): ("b", "c"), Ref("b"): ("c",)}
    assert one.called_once == {"in", "c"}
    assert one.position == {"in": 0, "a": 1, "b": 2, "c": 3}
    assert one.output_refs == (Ref("c"),) and one.input_refs == (Ref("in"),)
    assert one.shape(Ref("a")) == SHAPE and one.dtype(Ref("a")) == "float32"
    assert [n.name for n in one] == ["in", "a", "b", "c"]


def test_an_invalid_graph_cannot_exist() -> None:
    with pytest.raises(ModelError, match="The graph of 'g' has two calls named 'a'"):
        graph(node("a", "in"), node("a", "in"))
    with pytest.raises(ModelError, match="'a' reads 'b', which no call before it writes"):
        graph(node("a", "b"), node("b", "in"))
    with pytest.raises(ModelError, match="'b' reads 'a:1', which no call before it writes"):
        graph(node("a", "in"), node("b", Ref("a", 1)))
    with pytest.raises(ModelError, match="The graph of 'g' names 'z', which no call writes"):
        graph(node("a", "in"), outputs=[Ref("a"), Ref("z")])


def test_replacing_a_site_redirects_its_readers() -> None:
    one = graph(
        node("a", "in"),
        node("b", "a"),
        node("c", "b", "a"),
        node("d", "c", other=Ref("a")),
        outputs={"x": Ref("d"), "y": Ref("c")},
    )
    new = one.replace_site(("b", "c"), [node("m", "a")], Ref("c"), Ref("m"))
    assert [n.name for n in new] == ["in", "a", "m", "d"]
    assert new.by_name["d"].inputs == (Ref("m"), Ref("a"))
    assert new.outputs == {"x": Ref("d"), "y": Ref("m")}
    assert [n.name for n in one] == ["in", "a", "b", "c", "d"]
    removed = one.replace_site(("b", "c"), [], Ref("c"), Ref("a"))
    assert removed.by_name["d"].inputs == (Ref("a"), Ref("a")) and removed.outputs["y"] == Ref("a")


def test_a_site_that_is_read_inside_cannot_go() -> None:
    one = graph(node("a", "in"), node("b", "a"), node("c", "b", "a"))
    with pytest.raises(ModelError, match="'c' reads 'a', which no call before it writes"):
        one.replace_site(("a", "b"), [node("m", "in")], Ref("b"), Ref("m"))


def test_costs_of_parts_that_run_one_after_the_other() -> None:
    assert Cost(1, 2, 30) + Cost(10, 20, 3) == Cost(11, 22, 30)


def test_values_print_and_have_keys() -> None:
    assert str(Refusal("block", "conv3", "why")) == "block: conv3: why"
    assert str(Ref("a")) == "a" and str(Ref("a", 2)) == "a:2"
    assert Candidate(("a", "b"), "conv3", 0.1, Cost()).key == "a+b=conv3"
    with pytest.raises(AttributeError):
        Refusal("a", "b", "c").site = "d"

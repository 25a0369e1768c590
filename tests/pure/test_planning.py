import json
import re
import resource
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from updp_tf.errors import OutputError, PlanError
from updp_tf.planning import Edit, Plan, arrays_of, check_fingerprint

FIRST = Edit(
    blocks=("block_1_add",),
    site=("block_1_conv", "block_1_relu", "block_1_add"),
    form="conv3",
    options={"kernel_size": 3, "skip": "kept", "crop": (1, 1), "ridge": 1e-4, "tail": None, "bias": True},
    score=0.1 + 0.2,
    r2=0.93,
    arrays="block_1_add",
    fingerprint="abc",
)
SPAN = Edit(blocks=("b2", "b3"), site=("b2", "b3"), form="remove", score=0.5)
PLAN = Plan(
    fingerprint="f" * 64,
    model="mobilenet",
    edits=(FIRST, SPAN),
    budget={"macs": 0.7, "merged": 3},
    versions={"updp-tf": "0.1.0", "keras": "3.15.1"},
    notes=("5 images a class",),
)
ARRAYS = {
    "block_1_add/0/kernel": np.linspace(-1, 1, 54, dtype=np.float32).reshape(3, 3, 2, 3),
    "block_1_add/0/bias": np.array([0.1, np.pi, -0.0]),
}


def as_document(plan=PLAN, **changes):
    return json.loads(plan.to_json()) | changes


# --- the document ----------------------------------------------------------------------------------------------------


def test_a_plan_survives_the_round_trip():
    text = PLAN.to_json()
    assert Plan.from_json(text) == PLAN
    assert Plan.from_json(text).to_json() == text
    assert next(iter(json.loads(text))) == "schema"


texts = st.text(min_size=1, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def plans(draw):
    names = draw(st.lists(texts, unique=True, max_size=5))
    edits = tuple(
        Edit(
            blocks=(name,),
            site=(name,),
            form=draw(texts),
            options=draw(st.dictionaries(texts, json_values, max_size=3)),
            score=draw(finite),
            r2=draw(st.none() | finite),
            arrays=draw(st.none() | st.just(f"{number}")),
        )
        for number, name in enumerate(names)
    )
    return Plan(
        fingerprint=draw(st.text()),
        model=draw(st.text()),
        edits=edits,
        budget=draw(st.dictionaries(texts, finite, max_size=2)),
        versions=draw(st.dictionaries(texts, texts, max_size=2)),
        notes=tuple(draw(st.lists(st.text(), max_size=2))),
    )


@given(plan=plans())
def test_every_plan_survives_the_round_trip_to_the_last_bit(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    # == takes 0.0 for -0.0
    assert [edit.score.hex() for edit in again.edits] == [edit.score.hex() for edit in plan.edits]


def test_numpy_numbers_and_lists_become_what_json_gives_back():
    edit = Edit(["b"], ["n"], "conv3", {"k": np.int64(3), "s": [1, [2]], "f": np.float32(0.5)}, score=np.float64(0.25))
    assert edit.options == {"k": 3, "s": (1, (2,)), "f": 0.5}
    assert type(edit.options["k"]) is int and type(edit.score) is float and edit.blocks == ("b",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "needs both the blocks and the site"),
        ({"site": ()}, "needs both the blocks and the site"),
        ({"blocks": "b2"}, "'blocks' of an edit is a list of texts. Received: 'b2'"),
        ({"site": ("a", "a")}, "'site' of an edit is a list of different names"),
        ({"site": ("a", 3)}, "'site' of an edit is a list of texts"),
        ({"form": ""}, "'form' of an edit is a text that is not empty"),
        ({"options": {"a": {1, 2}}}, "'options' of an edit is an object of what JSON can hold"),
        ({"options": {3: 4}}, "'options' of an edit is an object of what JSON can hold"),
        ({"options": {"a": float("nan")}}, "'options' of an edit"),
        ({"options": [1]}, "'options' of an edit is an object. Received"),
        ({"score": float("nan")}, "'score' of an edit is a finite number. Received: nan"),
        ({"score": None}, "'score' of an edit is a finite number. Received: None"),
        ({"score": True}, "'score' of an edit is a finite number. Received: True"),
        ({"r2": "0.9"}, "'r2' of an edit is a finite number. Received: '0.9'"),
        ({"arrays": 3}, "'arrays' of an edit is a text"),
        ({"fingerprint": None}, "'fingerprint' of an edit is a text"),
    ],
)
def test_malformed_edits(changes, message):
    with pytest.raises(PlanError, match=message):
        replace(SPAN, **changes)


def test_plans_that_contradict_themselves():
    with pytest.raises(PlanError, match="The block 'b3' belongs to two edits, 'b2\\+b3' and 'b3'"):
        replace(PLAN, edits=(SPAN, Edit(("b3",), ("x",), "conv3")))
    with pytest.raises(PlanError, match="The call 'b2' belongs to two edits"):
        replace(PLAN, edits=(SPAN, Edit(("x",), ("b2",), "conv3")))
    for other in ("block_1_add", "block_1_add/0"):
        with pytest.raises(PlanError, match="Two edits name the same arrays"):
            replace(PLAN, edits=(FIRST, replace(SPAN, arrays=other)))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "p.json: a plan is a JSON object. Received: list"),
        ({}, "p.json: the field 'schema' is missing"),
        (as_document(schema=2), "p.json: 'schema' is 2: this version of updp-tf reads plans of schema 1"),
        (as_document(schema="1"), "p.json: 'schema' is '1': this version"),
        (as_document(schema=True), "p.json: 'schema' is True: this version"),
        (as_document(color="red"), "p.json: the field 'color' is unknown"),
        ({k: v for k, v in as_document().items() if k != "model"}, "p.json: the field 'model' is missing"),
        (as_document(edits={}), "p.json: 'edits' of a plan is a list of edits"),
        (as_document(edits=[3]), r"p.json: 'edits\[0\]': expected an object. Received: int"),
        (as_document(edits=[{}]), r"p.json: 'edits\[0\]': the field 'blocks' is missing"),
        (as_document(notes="x"), "p.json: 'notes' of a plan is a list of texts"),
        (as_document(versions={"a": 1}), "p.json: 'versions' of a plan is an object of texts"),
        (as_document(budget=None), "p.json: 'budget' of a plan is an object"),
        (as_document(fingerprint=3), "p.json: 'fingerprint' of a plan is a text"),
        (as_document(arrays="a.npz"), "p.json: 'arrays' is null, or an object of 'file' and 'sha256'"),
        (as_document(arrays={"file": "../a.npz", "sha256": ""}), "p.json: 'arrays.file' is the name of an .npz file"),
        (as_document(arrays={"file": "/etc/a.npz", "sha256": ""}), "'arrays.file' is the name"),
        (as_document(arrays={"file": "a.npz", "sha256": 3}), "'arrays.sha256' is a text"),
    ],
)
def test_malformed_documents_name_file_and_field(document, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(document), source="p.json")


def test_the_second_edit_is_named():
    document = as_document()
    document["edits"][1]["score"] = "low"
    with pytest.raises(
        PlanError, match=r"p.json: 'edits\[1\]': 'score' of an edit is a finite number. Received: 'low'"
    ):
        Plan.from_json(json.dumps(document), source="p.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.json: this is no plan: Expecting value"),
        (PLAN.to_json()[:-20], "p.json: this is no plan"),
        ('{"schema": 1, "schema": 1}', "the field 'schema' is given twice"),
        (PLAN.to_json().replace("0.5", "NaN"), "NaN is no number that JSON knows"),
        ("[" * 10**5, "p.json: this is no plan"),
    ],
)
def test_texts_that_are_no_plan(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text, source="p.json")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.json"


def left_in(folder):
    return sorted(item.name for item in folder.iterdir())


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].tobytes() == array.tobytes()


def test_files_survive_the_round_trip(path):
    PLAN.save(path, ARRAYS)
    assert left_in(path.parent) == ["plan.json", "plan.npz"]
    plan, arrays = Plan.load(path)
    assert plan == PLAN
    assert_same(arrays, ARRAYS)
    assert list(arrays_of(FIRST, arrays)) == ["0/kernel", "0/bias"]
    assert arrays_of(SPAN, arrays) == arrays_of(FIRST, None) == {}


def test_without_arrays_there_is_one_file(path):
    PLAN.save(str(path))
    assert left_in(path.parent) == ["plan.json"]
    assert Plan.load(str(path)) == (PLAN, None)


def test_the_same_plan_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        PLAN.save(tmp_path / folder / "plan.json", ARRAYS)
    for name in ("plan.json", "plan.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "plan.npz") as archive:
        assert {item.date_time[0] for item in archive.infolist()} == {1980}  # no time of day in it


@pytest.mark.parametrize("name", ["plan.json", "plan.npz"])
def test_neither_file_is_replaced_without_force(path, name):
    path.with_name(name).write_text("old")
    with pytest.raises(OutputError, match=f"{name}' exists already"):
        PLAN.save(path, ARRAYS)
    assert left_in(path.parent) == [name]
    assert path.with_name(name).read_text() == "old"
    PLAN.save(path, ARRAYS, force=True)
    assert_same(Plan.load(path)[1], ARRAYS)


def test_a_failure_while_writing_leaves_both_old_files(path):
    PLAN.save(path, ARRAYS)

    # the arrays fit, the document after them does not: a real limit on the size of files, as a quota is
    changed = {name: array + 1 for name, array in ARRAYS.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match="plan.json': the disk or its quota is full"):
            replace(PLAN, notes=("x" * 200_000,)).save(path, changed, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_in(path.parent) == ["plan.json", "plan.npz"]
    plan, arrays = Plan.load(path)
    assert plan == PLAN
    assert_same(arrays, ARRAYS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"arrays of 'block_1_add' \('block_1_add/...'\) are missing"),
        ({**ARRAYS, "b2/0": np.zeros(1)}, "the array 'b2/0' belongs to no edit"),
        ({"block_1_add": np.zeros(1)}, "the array 'block_1_add' belongs to no edit"),
        ({"block_1_add/0": np.array([{}])}, "'block_1_add/0' is no array of numbers. Received: object"),
        ({"block_1_add/0": [1.0]}, "'block_1_add/0' is no array of numbers. Received: <class 'list'>"),
    ],
)
def test_arrays_that_do_not_fit(path, arrays, message):
    with pytest.raises(PlanError, match=message):
        PLAN.save(path, arrays)
    assert left_in(path.parent) == []


def test_a_plan_named_like_its_arrays(path):
    with pytest.raises(PlanError, match="is the name of its arrays"):
        PLAN.save(path.with_suffix(".npz"), ARRAYS)


def test_files_that_cannot_be_loaded(path):
    with pytest.raises(PlanError, match="plan.json' cannot be read: .*No such file"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="plan.json' cannot be read"):
        Plan.load(path)
    path.write_text("{}")
    with pytest.raises(PlanError, match="plan.json': the field 'schema' is missing"):
        Plan.load(path)


def test_arrays_that_are_missing_other_or_damaged(path):
    PLAN.save(path, ARRAYS)
    beside = path.with_suffix(".npz")
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-30])
    with pytest.raises(PlanError, match="plan.npz' holds other arrays than those '.*plan.json' was saved with"):
        Plan.load(path)
    beside.unlink()
    with pytest.raises(PlanError, match="names the arrays 'plan.npz', which are not beside it"):
        Plan.load(path)


def forge(path, write):
    """Replace the arrays, and the sum that would give it away."""
    from updp_tf.run_dir import sha256_of

    beside = path.with_suffix(".npz")
    digest = sha256_of(beside)
    write(beside)
    path.write_text(path.read_text().replace(digest, sha256_of(beside)))


def test_a_damaged_archive_is_named_even_if_its_sum_is_right(path):
    PLAN.save(path, ARRAYS)
    forge(path, lambda beside: beside.write_bytes(beside.read_bytes()[:100]))
    with pytest.raises(PlanError, match="plan.npz' cannot be read"):
        Plan.load(path)


def test_nothing_is_unpickled(path):
    PLAN.save(path, ARRAYS)
    forge(path, lambda beside: np.savez(beside, **{"block_1_add/0": np.array([{"a": 1}], dtype=object)}))
    with pytest.raises(PlanError, match="plan.npz' cannot be read: Object arrays cannot be loaded"):
        Plan.load(path)


# --- the model a plan is for -----------------------------------------------------------------------------------------

NODES = ("input", *FIRST.site, *SPAN.site, "head")


def test_the_same_fingerprint_is_enough():
    check_fingerprint(PLAN, PLAN.fingerprint, ())


@pytest.mark.parametrize(
    ("nodes", "site_fingerprint", "message"),
    [
        (("input", "b2", "b3"), None, "block 'block_1_add' differs, this model has no call 'block_1_conv'"),
        (("input", *FIRST.site, "b2"), None, "block 'b2+b3' differs, this model has no call 'b3'"),
        ((*FIRST.site, "b3", "b2"), None, "block 'b2+b3' differs, its calls come in another order"),
        (NODES, lambda site: "xyz", "block 'block_1_add' differs, its calls have other settings or shapes"),
        (NODES, lambda site: "abc", "calls of the same names, but the model around or inside them differs"),
        (NODES, None, "calls of the same names, but the model around or inside them differs"),
    ],
)
def test_another_model_is_refused_by_its_first_block_that_differs(nodes, site_fingerprint, message):
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        check_fingerprint(PLAN, "0" * 64, nodes, site_fingerprint=site_fingerprint)
    assert str(caught.value).startswith("The plan was made for another model ('mobilenet'): ")

"""Plans: which part of which model becomes what, as a JSON document with the fitted arrays beside it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from updp_tf.errors import PlanError
from updp_tf.run_dir import sha256_of, write_atomically

SCHEMA = 1
READABLE_SCHEMAS = (1,)


@dataclass(frozen=True)
class Edit:
    """One block or span, and the form it takes.

    Attributes:
        blocks: names of the blocks it replaces.
        site: names of the nodes it replaces, in topological order.
        form: name of the form.
        options: of the form: what JSON can hold (lists become tuples).
        score: what it was expected to cost in accuracy.
        r2: explained part of the output on held-out positions, None where nothing was measured.
        arrays: the fitted arrays beside the plan are those whose name begins with `<arrays>/`; None for none.
        fingerprint: of the site in the model the plan was made for; empty where unknown.
    """

    blocks: tuple[str, ...]
    site: tuple[str, ...]
    form: str
    options: Mapping[str, Any] = field(default_factory=dict)
    score: float = 0.0
    r2: float | None = None
    arrays: str | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        _normalise(self, "an edit")
        if not self.blocks or not self.site:
            raise PlanError(f"The edit of {self.blocks or self.site} needs both the blocks and the site it replaces.")

    @property
    def name(self) -> str:
        """The names of its blocks, joined."""
        return "+".join(self.blocks)


@dataclass(frozen=True)
class Plan:
    """Which forms a model takes.

    Attributes:
        fingerprint: of the model's structure.
        model: its name.
        edits: in graph order; their sites do not overlap.
        budget: as it was asked.
        versions: of the packages that made the plan.
        notes: sentences for people.
        schema: version of the document.
        weights: hash of the weights that the arrays were fitted to; empty where there are none.
    """

    fingerprint: str
    model: str
    edits: tuple[Edit, ...] = ()
    budget: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA
    weights: str = ""

    def __post_init__(self) -> None:
        _normalise(self, "a plan")
        if self.schema not in READABLE_SCHEMAS:
            raise PlanError(f"'schema' is {self.schema}: {_readable_versions()}.")
        for kind in ("block", "call"):
            owner: dict[str, str] = {}
            for edit in self.edits:
                for name in edit.blocks if kind == "block" else edit.site:
                    if name in owner:
                        raise PlanError(f"The {kind} '{name}' belongs to two edits, '{owner[name]}' and '{edit.name}'.")
                    owner[name] = edit.name
        keys = [f"{edit.arrays}/" for edit in self.edits if edit.arrays is not None]
        for first, second in itertools.permutations(keys, 2):
            if second.startswith(first):
                raise PlanError(f"Two edits name the same arrays: '{first}' and '{second}'.")

    def to_json(self) -> str:
        """Return the document, without arrays; `from_json` gives back an equal plan."""
        return json.dumps(_document(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> Plan:
        """Return the plan that a document holds.

        Args:
            text: the document.
            source: what error messages call it.

        Raises:
            PlanError: what is wrong, in which field of what.
        """
        try:
            document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source}: this is no plan: {error}.") from error
        return _parse(document, source)

    def save(
        self,
        path: str | os.PathLike[str],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Write the document to `path`, and arrays to the file of the same stem that ends in `.npz`.

        Both are complete on the disk before either gets its name, and the arrays get theirs first: a document never
        names a file that is not there. It holds the SHA-256 of the arrays, so that `load` notices other ones.

        Args:
            path: of the document, for instance `plan.json`.
            arrays: by name `<edit.arrays>/<anything>`; every edit that names arrays has some, and no other has.
            force: replace files that exist.

        Raises:
            OutputError: a file exists and `force` is False, or the disk is full.
            PlanError: arrays that do not fit the edits, or that are not plain numbers.
        """
        path = Path(path)
        _check_arrays(self, arrays, source=f"'{path}'")
        beside = path.with_suffix(".npz")
        if beside == path:
            raise PlanError(f"A plan is a JSON document: '{path}' is the name of its arrays.")
        document = _document(self)
        content = b"" if arrays is None else _npz(arrays)
        if arrays is not None:
            document["arrays"] = {"file": beside.name, "sha256": hashlib.sha256(content).hexdigest()}
        with write_atomically(path, force=force) as json_file:
            with open(json_file, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # the arrays may not get their name before this is safe
            if arrays is not None:
                with write_atomically(beside, force=force) as npz_file:
                    npz_file.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Plan, dict[str, np.ndarray] | None]:
        """Return the plan in a file, and the arrays beside it, None where it was saved without.

        Raises:
            PlanError: a file that is missing, damaged or malformed: which one, and where.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"'{path}' cannot be read: {error}.") from error
        plan = cls.from_json(text, source=f"'{path}'")
        named = json.loads(text).get("arrays")
        if named is None:
            return plan, None
        beside = path.with_name(named["file"])
        if not beside.is_file():
            raise PlanError(f"'{path}' names the arrays '{beside.name}', which are not beside it.")
        if sha256_of(beside) != named["sha256"]:
            raise PlanError(f"'{beside}' holds other arrays than those '{path}' was saved with, or is damaged.")
        arrays = _read_npz(beside)
        _check_arrays(plan, arrays, source=f"'{beside}'")
        return plan, arrays


def arrays_of(edit: Edit, arrays: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Return the arrays of one edit, by the part of their name after `<edit.arrays>/`; empty where it has none."""
    if edit.arrays is None or arrays is None:
        return {}
    prefix = f"{edit.arrays}/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def check_fingerprint(
    plan: Plan,
    fingerprint: str,
    node_names: Sequence[str],
    *,
    site_fingerprint: Callable[[tuple[str, ...]], str] | None = None,
) -> None:
    """Check that a plan was made for a model.

    Args:
        plan: to be applied.
        fingerprint: of the model at hand.
        node_names: of its calls, in topological order.
        site_fingerprint: of some of its calls; finds the block that differs where all names are the same.

    Raises:
        PlanError: the fingerprints differ; the message names the first block of the plan that does.
    """
    if plan.fingerprint == fingerprint:
        return
    raise PlanError(
        f"The plan was made for another model ('{plan.model}'): {_first_difference(plan, node_names, site_fingerprint)}"
    )


def _first_difference(
    plan: Plan, node_names: Sequence[str], site_fingerprint: Callable[[tuple[str, ...]], str] | None
) -> str:
    position = {name: index for index, name in enumerate(node_names)}
    for edit in plan.edits:
        missing = [name for name in edit.site if name not in position]
        if missing:
            return f"block '{edit.name}' differs, this model has no call '{missing[0]}'."
        places = [position[name] for name in edit.site]
        if places != sorted(places):
            return f"block '{edit.name}' differs, its calls come in another order in this model."
        if site_fingerprint and edit.fingerprint and site_fingerprint(edit.site) != edit.fingerprint:
            return f"block '{edit.name}' differs, its calls have other settings or shapes in this model."
    return "the blocks it merges have calls of the same names, but the model around or inside them differs."


# --- the document --------------------------------------------------------------------------------------------------


def _document(plan: Plan) -> dict[str, Any]:
    # the version first, so that a reader of another version sees it before anything else
    return {
        "schema": plan.schema,
        **{key: value for key, value in asdict(plan).items() if key != "schema"},
        "arrays": None,
    }


def _parse(document: Any, source: str) -> Plan:
    if not isinstance(document, dict):
        raise PlanError(f"{source}: a plan is a JSON object. Received: {type(document).__name__}.")
    if "schema" not in document:
        raise PlanError(f"{source}: the field 'schema' is missing: this is no plan.")
    if document["schema"] not in READABLE_SCHEMAS or isinstance(document["schema"], bool):
        raise PlanError(f"{source}: 'schema' is {document['schema']!r}: {_readable_versions()}.")
    values = dict(document)
    _check_named_arrays(values.pop("arrays", None), source)
    edits = values.get("edits")
    if isinstance(edits, list):
        values["edits"] = tuple(_build(Edit, edit, f"{source}: 'edits[{n}]'") for n, edit in enumerate(edits))
    return _build(Plan, values, source)


def _build(kind: type, values: Any, source: str) -> Any:
    """Return `kind(**values)`, every field present, none unknown; its own checks name the field."""
    if not isinstance(values, dict):
        raise PlanError(f"{source}: expected an object. Received: {type(values).__name__}.")
    names = [item.name for item in fields(kind)]
    for name in names:
        if name not in values:
            raise PlanError(f"{source}: the field '{name}' is missing.")
    for name in values:
        if name not in names:
            raise PlanError(f"{source}: the field '{name}' is unknown.")
    try:
        return kind(**values)
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error


def _check_named_arrays(named: Any, source: str) -> None:
    if named is None:
        return
    if not (isinstance(named, dict) and set(named) == {"file", "sha256"}):
        raise PlanError(f"{source}: 'arrays' is null, or an object of 'file' and 'sha256'. Received: {named!r}.")
    file = named["file"]
    # beside the plan and nowhere else: a document must not make its reader open other files
    if not isinstance(file, str) or file != Path(file).name or not file.endswith(".npz"):
        raise PlanError(f"{source}: 'arrays.file' is the name of an .npz file beside the plan. Received: {file!r}.")
    if not isinstance(named["sha256"], str):
        raise PlanError(f"{source}: 'arrays.sha256' is a text. Received: {named['sha256']!r}.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number that JSON knows")


def _readable_versions() -> str:
    versions = ", ".join(map(str, READABLE_SCHEMAS))
    return f"this version of updp-tf reads plans of schema {versions}"


# --- checks of field values ----------------------------------------------------------------------------------------


def _normalise(value: Edit | Plan, what: str) -> None:
    """Check the types of all fields and bring them to one form: tuples, dicts, Python numbers."""
    checks: dict[str, Callable[[Any], Any]] = {
        "blocks": _names,
        "site": _names,
        "form": _text,
        "options": _json_object,
        "score": _number,
        "r2": lambda given: None if given is None else _number(given),
        "arrays": lambda given: None if given is None else _text(given),
        "fingerprint": _any_text,
        "model": _any_text,
        "edits": _edits,
        "budget": _json_object,
        "versions": _text_by_text,
        "notes": _texts,
        "schema": _whole,
        "weights": _any_text,
    }
    for item in fields(value):
        given = getattr(value, item.name)
        try:
            checked = checks[item.name](given)
        except _WrongValueError as error:
            raise PlanError(f"'{item.name}' of {what} is {error}. Received: {given!r}.") from None
        object.__setattr__(value, item.name, checked)


class _WrongValueError(Exception):
    """What a value should have been."""


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise _WrongValueError("a text that is not empty")
    return given


def _any_text(given: Any) -> str:
    if not isinstance(given, str):
        raise _WrongValueError("a text")
    return given


def _texts(given: Any) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise _WrongValueError("a list of texts")
    return tuple(given)


def _names(given: Any) -> tuple[str, ...]:
    names = _texts(given)
    if not all(names) or len(set(names)) < len(names):
        raise _WrongValueError("a list of different names")
    return names


def _number(given: Any) -> float:
    if isinstance(given, (int, float, np.integer, np.floating)) and not isinstance(given, bool):
        if math.isfinite(given):
            return float(given)
    raise _WrongValueError("a finite number")


def _whole(given: Any) -> int:
    if not isinstance(given, int) or isinstance(given, bool):
        raise _WrongValueError("a whole number")
    return given


def _edits(given: Any) -> tuple[Edit, ...]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(edit, Edit) for edit in given):
        raise _WrongValueError("a list of edits")
    return tuple(given)


def _text_by_text(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for pair in given.items() for text in pair):
        raise _WrongValueError("an object of texts")
    return dict(given)


def _json_object(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise _WrongValueError("an object")
    return _json_value(given)


def _json_value(given: Any) -> Any:
    """Return what JSON can hold, in the one form that comes back from it: tuples, dicts, Python numbers."""
    if given is None or isinstance(given, (bool, str, int)):
        return given
    if isinstance(given, np.generic):
        return _json_value(given.item())
    if isinstance(given, float) and math.isfinite(given):
        return given
    if isinstance(given, (list, tuple)):
        return tuple(_json_value(item) for item in given)
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        return {key: _json_value(item) for key, item in given.items()}
    raise _WrongValueError("an object of what JSON can hold")


# --- the arrays ----------------------------------------------------------------------------------------------------


def _check_arrays(plan: Plan, arrays: Mapping[str, np.ndarray] | None, *, source: str) -> None:
    if arrays is None:
        return
    wanted = {edit.arrays: edit.name for edit in plan.edits if edit.arrays is not None}
    for name, array in arrays.items():
        owner = next((key for key in wanted if name.startswith(f"{key}/")), None)
        if owner is None:
            raise PlanError(f"{source}: the array '{name}' belongs to no edit.")
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise PlanError(
                f"{source}: '{name}' is no array of numbers. Received: {getattr(array, 'dtype', type(array))}."
            )
    for key, name in wanted.items():
        if not any(array_name.startswith(f"{key}/") for array_name in arrays):
            raise PlanError(f"{source}: the arrays of '{name}' ('{key}/...') are missing.")


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    # not np.savez(**arrays): it would pickle, and it writes the time of day; the same arrays are the same bytes here
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return content.getvalue()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PlanError(f"'{path}' cannot be read: {error}.") from error

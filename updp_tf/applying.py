"""Plans out of chosen forms, and back: the blocks of a plan on the model it was made for, and the maps of its forms."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from updp_tf.blocks import Blocks, find_blocks
from updp_tf.errors import PlanError
from updp_tf.forms import Fitted, fitted_from_arrays, fitted_to_arrays, form_by_name
from updp_tf.graph import fingerprint, weights_hash
from updp_tf.merging import Choice
from updp_tf.planning import Edit, Plan, arrays_of, check_fingerprint
from updp_tf.scoring import Start, require_names, start_without_images
from updp_tf.structure import Candidate, Refusal, block_name

PACKAGES = ("updp-tf", "keras", "numpy", "scipy")
"""Whose versions a plan tells."""


def plan_of(
    model: Any,
    blocks: Blocks,
    chosen: Sequence[Candidate],
    fitted: Mapping[str, Fitted],
    *,
    budget: Mapping[str, float],
    notes: tuple[str, ...] = (),
    has_arrays: bool = False,
) -> Plan:
    """Return chosen forms as a plan.

    Args:
        model: that they were chosen for.
        blocks: of the model.
        chosen: a form for each block, or span of blocks, that goes.
        fitted: their maps, by block name.
        budget: they were chosen under.
        notes: for people.
        has_arrays: the maps will be saved beside the plan.
    """
    joined = blocks.joined(one.blocks for one in chosen)
    edits = [
        Edit(
            blocks=one.blocks,
            site=joined[block_name(one.blocks)].nodes,
            form=one.form,
            options=dict(one.options),
            score=one.score,
            r2=fitted[block_name(one.blocks)].r2,
            arrays=block_name(one.blocks) if has_arrays else None,
        )
        for one in chosen
    ]
    return Plan(
        fingerprint=fingerprint(blocks.graph),
        weights=weights_hash(blocks.graph),
        model=model.name,
        edits=tuple(edits),
        budget=dict(budget),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        notes=notes,
    )


def arrays_beside(plan: Plan, fitted: Mapping[str, Fitted]) -> dict[str, np.ndarray]:
    """Return the maps of a plan's forms as the arrays that are saved beside it."""
    return {
        f"{edit.arrays}/{name}": array
        for edit in plan.edits
        for name, array in fitted_to_arrays(fitted[block_name(edit.blocks)]).items()
    }


def blocks_of_plan(model: Any, plan: Plan) -> tuple[Blocks, tuple[Choice, ...]]:
    """Return a model's blocks, the plan's spans joined, and the form it chooses for each block that goes.

    Raises:
        PlanError: the plan is for another model, or merges nothing.
    """
    blocks = find_blocks(model)
    check_fingerprint(plan, fingerprint(blocks.graph), [node.name for node in blocks.graph])
    blocks = blocks.in_parts(having=(name for edit in plan.edits for name in edit.blocks))
    for edit in plan.edits:
        require_names(edit.blocks, blocks)
    blocks = blocks.joined(edit.blocks for edit in plan.edits)
    choices = tuple(Choice(block_name(edit.blocks), edit.form, edit.options["skip"]) for edit in plan.edits)
    if not choices:
        raise PlanError(f"The plan for '{plan.model}' merges nothing.")
    return blocks, choices


def maps_of_plan(
    blocks: Blocks,
    plan: Plan,
    arrays: Mapping[str, np.ndarray] | None,
    start: Start,
    *,
    exact_borders: bool = False,
) -> dict[str, Fitted]:
    """Return the maps of a plan without images: those beside it, or those of the blocks' own weights.

    Raises:
        PlanError: there are neither, or the arrays were fitted to other weights.
    """
    if arrays is not None:
        if plan.weights != weights_hash(blocks.graph):
            raise PlanError(
                f"The arrays beside the plan were fitted to other weights of '{plan.model}'; give calibration images."
            )
        return {block_name(edit.blocks): fitted_from_arrays(arrays_of(edit, arrays), r2=edit.r2) for edit in plan.edits}
    if start == "least_squares":
        raise PlanError(
            "The plan has no fitted arrays beside it: give calibration images, load the plan from its file, or set "
            "Options(start='gaussian')."
        )
    found: dict[str, Fitted] = {}
    for edit in plan.edits:
        name, form = block_name(edit.blocks), form_by_name(edit.form)
        fitted, _ = start_without_images(
            blocks.graph, blocks[name], form, edit.options["skip"], start, exact_borders=exact_borders
        )
        if isinstance(fitted, Refusal):
            raise PlanError(f"'{name}' cannot become {edit.form} without images: {fitted.reason}.")
        found[name] = fitted
    return found

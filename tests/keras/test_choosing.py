"""Measuring whole plans, and the ways to search, on networks and on real weights."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

import updp_tf
from tests import zoo
from tests.keras.test_merging import images_for
from updp_tf import Exact, Genetic, Options, Random
from updp_tf.blocks import find_blocks
from updp_tf.choosing import choose
from updp_tf.errors import BudgetError, CalibrationError
from updp_tf.forms import form_by_name
from updp_tf.judging import Judge, divergence
from updp_tf.learning import Learned, learn
from updp_tf.merging import Choice, merge_fitted, merge_in_sequence
from updp_tf.scoring import score
from updp_tf.searching import Space
from updp_tf.structure import block_name

CLASSIFIERS = ("residual", "inverted_residuals", "bottlenecks", "plain")


def prune(model, **options):
    return updp_tf.prune(model, verbose=False, **options)


def scored(model, images, *, spans=1):
    blocks = find_blocks(model)
    return blocks, score(blocks, images, spans=spans)


def space_of(blocks, scores, budget):
    costs = {block.name: block.cost for block in blocks}
    return Space.within(scores.candidates, blocks=costs, rest=blocks.rest_cost, budget=budget)


def merged_with_fits(blocks, scores, chosen, images=None):
    joined = blocks.joined(one.blocks for one in chosen)
    choices = [Choice(block_name(one.blocks), one.form, one.options["skip"]) for one in chosen]
    fitted = {block_name(one.blocks): scores.fitted[one.key] for one in chosen}
    if images is None:
        return merge_fitted(joined, choices, fitted, kind="fitted").model
    return merge_in_sequence(joined, choices, images, fitted=fitted).model


def kl(p, q):
    """Written out, float64: the mean over images of sum p log(p / q)."""
    p, q = p.astype("float64"), q.astype("float64")
    return float(
        np.mean([sum(a * np.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])
    )


# What is measured


@pytest.mark.parametrize(
    "name", [*CLASSIFIERS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFIERS[2:])]
)
def test_the_loss_of_a_plan_is_that_of_the_merged_model(name: str) -> None:
    model = zoo.build(name)
    images = images_for(model, 60)
    blocks, scores = scored(model, images, spans=2)
    unseen = images[9::10]
    with Judge(blocks, scores.fitted, images, reestimate=False) as judge:
        assert (judge.measure, judge.n_images) == ("KL", 6)
        for one in space_of(blocks, scores, {"macs": 0.9}).best(4):
            small = merged_with_fits(blocks, scores, one.chosen)
            want = kl(zoo.outputs_of(model, unseen)[0], zoo.outputs_of(small, unseen)[0])
            assert judge.loss(one.chosen) == pytest.approx(want, rel=1e-3, abs=1e-6)
        assert judge.loss(()) == 0.0


def test_norms_behind_the_edits_are_renewed() -> None:
    model = zoo.build("residual")
    images = images_for(model, 60)
    blocks, scores = scored(model, images)
    with Judge(blocks, scores.fitted, images) as judge:
        for one in space_of(blocks, scores, {"macs": 0.7}).best(3):
            small = merged_with_fits(blocks, scores, one.chosen, images)
            want = kl(zoo.outputs_of(model, images[9::10])[0], zoo.outputs_of(small, images[9::10])[0])
            assert judge.loss(one.chosen) == pytest.approx(want, rel=1e-3, abs=1e-6)
            still = merged_with_fits(blocks, scores, one.chosen)
            bare = kl(zoo.outputs_of(model, images[9::10])[0], zoo.outputs_of(still, images[9::10])[0])
            assert bare != pytest.approx(want, rel=0.02), "renewing changes nothing here, so nothing is shown"


def test_judging_changes_no_weight_and_keeps_memory_on_disk() -> None:
    model = zoo.build("inverted_residuals")
    images = images_for(model, 40)
    before = [np.array(weight) for weight in model.weights]
    blocks, scores = scored(model, images)
    chosen = space_of(blocks, scores, {"macs": 0.8}).solution.chosen
    losses = []
    for limit in (10**9, 0):
        with Judge(blocks, scores.fitted, images, memory_bytes=limit) as judge:
            losses += [judge.loss(chosen), judge.loss(chosen)]
    assert len(set(losses)) == 1
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.array(new))


def test_outputs_of_every_kind_have_a_divergence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 50, 7))
    p, q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert divergence(p, q) == pytest.approx(kl(p, q), rel=1e-9)
    assert divergence(p, p) == 0.0
    # one probability each: the KL of its two outcomes, summed over the outputs of an image
    a, b = 1 / (1 + np.exp(-logits))
    want = np.mean([kl(np.stack([x, 1 - x], -1), np.stack([y, 1 - y], -1)) * 7 for x, y in zip(a, b, strict=True)])
    assert divergence(a, b) == pytest.approx(want, rel=1e-9)
    assert divergence(logits[0], logits[1]) == pytest.approx(
        np.square(logits[0] - logits[1]).sum() / (logits[0].var(axis=0) * 50).sum(), rel=1e-12
    )
    # what float32 rounds to zero is no infinite loss
    assert np.isfinite(divergence(np.eye(3, dtype="float32"), np.eye(3, dtype="float32")[::-1]))


def test_other_outputs_and_score_functions() -> None:
    model = zoo.shared("tap_inside")
    images = images_for(model, 40)
    blocks, scores = scored(model, images)
    chosen = scores.candidates[:1]
    small = merged_with_fits(blocks, scores, chosen)
    want, have = (zoo.outputs_of(one, images[9::10]) for one in (model, small))
    with Judge(blocks, scores.fitted, images, reestimate=False) as judge:
        expected = sum(divergence(a, b) for a, b in zip(want, have, strict=True))
        assert judge.loss(chosen) == pytest.approx(expected, rel=1e-3)

    def score_fn(original, pruned):
        assert isinstance(original, list)
        return max(float(np.abs(a - b).max()) for a, b in zip(original, pruned, strict=True))

    with Judge(blocks, scores.fitted, images, reestimate=False, score_fn=score_fn) as judge:
        assert judge.measure == "score_fn"
        assert judge.loss(chosen) == pytest.approx(score_fn(want, have), rel=1e-3)


def test_too_few_images_to_measure_on() -> None:
    model = zoo.shared("residual")
    with pytest.raises(CalibrationError, match="compared on a tenth of the images: 19 are too few, give 20 or more"):
        prune(model, calibration=images_for(model, 19), budget={"macs": 0.8}, method="exact")


# The ways to search


@pytest.fixture(scope="module")
def problem():
    model = zoo.build("bottlenecks")
    images = images_for(model, 60)
    blocks, scores = scored(model, images, spans=2)
    with Judge(blocks, scores.fitted, images) as judge:
        yield space_of(blocks, scores, {"macs": 0.75}), judge


def test_exact_ends_where_no_swap_is_better(problem) -> None:
    space, judge = problem
    found, report = choose(space, Exact(plans=4, swaps=10**6), judge)
    loss = judge.loss(found.chosen)
    assert loss == min(one.loss for one in report.measured) == report.measured[report.best].loss
    assert report.measured[report.best].solution == found
    for one in (*space.best(4), *space.swaps(found)):
        assert judge.loss(one.chosen) >= loss
    assert [one.solution for one in report.measured[:4]] == list(space.best(4))
    again, same = choose(space, Exact(plans=4, swaps=10**6), judge)
    assert (again, same.as_json()) == (found, report.as_json())


def test_exact_measures_no_more_than_it_may(problem) -> None:
    space, judge = problem
    for plans, swaps in ((1, 0), (3, 0), (2, 3)):
        _, report = choose(space, Exact(plans=plans, swaps=swaps), judge)
        assert plans <= len(report.measured) <= plans + swaps
        assert len({tuple(i.key for i in one.solution.chosen) for one in report.measured}) == len(report.measured)
    # one plan and no swap is the smallest sum of scores
    assert choose(space, Exact(plans=1, swaps=0), judge)[0] == space.solution


def test_the_best_of_random_plans(problem) -> None:
    space, judge = problem
    rng = np.random.default_rng(5)
    drawn = [space.random(rng) for _ in range(6)]
    found, report = choose(space, Random(n=6, seed=5), judge)
    assert judge.loss(found.chosen) == min(judge.loss(one.chosen) for one in drawn)
    assert {one.solution.score for one in report.measured} == {one.score for one in drawn}
    single, nothing = choose(space, Random(seed=5), judge)
    assert single == drawn[0] and nothing.measured == ()


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("additive", {"macs": 0.9, "params": 0.85}),
        pytest.param("exact", {"merged": 2}, marks=pytest.mark.slow),
        (Exact(plans=2, swaps=2), {"macs": 0.9, "params": 0.85}),
        pytest.param("random", {"macs": 0.75}, marks=pytest.mark.slow),
        (Random(n=3, seed=1), {"macs": 0.9, "params": 0.85}),
        ("uniform", {"macs": 0.9, "params": 0.85}),
        (Genetic(trials=5, population=4), {"macs": 0.9, "params": 0.85}),
    ],
    ids=str,
)
def test_every_method_gives_a_plan_within_the_budget(method, budget) -> None:
    model = zoo.shared("residual")
    images = images_for(model, 20)
    how = {"options": Options(refit=False, spans=2), "forms": ["conv3", "pointwise", "remove"], "method": method}
    small = prune(model, calibration=images, budget=budget, **how)
    report = small.pruning
    for key, limit in budget.items():
        if key == "merged":
            assert sum(len(edit.blocks) for edit in report.plan.edits) == limit
        else:
            assert getattr(report.after, key) <= limit * getattr(report.before, key)
    name = method if isinstance(method, str) else method.name
    assert report.search.method == name
    json.dumps(report.as_json(), allow_nan=False)
    plan = updp_tf.search(model, calibration=images, budget=budget, verbose=False, **how)
    assert [(e.blocks, e.form) for e in plan.edits] == [(e.blocks, e.form) for e in report.plan.edits]
    assert plan.notes == report.plan.notes
    if report.search.measured:
        assert str(report.search) in str(report) and plan.notes == (str(report.search),)


def test_methods_without_images() -> None:
    model = zoo.shared("residual")
    for method in ("exact", "uniform", Random(n=3)):
        small = prune(model, method=method, budget={"macs": 0.9}, forms=["conv3", "remove"])
        assert small.pruning.search.measured == ()

    with pytest.raises(CalibrationError, match="A genetic search measures plans: give calibration images"):
        prune(model, method="genetic", budget={"macs": 0.9})


@pytest.mark.slow
def test_a_learned_search_is_repeatable_and_within_the_budget() -> None:
    model = zoo.build("residual")
    images = images_for(model, 40)
    blocks = find_blocks(model)
    scores = score(blocks, images, forms=[form_by_name("remove")])
    space = space_of(blocks, scores, {"merged": 1})
    method = Learned(steps=10, batch_size=20)
    learned = partial(learn, blocks=blocks, fitted=scores.fitted, images=images)
    wants, again = learned(space, method), learned(space, method)
    assert wants == again and set(wants) == {item.key for item in space.items}
    assert np.ptp(list(wants.values())) > 1e-3
    with Judge(blocks, scores.fitted, images) as judge:
        found, report = choose(space, method, judge, None, learned)
        assert [item.key for item in found.chosen] == [min(wants, key=wants.__getitem__)]
        assert report.measured[0].loss == judge.loss(found.chosen) and report.method == "learned"
    with pytest.raises(CalibrationError, match="A learned search trains on calibration images"):
        choose(space, method, None)


def test_a_genetic_search_is_at_least_as_good_as_what_it_begins_with(problem, tmp_path) -> None:
    space, judge = problem
    method = Genetic(trials=10, population=6, storage=f"sqlite:///{tmp_path}/search.db")
    found, report = choose(space, method, judge)
    losses = [judge.loss(one.chosen) for one in space.best(3)]
    assert [one.loss for one in report.measured[:3]] == losses
    assert judge.loss(found.chosen) == min(one.loss for one in report.measured) <= min(losses)
    again, same = choose(space, method, judge)  # from the storage, without measuring
    assert (again, same.as_json()) == (found, report.as_json())


def test_a_score_function_decides_between_plans() -> None:
    model = zoo.shared("residual")
    images = images_for(model, 40)
    blocks, scores = scored(model, images)
    unseen = images[9::10]

    def score_fn(original, pruned) -> float:  # the less alike, the better
        return -float(np.square(original - pruned).sum())

    options = {"calibration": images, "budget": {"merged": 1}, "method": Exact(plans=4, swaps=0), "verbose": False}
    alike, unlike = (updp_tf.search(model, **options, score_fn=one) for one in (None, score_fn))
    losses = []
    for plan in (alike, unlike):
        chosen = [
            one for one in scores.candidates if (one.blocks, one.form) == (plan.edits[0].blocks, plan.edits[0].form)
        ]
        small = merged_with_fits(blocks, scores, chosen, images)
        losses.append(np.square(zoo.outputs_of(model, unseen)[0] - zoo.outputs_of(small, unseen)[0]).sum())
    assert losses[0] < losses[1]


def test_the_accuracy_side_takes_a_method_too() -> None:
    model = zoo.shared("residual")
    images = images_for(model, 20)
    small = prune(
        model,
        calibration=images,
        max_drop={"agreement": 0.5},
        method=Exact(plans=2, swaps=1),
        options=Options(refit=False),
    )
    assert small.pruning.agreement >= 0.5 and small.pruning.search.method == "exact"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune(zoo.shared("residual"), method="greedy"), "named 'greedy'; there are: additive, exact, random"),
        (lambda: Exact(plans=0), "'plans' of a search is a whole number, 1 or more. Received: 0"),
        (lambda: Exact(swaps=-1), "'swaps' of a search is a whole number, 0 or more"),
        (lambda: Random(n=1.5), "'n' of a search is a whole number, 1 or more. Received: 1.5"),
    ],
)
def test_wrong_methods_are_refused(make, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        make()


# Real weights


@pytest.mark.slow
def test_exact_finds_better_plans_than_the_sum_of_scores_on_resnet20(shared_loader) -> None:
    (x_train, _), _ = shared_loader.cifar10()
    model = shared_loader.resnet20()
    images = shared_loader.cifar_preprocess(x_train[:300])
    blocks, scores = scored(model, images)
    space = space_of(blocks, scores, {"macs": 0.65})
    with Judge(blocks, scores.fitted, images) as judge:
        found, report = choose(space, Exact(plans=4, swaps=6), judge)
        additive = judge.loss(space.solution.chosen)
    assert judge.measure == "KL" and judge.n_images == 30
    small = merged_with_fits(blocks, scores, found.chosen, images)
    want = kl(*(zoo.outputs_of(one, images[9::10])[0] + 1e-7 for one in (model, small)))
    assert report.measured[report.best].loss == pytest.approx(want, rel=0.25)  # norms by batch, not by all images
    assert report.measured[report.best].loss <= additive
    assert 0 < additive < 2

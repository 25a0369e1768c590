import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updp_tf.cost import Budget, is_dearer, total
from updp_tf.errors import BudgetError, FormError
from updp_tf.partitioning import LARGEST_COEFFICIENT, Limits, Problem, Solution, System
from updp_tf.searching import Measured, SearchReport, Space, nearest, solve
from updp_tf.structure import Candidate, Cost

REST = Cost(macs=50, params=20, activation_bytes=3, latency_ns=-2, file_bytes=9)


def candidate(blocks, form, score, macs=1, params=1, activation_bytes=1):
    names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    return Candidate(names, form, score, Cost(macs, params, activation_bytes))


# --- against brute force -------------------------------------------------------------------------------------------


def all_choices(candidates, blocks):
    """Every set of candidates that covers no block twice, as lists."""

    def extend(left, used, chosen):
        if not left:
            yield list(chosen)
            return
        yield from extend(left[1:], used, chosen)
        first = left[0]
        if not used & set(first.blocks):
            yield from extend(left[1:], used | set(first.blocks), [*chosen, first])

    yield from extend(list(candidates), set(), [])


def brute_force(candidates, blocks, rest, budget):
    """Score, MACs and merged blocks of the best choice, or None where nothing is within the budget."""
    original = total((rest, *blocks.values()))
    allowed = [
        item
        for item in candidates
        if not is_dearer(item.cost, total(blocks[name] for name in item.blocks), budget.unit)
    ]
    best = None
    for chosen in all_choices(allowed, blocks):
        covered = {name for item in chosen for name in item.blocks}
        kept = (cost for name, cost in blocks.items() if name not in covered)
        cost = total((rest, *kept, *(item.cost for item in chosen)))
        if budget.is_met(cost, original, merged=len(covered)):
            # scores are multiples of 1/8 or far apart: rounding makes equal sums equal
            key = (round(math.fsum(item.score for item in chosen), 10), cost.macs, len(covered))
            best = key if best is None else min(best, key)
    return best


@st.composite
def instances(draw, max_blocks=5, max_forms=3):
    n_blocks = draw(st.integers(1, max_blocks))
    coarse = draw(st.booleans())  # many ties, or none
    amounts = st.integers(0, 12) if coarse else st.integers(0, 10**9)
    scores = st.integers(-2, 8).map(lambda n: n / 8) if coarse else st.integers(-(10**5), 10**7).map(lambda n: n / 1e6)
    costs = st.builds(Cost, amounts, amounts, st.integers(0, 12), amounts, amounts)
    blocks = {f"b{index}": draw(costs) for index in range(n_blocks)}
    candidates = [
        Candidate((name,), f"form{number}", draw(scores), draw(costs))
        for name in blocks
        for number in range(draw(st.integers(0, max_forms)))
    ]
    for first, last in itertools.combinations(range(n_blocks), 2):
        if last - first < 3 and draw(st.booleans()):
            span = tuple(f"b{index}" for index in range(first, last + 1))
            candidates.append(Candidate(span, "span", draw(scores), draw(costs)))
    fractions = st.floats(0.05, 1.0)
    asked = draw(
        st.dictionaries(
            st.sampled_from(["macs", "params", "activation_bytes", "latency", "bytes"]), fractions, max_size=3
        )
    )
    if draw(st.booleans()):
        asked["macs_max"] = draw(st.integers(1, 40 if coarse else 3 * 10**9))
    if not asked or draw(st.integers(0, 3)) == 0:
        asked["merged"] = draw(st.integers(1, n_blocks))
    return candidates, blocks, Budget.parse(asked)


def check_against_brute_force(candidates, blocks, rest, budget):
    expected = brute_force(candidates, blocks, rest, budget)
    if expected is None:
        with pytest.raises(BudgetError, match="cannot be met"):
            solve(candidates, blocks=blocks, rest=rest, budget=budget)
        return None
    found = solve(candidates, blocks=blocks, rest=rest, budget=budget)
    assert budget.is_met(found.cost, total((rest, *blocks.values())), merged=found.merged)
    assert_is_consistent(found, blocks, rest)
    assert abs(found.score - expected[0]) <= 1e-9 * max([1.0, *(abs(item.score) for item in candidates)])
    return found, expected


def assert_is_consistent(found, blocks, rest):
    covered = [name for item in found.chosen for name in item.blocks]
    assert len(covered) == len(set(covered)) == found.merged
    kept = [cost for name, cost in blocks.items() if name not in covered]
    assert found.cost == total((rest, *kept, *(item.cost for item in found.chosen)))
    assert found.score == pytest.approx(sum(item.score for item in found.chosen), abs=1e-12)


@given(instance=instances(), seed=st.integers(0, 99))
def test_equal_to_brute_force(instance, seed):
    candidates, blocks, budget = instance
    outcome = check_against_brute_force(candidates, blocks, REST, budget)
    if outcome is None:
        return
    found, expected = outcome
    assert (found.cost.macs, found.merged) == expected[1:]
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    assert solve(shuffled, blocks=blocks, rest=REST, budget=budget) == found


def times_and_bytes(cost):
    return cost.latency_ns, cost.file_bytes


def best_of_all(candidates, blocks, rest, budget):
    """The smallest sum of scores within the budget, None where there is none, over every choice there is.

    Two halves of the blocks are written out whole, and every pair of halves is looked at; a span over the middle
    takes its blocks out of both.
    """
    names = list(blocks)
    middle = len(names) // 2
    position = {name: index for index, name in enumerate(names)}
    original = total((rest, *blocks.values()))
    bounds = budget.bounds(original)
    allowed = [
        item
        for item in candidates
        if not is_dearer(item.cost, total(blocks[name] for name in item.blocks), budget.unit)
    ]

    def half(first, last, gone):
        """Score, MACs, parameters, largest activations, merged blocks, time, bytes of every choice of some blocks."""
        by_start = {}
        for item in allowed:
            covered = [position[name] for name in item.blocks]
            if first <= covered[0] and covered[-1] < last and not gone & set(covered):
                by_start.setdefault(covered[0], []).append((len(covered), item.score, item.cost))
        # row of the table = one choice for the blocks before `index`
        table = {first: np.zeros((1, 7))}
        for index in range(first, last):
            kept = blocks[names[index]]
            steps = [(1, 0.0, Cost() if index in gone else kept, 0)]
            steps += [(length, score, cost, length) for length, score, cost in by_start.get(index, [])]
            for length, score, cost, merged in steps:
                rows = table[index].copy()
                rows[:, :3] += (score, cost.macs, cost.params)
                rows[:, 3] = np.maximum(rows[:, 3], cost.activation_bytes)
                rows[:, 4:] += (merged, cost.latency_ns, cost.file_bytes)
                end = index + length
                table[end] = np.concatenate([table[end], rows]) if end in table else rows
        return table.get(last, np.zeros((0, 7)))

    best = None
    over = [item for item in allowed if position[item.blocks[0]] < middle <= position[item.blocks[-1]]]
    for item in (None, *over):
        gone = set() if item is None else {position[name] for name in item.blocks}
        left, right = half(0, middle, gone), half(middle, len(names), gone)
        fixed = np.array([0.0, rest.macs, rest.params, rest.activation_bytes, 0.0, rest.latency_ns, rest.file_bytes])
        if item is not None:
            fixed += (item.score, item.cost.macs, item.cost.params, 0.0, len(gone), *times_and_bytes(item.cost))
            fixed[3] = max(rest.activation_bytes, item.cost.activation_bytes)
        for row in left + fixed * (1, 1, 1, 0, 1, 1, 1):
            pairs = right + row * (1, 1, 1, 0, 1, 1, 1)
            pairs[:, 3] = np.maximum(np.maximum(right[:, 3], row[3]), fixed[3])
            within = np.ones(len(pairs), dtype=bool)
            for column, unit in enumerate(
                ("macs", "params", "activation_bytes", "merged", "latency_ns", "file_bytes"), start=1
            ):
                if unit in bounds:
                    within &= pairs[:, column] <= bounds[unit]
            if budget.merged is not None:
                within &= pairs[:, 4] == budget.merged
            if within.any():
                found = float(pairs[within, 0].min())
                best = found if best is None else min(best, found)
    return best


def check_against_all(candidates, blocks, budget):
    expected = best_of_all(candidates, blocks, REST, budget)
    if expected is None:
        with pytest.raises(BudgetError, match="cannot be met"):
            solve(candidates, blocks=blocks, rest=REST, budget=budget)
        return
    found = solve(candidates, blocks=blocks, rest=REST, budget=budget)
    assert budget.is_met(found.cost, total((REST, *blocks.values())), merged=found.merged)
    assert_is_consistent(found, blocks, REST)
    assert abs(found.score - expected) <= 1e-9 * max([1.0, *(abs(item.score) for item in candidates)])


@settings(max_examples=40)
@given(instance=instances(max_blocks=12))
def test_equal_to_all_choices_up_to_twelve_blocks_and_three_forms(instance):
    check_against_all(*instance)


@pytest.mark.slow
@settings(max_examples=1500)
@given(instance=instances(max_blocks=12))
def test_equal_to_all_choices_many_times(instance):
    check_against_all(*instance)


@given(instance=instances(max_blocks=4))
def test_both_brute_forces_agree(instance):
    candidates, blocks, budget = instance
    best = brute_force(candidates, blocks, REST, budget)
    assert best_of_all(candidates, blocks, REST, budget) == (None if best is None else pytest.approx(best[0]))


def random_instance(seed, *, n_blocks, n_forms, spans=True):
    draw = random.Random(seed)
    blocks = {
        f"b{index}": Cost(draw.randint(10**6, 10**8), draw.randint(10**4, 10**6), draw.randint(10**5, 10**6))
        for index in range(n_blocks)
    }

    def form(names, name):
        whole = total(blocks[member] for member in names)
        kept = draw.uniform(0.05, 1.1), draw.uniform(0.05, 1.1)
        cost = Cost(int(whole.macs * kept[0]), int(whole.params * kept[1]), draw.randint(10**5, 10**6))
        return Candidate(names, name, draw.uniform(0.0, 1.0) ** 2 * len(names), cost)

    names = list(blocks)
    candidates = [form((name,), f"form{number}") for name in names for number in range(n_forms)]
    if spans:
        candidates += [form(tuple(names[i : i + 2]), "span") for i in range(0, n_blocks - 1, 2)]
        candidates += [form(tuple(names[i : i + 3]), "span") for i in range(1, n_blocks - 2, 3)]
    return candidates, blocks


BUDGETS = (
    {"macs": 0.6},
    {"macs": 0.7, "params": 0.6},
    {"params": 0.5, "merged": 4},
    {"activation_bytes": 0.8, "macs": 0.7},
)


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_brute_force_on_eight_blocks(seed):
    candidates, blocks = random_instance(seed, n_blocks=8, n_forms=3 if seed < 4 else 2, spans=seed >= 2)
    check_against_brute_force(candidates, blocks, REST, Budget.parse(BUDGETS[seed % len(BUDGETS)]))


def test_the_guessed_core_changes_nothing(monkeypatch):
    # a core that is guessed too small or too large costs time, never the optimum
    found = []
    for size in (0, 5, 10**6):
        monkeypatch.setattr("updp_tf.partitioning.FIRST_CORE", size)
        for seed in range(4):
            candidates, blocks = random_instance(seed, n_blocks=24, n_forms=4)
            budget = {"macs": 0.6, "params": 0.65}
            found.append((seed, solve(candidates, blocks=blocks, rest=REST, budget=budget)))
    for seed in range(4):
        first, *others = [solution for other, solution in found if other == seed]
        assert others == [first, first]


def test_two_hundred_blocks_five_forms_two_budgets():
    candidates, blocks = random_instance(7, n_blocks=200, n_forms=5, spans=False)
    budget = Budget.parse({"macs": 0.6, "params": 0.65})
    found = solve(candidates, blocks=blocks, rest=REST, budget=budget)
    assert_is_consistent(found, blocks, REST)
    original = total((REST, *blocks.values()))
    assert budget.is_met(found.cost, original, merged=found.merged)
    # the optimum fills a budget of 200 blocks to the last percent
    assert max(found.cost.macs / original.macs / 0.6, found.cost.params / original.params / 0.65) > 0.99


# --- what is chosen ------------------------------------------------------------------------------------------------

BLOCKS = {name: Cost(100, 10, 10) for name in "abc"}


def test_a_budget_that_is_met_already_keeps_everything():
    found = solve([candidate("a", "conv", 0.1)], blocks=BLOCKS, rest=REST, budget={"macs": 1.0})
    assert found == Solution((), 0.0, Cost(350, 50, 10, -2, 9), 0)


def test_spans_count_their_blocks_and_exclude_their_members():
    items = [candidate("a", "conv", 0.1), candidate("b", "conv", 0.2), candidate(("a", "b"), "span", 0.15)]
    found = solve(items, blocks=BLOCKS, rest=REST, budget={"merged": 2})
    assert [item.key for item in found.chosen] == ["a+b=span"]
    assert (found.merged, found.score) == (2, 0.15)
    assert found.cost == Cost(50 + 1 + 100, 20 + 1 + 10, 10, -2, 9)


def test_chosen_is_in_graph_order():
    items = [candidate(name, "conv", 0.1) for name in "cab"]
    found = solve(items, blocks=BLOCKS, rest=REST, budget={"merged": 3})
    assert [item.blocks for item in found.chosen] == [("a",), ("b",), ("c",)]


def test_forms_dearer_than_their_block_are_never_picked():
    dear = candidate("a", "conv5", 0.0, macs=101, params=1)
    same = candidate("b", "conv3", 0.3, macs=100, params=99)
    found = solve([dear, same], blocks=BLOCKS, rest=REST, budget={"merged": 1})
    assert found.chosen == (same,)
    # in the budget's unit: by parameters it is the other way round
    found = solve([dear, same], blocks=BLOCKS, rest=REST, budget={"params": 1.0, "merged": 1})
    assert found.chosen == (dear,)


def test_a_span_is_compared_with_the_sum_of_its_blocks():
    span = candidate(("a", "b"), "span", 0.3, macs=200)
    assert solve([span], blocks=BLOCKS, rest=REST, budget={"merged": 2}).chosen == (span,)
    with pytest.raises(BudgetError, match="at most 0 of 3 blocks"):
        solve([candidate(("a", "b"), "span", 0.3, macs=201)], blocks=BLOCKS, rest=REST, budget={"merged": 2})


def test_activation_bytes_are_a_maximum_and_force_blocks_out():
    blocks = {"a": Cost(100, 10, 10), "b": Cost(100, 10, 20)}
    items = [
        candidate("a", "conv", 0.1, activation_bytes=9),
        candidate("b", "large", 0.1, activation_bytes=11),
        candidate("b", "small", 0.9, activation_bytes=10),
    ]
    found = solve(items, blocks=blocks, rest=REST, budget={"activation_bytes": 0.5})
    assert [item.form for item in found.chosen] == ["small"]
    assert found.cost.activation_bytes == 10


def test_ties_go_to_fewer_macs_then_fewer_blocks_then_first_key():
    dearer, cheaper = candidate("a", "a_first", 0.5, macs=60), candidate("a", "b_second", 0.5, macs=50)
    assert solve([dearer, cheaper], blocks=BLOCKS, rest=REST, budget={"macs": 0.9}).chosen == (cheaper,)
    # the same score and MACs with one block and with two
    pair = [candidate("a", "conv", 0.25, macs=80), candidate("b", "conv", 0.25, macs=80)]
    single = candidate("c", "conv", 0.5, macs=60)
    assert solve([*pair, single], blocks=BLOCKS, rest=REST, budget={"macs_max": 310}).chosen == (single,)
    twins = [candidate(name, form, 0.5, macs=60) for name in "cba" for form in ("y", "x")]
    assert [item.key for item in solve(twins, blocks=BLOCKS, rest=REST, budget={"merged": 1}).chosen] == ["a=x"]


def test_a_saving_that_costs_nothing_is_taken():
    free = candidate("b", "conv", 0.0, macs=40)
    assert solve([free], blocks=BLOCKS, rest=REST, budget={"macs": 1.0}).chosen == (free,)


def test_keep_candidates_are_ignored():
    keeps = [Candidate((name,), "keep", 0.0, cost) for name, cost in BLOCKS.items()]
    found = solve([*keeps, candidate("a", "conv", 0.5)], blocks=BLOCKS, rest=REST, budget={"merged": 1})
    assert [item.key for item in found.chosen] == ["a=conv"]


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("size", [10**9, 10**14])
def test_budgets_hold_to_the_last_unit(spare, size):
    # one of 10^14 MACs is far less than what the solver tolerates in a row: the answer that breaks it is excluded
    blocks = {"a": Cost(size, 1, 1), "b": Cost(size, 1, 1)}
    items = [candidate("a", "good", 0.1, macs=size // 2 + 1), candidate("a", "poor", 0.9, macs=size // 2)]
    budget = {"macs_max": 50 + size + size // 2 + spare}
    assert solve(items, blocks=blocks, rest=REST, budget=budget).chosen == (items[1 - spare],)


def test_excluding_the_best_choices_gives_the_next():
    items = [candidate(name, "conv", score) for name, score in (("a", 0.1), ("b", 0.2), ("c", 0.4))]
    problem = Problem.build(items, BLOCKS, REST, Budget.parse({"merged": 2}))
    system = System.build(problem, Limits({}, 2))
    found = []
    while (picked := system.minimise(problem.scores, other_than=found)) is not None:
        found.append(picked)
    assert [picked.tolist() for picked in found] == [[0, 1], [0, 2], [1, 2]]


def test_scores_that_differ_little_are_told_apart():
    best = 1e-3
    items = [candidate("a", "conv", best + 1e-9), candidate("b", "conv", best, macs=90), candidate("c", "conv", 10.0)]
    # the largest score decides what is a tie: 5e-10 of 1.0 here, far under the difference after the third is gone
    found = solve(items[:2], blocks=BLOCKS, rest=REST, budget={"merged": 1})
    assert found.chosen == (items[1],)
    assert LARGEST_COEFFICIENT >= 1e4  # HiGHS stops within an absolute 1e-6 of the optimum


# --- what cannot be met --------------------------------------------------------------------------------------------

FEW = [candidate("a", "conv", 0.3, macs=22), candidate("b", "conv", 0.2, macs=50, params=12)]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"macs": 0.5}, r"^The budget macs 0.5 cannot be met: the smallest plan has 0.635 \(222 of 350\).$"),
        ({"macs_max": 100}, r"macs_max 100 cannot be met: the smallest plan has 222 \(222 of 350\)"),
        ({"params": 0.5}, r"params 0.5 cannot be met: the smallest plan has 0.82 \(41 of 50\)"),
        ({"activation_bytes": 0.5}, r"activation_bytes 0.5 cannot be met: the smallest plan has 1 \(10 B of 10 B\)"),
        ({"merged": 3}, "merged 3 cannot be met: at most 2 of 3 blocks can be merged"),
        ({"macs": 0.5, "merged": 3}, "merged 3 cannot be met: at most 2 .*; macs 0.5 cannot be met: the smallest"),
        (
            {"macs": 0.8, "params_max": 42},
            r"^The budgets macs 0.8 and params_max 42 cannot be met together: within the other limits the least "
            r"macs are 0.943 \(330 of 350\); within the other limits the least params are 44 \(44 of 50\).$",
        ),
        (
            {"macs": 0.7, "merged": 1},
            r"cannot be met together: within the other limits 2 blocks can be merged; within .* macs are 0.778",
        ),
    ],
)
def test_the_nearest_is_named(budget, message):
    candidates = FEW
    if "params_max" in budget:
        candidates = [candidate("a", "small", 0.3, macs=22, params=4), candidate("a", "thin", 0.2, macs=80, params=1)]
    with pytest.raises(BudgetError, match=message):
        solve(candidates, blocks=BLOCKS, rest=REST, budget=budget)


def test_a_number_of_blocks_between_two_possible_ones():
    spans = [candidate(("a", "b"), "span", 0.3)]
    with pytest.raises(BudgetError, match="merged 1 cannot be met: 0 or 2 blocks can be merged"):
        solve(spans, blocks=BLOCKS, rest=REST, budget={"merged": 1})


def test_what_lies_outside_the_blocks_can_break_a_limit():
    with pytest.raises(BudgetError, match=r"activation_bytes_max 5 cannot be met: the smallest plan has 99"):
        solve(FEW, blocks=BLOCKS, rest=Cost(0, 0, 99), budget={"activation_bytes_max": 5})


def test_no_candidates_at_all():
    with pytest.raises(BudgetError, match="the smallest plan has 1 "):
        solve([], blocks=BLOCKS, rest=REST, budget={"macs": 0.8})
    assert solve([], blocks=BLOCKS, rest=REST, budget={"macs": 1.0}).chosen == ()
    assert solve([], blocks={}, rest=REST, budget={"macs": 1.0}).cost == REST


def test_wrong_candidates():
    def ask(*items):
        return solve(items, blocks=BLOCKS, rest=REST, budget={"macs": 0.8})

    with pytest.raises(FormError, match="'z=conv' replaces 'z', which is none of the blocks"):
        ask(candidate("z", "conv", 0.1))
    with pytest.raises(FormError, match="score of 'a=conv' is nan"):
        ask(candidate("a", "conv", math.nan))
    with pytest.raises(FormError, match="Two candidates are named 'a=conv'"):
        ask(candidate("a", "conv", 0.1), candidate("a", "conv", 0.2))


# --- nearest -------------------------------------------------------------------------------------------------------


def test_nearest_is_the_solution_where_the_budget_can_be_met():
    found, message = nearest(FEW, blocks=BLOCKS, rest=REST, budget={"macs": 0.8})
    assert message is None
    assert found == solve(FEW, blocks=BLOCKS, rest=REST, budget={"macs": 0.8})


def test_nearest_takes_the_smallest_where_it_cannot():
    found, message = nearest(FEW, blocks=BLOCKS, rest=REST, budget={"macs": 0.5})
    assert found.cost.macs == 222
    assert message == "The budget macs 0.5 cannot be met: the smallest plan has 0.635 (222 of 350)."


def test_nearest_chooses_the_best_score_at_the_smallest_value():
    items = [candidate("a", "poor", 0.9, macs=20), candidate("a", "good", 0.1, macs=20)]
    found, _ = nearest(items, blocks=BLOCKS, rest=REST, budget={"macs": 0.1})
    assert found.chosen == (items[1],)


def test_nearest_relaxes_limits_in_order():
    found, message = nearest(FEW, blocks=BLOCKS, rest=REST, budget={"merged": 9, "macs": 0.5, "activation_bytes": 0.1})
    assert (found.merged, found.cost.macs, found.cost.activation_bytes) == (2, 222, 10)
    assert message.count("cannot be met") == 3


def test_nearest_leaves_limits_that_can_be_met_as_they_are():
    found, message = nearest(FEW, blocks=BLOCKS, rest=REST, budget={"macs": 0.9, "activation_bytes": 0.1})
    assert [item.key for item in found.chosen] == ["b=conv"]  # not both, which would have the fewest MACs
    assert "macs" not in message


def test_nearest_with_nothing_to_choose_keeps_everything():
    found, message = nearest([], blocks=BLOCKS, rest=REST, budget={"macs": 0.8})
    assert found.chosen == ()
    assert "the smallest plan has 1 " in message


@given(instance=instances(max_blocks=4))
def test_nearest_always_answers_and_meets_what_can_be_met(instance):
    candidates, blocks, budget = instance
    found, message = nearest(candidates, blocks=blocks, rest=REST, budget=budget)
    assert_is_consistent(found, blocks, REST)
    is_met = budget.is_met(found.cost, total((REST, *blocks.values())), merged=found.merged)
    assert is_met == (message is None)
    if len(budget.limits) == 1 and budget.merged is None and not is_met:
        unit = budget.unit
        allowed = [c for c in candidates if not is_dearer(c.cost, total(blocks[n] for n in c.blocks), unit)]
        smallest = math.inf
        for chosen in all_choices(allowed, blocks):
            covered = {name for item in chosen for name in item.blocks}
            kept = [cost for name, cost in blocks.items() if name not in covered]
            smallest = min(smallest, getattr(total([REST, *kept, *(c.cost for c in chosen)]), unit))
        assert getattr(found.cost, unit) == smallest


# --- every choice within a budget ----------------------------------------------------------------------------------


def space_of(candidates, blocks, budget):
    return Space.within(candidates, blocks=blocks, rest=REST, budget=budget)


def all_within(candidates, blocks, budget):
    """Every choice within the budget: its score and its keys, the best first."""
    budget = Budget.parse(budget)
    original = total((REST, *blocks.values()))
    found = []
    for chosen in all_choices(candidates, blocks):
        covered = {name for item in chosen for name in item.blocks}
        kept = [cost for name, cost in blocks.items() if name not in covered]
        cost = total([REST, *kept, *(item.cost for item in chosen)])
        dear = any(is_dearer(c.cost, total(blocks[n] for n in c.blocks), budget.unit) for c in chosen)
        if not dear and budget.is_met(cost, original, merged=len(covered)):
            found.append((math.fsum(item.score for item in chosen), frozenset(item.key for item in chosen)))
    return sorted(found, key=lambda one: one[0])


def keys(solution):
    return frozenset(item.key for item in solution.chosen)


SPACE_BUDGETS = ({"macs": 0.75}, {"macs": 0.8, "params": 0.8}, {"merged": 3}, {"activation_bytes": 0.9, "macs": 0.9})


@pytest.fixture(params=[(seed, budget) for seed in range(4) for budget in SPACE_BUDGETS], ids=str)
def small_space(request):
    """A space with the instance that it is of, its budget, and every choice in it, from brute force."""
    seed, budget = request.param
    candidates, blocks = random_instance(seed, n_blocks=5, n_forms=2)
    everything = all_within(candidates, blocks, budget)
    if not everything:
        pytest.skip("nothing is within the budget")
    return SimpleNamespace(
        space=space_of(candidates, blocks, budget),
        candidates=candidates,
        blocks=blocks,
        budget=budget,
        everything=everything,
    )


def test_the_best_choices_are_the_first_of_all(small_space):
    candidates, blocks, budget = small_space.candidates, small_space.blocks, small_space.budget
    everything = small_space.everything
    found = small_space.space.best(12)
    assert [one.score for one in found] == pytest.approx([score for score, _ in everything[:12]])
    assert len({keys(one) for one in found}) == len(found) == min(12, len(everything))
    assert {keys(one) for one in found} <= {names for _, names in everything}
    assert found[0] == solve(candidates, blocks=blocks, rest=REST, budget=budget)


def test_the_best_choices_end_where_there_are_no_more():
    space = space_of([candidate("a", "conv", 0.1), candidate("b", "conv", 0.2)], BLOCKS, {"macs": 1.0})
    assert [keys(one) for one in space.best(9)] == [set(), {"a=conv"}, {"b=conv"}, {"a=conv", "b=conv"}]
    assert [keys(one) for one in space_of([], BLOCKS, {"macs": 1.0}).best(9)] == [set()]


def test_swaps_are_all_choices_that_differ_in_one_item(small_space):
    space = small_space.space
    for base in space.best(3):
        mine = keys(base)
        expected = [names for _, names in small_space.everything if len(mine - names) == 1 and len(names - mine) <= 1]
        found = list(space.swaps(base))
        assert sorted(map(sorted, map(keys, found))) == sorted(map(sorted, expected))
        assert [one.score for one in found] == sorted(one.score for one in found)


@given(instance=instances(max_blocks=5), seed=st.integers(0, 9))
def test_random_choices_are_within_the_budget(instance, seed):
    candidates, blocks, budget = instance
    if brute_force(candidates, blocks, REST, budget) is None:
        return
    found = [space_of(candidates, blocks, budget).random(np.random.default_rng(seed)) for _ in range(2)]
    assert found[0] == found[1]
    assert_is_consistent(found[0], blocks, REST)
    assert budget.is_met(found[0].cost, total((REST, *blocks.values())), merged=found[0].merged)
    # it knows no scores: with others it is the same choice
    others = [replace(item, score=-item.score) for item in candidates]
    assert keys(space_of(others, blocks, budget).random(np.random.default_rng(seed))) == keys(found[0])


def test_random_choices_reach_every_block_and_form():
    candidates, blocks = random_instance(3, n_blocks=8, n_forms=3)
    space, rng = space_of(candidates, blocks, {"macs": 0.7}), np.random.default_rng(0)
    drawn = [space.random(rng) for _ in range(200)]
    assert {item.key for one in drawn for item in one.chosen} == {item.key for item in space.items}
    assert len({keys(one) for one in drawn}) > 150


def test_the_closest_choice_differs_in_the_fewest_items():
    for seed in range(6):
        candidates, blocks = random_instance(seed, n_blocks=5, n_forms=2)
        space = space_of(candidates, blocks, {"macs": 0.75, "params": 0.85})
        everything = [names for _, names in all_within(candidates, blocks, {"macs": 0.75, "params": 0.85})]
        wished = [item for item in space.items if random.Random(seed).random() < 0.3]
        fewest = min(len({one.key for one in wished} ^ names) for names in everything)
        assert len({one.key for one in wished} ^ keys(space.closest_to(wished))) == fewest
        inside = space.best(3)[-1]
        assert space.closest_to(inside.chosen) == inside


def test_uniform_spreads_the_fewest_blocks_over_the_depth():
    blocks = {f"b{index}": Cost(100, 10, 10) for index in range(10)}
    items = [candidate(name, form, score, macs=50) for name in blocks for form, score in (("good", 0.1), ("poor", 0.2))]
    original = 50 + 1000
    for n, wanted in ((1, [5]), (2, [2, 7]), (3, [1, 5, 8]), (5, [1, 3, 5, 7, 9])):
        found = space_of(items, blocks, {"macs_max": original - 50 * n}).uniform()
        assert [item.key for item in found.chosen] == [f"b{index}=good" for index in wanted]
        assert space_of(items, blocks, {"merged": n}).uniform() == found
    # blocks that have no form are no part of the depth
    few = [item for item in items if item.blocks[0] in ("b0", "b1", "b2", "b3")]
    assert [item.key for item in space_of(few, blocks, {"merged": 2}).uniform().chosen] == ["b1=good", "b3=good"]


@pytest.mark.parametrize("budget", SPACE_BUDGETS, ids=str)
def test_uniform_is_within_every_limit(budget):
    for seed in range(4):
        candidates, blocks = random_instance(seed, n_blocks=9, n_forms=3)
        space = space_of(candidates, blocks, budget)
        try:
            found = space.uniform()
        except BudgetError as error:
            assert "No evenly spread blocks are within the budget" in str(error)
            continue
        assert Budget.parse(budget).is_met(found.cost, total((REST, *blocks.values())), merged=found.merged)
        assert_is_consistent(found, blocks, REST)


def test_a_space_of_the_nearest_budget():
    space = Space.within(FEW, blocks=BLOCKS, rest=REST, budget={"macs": 0.5}, or_nearest=True)
    assert "the smallest plan has 0.635" in space.note
    assert (space.solution, space.note) == nearest(FEW, blocks=BLOCKS, rest=REST, budget={"macs": 0.5})
    assert [one.cost.macs for one in space.best(9)] == [222]


def test_a_report_tells_guess_and_truth():
    def measured(score, loss):
        return Measured(Solution((candidate("a", f"f{score}", score),), score, Cost(10, 2), 1), loss)

    report = SearchReport("exact", "KL", 60, (measured(0.1, 0.5), measured(0.2, 0.3), measured(0.4, 0.9)), 1)
    assert report.rank_correlation == pytest.approx(0.5)
    assert str(report) == (
        "exact: 3 plans measured on 60 images, KL 0.3000 (sum of scores 0.2000); the smallest sum of them, 0.1000, "
        "had 0.5000; rank correlation of both 0.50"
    )
    rows = report.as_json()["measured"]
    assert [row["loss"] for row in rows] == [0.5, 0.3, 0.9] and rows[1]["forms"] == ["a=f0.2"]
    assert str(SearchReport("uniform")) == "uniform: sum of scores, nothing measured"
    assert replace(report, measured=(measured(0.1, math.inf),), best=0).as_json()["measured"][0]["loss"] is None


def test_a_network_faster_than_the_fastest_is_told_how_fast_that_is():
    blocks = {"a": Cost(100, 10, 10, 3_000_000), "b": Cost(100, 10, 10, 2_000_000)}
    forms = [
        Candidate(("a",), "fast", 0.2, Cost(10, 1, 1, 1_000_000)),
        Candidate(("a",), "slow", 0.1, Cost(10, 1, 1, 3_000_001)),  # slower than the block: never picked
        Candidate(("b",), "fast", 0.2, Cost(10, 1, 1, 1_500_000)),
    ]
    rest = Cost(1, 1, 1, 500_000)
    with pytest.raises(BudgetError, match=r"^The budget latency_ms 2.5 .*fastest plan takes 3 \(3 ms of 5.5 ms\).$"):
        solve(forms, blocks=blocks, rest=rest, budget={"latency_ms": 2.5})
    found = solve(forms, blocks=blocks, rest=rest, budget={"latency_ms": 3.5})
    assert [item.key for item in found.chosen] == ["a=fast"]
    assert found.cost.latency_ns == 3_500_000
    by_macs = solve(forms, blocks=blocks, rest=rest, budget={"macs": 0.6})
    assert [item.key for item in by_macs.chosen] == ["a=fast"]

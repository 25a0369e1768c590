import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from updp_tf.cost import Budget, Limit, is_dearer, readable, total
from updp_tf.errors import BudgetError
from updp_tf.structure import Cost

ORIGINAL = Cost(macs=1000, params=200, activation_bytes=64)


@pytest.mark.parametrize(
    ("asked", "bounds", "merged", "unit"),
    [
        ({"macs": 0.7}, {"macs": 700}, None, "macs"),
        ({"params": 0.5, "macs": 0.25}, {"params": 100, "macs": 250}, None, "params"),
        ({"macs": 0.5, "macs_max": 400}, {"macs": 400}, None, "macs"),
        ({"macs_max": 400, "macs": 0.5}, {"macs": 400}, None, "macs"),
        ({"macs_max": 600.0, "macs": 0.5}, {"macs": 500}, None, "macs"),
        ({"merged": 3}, {}, 3, "macs"),
        ({"merged": 3, "activation_bytes": 0.5}, {"activation_bytes": 32}, 3, "activation_bytes"),
        ({"activation_bytes_max": np.int64(40)}, {"activation_bytes": 40}, None, "activation_bytes"),
        ({"macs": 1}, {"macs": 1000}, None, "macs"),
        ({"macs": np.float32(0.5)}, {"macs": 500}, None, "macs"),
    ],
)
def test_parse(asked, bounds, merged, unit):
    budget = Budget.parse(asked)
    assert budget.bounds(ORIGINAL) == bounds
    assert budget.merged == merged
    assert budget.unit == unit
    assert Budget.parse(budget.asked) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (0.7, r'is a mapping such as \{"macs": 0.7\}. Received: 0.7'),
        ({}, "is empty: give at least one of macs, params"),
        ({"macs": 70}, r'fraction of the original.*Received: 70. Did you mean 0.7, or \{"macs_max": 70\}\?'),
        ({"macs": 2e8}, r'Received: 200000000.0. Did you mean \{"macs_max": 200000000.0\}\?'),
        ({"macs": 0}, "above 0 and at most 1. Received: 0.$"),
        ({"params": -0.5}, "above 0 and at most 1. Received: -0.5.$"),
        ({"macs": float("nan")}, "Received: nan"),
        ({"macs": float("inf")}, "Received: inf"),
        ({"macs": "0.7"}, "Received: '0.7'"),
        ({"macs": True}, "Received: True"),
        ({"macs": None}, "Received: None"),
        ({"macs_max": 0.7}, r'whole number of MACs, 1 or more. Received: 0.7. For a fraction use \{"macs": 0.7\}.'),
        ({"params_max": 1.5}, "whole number of parameters, 1 or more. Received: 1.5.$"),
        ({"params_max": 0}, "whole number of parameters, 1 or more. Received: 0.$"),
        ({"merged": 0}, "whole number of blocks, 1 or more. Received: 0.$"),
        ({"merged": 0.5}, "whole number of blocks, 1 or more. Received: 0.5.$"),
        ({"merged": True}, "Received: True"),
        ({"latency": 0.5}, "cannot be in 'latency': use macs, params, activation_bytes, macs_max"),
        ({"mac": 0.5}, "cannot be in 'mac': use macs.*merged"),
        ({"macs": 0.5, 3: 4}, "cannot be in 3"),
    ],
)
def test_malformed_budgets_get_one_sentence(asked, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(asked)


@given(hundredths=st.integers(1, 100), hundreds=st.integers(1, 10**8))
def test_a_fraction_of_a_whole_number_loses_no_unit(hundredths, hundreds):
    # 0.29 * 100 is 28.999999999999996 in binary; 29 of 100 MACs are 0.29 of them all the same
    limit = Limit("macs", hundredths / 100)
    assert limit.bound(Cost(macs=100 * hundreds)) == hundredths * hundreds


def test_a_bound_is_never_above_the_fraction():
    assert Limit("macs", 0.7).bound(Cost(macs=9)) == 6
    assert Limit("macs", 0.999999).bound(Cost(macs=10**5)) == 99_999


def test_is_met_holds_every_limit():
    budget = Budget.parse({"macs": 0.7, "activation_bytes": 0.5, "merged": 2})
    assert budget.is_met(Cost(700, 999, 32), ORIGINAL, merged=2)
    assert not budget.is_met(Cost(701, 0, 0), ORIGINAL, merged=2)
    assert not budget.is_met(Cost(0, 0, 33), ORIGINAL, merged=2)
    assert not budget.is_met(Cost(0, 0, 0), ORIGINAL, merged=3)


def test_total_adds_work_and_takes_the_largest_memory():
    assert total([Cost(1, 2, 3), Cost(10, 20, 2)]) == Cost(11, 22, 3)
    assert total([]) == Cost()


def test_is_dearer_is_strict_and_in_one_unit():
    assert is_dearer(Cost(2, 0, 0), Cost(1, 9, 9), "macs")
    assert not is_dearer(Cost(1, 9, 9), Cost(1, 0, 0), "macs")
    assert is_dearer(Cost(0, 0, 5), Cost(9, 9, 4), "activation_bytes")


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (222_600_000, "macs", "222.6 M"),
        (999, "params", "999"),
        (1_200_000, "activation_bytes", "1.2 MB"),
        (7, "bytes", "7 B"),
    ],
)
def test_readable(amount, unit, text):
    assert readable(amount, unit) == text

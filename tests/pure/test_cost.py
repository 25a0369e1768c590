import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from updp_tf.cost import Budget, Limit, is_dearer, readable, total
from updp_tf.errors import BudgetError
from updp_tf.structure import Cost

ORIGINAL = Cost(macs=1000, params=200, activation_bytes=64, latency_ns=2_000_000, file_bytes=3000)


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
        ({"latency": 0.6}, {"latency_ns": 1_200_000}, None, "latency_ns"),
        ({"latency_ms": 1.2}, {"latency_ns": 1_200_000}, None, "latency_ns"),
        ({"latency_ms": 1.9, "latency": 0.6, "macs": 0.9}, {"latency_ns": 1_200_000, "macs": 900}, None, "latency_ns"),
        ({"bytes": 0.5, "merged": 2}, {"file_bytes": 1500}, 2, "file_bytes"),
        ({"bytes_max": 2_000_000}, {"file_bytes": 2_000_000}, None, "file_bytes"),
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
        ({"latency": 1.2}, r'fraction of the original.*Did you mean 0.012, or \{"latency_ms": 1.2\}\?'),
        ({"latency_ms": 0}, "'latency_ms' is a number of milliseconds above 0. Received: 0.$"),
        ({"latency_ms": "fast"}, "Received: 'fast'"),
        ({"bytes_max": 0.5}, r'whole number of bytes of the .tflite file.*For a fraction use \{"bytes": 0.5\}'),
        (
            {"latency_max": 0.5},
            "cannot be in 'latency_max': use macs, params, activation_bytes, latency, bytes, macs_max",
        ),
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
    assert total([Cost(latency_ns=1, file_bytes=5), Cost(latency_ns=2, file_bytes=6)]) == Cost(0, 0, 0, 3, 11)
    assert total([]) == Cost()
    assert Cost(1, 2, 3).as_json() == {"macs": 1, "params": 2, "activation_bytes": 3}
    assert Cost(1, 2, 3, 4, 5).as_json()["latency_ns"] == 4


def test_is_dearer_is_strict_and_in_one_unit():
    assert is_dearer(Cost(2, 0, 0), Cost(1, 9, 9), "macs")
    assert not is_dearer(Cost(1, 9, 9), Cost(1, 0, 0), "macs")
    assert is_dearer(Cost(0, 0, 5), Cost(9, 9, 4), "activation_bytes")


def test_what_was_measured_slower_is_dearer_whatever_the_budget():
    assert is_dearer(Cost(macs=1, latency_ns=11), Cost(macs=2, latency_ns=10), "macs")
    assert not is_dearer(Cost(macs=1, latency_ns=10), Cost(macs=2, latency_ns=10), "macs")


def test_only_time_and_bytes_need_a_table():
    assert Budget.parse({"macs": 0.5, "bytes_max": 9}).needs_table == "bytes_max"
    assert Budget.parse({"latency": 0.5}).needs_table == "latency"
    assert Budget.parse({"macs": 0.5, "merged": 9}).needs_table is None


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (222_600_000, "macs", "222.6 M"),
        (999, "params", "999"),
        (1_200_000, "activation_bytes", "1.2 MB"),
        (7, "bytes", "7 B"),
        (1_234_567, "latency_ns", "1.235 ms"),
        (2_000_000, "file_bytes", "2.0 MB"),
    ],
)
def test_readable(amount, unit, text):
    assert readable(amount, unit) == text

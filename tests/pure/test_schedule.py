"""Schedules: which blend a step has, and what makes no schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updp_tf.errors import ScheduleError
from updp_tf.schedule import Schedule, steps_of

SHAPES = st.sampled_from(["cosine", "linear"])
ORDERS = st.sampled_from(["together", "front_to_back", "back_to_front"])


@given(st.integers(1, 500), st.floats(0, 1), SHAPES, ORDERS, st.integers(1, 9))
def test_blends_fall_from_one_to_zero_and_stay_there(total, until, shape, order, n):
    schedule = Schedule(total_steps=total, until=until, shape=shape, order=order)
    for index in range(n):
        blends = [schedule.blend(step, index, n) for step in range(total + 1)]
        assert all(later <= earlier for earlier, later in zip(blends, blends[1:], strict=False))
        assert all(0 <= blend <= 1 for blend in blends)
        begin, end = steps_of(schedule.window(index, n), total)
        assert all(blend == 1.0 for blend in blends[: min(begin + 1, end)])
        assert all(blend == 0.0 for blend in blends[round(until * total) :])


def test_the_curves_at_a_quarter_of_the_way():
    assert Schedule(total_steps=100, until=0.8, shape="linear").blend(20) == pytest.approx(0.75)
    assert Schedule(total_steps=100, until=0.8).blend(20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize(("order", "first"), [("front_to_back", 0), ("back_to_front", 3)])
def test_one_block_after_the_other(order, first):
    schedule = Schedule(total_steps=80, until=0.5, order=order)
    middle_of_first = [schedule.blend(5, index, 4) for index in range(4)]
    assert 0 < middle_of_first.pop(first) < 1
    assert middle_of_first == [1.0] * 3
    assert [schedule.blend(40, index, 4) for index in range(4)] == [0.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "one step or more"),
        ({"until": 1.5}, "from 0 to 1"),
        ({"until": math.nan}, "from 0 to 1"),
        ({"shape": "exponential"}, "'cosine' or 'linear'"),
        ({"order": "random"}, "front_to_back"),
    ],
)
def test_what_makes_no_schedule_says_so(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(**arguments)


def test_a_schedule_without_steps_has_no_blend():
    with pytest.raises(ScheduleError, match="total_steps"):
        Schedule().blend(0)

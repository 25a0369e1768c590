"""Every family and backbone of the coverage table narrows: it builds, runs as the oracle says, trains, saves, loads."""

from __future__ import annotations

import pytest

from tests.coverage_table import models
from tests.isomorphic.oracle import TOLERANCE
from tests.width_table import Row, measure, results

SMALL = "MobileNet alpha 0.25"


def check(row: Row) -> None:
    assert float(row.oracle_error) < TOLERANCE, row
    assert row.trained == row.loaded == "yes", row
    assert not row.int8.startswith("no"), row
    assert int(row.params_after) < int(row.params), row


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == SMALL else pytest.mark.slow) for name in models()]
)
def test_a_family_narrows_by_a_quarter_and_by_half(name):
    for row in measure(name, export=False):
        check(row)


def test_what_the_table_holds_is_as_it_should_be():
    for row in results():
        check(row)

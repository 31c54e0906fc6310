"""The table of the documentation that says which method works in which setting of the Trainer."""

import json

import pytest

from support.compatibility import COLUMNS, cells
from support.reference import METHODS


def test_every_method_has_passed_in_every_setting(repository):
    """A method that is new, or a test that failed when the table was recorded, needs `make compatibility`."""
    table = json.loads((repository / "docs" / "compatibility.json").read_text())
    assert set(table) == set(METHODS)
    for method, row in table.items():
        assert tuple(row) == COLUMNS, method
        assert all(passed and count > 0 for passed, count in row.values()), method


class Report:
    def __init__(self, outcome, *properties, when="call"):
        self.outcome, self.when, self.user_properties = outcome, when, [("cell", each) for each in properties]


@pytest.mark.parametrize(("last", "passed"), [("passed", True), ("failed", False)])
def test_a_cell_passes_if_all_of_its_tests_do(last, passed):
    reports = [
        Report("passed", ["sam", "fp32"]),
        Report(last, ["sam", "fp32"], ["sam", "clip"]),
        Report("failed", ["sam", "DDP"], when="setup"),
    ]
    assert cells(reports) == {"sam": {"fp32": [passed, 2], "clip": [passed, 1]}}

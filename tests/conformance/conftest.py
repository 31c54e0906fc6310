"""Summary line of the conformance run: how many recorded files are matched, how many wait for their method."""

import pytest
from _pytest.terminal import TerminalReporter

RUNNER = "conformance/test_golden.py::test_recorded_values["
NONE = "[none]"  # the one skipped case when there is no folder


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    counts = {
        outcome: sum(
            RUNNER in report.nodeid and NONE not in report.nodeid for report in terminalreporter.stats.get(outcome, [])
        )
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counts.values()):
        terminalreporter.write_line(
            f"recorded values: {counts['passed']} matched, {counts['failed']} different, "
            f"{counts['skipped']} waiting for their method"
        )

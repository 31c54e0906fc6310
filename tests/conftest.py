"""Options and surroundings shared by all tests: quiet, seeded, and in a folder of their own."""

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.terminal import TerminalReporter

from support import compatibility

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDED = "test_golden.py::test_recorded_values["
NONE = "[none]"  # the case that says that there is no folder of recorded values


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder of recorded values, FAMILY/METHOD_CASE.npz (default: ../shared/golden beside the repository)",
    )
    parser.addoption(
        "--record-compatibility",
        metavar="FILE",
        type=Path,
        default=None,
        help="write which method passed in which setting of the Trainer, the table of the documentation",
    )
    parser.addoption(
        "--dist-folder",
        metavar="DIR",
        type=Path,
        default=None,
        help="test the sdist and wheel in DIR instead of building them",
    )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def quiet_lightning() -> None:
    """No promotional tips and device tables; what is logged as a warning is still shown."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers for a test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # left behind by seed_everything
        os.environ.pop(variable, None)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, so that nothing depends on the checkout and nothing is written into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_double_imports() -> Iterator[None]:
    """callbacks and recipes exist only inside the package: imported as top-level modules, every class exists twice."""
    yield
    strangers = {"callbacks", "recipes"} & set(sys.modules)
    assert not strangers, f"imported past the package: {sorted(strangers)}; use lightning_robust.*"


@pytest.fixture
def cell(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Says which cell of the documentation's compatibility table a test stands for: method and setting."""
    return lambda row, column: record_property("cell", [row, column])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """How many recorded files are matched, and how many wait for their method.

    It stands here and not in tests/conformance, whose conftest a parallel run reads in its workers only.
    """
    stats = terminalreporter.stats
    target: Path | None = terminalreporter.config.getoption("--record-compatibility")
    if target is not None:
        compatibility.write(target, [each for reports in stats.values() for each in reports])
    names = {
        outcome: [report.nodeid for report in stats.get(outcome, [])] for outcome in ("passed", "failed", "skipped")
    }
    counts = {outcome: sum(RECORDED in name and NONE not in name for name in found) for outcome, found in names.items()}
    if any(counts.values()):
        terminalreporter.write_line(
            f"recorded values: {counts['passed']} matched, {counts['failed']} different, "
            f"{counts['skipped']} waiting for their method"
        )

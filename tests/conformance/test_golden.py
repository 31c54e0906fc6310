"""Every recorded file against the public API: `pytest tests/conformance --golden DIR`.

One case per ``DIR/FAMILY/METHOD_CASE.npz``. A case fails when a value differs or when an array of the file was
neither read, compared nor named in `Golden.skip`; it is skipped, with the reason, when no adapter knows its method.
"""

import importlib
import pkgutil
from pathlib import Path

import pytest

from conformance import adapters
from support.golden import ADAPTERS, Golden, discover

for module in pkgutil.iter_modules(adapters.__path__, f"{adapters.__name__}."):
    importlib.import_module(module.name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recorded" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--golden")
    folder: Path = named or metafunc.config.rootpath.parent / "shared" / "golden"
    files = discover(folder.resolve())  # a test runs in a folder of its own
    if named and not files:  # a typing error must not look like a run without failures
        raise pytest.UsageError(f"--golden {named}: no FAMILY/METHOD_CASE.npz in this folder")
    if files:
        cases = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in files]
    else:
        reason = "no recorded values in ../shared/golden; name a folder with --golden DIR"
        cases = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("recorded", cases)


def compare(golden: Golden) -> None:
    """Run the adapter of a file; skip without one, fail on leftovers."""
    key = golden.family, golden.method
    if key not in ADAPTERS:
        pytest.skip(f"no adapter yet for {'/'.join(key)}")
    ADAPTERS[key](golden)
    if golden.unused():
        pytest.fail(f"arrays that the adapter of {'/'.join(key)} neither used nor skipped: {golden.unused()}")


def test_recorded_values(recorded: Path) -> None:
    compare(Golden(recorded))

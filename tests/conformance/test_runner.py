"""The runner itself: it must not pass what it did not compare."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.test_golden import compare
from support.golden import ADAPTERS, Golden, adapter, discover


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Golden:
    for key in list(ADAPTERS):
        monkeypatch.delitem(ADAPTERS, key)
    return Golden(record(tmp_path, x=np.array([1.0, 2.0]), doubled=np.array([2.0, 4.0])))


def record(folder: Path, **arrays: Any) -> Path:
    path = folder / "toys" / "double_a.npz"
    path.parent.mkdir(parents=True)
    meta = json.dumps({"family": "toys", "method": "double", "hyper": {"factor": 2.0}})
    np.savez(path, meta=np.array(meta), **arrays)
    return path


def test_matching_values_pass(golden: Golden) -> None:
    @adapter("toys", "double")
    def double(golden: Golden) -> None:
        golden.check("doubled", golden.hyper["factor"] * golden.tensor("x"))

    compare(golden)


def test_a_different_value_fails(golden: Golden) -> None:
    @adapter("toys", "double")
    def double(golden: Golden) -> None:
        golden.check("doubled", golden.hyper["factor"] * golden.tensor("x") + 1e-7)

    with pytest.raises(AssertionError, match="double_a: doubled"):
        compare(golden)


def test_an_array_nobody_looked_at_fails(golden: Golden) -> None:
    @adapter("toys", "double")
    def double(golden: Golden) -> None:
        golden.tensor("x")

    with pytest.raises(pytest.fail.Exception, match=r"neither used nor skipped: \['doubled'\]"):
        compare(golden)


def test_a_skipped_array_needs_a_reason(golden: Golden) -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        golden.skip("doubled", reason="")


def test_without_adapter_the_case_waits(golden: Golden) -> None:
    with pytest.raises(pytest.skip.Exception, match="no adapter yet for toys/double"):
        compare(golden)


def test_one_adapter_per_method(golden: Golden) -> None:
    adapter("toys", "double")(print)
    with pytest.raises(ValueError, match="two adapters for toys/double"):
        adapter("toys", "double")(print)


def test_discovery(tmp_path: Path) -> None:
    assert discover(tmp_path) == []
    path = record(tmp_path, x=np.zeros(1))
    (tmp_path / "toys" / "INDEX.md").write_text("not a record")
    assert discover(tmp_path) == [path]

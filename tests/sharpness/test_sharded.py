"""sharp_backward on parameters sharded over two processes is one process with the whole batch."""

import re
from pathlib import Path

import pytest
import torch

from support.ranks import WORLD, launch
from support.sharded_lightning import CASES, whole_runs

SCRIPT = Path(__file__).parents[1] / "support" / "sharded_training.py"
METHODS = ["sam", "asam", "gsam", "gam"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launch(str(SCRIPT), str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", [*METHODS, *(f"{name} accumulate clip" for name in METHODS), "gathered copies kept"])
def test_equals_one_process_with_the_whole_batch(ranks, case):
    for rank in ranks:
        sharded, single = rank[case]
        for one, other in zip(sharded, single, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def one_process():
    return whole_runs()


@pytest.mark.parametrize("case", CASES)
def test_the_callback_equals_one_process_with_the_whole_batch(ranks, one_process, case):
    for rank in ranks:
        weights, loss = rank[case]
        torch.testing.assert_close(weights, one_process[case][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, one_process[case][1])


def test_methods_differ(ranks):
    """Else the comparison above could not fail."""
    assert all((ranks[0]["sam"][1][0] - ranks[0][name][1][0]).abs().max() > 1e-3 for name in ("asam", "gsam", "gam"))


def test_an_exception_leaves_nothing_behind(ranks):
    for rank in ranks:
        found = rank["exception"]
        assert found["kept"]
        assert all(torch.equal(one, other) for one, other in zip(found["weights"], found["clean"], strict=True))
        assert found["off"] < 1e-12


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no module", "pass the module that fully_shard was applied to"),
        ("no sync", "leave out set_requires_gradient_sync(False)"),
        ("pending", "gradients that are not reduced yet"),
        ("mixed", "Some parameters are sharded and some are not"),
    ],
)
def test_refuses(ranks, case, message):
    assert all(re.search(re.escape(message), rank["refusals"][case]) for rank in ranks)

"""Losses that train parts of their own, in two processes."""

import pytest
import torch

from support.ddp_distillation import CALLBACKS, STEPS, fit, shuffled
from support.ranks import WORLD, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp_distillation")]  # one launch serves all of them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_distillation", str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", CALLBACKS)
def test_ranks_agree(ranks, name):
    equal(*(rank[name]["whole"] for rank in ranks))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_resume_equals_the_uninterrupted_run(ranks, name, step):
    for rank in ranks:
        equal(rank[name][step], rank[name]["whole"])


@pytest.mark.parametrize("name", ["hint", "aligned"])  # the batch statistic of USKD is that of each process
def test_two_halves_equal_the_whole_batch(ranks, name, tmp_path):
    alone = fit(name, tmp_path, shuffled())
    for key, value in ranks[0][name]["whole"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)

"""Mixing in two processes: each draws for itself, and runs continue exactly."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.mixing import Mixup
from lightning_robust.training import derive_seed
from support.ddp_mixing import CALLBACKS, EPOCHS, SEED, STEPS, Soft, shuffled
from support.modules import CLASSES, Images
from support.ranks import WORLD, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp_mixing")]  # one launch serves all of them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_mixing", str(folder))
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


def batches(rank, epoch):
    sampler = shuffled(rank).sampler
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler)).split(3)


def test_equals_averaged_gradients_of_mixtures_that_each_rank_draws(ranks):
    module, data = Soft(), Images(24)
    optimizer = module.configure_optimizers()
    for epoch in range(EPOCHS):
        shards = [batches(rank, epoch) for rank in range(WORLD)]
        for index, parts in enumerate(zip(*shards, strict=True)):
            optimizer.zero_grad()
            shares = []
            for rank, indices in enumerate(parts):
                generator = torch.Generator().manual_seed(derive_seed(SEED, rank, epoch, index, "mixing"))
                torch.rand((), generator=generator)
                mixture = Mixup(alpha=1.0).mix(data.x[indices], generator)
                shares.append(float(mixture.lam))
                target = mixture.probabilities(data.y[indices], CLASSES)
                (F.cross_entropy(module(mixture.x), target) / WORLD).backward()
            assert shares[0] != shares[1]
            optimizer.step()
    for name, value in ranks[0]["mixup"]["whole"].items():
        torch.testing.assert_close(value, module.get_parameter(name), rtol=1e-5, atol=1e-6)

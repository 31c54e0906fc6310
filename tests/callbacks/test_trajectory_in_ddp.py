"""SAF, ELR, PS-KD, MESA and ADR in two processes: one memory, one average, and runs that continue exactly."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.sharpness import trajectory_loss
from support.ddp_trajectory import BATCHES, CALLBACKS, EPOCHS, SAMPLES, STEPS, shuffled
from support.modules import Images, PlainModule
from support.ranks import WORLD, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp_trajectory")]  # one launch serves all of them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_trajectory", str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name


def test_the_sampler_that_lightning_injects_is_followed(ranks):
    for rank in ranks:
        assert len(rank["indices"]) == 2 * BATCHES
        assert all(torch.equal(told, truth) for told, truth in rank["indices"])
    seen = {int(index) for rank in ranks for told, _ in rank["indices"][:BATCHES] for index in told}
    assert seen == set(range(SAMPLES))


@pytest.mark.parametrize("name", CALLBACKS)
def test_ranks_agree(ranks, name):
    for part in ("weights", "state"):
        equal(*(rank[name]["whole"][part] for rank in ranks))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_resume_equals_the_uninterrupted_run(ranks, name, step):
    for rank in ranks:
        for part in ("weights", "state"):
            equal(rank[name][step][part], rank[name]["whole"][part])


def batches(rank, epoch):
    sampler = shuffled(rank).sampler
    sampler.set_epoch(epoch)
    return torch.tensor(list(sampler)).split(3)


def test_saf_equals_one_memory_and_averaged_gradients(ranks):
    module, data = PlainModule(norm=False), Images(SAMPLES)
    optimizer = module.configure_optimizers()
    memory = {}
    for epoch in range(EPOCHS):
        for step in zip(*(batches(rank, epoch) for rank in range(WORLD)), strict=True):
            optimizer.zero_grad()
            for indices in step:
                z = module(data.x[indices])
                loss = F.cross_entropy(z, data.y[indices])
                known = torch.tensor([(epoch - 1, int(index)) in memory for index in indices])
                assert known.all() == (epoch > 0)
                if epoch > 0:
                    past = torch.stack([memory[epoch - 1, int(index)] for index in indices])
                    loss = loss + 2.0 * trajectory_loss(z, past, 2.0)
                (loss / WORLD).backward()
                memory |= {(epoch, int(index)): row for index, row in zip(indices, z.detach(), strict=True)}
            optimizer.step()
    for name, value in module.named_parameters():
        torch.testing.assert_close(ranks[0]["saf"]["whole"]["weights"][name], value, rtol=1e-5, atol=1e-6)
    kept = ranks[0]["saf"]["whole"]["state"]["logits"]
    for epoch in (EPOCHS - 1, EPOCHS - 2):
        expected = torch.stack([memory[epoch, index] for index in range(SAMPLES)])
        torch.testing.assert_close(kept[epoch % 2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_memories(ranks, dtype):
    expected = torch.zeros(11)
    expected[[0, 1, 2, 7, 4, 5]] = torch.tensor([11.0, 11.0, -5.5, -5.5, 20.0, 21.0])
    for rank in ranks:
        values, known = rank["merged"][dtype]
        assert torch.equal(values, expected.unsqueeze(1).expand(11, 2))
        assert torch.equal(known, expected != 0)

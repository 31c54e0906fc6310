"""Methods that remember: the Trainer equals a plain loop, checkpoints hold the memory, processes hold the same one."""

import pytest
import torch

from support.ddp_memory import EPOCHS, METHODS, WORLD, by_loop, by_trainer
from support.modules import loader
from support.ranks import launch


def equal(first, second):
    return all(
        one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
        for one, other in zip(first, second, strict=True)
    )


def near(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_equals_a_plain_loop(name):
    """Four batches an epoch, two of them a step."""
    ours, reference = by_trainer(METHODS[name], loader()), by_loop(METHODS[name], loader())
    assert ours[1]
    near(ours, reference)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_holds_the_memory(name, tmp_path):
    path = tmp_path / "half.ckpt"
    whole = by_trainer(METHODS[name], loader())
    half = by_trainer(METHODS[name], loader(), epochs=EPOCHS - 1, save=path)
    saved = torch.load(path, weights_only=True)
    kept = saved["lightning_robust.SharpnessAware"]["memory"]
    assert equal([kept], [half[1]])
    assert equal(by_trainer(METHODS[name], loader(), ckpt_path=path), whole)
    for tensor in kept.values():  # the last epoch depends on it
        tensor.zero_()
    torch.save(saved, path)
    assert not equal(by_trainer(METHODS[name], loader(), ckpt_path=path), whole)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank found with every method, from one launch."""
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_memory", str(folder))
    return {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(WORLD)] for name in METHODS
    }


@pytest.mark.slow
@pytest.mark.xdist_group("ddp_memory")
class TestTwoProcesses:
    @pytest.mark.parametrize("run", ["whole", "resumed", "loop"])
    @pytest.mark.parametrize("name", METHODS)
    def test_weights_and_memory_are_those_of_the_other(self, ranks, name, run):
        first, second = (found[run] for found in ranks[name])
        assert first[1]
        assert equal(first, second)

    @pytest.mark.parametrize("name", METHODS)
    def test_a_resumed_run_is_the_uninterrupted_one(self, ranks, name):
        for found in ranks[name]:
            assert equal(found["resumed"], found["whole"])

    @pytest.mark.parametrize("name", METHODS)
    def test_a_plain_loop_is_the_trainer(self, ranks, name):
        for found in ranks[name]:
            near(found["loop"], found["whole"])

"""What an attack's passes say, kept without a pass of its own."""

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.objectives.ascent import Ascent, check_one_run
from support.attacked import CLASSES, CountingNet, images


@pytest.fixture
def net():
    return CountingNet().double().eval()


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_logits_are_those_of_the_iterates(net, loss):
    x, y = images(dtype=torch.float64)
    ascent = Ascent(net)
    iterates = []

    class Remembering(PGD):
        def step(self, x, x_adv, *args):
            iterates.append(x_adv.detach())
            return super().step(x, x_adv, *args)

    attack = Remembering(steps=4, loss=loss, evaluate_result=True)
    attack(ascent, x, y)
    assert net.batches == [8] * (4 + 1 + (loss == "kl"))
    assert ascent.logits().shape == (4, 8, CLASSES)
    assert not ascent.logits().requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ascent.logits(), torch.stack([net(each) for each in iterates]))


def test_the_attack_finds_what_it_finds_without(net):
    x, y = images(dtype=torch.float64)
    net.train()
    ours = PGD(steps=3)(Ascent(net), x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours, PGD(steps=3)(net, x, y, generator=torch.Generator().manual_seed(0)))
    assert net.training
    assert int(net.norm.num_batches_tracked) == 0  # attacked in evaluation mode


def test_half_precision_is_kept_in_full():
    ascent = Ascent(torch.nn.Linear(4, 3).bfloat16())
    PGD(steps=1)(ascent, torch.rand(2, 4).bfloat16(), torch.tensor([0, 1]))
    assert ascent.logits().dtype == torch.float32


def test_no_pass_and_shrinking_batches_are_refused(net):
    ascent = Ascent(net)
    with pytest.raises(ValueError, match="the passes were of no images"):
        ascent.logits()
    for count in (3, 2):
        ascent(torch.rand(count, 3, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the passes were of \[2, 3\] images; take PGD without `early_stop`"):
        ascent.logits()


@pytest.mark.parametrize("attack", [PGD(restarts=2), PGD(early_stop=True)])
def test_attacks_with_several_ways_are_refused(attack):
    with pytest.raises(ValueError, match=r"Follower follows one run of its attack .* set restarts=1"):
        check_one_run("Follower", attack)
    check_one_run("Follower", PGD())

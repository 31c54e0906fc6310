"""AAER against a loop over samples."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD, ScheduledAttack
from lightning_robust.objectives import AAER, aaer_loss, abnormal_examples
from lightning_robust.schedules import Constant
from support.attacked import CountingNet, images


@pytest.fixture
def net():
    return CountingNet().double().train()


def formula(start, adv, y, weights=(1.0, 2.5, 1.5), detached=True):
    """Sets and means sample by sample."""
    variation, drops = {True: [], False: []}, []
    for z0, z1, label in zip(start, adv, y, strict=True):
        before, after = (F.cross_entropy(z[None], label[None]) for z in (z0, z1))
        abnormal = bool(before > after)
        variation[abnormal].append(((z1 - z0) ** 2).sum())
        if abnormal:
            drops.append(before - (after.detach() if detached else after))
    ce = F.cross_entropy(adv, y)
    if not variation[True] or not variation[False]:
        return ce, len(drops)
    va, vn = (torch.stack(variation[kind]).mean() for kind in (True, False))
    scale = weights[0] * len(drops) / len(y)
    return ce + scale * (weights[1] * torch.stack(drops).mean() + weights[2] * F.relu(va - vn.detach())), len(drops)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 2.5, 1.5), (0.5, 0.0, 3.0)])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient(seed, classes, weights, detached):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(9, classes, dtype=torch.float64, generator=generator)
    adv = torch.randn(9, classes, dtype=torch.float64, generator=generator).mul(1 + seed).requires_grad_()
    y = torch.randint(classes, (9,), generator=generator)
    names = ("weight", "ce_weight", "variation_weight")
    loss, adversarial, penalty = aaer_loss(
        start, adv, y, **dict(zip(names, weights, strict=True)), ce_term="detached" if detached else "differentiable"
    )
    expected, count = formula(start, adv, y, weights, detached)
    assert 0 < count < 9
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(adversarial + penalty, loss)
    ours, theirs = (torch.autograd.grad(value, adv)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_detached_term_has_no_gradient_and_the_other_raises_the_loss():
    start, adv = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    # the normal sample moves further, so that only the cross-entropy term is left of the penalty
    gradients = {
        (term, weight): torch.autograd.grad(aaer_loss(start, adv, y, ce_weight=weight, ce_term=term)[0], adv)[0]
        for term in ("detached", "differentiable")
        for weight in (0.0, 2.5)
    }
    assert torch.equal(gradients["detached", 0.0], gradients["detached", 2.5])
    assert torch.equal(gradients["detached", 0.0], gradients["differentiable", 0.0])
    assert gradients["differentiable", 2.5][0, 0] > gradients["detached", 2.5][0, 0]  # down on the true class
    assert torch.equal(gradients["differentiable", 2.5][1], gradients["detached", 2.5][1])


@pytest.mark.parametrize("kind", ["all abnormal", "none abnormal", "one sample"])
def test_one_kind_alone_is_the_cross_entropy(kind):
    y = torch.tensor([0] if kind == "one sample" else [0, 0])
    start = torch.zeros(len(y), 2)
    shift = torch.tensor([-1.0, 0.0] if kind == "none abnormal" else [1.0, 0.0])
    adv = (start + shift).requires_grad_()
    loss, adversarial, penalty = aaer_loss(start, adv, y)
    assert torch.equal(loss, adversarial)
    assert float(penalty.detach()) == 0
    loss.backward()
    torch.testing.assert_close(adv.grad, (adv.detach().softmax(1) - F.one_hot(y, 2)) / len(y))


def test_soft_targets():
    start, adv = torch.randn(6, 4), torch.randn(6, 4)
    y = torch.tensor([0, 1, 2, 3, 3, 0])
    torch.testing.assert_close(aaer_loss(start, adv, F.one_hot(y, 4).float()), aaer_loss(start, adv, y))
    soft = torch.rand(6, 4).softmax(1)
    before, after = (F.cross_entropy(each, soft, reduction="none") for each in (start, adv))
    assert torch.equal(abnormal_examples(start, adv, soft).mask, before > after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype):
    start = torch.tensor([[120.0, -120.0], [-120.0, 120.0], [0.0, 0.0]], dtype=dtype)
    adv = (-start).requires_grad_()
    loss, _, penalty = aaer_loss(start, adv, torch.tensor([0, 0, 0]), ce_term="differentiable")
    assert loss.dtype == torch.float32
    # one of three is abnormal; it and the second move by 2 * 240^2, the third not at all
    torch.testing.assert_close(penalty, torch.tensor((2.5 * 240 + 1.5 * (115200 - 57600)) / 3))
    loss.backward()
    assert bool(adv.grad.isfinite().all())


def test_start_logits_are_those_of_the_attacks_own_forward(net):
    x, y = images(dtype=torch.float64)
    objective = AAER(attack=FGSM(eps=0.1, step_size=0.3, random_start=True, mode="train"))
    prepared = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(1))
    assert net.batches == [8]
    starts = []

    class Watched(FGSM):
        def draw_start(self, *args):
            starts.append(super().draw_start(*args))
            return starts[-1]

    again = Watched(eps=0.1, step_size=0.3, random_start=True, mode="train")
    x_adv = again(net, x, y, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x_adv, prepared.x_adv)
    torch.testing.assert_close(prepared.extra["start_logits"], net(starts[0]).detach())


def test_objective_is_the_formula(net):
    x, y = images(32, dtype=torch.float64)
    with torch.no_grad():
        net.norm.weight.mul_(60)  # far from linear, so that the step overshoots for some samples
    objective = AAER(attack=FGSM(eps=0.3, random_start=True, mode="train"), variation_weight=3.0)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == [32]
    adv = net(prepared.x_adv)
    expected, count = formula(prepared.extra["start_logits"], adv, y, (1.0, 2.5, 3.0))
    assert 0 < count < 32
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, adv)
    assert float(output.logs["abnormal"]) == pytest.approx(count / 32)
    assert output.sample_losses is None  # its parts are of the batch
    assert objective.passes(1) == 2


def test_published_defaults():
    objective = AAER()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.random_start, attack.mode) == (8 / 255, 10 / 255, True, "train")
    assert (objective.weight, objective.ce_weight, objective.variation_weight) == (1.0, 2.5, 1.5)
    assert "ce_term='detached'" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "Expected `weight`"),
        ({"ce_weight": -1}, "Expected `ce_weight`"),
        ({"variation_weight": -1}, "Expected `variation_weight`"),
        ({"ce_term": "none"}, "Expected `ce_term` to be one of 'detached', 'differentiable'"),
        ({"attack": PGD(early_stop=True)}, "AAER follows one run"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        AAER(**options)


def test_further_refusals():
    with pytest.raises(ValueError, match="Expected `ce_term`"):
        aaer_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), ce_term="none")
    with pytest.raises(ValueError, match="AAER follows one run"):
        AAER(attack=ScheduledAttack(PGD(restarts=2), eps=Constant(value=0.1))).epoch_starts(0, 1)

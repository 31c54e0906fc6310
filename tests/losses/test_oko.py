import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import OKO, MixedTarget, oko_loss

# three sets of one pair and two odd classes, in various orders
LABELS = torch.tensor([0, 3, 0, 1, 4, 2, 3, 2, 1, 0, 4, 4])
PAIRS = torch.tensor([0, 2, 4])
SHARES = torch.tensor([[0.5, 0.25, 0, 0.25, 0], [0, 0, 0.5, 0.25, 0.25], [0.25, 0.25, 0, 0, 0.5]], dtype=torch.float64)


def random_logits(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(12, 5, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def sums(logits):
    return torch.stack([logits[i : i + 4].sum(0) for i in (0, 4, 8)])


def test_hard_targets_are_the_cross_entropy_of_the_sum_with_the_pair():
    logits = random_logits()
    reference = F.cross_entropy(sums(logits), PAIRS, reduction="none")
    torch.testing.assert_close(oko_loss(logits, LABELS, k=2), reference)
    torch.testing.assert_close(OKO(k=2)(logits, LABELS), reference.mean())


def test_soft_targets_are_the_divergence_from_the_shares():
    logits = random_logits()
    reference = F.kl_div(sums(logits).log_softmax(1), SHARES, reduction="none").sum(1)
    torch.testing.assert_close(oko_loss(logits, LABELS, k=2, targets="soft"), reference)
    torch.testing.assert_close(OKO(k=2, targets="soft")(logits, LABELS), reference.mean())


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_the_gradient_is_the_true_one_and_finite_at_extremes(targets):
    assert torch.autograd.gradcheck(lambda z: oko_loss(z, LABELS, k=2, targets=targets), random_logits())
    extreme = (120 * (2 * F.one_hot(LABELS, 5).float() - 1)).requires_grad_()
    loss = OKO(k=2, targets=targets)(-extreme, LABELS)
    (gradient,) = torch.autograd.grad(loss, extreme)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_the_order_within_a_set_and_a_constant_change_nothing():
    logits = random_logits()
    order = torch.cat([4 * i + torch.tensor([2, 0, 3, 1]) for i in range(3)])
    torch.testing.assert_close(OKO(k=2)(logits[order], LABELS[order]), OKO(k=2)(logits, LABELS))
    torch.testing.assert_close(OKO(k=2)(logits + 7, LABELS), OKO(k=2)(logits, LABELS))


def test_in_evaluation_it_is_the_cross_entropy_of_single_images():
    logits = random_logits()[:5]
    torch.testing.assert_close(OKO().eval()(logits, LABELS[:5]), F.cross_entropy(logits, LABELS[:5]))


def test_low_precision_is_left_before_logits_are_summed():
    logits = random_logits(30.0, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = OKO(k=2)(logits, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, OKO(k=2)(logits.float(), LABELS), rtol=0, atol=0)


def test_pairs_alone_need_no_odd_class():
    logits = random_logits()
    pairs = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0])
    torch.testing.assert_close(OKO(k=0)(logits, pairs), F.cross_entropy(logits.view(6, 2, 5).sum(1), pairs[::2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "`k` to be an integer >= 0"),
        ({"k": 0, "targets": "soft"}, "`k` to be an integer >= 1"),
        ({"targets": "mean"}, "`targets` to be one of 'hard', 'soft'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OKO(**options)


def test_batches_of_something_else_are_refused():
    logits = random_logits()
    with pytest.raises(ValueError, match=r"multiple of 4, the size of a set \(k \+ 2\), but got \(11, 5\)"):
        OKO(k=2)(logits[:11], LABELS[:11])
    with pytest.raises(ValueError, match="one class appears twice and 2 others once"):
        OKO(k=2)(logits, LABELS.roll(1))
    with pytest.raises(ValueError, match="OKO needs class indices"):
        OKO(k=2)(logits, logits.detach().softmax(1))
    with pytest.raises(ValueError, match="OKO needs class indices"):
        OKO(k=2)(logits, MixedTarget(LABELS, LABELS, torch.tensor(0.5)))
    with pytest.raises(ValueError, match="Expected `target`"):
        OKO(k=2)(logits, LABELS[:8])
    with pytest.raises(ValueError, match=r"Expected labels to be in \[0, 4\]"):
        OKO(k=2)(logits, LABELS.where(LABELS != 4, 5))

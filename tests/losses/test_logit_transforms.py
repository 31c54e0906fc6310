"""LogitClip, LogitNorm, and what a criterion around another one passes on."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import (
    ELR,
    AdaFocal,
    Criterion,
    CrossEntropy,
    Focal,
    LogitClip,
    LogitNorm,
    OnlineLabelSmoothing,
    clip_logits,
    normalized_logits,
)
from support.criteria import Watching

LABELS = torch.tensor([0, 3, 2, 2, 1, 3])


def random_logits(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 4, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 2.0])
def test_norms_above_the_bound_become_the_bound_and_others_stay(max_norm, p):
    logits = random_logits()
    clipped, norms = clip_logits(logits, max_norm=max_norm, p=p), logits.norm(p, dim=1)
    reference = torch.stack(
        [z if norm <= max_norm else z / norm * max_norm for z, norm in zip(logits, norms, strict=True)]
    )
    torch.testing.assert_close(clipped, reference)
    loss, expected = LogitClip(max_norm=max_norm, p=p)(logits, LABELS), F.cross_entropy(reference, LABELS)
    gradients = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients)


def test_the_published_code_looks_at_the_inverse_bound():
    logits = torch.tensor([[0.3, 0.0], [0.6, 0.0], [3.0, 0.0]], dtype=torch.float64)
    clipped = clip_logits(logits, max_norm=2.0, reference_compat=True)
    torch.testing.assert_close(clipped[:, 0].tolist(), [0.3, 2.0, 2.0], rtol=1e-6, atol=0)
    exact = clip_logits(logits, max_norm=2.0)
    torch.testing.assert_close(exact[:, 0].tolist(), [0.3, 0.6, 2.0])


def test_the_loss_of_clipped_logits_is_bounded():
    extreme = 120 * (2 * F.one_hot((LABELS + 1) % 4, 4).float() - 1)
    losses = LogitClip(max_norm=1.5, base=CrossEntropy(reduction="none"))(extreme, LABELS)
    assert float(losses.max()) <= math.log(1 + 3 * math.exp(3.0))
    assert float(LogitClip(max_norm=1.5)(-extreme, LABELS)) >= math.log(1 + 3 * math.exp(-3.0))


@pytest.mark.parametrize("temperature", [0.04, 1.0])
def test_normalised_logits_have_one_norm_and_lose_their_scale(temperature):
    logits = random_logits()
    norms = normalized_logits(logits, temperature=temperature).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1 / temperature), rtol=1e-6, atol=0)
    criterion = LogitNorm(temperature=temperature)
    torch.testing.assert_close(criterion(logits, LABELS), criterion(5 * logits, LABELS), rtol=1e-5, atol=0)
    reference = F.cross_entropy(logits / (temperature * (logits.norm(dim=1, keepdim=True) + 1e-7)), LABELS)
    torch.testing.assert_close(criterion(logits, LABELS), reference)


def test_the_smallest_loss_is_the_documented_one():
    best = torch.tensor([[3.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    value = LogitNorm(temperature=0.5)(best, torch.tensor([0]))
    assert float(value) == pytest.approx(math.log(1 + 3 * math.exp(-math.sqrt(4 / 3) / 0.5)), rel=1e-5)


@pytest.mark.parametrize("criterion", [LogitClip(max_norm=0.7), LogitNorm(temperature=0.5)], ids=["clip", "norm"])
def test_the_gradient_is_the_true_one_and_finite_at_the_origin(criterion):
    assert torch.autograd.gradcheck(lambda z: criterion(z, LABELS), random_logits())
    zeros = torch.zeros(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(criterion(zeros, LABELS), zeros)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("wrap", [LogitClip, LogitNorm])
def test_dense_logits_are_transformed_pixel_by_pixel(wrap):
    pixels, labels = random_logits()[..., None].expand(6, 4, 3), LABELS[:, None].expand(6, 3)
    torch.testing.assert_close(wrap()(pixels, labels), wrap()(random_logits(), LABELS))


@pytest.mark.parametrize("wrap", [LogitClip, LogitNorm])
def test_the_base_is_whatever_criterion_on_the_transformed_logits(wrap):
    logits, soft = random_logits(3.0), random_logits(2.0).detach().softmax(1)
    criterion = wrap(base=Focal(gamma=2.0, weight=[1.0, 2.0, 3.0, 4.0], reduction="none"))
    assert criterion.reduction == "none"
    transformed = criterion.transform(logits)
    for target in (LABELS, soft):
        torch.testing.assert_close(criterion(logits, target), criterion.base(transformed, target))


def test_what_the_base_needs_and_is_told_goes_through():
    around = LogitClip(base=ELR())
    assert (around.needs, around.needs_epoch, around.soft_targets) == (("index",), False, True)
    around.samples_known(10)
    around(random_logits(), LABELS, index=torch.arange(6))
    assert bool(around.base.memory.rows[:6].any())
    with pytest.raises(TypeError, match="index is missing"):
        around(random_logits(), LABELS)

    watching = LogitNorm(base=Watching())
    assert watching.needs_epoch
    assert watching.needs_validation
    watching.epoch_starts(2, 5)
    watching.observe(random_logits(), LABELS)
    watching.validation_ends(lambda tensor: tensor)
    watching.epoch_ends(2, lambda tensor: tensor)
    assert watching.base.calls == [("starts", 2, 5), ("observe", 6), ("validation",), ("ends", 2)]

    smoothing = LogitNorm(base=OnlineLabelSmoothing(num_classes=4))
    assert not smoothing.soft_targets
    smoothing(random_logits(), LABELS)
    counts = smoothing.base.counts.clone()
    smoothing.synchronise(lambda tensor: 2 * tensor)  # two processes that saw the same
    assert torch.equal(smoothing.base.counts, counts)


def test_a_base_that_watches_validation_sees_transformed_logits():
    class Kept(Criterion):
        def observe(self, logits, target):
            self.seen = logits

    around = LogitNorm(temperature=1.0, base=Kept())
    around.observe(random_logits(), LABELS)
    torch.testing.assert_close(around.base.seen, normalized_logits(random_logits(), temperature=1.0))
    assert LogitClip(base=AdaFocal()).needs_validation


def test_state_and_counting_reach_the_base():
    around = LogitClip(base=ELR(num_samples=6))
    around(random_logits(), LABELS, index=torch.arange(6))
    assert "base.memory.rows" in around.state_dict()
    around.counted(False)
    assert not around.base.recording


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitClip(max_norm=0.0), "`max_norm` to be a finite number > 0"),
        (lambda: LogitClip(p=0.5), "`p` to be a number >= 1 or infinity but got 0.5"),
        (lambda: LogitNorm(temperature=-1.0), "`temperature` to be a finite number > 0"),
        (lambda: LogitNorm()(torch.zeros(3), torch.zeros(3)), r"`logits` to be \[B, C\]"),
    ],
)
def test_what_is_out_of_range_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""What holds for every criterion: forms of targets, weights, ignored labels, precision, extremes, many classes."""

import copy

import pytest
import torch

from lightning_robust.losses import MixedTarget, SampleCriterion
from support.criteria import NAMES, build, context_of

CLASSES, SAMPLES = 5, 12
LABELS = torch.tensor([0, 3, 1, 4, 2, 2])
INDEX = torch.tensor([3, 7, 0, 11, 5, 8])

every_criterion = pytest.mark.parametrize("name", NAMES)


def logits(scale=1.0, dtype=torch.float64, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(len(LABELS), classes, generator=generator, dtype=torch.float64)).to(dtype)


def value(name, z, target, **options):
    """The loss of a fresh criterion, and its gradient."""
    criterion = build(name, z.shape[1], SAMPLES, **options).to(z.dtype if z.dtype == torch.float64 else torch.float32)
    z = z.clone().requires_grad_()
    loss = criterion(z, target, **context_of(criterion, INDEX, z.shape[1]))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


def takes(name, argument):
    criterion = build(name, CLASSES, SAMPLES)
    return isinstance(criterion, SampleCriterion) if argument == "reduction" else argument in vars(criterion)


def soft(name):
    return build(name, CLASSES, SAMPLES).soft_targets


@every_criterion
def test_a_scalar_in_full_precision_with_a_finite_gradient(name):
    loss, gradient = value(name, logits(), LABELS)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@every_criterion
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_logits_have_the_loss_of_their_float32_values(name, dtype):
    z = logits(3.0, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = value(name, z, LABELS)
    expected, _ = value(name, z.float(), LABELS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@every_criterion
def test_finite_with_finite_gradients_at_extreme_logits_in_float32(name):
    for sign in (1.0, -1.0):
        z = torch.zeros(len(LABELS), CLASSES)
        z[torch.arange(len(LABELS)), LABELS] = 120.0 * sign
        z[0] = 0.0
        loss, gradient = value(name, z, LABELS)
        assert bool(loss.isfinite()), sign
        assert bool(gradient.isfinite().all()), sign


@every_criterion
def test_one_hot_rows_equal_labels(name):
    one_hot = torch.nn.functional.one_hot(LABELS, CLASSES).double()
    if not soft(name):
        with pytest.raises(ValueError, match="class indices"):
            value(name, logits(), one_hot)
        return
    for ours, expected in zip(value(name, logits(), one_hot), value(name, logits(), LABELS), strict=True):
        torch.testing.assert_close(ours, expected)


@every_criterion
def test_a_mixed_target_equals_its_probabilities(name):
    lam = torch.linspace(0.1, 0.9, len(LABELS), dtype=torch.float64)
    mixed = MixedTarget(LABELS, LABELS.roll(1), lam)
    if not soft(name):
        with pytest.raises(ValueError, match="class indices"):
            value(name, logits(), mixed)
        return
    dense = mixed.probabilities(CLASSES, torch.float64)
    for ours, expected in zip(value(name, logits(), mixed), value(name, logits(), dense), strict=True):
        torch.testing.assert_close(ours, expected)


@every_criterion
def test_an_ignored_sample_is_as_if_it_were_not_there_and_a_batch_of_them_is_zero(name):
    if not takes(name, "ignore_index"):
        pytest.skip("has no ignored labels")
    with_ignored = torch.where(LABELS == 2, -100, LABELS)
    loss, gradient = value(name, logits(), with_ignored)
    keep = LABELS != 2
    criterion = build(name, CLASSES, SAMPLES).double()
    alone = criterion(logits()[keep], LABELS[keep], **context_of(criterion, INDEX[keep], CLASSES))
    torch.testing.assert_close(loss, alone.detach())
    assert not bool(gradient[~keep].any())
    loss, gradient = value(name, logits(), torch.full_like(LABELS, -100))
    assert float(loss) == 0.0
    assert not bool(gradient.any())


@every_criterion
def test_reductions_and_class_weights_mean_what_they_mean_in_torch(name):
    if not takes(name, "reduction"):
        pytest.skip("not a mean of per-sample losses")
    each, _ = value(name, logits(), LABELS, reduction="none")
    assert each.shape == LABELS.shape
    torch.testing.assert_close(value(name, logits(), LABELS)[0], each.mean())
    torch.testing.assert_close(value(name, logits(), LABELS, reduction="sum")[0], each.sum())
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25], dtype=torch.float64)
    weighted, _ = value(name, logits(), LABELS, reduction="none", weight=weight.tolist())
    torch.testing.assert_close(weighted, weight[LABELS] * each)
    mean, _ = value(name, logits(), LABELS, weight=weight.tolist())
    torch.testing.assert_close(mean, (weight[LABELS] * each).sum() / weight[LABELS].sum())


@every_criterion
def test_21_000_classes_and_two(name):
    if name not in ("CPC", "OnlineLabelSmoothing"):  # what they cost grows with the square of the classes
        wide = torch.randn(len(LABELS), 21_000, generator=torch.Generator().manual_seed(1))
        loss, gradient = value(name, wide, LABELS)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())
        two, gradient = value(name, wide[:, :2], LABELS % 2)
        assert bool(two.isfinite())
        assert bool(gradient.isfinite().all())


@every_criterion
def test_wrong_labels_and_shapes_are_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match=r"Expected labels to be in \[0, 4\]"):
        value(name, logits(), LABELS + 1)
    with pytest.raises(ValueError, match="Expected `target`"):
        value(name, logits(), LABELS[:-1])


@every_criterion
def test_a_copy_and_a_state_dict_carry_what_is_remembered(name):
    criterion = build(name, CLASSES, SAMPLES).double()
    context = context_of(criterion, INDEX, CLASSES)
    criterion(logits(), LABELS, **context)
    restored = build(name, CLASSES, SAMPLES).double()
    restored.load_state_dict(copy.deepcopy(criterion.state_dict()))
    again = copy.deepcopy(criterion)
    for other in (restored, again):
        torch.testing.assert_close(
            other(logits(2.0), LABELS, **context), copy.deepcopy(criterion)(logits(2.0), LABELS, **context)
        )


@every_criterion
def test_a_pass_that_does_not_count_and_evaluation_remember_nothing(name):
    criterion = build(name, CLASSES, SAMPLES).double()
    context = context_of(criterion, INDEX, CLASSES)
    criterion(logits(), LABELS, **context)
    before = copy.deepcopy(criterion.state_dict())
    criterion.counted(False)
    criterion(logits(2.0), LABELS, **context)
    criterion.counted(True)
    criterion.eval()(logits(2.0), LABELS, **context)
    after = criterion.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@every_criterion
def test_what_is_needed_is_asked_for_by_name(name):
    criterion = build(name, CLASSES, SAMPLES)
    if criterion.needs:
        with pytest.raises(TypeError, match=criterion.needs[0]):
            criterion(logits(), LABELS)

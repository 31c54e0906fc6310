"""Soft labels in few numbers, and the losses that train on them."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.distillation import FKD, FerKD, compress_soft_labels, ferkd_labels, recover_soft_labels
from lightning_robust.losses import MixedTarget
from support.distillation_losses import labels, logits

STUDENT, TEACHER, LABELS = logits(0, 12, 6), logits(1, 12, 6, scale=1.5), labels(2, 6, 12)
PROBABILITIES = TEACHER.softmax(1)


def loop(row, form, k):
    """One soft label, class by class."""
    ranked = sorted(range(len(row)), key=lambda c: -row[c])
    stored = ranked[: 1 if form in ("hard", "smoothing") else k]
    mass = sum(row[c] for c in stored)
    inside = {"hard": lambda p: 1.0, "marginal_renorm": lambda p: p / mass}.get(form, lambda p: p)
    outside = (1 - mass) / max(len(row) - len(stored), 1) if "smoothing" in form else 0.0
    return [inside(row[c]) if c in stored else outside for c in range(len(row))]


@pytest.mark.parametrize("form", ["hard", "smoothing", "marginal_smoothing", "marginal_renorm"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_recovery_equals_a_naive_loop(form, k):
    expected = torch.tensor([loop(row, form, k) for row in PROBABILITIES.tolist()], dtype=torch.float64)
    index, value = compress_soft_labels(PROBABILITIES, k)
    found = recover_soft_labels(index, value, num_classes=6, form=form)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(FKD(form=form, k=k)(STUDENT, TEACHER), F.cross_entropy(STUDENT, expected))


def test_all_classes_are_the_soft_label_itself():
    index, value = compress_soft_labels(PROBABILITIES, 100)
    assert index.shape == (12, 6)
    torch.testing.assert_close(recover_soft_labels(index, value, num_classes=6), PROBABILITIES)
    torch.testing.assert_close(FKD(k=100)(STUDENT, TEACHER), F.cross_entropy(STUDENT, PROBABILITIES))


def test_single_classes_may_come_without_a_dimension_for_them():
    index = torch.tensor([2, 0])
    assert torch.equal(recover_soft_labels(index, num_classes=3, form="hard"), F.one_hot(index, 3).float())
    value = torch.tensor([0.5, 0.8])
    found = recover_soft_labels(index, value, num_classes=3, form="smoothing")
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.25, 0.5], [0.8, 0.1, 0.1]]))


def test_small_integers_and_half_precision_as_stored():
    index, value = compress_soft_labels(PROBABILITIES.half(), 3)
    found = recover_soft_labels(index.to(torch.int16), value, num_classes=6)
    assert found.dtype == torch.float16
    torch.testing.assert_close(
        found.double(), recover_soft_labels(index, value.double(), num_classes=6), rtol=0, atol=2e-3
    )


def test_rounding_never_makes_a_negative_probability():
    value = torch.tensor([[0.7, 0.3004]])
    assert (recover_soft_labels(torch.tensor([[0, 1]]), value, num_classes=4) >= 0).all()


def test_positions():
    volume = PROBABILITIES.view(3, 4, 6).movedim(2, 1)
    index, value = compress_soft_labels(volume, 2)
    flat = recover_soft_labels(*compress_soft_labels(PROBABILITIES, 2), num_classes=6)
    torch.testing.assert_close(recover_soft_labels(index, value, num_classes=6).movedim(1, 2).reshape(12, 6), flat)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress_soft_labels(PROBABILITIES, 0), "`k` to be an integer >= 1"),
        (lambda: FKD(k=0), "`k` to be an integer >= 1"),
        (lambda: FKD(form="soft"), "`form` to be one of 'hard'"),
        (lambda: recover_soft_labels(LABELS, num_classes=6, form="soft"), "`form` to be one of 'hard'"),
        (lambda: recover_soft_labels(LABELS, num_classes=0, form="hard"), "`num_classes` to be an integer >= 1"),
        (lambda: recover_soft_labels(LABELS, num_classes=6), "Expected `value`, the probabilities of the stored"),
        (lambda: recover_soft_labels(LABELS, TEACHER, num_classes=6), r"`index` to be classes \[B\] or \[B, k\]"),
        (lambda: recover_soft_labels(TEACHER, TEACHER, num_classes=6), r"`index` to be classes \[B\] or \[B, k\]"),
        (lambda: recover_soft_labels(LABELS[None], TEACHER[:1].repeat(1, 2), num_classes=6), "at most `num_classes`"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SURE, LOST = 0.6, 0.35


def test_ferkd_equals_a_naive_loop():
    confidence = PROBABILITIES.amax(1)
    kinds = [(confidence < LOST).sum(), ((confidence >= LOST) & (confidence < SURE)).sum(), (confidence >= SURE).sum()]
    assert min(kinds) > 0
    total, count = 0.0, 0
    for z, q, y in zip(STUDENT, PROBABILITIES, LABELS.tolist(), strict=True):
        if q.max() < LOST:
            continue
        count += 1
        soft = q if q.max() >= SURE else 0.9 * F.one_hot(torch.tensor(y), 6).double() + 0.1 / 6
        total -= float((soft * z.log_softmax(0)).sum())
    loss = FerKD(soften_below=SURE, discard_below=LOST)
    assert float(loss(STUDENT, TEACHER, LABELS)) == pytest.approx(total / count, rel=1e-12)
    each = loss.sample_losses(STUDENT, TEACHER, LABELS)
    assert torch.equal(each == 0, confidence < LOST)


def test_ferkd_without_thresholds_is_the_soft_label_and_with_the_highest_the_smoothed_one():
    soft = FerKD(soften_below=0.0)(STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(soft, F.cross_entropy(STUDENT, PROBABILITIES))
    smoothed = FerKD(soften_below=1.0, label_smoothing=0.2)(STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(smoothed, F.cross_entropy(STUDENT, LABELS, label_smoothing=0.2))


def test_ferkd_leaves_out_a_whole_batch():
    student = STUDENT.clone().requires_grad_()
    loss = FerKD(soften_below=1.0, discard_below=1.0)(student, TEACHER, LABELS)
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() == 0


def test_ferkd_labels_of_mixtures_and_ignored_samples():
    mixture = MixedTarget(LABELS, LABELS.flip(0), torch.tensor(0.3))
    found, kept = ferkd_labels(PROBABILITIES, mixture, soften_below=1.0, discard_below=0.0, label_smoothing=0.0)
    torch.testing.assert_close(found, mixture.probabilities(6, torch.float64), rtol=1e-6, atol=1e-7)
    assert kept.all()
    some = torch.where(torch.arange(12) == 4, -100, LABELS)
    _, kept = ferkd_labels(PROBABILITIES, some, soften_below=SURE, discard_below=0.0)
    assert kept.tolist() == [i != 4 for i in range(12)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soften_below": 1.5}, r"`soften_below` to be in \[0, 1\]"),
        ({"soften_below": 0.3, "discard_below": 0.5}, r"`discard_below` to be in \[0, 0.3\]"),
        ({"soften_below": 0.3, "label_smoothing": 2.0}, r"`label_smoothing` to be in \[0, 1\]"),
    ],
)
def test_ferkd_refuses_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FerKD(**options)
    with pytest.raises(ValueError, match=message):
        ferkd_labels(PROBABILITIES, LABELS, **{"discard_below": 0.0, **options})


def test_ferkd_has_no_thresholds_of_its_own():
    with pytest.raises(TypeError, match="soften_below"):
        FerKD()

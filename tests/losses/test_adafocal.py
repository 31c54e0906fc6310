import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import AdaFocal, adafocal_gammas, adafocal_loss
from support.labels import logits_and_labels, mixed_labels, of_every_class, same_gradients, soft_labels

GAMMAS = torch.tensor([3.1, -0.7, 0.4, -2.0], dtype=torch.float64)
BOUNDS = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)


def identity(count):
    return count


def naive(logits, labels):
    losses = []
    for row, label in zip(logits.softmax(1), labels, strict=True):
        p = row[label]
        gamma = GAMMAS[sum(p.item() >= bound for bound in BOUNDS.tolist())]
        losses.append(-((1 - p if gamma >= 0 else 1 + p) ** abs(float(gamma))) * p.log())
    return torch.stack(losses)


def ours(logits, target):
    return adafocal_loss(logits, target, gammas=GAMMAS, bounds=BOUNDS)


def test_values_and_gradients_are_the_definition():
    logits, labels = logits_and_labels(samples=40, scale=2)
    bins = torch.bucketize(logits.softmax(1).gather(1, labels[:, None]), BOUNDS)
    assert bins.unique().tolist() == [0, 1, 2, 3]
    same_gradients(lambda z: ours(z, labels), lambda z: naive(z, labels), logits)


def test_soft_and_mixed_targets_are_the_mean_over_labels():
    logits, labels = logits_and_labels(scale=2)
    soft = soft_labels()
    torch.testing.assert_close(ours(logits, soft), (soft * of_every_class(ours, logits)).sum(1))
    mixed = mixed_labels(labels)
    torch.testing.assert_close(ours(logits, mixed), ours(logits, mixed.probabilities(5, torch.float64)))


def test_a_bound_belongs_to_the_upper_bin():
    logits = torch.zeros(1, 2, dtype=torch.float64)
    loss = adafocal_loss(logits, torch.tensor([0]), gammas=torch.tensor([0.0, 1.0]), bounds=torch.tensor([0.5]))
    assert loss.item() == pytest.approx(0.5 * math.log(2))


def test_extreme_logits_and_fractional_exponents():
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    for gamma in (0.0, 0.3, -0.3, 20.0, -2.0):
        module = AdaFocal(gamma=gamma, reduction="none")
        values = module(logits, labels)
        torch.testing.assert_close(values, torch.tensor([0.0, 240.0]))
        assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("gamma", "gap", "expected"),
    [
        (1.0, 0.3, math.exp(0.3)),
        (1.0, -0.3, math.exp(-0.3)),
        (-1.0, 0.3, -math.exp(-0.3)),  # over-confident: towards the focal loss
        (0.3, -0.5, -0.2),  # too small: changes sides
        (-0.3, 0.5, 0.2),
        (0.0, 0.5, 0.2),
        (19.0, 0.9, 20.0),
        (-1.9, -0.9, -2.0),
    ],
)
def test_update_of_one_exponent(gamma, gap, expected):
    found = adafocal_gammas(torch.tensor([gamma], dtype=torch.double), torch.tensor([gap], dtype=torch.double))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_options_of_the_update():
    gammas, gaps = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.5, 0.9, -0.9])
    found = adafocal_gammas(gammas, gaps, rate=2.0, switch=0.5, gamma_min=-0.4, gamma_max=3.0)
    torch.testing.assert_close(found, torch.tensor([math.e, 3.0, -0.4]))


def validation_set(samples=3000, seed=0):
    """Over-confident where sure, under-confident elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, 4, generator=generator)
    sampled = torch.multinomial((0.6 * logits).softmax(1), 1, generator=generator).squeeze(1)
    return logits, sampled


def sorted_bins(logits, labels, n_bins):
    """Gaps and inner bounds of bins between interpolated quantiles of the sorted confidences."""
    confidence, predicted = (x.numpy() for x in logits.softmax(1).max(1))
    edges = np.interp(np.linspace(0, len(labels), n_bins + 1), np.arange(len(labels)), np.sort(confidence))
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n_bins - 1)
    correct = predicted == labels.numpy()
    gaps = [confidence[which == b].mean() - correct[which == b].mean() for b in range(n_bins)]
    return torch.tensor(gaps), torch.tensor(edges[1:-1])


def test_bins_are_those_of_the_sorted_confidences():
    logits, labels = validation_set()
    module = AdaFocal(n_bins=10)
    for part in range(0, 3000, 700):
        module.observe(logits[part : part + 700], labels[part : part + 700])
    module.validation_ends(identity)
    gaps, bounds = sorted_bins(logits, labels, 10)
    assert gaps.abs().max() > 0.05
    torch.testing.assert_close(module.bounds, bounds.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(module.gammas, gaps.exp().float(), rtol=0, atol=2e-2)


def test_gaps_are_exact_within_the_bins():
    logits, labels = validation_set()
    module = AdaFocal(n_bins=10)
    module.observe(logits, labels)
    module.validation_ends(identity)
    confidence, predicted = logits.double().softmax(1).max(1)
    which = torch.bucketize(confidence, module.bounds.double(), right=True)
    for index in range(10):
        inside = which == index
        gap = confidence[inside].mean() - (predicted == labels)[inside].double().mean()
        assert module.gammas[index].item() == pytest.approx(math.exp(gap), rel=1e-6)


def test_processes_agree_to_the_bit_with_one():
    logits, labels = validation_set()
    alone, first, second = (AdaFocal() for _ in range(3))
    alone.observe(logits, labels)
    first.observe(logits[::2], labels[::2])
    second.observe(logits[1::2], labels[1::2])
    counts = first.counts + second.counts
    alone.validation_ends(identity)
    for module in (first, second):
        module.validation_ends(lambda count: counts)
        assert torch.equal(module.gammas, alone.gammas)
        assert torch.equal(module.bounds, alone.bounds)


def test_each_validation_epoch_starts_counting_anew_and_an_empty_one_changes_nothing():
    logits, labels = validation_set()
    module = AdaFocal()
    module.observe(logits, labels)
    module.validation_ends(identity)
    assert not module.counts.any()
    before = copy.deepcopy(module.state_dict())
    module.observe(logits, torch.full_like(labels, -100))
    module.validation_ends(identity)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_ignored_and_dense_labels():
    logits, labels = validation_set(600)
    kept, ignoring = AdaFocal(), AdaFocal(ignore_index=3)
    kept.observe(logits[labels != 3], labels[labels != 3])
    ignoring.observe(logits.view(100, 6, 4).movedim(2, 1), labels.view(100, 6))
    # another layout may round a confidence into the next cell
    assert torch.equal(kept.counts[:2].sum(1), ignoring.counts[:2].sum(1))
    for module in (kept, ignoring):
        module.validation_ends(identity)
    torch.testing.assert_close(ignoring.gammas, kept.gammas, rtol=0, atol=1e-2)
    assert kept.gammas.ne(1).all()


def test_a_model_that_is_always_sure_stays_finite():
    logits = torch.zeros(50, 3)
    logits[:, 0] = 120.0
    labels = torch.tensor([0] * 25 + [1] * 25)
    module = AdaFocal()
    for _ in range(20):
        module.observe(logits, labels)
        module.validation_ends(identity)
    assert module.gammas.isfinite().all()
    assert module.bounds.isfinite().all()
    assert (module.bounds.diff() >= 0).all()
    assert module.gammas.max() == 20.0
    assert module(logits, labels).isfinite()


def test_validation_under_inference_mode_leaves_buffers_that_training_can_use():
    logits, labels = validation_set(200)
    module = AdaFocal()
    with torch.inference_mode():
        module.observe(logits.clone(), labels.clone())
        module.validation_ends(identity)
    leaf = logits.requires_grad_()
    module(leaf, labels).backward()
    assert leaf.grad.isfinite().all()
    module.gammas.mul_(1)  # what a broadcast of buffers does
    module.observe(logits, labels)


def test_state_dict_carries_exponents_and_bounds_only():
    logits, labels = validation_set(200)
    module = AdaFocal()
    module.observe(logits, labels)
    module.validation_ends(identity)
    restored = AdaFocal()
    restored.load_state_dict(module.state_dict())
    assert set(module.state_dict()) == {"gammas", "bounds"}
    torch.testing.assert_close(restored(logits, labels), module(logits, labels), rtol=0, atol=0)


def test_one_bin_is_one_exponent_for_all():
    logits, labels = validation_set(200)
    module = AdaFocal(n_bins=1, gamma=2.0)
    assert module.bounds.shape == (0,)
    module.observe(logits, labels)
    module.validation_ends(identity)
    confidence, predicted = logits.softmax(1).max(1)
    gap = confidence.mean() - (predicted == labels).float().mean()
    assert module.gammas.item() == pytest.approx(2 * gap.exp().item(), rel=1e-5)


def test_gamma_zero_bins_are_the_cross_entropy_and_repr():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(AdaFocal(gamma=0.0)(logits, labels), F.cross_entropy(logits, labels))
    assert repr(AdaFocal()) == "AdaFocal(n_bins=15, rate=1.0, reduction='mean')"


@pytest.mark.parametrize(
    "wrong", [{"n_bins": 0}, {"rate": 0.0}, {"switch": -1.0}, {"gamma": 21.0}, {"gamma": math.nan}], ids=str
)
def test_refusals(wrong):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(wrong))}`"):
        AdaFocal(**wrong)


def test_soft_validation_targets_are_refused():
    with pytest.raises(ValueError, match="AdaFocal's validation needs class indices"):
        AdaFocal().observe(torch.zeros(2, 3), torch.ones(2, 3) / 3)

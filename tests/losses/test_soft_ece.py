import math

import pytest
import torch

from lightning_robust.losses import SoftECE, cross_entropy, soft_binned_ece
from lightning_robust.metrics import reliability_table


def batch(samples=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(samples, generator=generator, dtype=torch.float64)
    correct = torch.rand(samples, generator=generator, dtype=torch.float64) < confidence.square()
    return confidence.requires_grad_(), correct


def by_hand(confidence, correct, bins, temperature):
    """Sample by sample, bin by bin."""
    sizes, gaps = [0.0] * bins, [0.0] * bins
    for r, c in zip(confidence.tolist(), correct.tolist(), strict=True):
        shares = [math.exp(-((r - (j + 0.5) / bins) ** 2) / temperature) for j in range(bins)]
        for j, share in enumerate(shares):
            sizes[j] += share / sum(shares)
            gaps[j] += share / sum(shares) * (r - c)
    total = sum(sizes)
    return math.sqrt(sum(s / total * (g / max(s, 1e-5)) ** 2 for s, g in zip(sizes, gaps, strict=True)))


@pytest.mark.parametrize(("bins", "temperature"), [(1, 1.0), (5, 0.01), (15, 0.001)])
def test_equals_loops_over_samples_and_bins(bins, temperature):
    confidence, correct = batch()
    ours = soft_binned_ece(confidence, correct, bins=bins, temperature=temperature)
    assert ours.item() == pytest.approx(by_hand(confidence, correct, bins, temperature))


def test_the_temperature_follows_from_the_decay_factor():
    confidence, correct = batch()
    from_factor = soft_binned_ece(confidence, correct, bins=10, decay_factor=30.0)
    torch.testing.assert_close(
        from_factor, soft_binned_ece(confidence, correct, bins=10, temperature=1 / (math.log(30) * 100))
    )
    assert SoftECE(bins=15).temperature == pytest.approx(1 / (math.log(80) * 225))


def test_hard_bins_in_the_limit():
    confidence, correct = batch()
    soft = soft_binned_ece(confidence, correct, bins=15, temperature=1e-7)
    table = reliability_table(confidence.detach(), correct, n_bins=15)
    torch.testing.assert_close(soft, table.error("l2"))


def test_gradients():
    confidence, correct = batch(8)
    assert torch.autograd.gradcheck(lambda r: soft_binned_ece(r, correct), confidence)
    assert torch.autograd.gradgradcheck(lambda r: soft_binned_ece(r, correct), confidence)


def test_what_is_not_kept_does_not_count():
    confidence, correct = batch()
    kept = torch.arange(40) % 3 != 0
    torch.testing.assert_close(
        soft_binned_ece(confidence, correct, kept=kept), soft_binned_ece(confidence[kept], correct[kept])
    )


def test_no_error_has_no_gradient_instead_of_nan():
    for confidence, correct, kept in (
        (torch.ones(3), torch.ones(3), None),
        (torch.rand(3), torch.ones(3), torch.zeros(3, dtype=torch.bool)),
    ):
        confidence = confidence.requires_grad_()
        value = soft_binned_ece(confidence, correct, kept=kept)
        assert value.item() == 0.0
        assert torch.autograd.grad(value, confidence)[0].tolist() == [0.0, 0.0, 0.0]


def test_the_criterion_adds_it_to_the_cross_entropy_of_dense_logits_too():
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, -100], [4, 4, 1, 0]])
    p, answer = logits.softmax(1).max(1)
    kept = labels != -100
    expected = cross_entropy(logits, labels) + 3.0 * soft_binned_ece(p[kept], (answer == labels)[kept], bins=4)
    ours = SoftECE(weight=3.0, bins=4)(logits, labels)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (ours, expected)))


def test_refusals():
    with pytest.raises(ValueError, match="Expected `bins` to be an integer >= 1 but got 0"):
        SoftECE(bins=0)
    with pytest.raises(ValueError, match="Expected `temperature` to be a finite number > 0 but got 0"):
        SoftECE(temperature=0.0)
    with pytest.raises(ValueError, match=r"Expected `decay_factor` to be a finite number > 1 but got 1\.0"):
        soft_binned_ece(*batch(), decay_factor=1.0)
    with pytest.raises(ValueError, match="SoftECE needs class indices"):
        SoftECE()(torch.zeros(2, 4), torch.full((2, 4), 0.25))

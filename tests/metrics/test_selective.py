# SPDX-License-Identifier: Apache-2.0
"""Risk-coverage curves and their areas against loops, all orders of ties, and scikit-learn's AUROC."""

import itertools
import math

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torchmetrics import MetricCollection

from lightning_robust.metrics import (
    AUGRC,
    AURC,
    ExcessAURC,
    augrc,
    aurc,
    confidence_score,
    excess_aurc,
    risk_coverage_curve,
)
from support.ddp_calibrated import data, selective

# few different scores, so that ties are common
SAMPLES = st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=2, max_size=7)


def tensors(samples):
    scores, correct = zip(*samples, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(correct)


def risks(samples):
    """Risk after each sample, in the order of falling scores; ties as they are given."""
    wrong, found = 0, []
    for kept, (_, right) in enumerate(sorted(samples, key=lambda sample: -sample[0]), start=1):
        wrong += not right
        found.append(wrong / kept)
    return found


def area(risk, kind):
    """By the definition of each convention, on a grid of coverages."""
    n = len(risk)
    coverage = [(i + 1) / n for i in range(n)]
    if kind == "mean":
        return sum(risk) / n
    if kind == "from_zero":
        coverage, risk = [0.0, *coverage], [0.0, *risk]
    points = zip(itertools.pairwise(coverage), itertools.pairwise(risk), strict=True)
    whole = sum((b - a) * (low + high) / 2 for (a, b), (low, high) in points)
    return whole / (1 - 1 / n) if kind == "trapezoid" else whole


AREAS = ["mean", "trapezoid", "from_zero"]


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_the_curve_counts_errors(samples):
    scores, correct = tensors(samples)
    curve = risk_coverage_curve(scores, correct, ties="order")
    assert curve.risk.tolist() == pytest.approx(risks(samples))
    assert curve.coverage.tolist() == [(i + 1) / len(samples) for i in range(len(samples))]
    assert curve.thresholds.tolist() == sorted(scores.tolist(), reverse=True)
    assert curve.generalized_risk.tolist() == pytest.approx(
        [risk * kept for risk, kept in zip(risks(samples), curve.coverage.tolist(), strict=True)]
    )


@settings(max_examples=40, deadline=None)
@given(SAMPLES, st.sampled_from(AREAS))
def test_areas_are_those_of_their_definition(samples, kind):
    scores, correct = tensors(samples)
    assert aurc(scores, correct, ties="order", area=kind).item() == pytest.approx(area(risks(samples), kind))
    best = area(risks(list(enumerate(sorted(correct.tolist())))), kind)
    ours = excess_aurc(scores, correct, ties="order", area=kind).item()
    assert ours == pytest.approx(area(risks(samples), kind) - best)
    assert ours >= -1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=6), st.sampled_from(AREAS))
def test_expected_is_the_mean_over_all_orders_of_ties(samples, kind):
    orders = [area(risks(order), kind) for order in itertools.permutations(samples)]
    assert aurc(*tensors(samples), area=kind).item() == pytest.approx(sum(orders) / len(orders))


@settings(max_examples=40, deadline=None)
@given(SAMPLES, st.randoms(use_true_random=False))
def test_expected_does_not_depend_on_the_order_nor_on_the_scale(samples, chance):
    shuffled = list(samples)
    chance.shuffle(shuffled)
    scores, correct = tensors(samples)
    assert torch.equal(aurc(scores, correct), aurc(*tensors(shuffled)))
    assert torch.equal(aurc(scores, correct), aurc(scores.exp(), correct))


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_augrc_follows_from_auroc_and_accuracy(samples):
    scores, correct = tensors(samples)
    accuracy = correct.double().mean().item()
    auroc = roc_auc_score(correct, scores) if 0 < accuracy < 1 else 0.5
    expected = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(scores, correct).item() == pytest.approx(expected)


def test_without_errors_all_is_zero_and_with_errors_only_the_risk_is_one():
    scores = torch.rand(20)
    right, wrong = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    for kind in AREAS:
        assert aurc(scores, right, area=kind).item() == 0.0
        assert excess_aurc(scores, wrong, area=kind).item() == 0.0
    assert aurc(scores, wrong).item() == 1.0
    assert augrc(scores, right).item() == 0.0
    assert augrc(scores, wrong).item() == pytest.approx(0.5)


def test_the_best_area_tends_to_its_published_limit():
    errors, n = 300, 10_000
    scores = torch.arange(n, 0, -1)
    rate = errors / n
    value = aurc(scores, torch.arange(n) < n - errors).item()
    assert value == pytest.approx(rate + (1 - rate) * math.log(1 - rate), rel=0.02)


def test_a_million_samples_with_scores_that_differ_in_the_last_digit():
    n = 1_000_000
    scores = 1 + torch.arange(n, dtype=torch.float64) * 2**-52
    correct = torch.arange(n) >= n // 2
    assert excess_aurc(scores, correct).item() == 0.0
    assert excess_aurc(scores.float(), correct).item() > 0.1


def test_refusals():
    good = torch.tensor([0.5, 0.1])
    right = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"Expected `scores` to be of shape \[N\] with N >= 1 but got \[0\]"):
        aurc(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match=r"Expected `correct` to have the shape \[2\] of `scores` but got \[1\]"):
        aurc(good, right[:1])
    with pytest.raises(ValueError, match="1 of 2 are NaN"):
        aurc(torch.tensor([0.5, math.nan]), right)
    with pytest.raises(ValueError, match="Expected `correct` to hold booleans, or zeros and ones"):
        aurc(good, torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="Expected `ties` to be one of 'expected', 'order' but got 'random'"):
        aurc(good, right, ties="random")
    with pytest.raises(ValueError, match="Expected `area` to be one of 'mean', 'trapezoid', 'from_zero' but got 'sum'"):
        aurc(good, right, area="sum")
    with pytest.raises(ValueError, match='Expected at least 2 samples for area="trapezoid" but got 1'):
        aurc(good[:1], right[:1], area="trapezoid")


def test_the_confidence_is_the_logarithm_of_the_largest_probability_without_ties_at_one():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(confidence_score(logits), logits.double().softmax(1).amax(1).log())
    gaps = torch.arange(30.0, 700.0, 10.0)
    saturated = confidence_score(torch.stack([gaps, torch.zeros_like(gaps), -gaps], 1))
    assert bool((saturated.diff() > 0).all())
    assert confidence_score(torch.zeros(1, 4)).item() == pytest.approx(-math.log(4))


def test_metrics_of_batches_equal_the_functions_on_everything():
    logits, labels = data(100)
    labels = labels.clamp(min=0)
    metrics = MetricCollection({"aurc": AURC(), "excess": ExcessAURC(), "augrc": AUGRC()})
    for batch in torch.arange(100).split(17):
        metrics.update(logits[batch], labels[batch])
    found = metrics.compute()
    scores, correct = confidence_score(logits), logits.argmax(1) == labels
    assert 0 < correct.sum() < 100
    for name, function in (("aurc", aurc), ("excess", excess_aurc), ("augrc", augrc)):
        torch.testing.assert_close(found[name], function(scores, correct))
    assert torch.equal(metrics["aurc"].curve().risk, risk_coverage_curve(scores, correct).risk)
    assert len(metrics.compute_groups) == 1
    metrics.reset()
    metrics.update(logits[:0], labels[:0])
    assert all(bool(value.isnan()) for value in metrics.compute().values())


def test_a_metric_takes_scores_and_conventions():
    logits, labels = data(30)
    scores = torch.arange(30) % 4
    metric = AURC(ties="order", area="from_zero")
    metric.update(logits, labels, scores)
    expected = aurc(scores, logits.argmax(1) == labels, ties="order", area="from_zero")
    torch.testing.assert_close(metric.compute(), expected)
    torch.testing.assert_close(AURC()(logits, labels), aurc(confidence_score(logits), logits.argmax(1) == labels))


def test_a_metric_keeps_its_precision():
    logits, labels = data(30)
    expected = AURC()(logits, labels)
    low = AURC().half().set_dtype(torch.bfloat16)
    low.update(logits, labels)
    assert torch.equal(low.compute(), expected)
    assert low.compute().dtype == torch.float64


def test_metric_refusals():
    with pytest.raises(ValueError, match="Expected `area` to be one of"):
        AURC(area="sum")
    with pytest.raises(ValueError, match="Expected `ties` to be one of"):
        ExcessAURC(ties="random")
    with pytest.raises(ValueError, match=r"Expected `logits` to be a floating point tensor \[B, C\]"):
        AURC().update(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"Expected `scores` of shape \[3\] but got \[2\]"):
        AURC().update(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
    metric = AURC()
    metric.update(torch.full((1, 3), math.nan), torch.tensor([0]))
    with pytest.raises(ValueError, match="1 of 1 are NaN"):
        metric.compute()


@pytest.mark.slow
def test_two_processes_with_different_numbers_of_samples_or_none(tmp_path):
    mp.start_processes(selective, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2, start_method="spawn")
    whole = AURC()
    whole.update(*data(41))
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"rank{rank}"):
            assert torch.equal(found, whole.compute())

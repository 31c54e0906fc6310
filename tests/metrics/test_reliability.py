# SPDX-License-Identifier: Apache-2.0
"""The bin table and what is read off it."""

import pytest
import torch

from lightning_robust.metrics import ReliabilityTable, TopLabelReliability, reliability_table


def test_signed_and_one_sided_numbers():
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.7], dtype=torch.float64)
    correct = torch.tensor([1, 0, 1, 0])
    table = reliability_table(confidence, correct, n_bins=10)
    assert table.total.item() == 4
    assert table.overall_accuracy.item() == 0.5
    assert table.mean_confidence.item() == pytest.approx(0.775)
    assert table.confidence_gap.item() == pytest.approx(0.275)  # above zero: over-confident
    assert table.overconfidence.item() == pytest.approx(0.8)
    assert table.underconfidence.item() == pytest.approx(0.25)
    assert table.brier.isnan()
    assert table.nll.isnan()
    assert table.accuracy[8].item() == 0.5
    assert table.gap[8].item() == pytest.approx(0.4)
    assert table.accuracy[0].isnan()


def test_the_metric_and_the_function_agree():
    logits = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 5
    metric = TopLabelReliability(n_bins=7)
    metric.update(logits, labels)
    confidence, answer = logits.softmax(1).max(1)
    expected = reliability_table(confidence, answer == labels, n_bins=7)
    table = metric.compute()
    assert isinstance(table, ReliabilityTable)
    for field in ("counts", "correct", "confidence_sum", "correct_confidence_sum"):
        torch.testing.assert_close(getattr(table, field), getattr(expected, field), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(table.nll, torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize(("closed", "counts"), [("right", [3, 1]), ("left", [2, 2])])
def test_edges(closed, counts):
    table = reliability_table(torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.ones(4), n_bins=2, closed=closed)
    assert table.counts.tolist() == counts


def test_nothing_wrong_or_nothing_right_is_nan_not_an_error():
    assert reliability_table(torch.tensor([0.5]), torch.tensor([1])).overconfidence.isnan()
    assert reliability_table(torch.tensor([0.5]), torch.tensor([0])).underconfidence.isnan()


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_an_empty_table_is_nan(norm):
    table = reliability_table(torch.zeros(0), torch.zeros(0))
    assert table.error(norm).isnan()
    assert table.confidence_gap.isnan()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.tensor([1.5]), torch.tensor([1])), {}, r"`confidence` to be in \[0, 1\]"),
        ((torch.tensor([torch.nan]), torch.tensor([1])), {}, r"`confidence` to be in \[0, 1\]"),
        ((torch.zeros(2), torch.zeros(3)), {}, r"of one shape \[N\] but got \[2\] and \[3\]"),
        ((torch.zeros(2), torch.zeros(2)), {"n_bins": 0}, "`n_bins` to be an integer >= 1"),
        ((torch.zeros(2), torch.zeros(2)), {"closed": "no"}, "`closed` to be one of"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        reliability_table(*arguments, **options)


def test_unknown_norm():
    with pytest.raises(ValueError, match="`norm` to be one of"):
        reliability_table(torch.zeros(2), torch.zeros(2)).error("l7")

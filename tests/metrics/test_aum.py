"""Margins and their table against dictionaries."""

from collections import defaultdict

import pytest
import torch

from lightning_robust.metrics import MarginTable, assign_threshold_samples, flag_suspicious, logit_margin

SAMPLES, CLASSES = 13, 5


def visits(seed=0, steps=9):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        indices = torch.randperm(SAMPLES, generator=generator)[:4]
        logits = 5 * torch.randn(4, CLASSES, generator=generator, dtype=torch.float64)
        yield step, indices, logits, indices % CLASSES


def naive(steps):
    margins, suggested = defaultdict(list), {}
    for _, indices, logits, labels in steps:
        for index, row, label in zip(indices.tolist(), logits, labels.tolist(), strict=True):
            others = [(float(row[k]), k) for k in range(CLASSES) if k != label]
            margins[index].append(float(row[label]) - max(others)[0])
            suggested[index] = max(others)[1]
    return margins, suggested


def check(table, steps):
    margins, suggested = naive(steps)
    for index in range(SAMPLES):
        assert table.visits[index] == len(margins[index])
        if margins[index]:
            assert table.aum[index].item() == pytest.approx(sum(margins[index]) / len(margins[index]), rel=1e-9)
            assert table.suggested[index] == suggested[index]
            assert table.labels[index] == index % CLASSES
        else:
            assert table.aum[index].isnan()
            assert table.suggested[index] == table.labels[index] == -1


def test_table():
    table = MarginTable(SAMPLES)
    for step, *what in visits():
        table.record(*what, step=step)
    check(table, list(visits()))


def test_two_processes_share_one_table_exactly():
    whole, parts = MarginTable(SAMPLES), [MarginTable(SAMPLES), MarginTable(SAMPLES)]
    for step, indices, logits, labels in visits(steps=12):
        whole.record(indices, logits, labels, step=step)
        for table, rows in zip(parts, (slice(0, 2), slice(2, 4)), strict=True):
            table.record(indices[rows], logits[rows], labels[rows], step=step)
        if step % 5 == 4:
            together(parts)
    together(parts)
    for table in parts:
        for name in ("sums", "visits", "last"):
            assert torch.equal(table.state_dict()[name], whole.state_dict()[name])
    check(parts[1], list(visits(steps=12)))


def together(parts):
    """What all_reduce does: every process gets the same of what all had before."""
    for names, operation in ((("_new_sums", "_new_visits"), sum), (("_last",), lambda x: torch.stack(list(x)).amax(0))):
        for name in names:
            value = operation(getattr(table, name).clone() for table in parts)
            for table in parts:
                setattr(table, name, value.clone())
    for table in parts:
        table.merge(lambda part: part, lambda part: part)


def test_state_continues_exactly():
    whole, first, second = (MarginTable(SAMPLES) for _ in range(3))
    for step, *what in visits():
        whole.record(*what, step=step)
        (first if step < 4 else second).record(*what, step=step)
        if step == 3:
            second.load_state_dict(first.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    with pytest.raises(ValueError, match="remembers 13 samples but the training set has 12"):
        MarginTable(12).load_state_dict(whole.state_dict())


def test_ignored_and_broken_samples_do_not_count():
    table = MarginTable(4)
    logits = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [3.0, 0.0]])
    table.record(torch.tensor([0, 1, 2]), logits, torch.tensor([-100, 0, 0]), step=0)
    assert table.visits.tolist() == [0, 0, 1, 0]
    assert table.suggested.tolist() == [-1, -1, 1, -1]
    table.record(torch.tensor([2]), torch.tensor([[1e6, 0.0]]), torch.tensor([0]), step=1)
    assert table.aum[2] == (3 + 8192) / 2


def test_half_precision_logits_are_widened():
    table = MarginTable(1)
    table.record(torch.tensor([0]), torch.tensor([[10.0, -300.0]], dtype=torch.bfloat16), torch.tensor([1]), step=0)
    assert table.aum.tolist() == [-310.0]


def test_a_tie_of_the_label_has_no_margin():
    assert logit_margin(torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([0])).tolist() == [0.0]


def test_flags_follow_the_rule_of_the_paper():
    generator = torch.Generator().manual_seed(2)
    aum = torch.randn(500, generator=generator, dtype=torch.float64)
    aum[7] = torch.nan
    thresholds = torch.randperm(500, generator=generator)[:150]
    for percentile in (99.0, 90.0, 50.0, 100.0):
        reference = aum[thresholds][~aum[thresholds].isnan()]
        larger = (aum[:, None] < reference[None]).double().mean(1)
        expected = (larger > (100 - percentile) / 100 + 1e-12) & ~aum.isnan()
        assert torch.equal(flag_suspicious(aum, thresholds, percentile=percentile), expected)
    with pytest.raises(ValueError, match="No threshold sample has an area"):
        flag_suspicious(aum, torch.tensor([7]))
    with pytest.raises(ValueError, match=r"`percentile` to be in \[0, 100\] but got 101"):
        flag_suspicious(aum, thresholds, percentile=101)


def test_threshold_samples():
    labels = torch.arange(100) % 9
    first, second = (assign_threshold_samples(labels, part=part) for part in (0, 1))
    assert len(first.indices) == len(second.indices) == 10
    assert not set(first.indices.tolist()) & set(second.indices.tolist())
    for chosen in (first, second):
        assert (chosen.labels[chosen.indices] == 9).all()
        assert (chosen.labels != labels).sum() == 10
    assert labels.max() == 8
    assert torch.equal(first.indices, assign_threshold_samples(labels).indices)
    assert not torch.equal(first.indices, assign_threshold_samples(labels, seed=1).indices)
    with pytest.raises(ValueError, match="not enough for choice number 10 of 10"):
        assign_threshold_samples(labels, part=10)
    with pytest.raises(ValueError, match="not enough for choice number 0 of 0"):
        assign_threshold_samples(torch.tensor([0, 1]))

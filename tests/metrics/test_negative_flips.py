"""Rates of negative flips against counting by hand."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from lightning_robust.metrics import NegativeFlipRate, RelativeNegativeFlipRate
from support.flips import data, worker

METRICS = {"nfr": NegativeFlipRate, "relative": RelativeNegativeFlipRate}


def counted(new, old, labels):
    """The rate, and that over what independent mistakes would give."""
    rows = list(zip(new.argmax(1).tolist(), old.argmax(1).tolist(), labels.tolist(), strict=True))
    flips = sum(b == y and a != y for a, b, y in rows)
    old_right, new_wrong = sum(b == y for _, b, y in rows), sum(a != y for a, _, y in rows)
    return flips / len(rows), flips * len(rows) / (old_right * new_wrong)


def test_counts_as_by_hand_in_any_batches():
    new, old, labels = data()
    expected = counted(new, old, labels)
    for size in (301, 100, 7):
        metrics = MetricCollection({name: metric() for name, metric in METRICS.items()})
        for batch in zip(new.split(size), old.split(size), labels.split(size), strict=True):
            metrics.update(*batch)
        found = metrics.compute()
        assert [found[name].item() for name in METRICS] == pytest.approx(expected, rel=1e-12)
        assert found["nfr"].dtype == torch.float64
        assert metrics.compute_groups == {0: ["nfr", "relative"]}


def test_classes_in_place_of_logits_and_a_teacher_with_fewer_classes():
    new, old, labels = data()
    metric = NegativeFlipRate()
    metric.update(new.argmax(1), old.argmax(1), labels)
    assert metric.compute().item() == pytest.approx(counted(new, old, labels)[0])
    metric.reset()
    metric.update(new, old[:, :3], labels)
    assert metric.compute().item() == pytest.approx(counted(new, old[:, :3], labels)[0])


def test_independent_mistakes_have_a_relative_rate_of_about_one():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(200_000, dtype=torch.long)
    old, new = ((torch.rand(200_000, generator=generator) < wrong).long() for wrong in (0.3, 0.2))
    metric = RelativeNegativeFlipRate()
    metric.update(new, old, labels)
    assert metric.compute().item() == pytest.approx(1.0, abs=0.01)


def test_nothing_and_perfect_models_have_no_relative_rate():
    labels = torch.tensor([0, 1])
    nothing = NegativeFlipRate()
    nothing.update(labels[:0], labels[:0], labels[:0])
    assert nothing.compute().isnan()
    rate, relative = NegativeFlipRate(), RelativeNegativeFlipRate()
    for metric in (rate, relative):
        metric.update(labels, labels, labels)
    assert rate.compute() == 0
    assert relative.compute().isnan()


def test_a_value_per_batch_and_the_value_of_all():
    new, old, labels = data()
    metric = NegativeFlipRate()
    values = [metric(*batch) for batch in zip(new.split(43), old.split(43), labels.split(43), strict=True)]
    torch.testing.assert_close(torch.stack(values).mean(), metric.compute())


def test_the_state_stays_integers_in_half_precision():
    new, old, labels = data()
    metric = NegativeFlipRate().half()
    for _ in range(10):
        metric.update(new.half(), old.half(), labels)
    assert metric.flip_counts.dtype == torch.long
    assert metric.flip_counts[0] == 3010


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1).long()), r"`labels` to be class indices \[B\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)), r"`labels` to be class indices \[B\]"),
        ((torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3).long()), r"`predictions` to be logits \[3, C\] or"),
        ((torch.zeros(3, 2), torch.zeros(3), torch.zeros(3).long()), r"`old_predictions` to be logits \[3, C\] or"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2), torch.zeros(3).long()), r"`predictions` to be logits \[3, C\]"),
    ],
)
def test_refusals(arguments, message):
    metric = NegativeFlipRate()
    with pytest.raises(ValueError, match=message):
        metric.update(*arguments)
    assert metric.flip_counts.sum() == 0


@pytest.mark.slow
def test_two_processes(tmp_path):
    mp.start_processes(worker, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2, start_method="spawn")
    expected = counted(*data())
    for rank in (0, 1):
        assert torch.load(tmp_path / f"rank{rank}").tolist() == pytest.approx(expected, rel=1e-12)
    assert not dist.is_initialized()

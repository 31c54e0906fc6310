# SPDX-License-Identifier: Apache-2.0
"""The streaming calibration metrics against naive loops and torchmetrics."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from lightning_robust.metrics import BrierScore, CalibrationError, NegativeLogLikelihood, TopLabelReliability

METRICS = [CalibrationError, BrierScore, NegativeLogLikelihood, TopLabelReliability]


def sample(n=500, classes=7, scale=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.distributions.Categorical(logits=logits.float() / 2).sample()
    return logits.to(dtype), labels


def naive(logits, labels, n_bins, closed):
    """One Python loop over samples; returns the bins and the two scores."""
    bins = [[0, 0, 0.0] for _ in range(n_bins)]
    brier = nll = 0.0
    for z, y in zip(logits.double(), labels.tolist(), strict=True):
        p = torch.exp(z - z.max()) / torch.exp(z - z.max()).sum()
        c, k = p.max().item(), int(p.argmax())
        upper = next(b for b in range(n_bins) if (c <= (b + 1) / n_bins if closed == "right" else c < (b + 1) / n_bins))
        bins[upper][0] += 1
        bins[upper][1] += k == y
        bins[upper][2] += c
        brier += sum((p[j].item() - (j == y)) ** 2 for j in range(len(p)))
        nll -= torch.log(p[y]).item()
    n = len(labels)
    gaps = [(count / n, abs(conf - right) / count) for count, right, conf in bins if count]
    errors = {
        "l1": sum(w * g for w, g in gaps),
        "l2": sum(w * g * g for w, g in gaps) ** 0.5,
        "max": max(g for _, g in gaps),
    }
    return bins, errors, brier / n, nll / n


@pytest.mark.parametrize("closed", ["left", "right"])
@pytest.mark.parametrize("n_bins", [1, 4, 15])
def test_equals_a_naive_loop(closed, n_bins):
    logits, labels = sample()
    bins, errors, brier, nll = naive(logits, labels, n_bins, closed)
    options = {"n_bins": n_bins, "closed": closed}
    metrics = MetricCollection(
        {
            **{norm: CalibrationError(norm=norm, **options) for norm in errors},
            "brier": BrierScore(**options),
            "nll": NegativeLogLikelihood(**options),
            "table": TopLabelReliability(**options),
        }
    )
    for part in torch.arange(len(labels)).split(64):
        metrics.update(logits[part], labels[part])
    values = metrics.compute()
    for name, expected in {**errors, "brier": brier, "nll": nll}.items():
        assert values[name].item() == pytest.approx(expected, rel=1e-9), name
        assert values[name].dtype == torch.float64
    table = values["table"]
    assert table.counts.reshape(-1).tolist() == [count for count, _, _ in bins]
    assert table.correct.reshape(-1).tolist() == [right for _, right, _ in bins]
    assert table.confidence_sum.reshape(-1).tolist() == pytest.approx([conf for _, _, conf in bins], rel=1e-8)
    assert len(metrics.compute_groups) == 1  # one state, one update


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("closed", ["left", "right"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_equals_torchmetrics_off_the_edges(norm, closed, scale):
    logits, labels = sample(n=2000, scale=scale, dtype=torch.float32)
    ours = CalibrationError(norm=norm, closed=closed)
    theirs = MulticlassCalibrationError(num_classes=7, n_bins=15, norm=norm)
    for part in torch.arange(2000).split(300):
        ours.update(logits[part], labels[part])
        theirs.update(logits[part].softmax(1), labels[part])
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=2e-6, abs=1e-6)


def test_left_closed_equals_torchmetrics_on_edges():
    # quarters and eighths are exact in binary, so both conventions are well defined here
    confidence = torch.tensor([0.5, 0.5, 0.625, 0.75, 0.75, 0.875, 0.8125])
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 1])
    probabilities = torch.stack([confidence, 1 - confidence], dim=1)
    theirs = MulticlassCalibrationError(num_classes=2, n_bins=8, norm="l1")
    expected = theirs(probabilities, labels).item()
    left = CalibrationError(n_bins=8, closed="left", from_logits=False)
    right = CalibrationError(n_bins=8, closed="right", from_logits=False)
    assert left(probabilities, labels).item() == pytest.approx(expected, rel=1e-6)
    assert right(probabilities, labels).item() != pytest.approx(expected, rel=1e-3)


def test_confidence_one_is_in_the_last_bin_and_not_in_a_hidden_one():
    probabilities = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.95, 0.05], [0.95, 0.05]])
    labels = torch.tensor([0, 1, 0, 0])
    for closed in ("left", "right"):
        metric = TopLabelReliability(n_bins=10, closed=closed, from_logits=False)
        metric.update(probabilities, labels)
        table = metric.compute()
        assert table.counts.tolist() == [0] * 9 + [4]
        assert table.error("max").item() == pytest.approx(abs(0.975 - 0.75), abs=1e-7)


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_every_sharding_gives_the_same_bits(pieces):
    logits, labels = sample(n=999, dtype=torch.float32)
    whole = TopLabelReliability()
    whole.update(logits, labels)
    order = torch.randperm(999, generator=torch.Generator().manual_seed(pieces))
    ranks = [TopLabelReliability() for _ in range(3)]
    for number, part in enumerate(order.tensor_split(pieces)):
        ranks[number % 3].update(logits[part], labels[part])
    merged = ranks[0]
    for other in ranks[1:]:
        if other.update_called:
            merged.merge_state(other)
    assert torch.equal(merged.sums, whole.sums)


def test_no_drift_in_a_long_run():
    # float32 sums stop counting at 2**24; here the state passes it
    metric = CalibrationError(from_logits=False)
    probabilities = torch.tensor([[0.75, 0.25]]).expand(400_000, 2)
    labels = (torch.arange(400_000) % 4 == 0).long()
    metric.update(probabilities, labels)
    metric.sums.mul_(100)
    assert metric.compute().item() == pytest.approx(0.0, abs=1e-9)
    assert TopLabelReliability(from_logits=False).n_bins == 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_get_a_float32_softmax(dtype):
    logits, labels = sample(scale=6.0, dtype=dtype)
    expected, metric = CalibrationError(norm="max"), CalibrationError(norm="max")
    expected.update(logits.double(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(logits, labels)
    assert metric.compute().item() == pytest.approx(expected.compute().item(), rel=1e-5)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: [metric.set_dtype(torch.bfloat16) for metric in m.values()],
    ],
)
def test_states_survive_casts_of_the_module(cast):
    logits, labels = sample(dtype=torch.float32)
    holder = nn.ModuleDict({"ece": CalibrationError(), "brier": BrierScore()})
    expected = {}
    for name, metric in holder.items():
        metric.update(logits[:250], labels[:250])
        reference = copy.deepcopy(metric)
        reference.update(logits[250:], labels[250:])
        expected[name] = reference.compute()
    cast(holder)
    for name, metric in holder.items():
        metric.update(logits[250:], labels[250:])
        assert metric.sums.dtype == torch.int64
        assert torch.equal(metric.compute(), expected[name])
        metric.reset()
        assert metric.sums.dtype == torch.int64


def test_a_state_reset_in_inference_mode_can_be_updated_outside():
    logits, labels = sample()
    metric = CalibrationError()
    with torch.inference_mode():
        metric.update(logits, labels)
        first = metric.compute().item()
        metric.reset()
    metric.update(logits.requires_grad_(), labels)
    assert metric.compute().item() == first
    assert not metric.compute().requires_grad


def test_constant_logits_are_not_all_correct():
    metric = TopLabelReliability()
    metric.update(torch.zeros(8, 4), torch.arange(4).repeat(2))
    table = metric.compute()
    assert table.overall_accuracy.item() == 0.25  # the first class wins a tie, as in argmax
    assert table.error("l1").item() == 0.0


def test_masked_classes_are_fine_and_a_masked_label_has_infinite_nll():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, -torch.inf, 0.0]])
    nll, brier = NegativeLogLikelihood(), BrierScore()
    nll.update(logits, torch.tensor([0, 0]))
    brier.update(logits, torch.tensor([0, 1]))
    assert nll.compute().isfinite()
    assert brier.compute().isfinite()
    nll.update(logits, torch.tensor([0, 1]))
    assert nll.compute().item() == torch.inf


@pytest.mark.parametrize("big", [1e3, 1e6, 1e9])
def test_huge_logits_do_not_overflow_the_sums(big):
    nll = NegativeLogLikelihood()
    for _ in range(3):
        nll.update(torch.tensor([[big, 0.0], [0.0, big]]).expand(2, 2), torch.tensor([1, 1]))
    assert nll.compute().item() == pytest.approx(big / 2, rel=1e-6)


def test_extreme_logits_match_float64():
    logits, labels = sample(scale=60.0, dtype=torch.float32)
    nll, brier = NegativeLogLikelihood(), BrierScore()
    nll.update(logits, labels)
    brier.update(logits, labels)
    exact = logits.double()
    onehot = nn.functional.one_hot(labels, 7)
    assert nll.compute().item() == pytest.approx(nn.functional.cross_entropy(exact, labels).item(), rel=1e-6)
    assert brier.compute().item() == pytest.approx((exact.softmax(1) - onehot).square().sum(1).mean().item(), rel=1e-6)


def test_conventions_are_not_merged_by_a_collection():
    # off the edges the first batch fills both states alike; a later one does not
    metrics = MetricCollection({c: CalibrationError(n_bins=2, closed=c, from_logits=False) for c in ("left", "right")})
    metrics.update(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
    metrics.update(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
    values = metrics.compute()
    assert values["left"] != values["right"]


def test_from_logits_is_explicit():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # valid logits and valid probabilities
    labels = torch.tensor([0, 1])
    as_logits, as_probabilities = TopLabelReliability(), TopLabelReliability(from_logits=False)
    as_logits.update(scores, labels)
    as_probabilities.update(scores, labels)
    assert as_probabilities.compute().mean_confidence.item() == pytest.approx(0.85)
    assert as_logits.compute().mean_confidence.item() == pytest.approx(scores.softmax(1).amax(1).mean().item())
    assert torch.equal(scores, torch.tensor([[0.9, 0.1], [0.2, 0.8]]))  # the caller's tensor is not changed


def test_logits_given_as_probabilities_are_refused():
    metric = CalibrationError(from_logits=False)
    metric.update(torch.tensor([[3.0, -1.0], [0.5, 0.5]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"1 rows are not probability distributions .* from_logits=True"):
        metric.compute()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_rows_are_refused_in_compute(bad):
    logits, labels = sample(n=10)
    logits[3, 2] = bad
    metric = CalibrationError()
    metric.update(logits, labels)
    with pytest.raises(ValueError, match="1 rows of `logits` contain NaN or \\+inf"):
        metric.compute()
    metric.reset()
    metric.update(logits[:3], labels[:3])
    assert metric.compute().isfinite()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), r"`logits` to be a floating point tensor \[B, C\]"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "C >= 2"),
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), "floating point"),
        (torch.zeros(3, 2, 4), torch.zeros(3, 4, dtype=torch.long), r"\[B, C\]"),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), r"with B = 3 but got \[4\]"),
        (torch.zeros(3, 2), torch.zeros(3, 2), r"class indices \[B\]"),
        (torch.zeros(3, 2), torch.zeros(3), "integer class indices but got torch.float32"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"in \[0, 1\] but got labels from 0 to 2"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), "labels from -1 to 1"),
    ],
)
def test_refuses_wrong_inputs(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        CalibrationError().update(logits, labels)


def test_labels_out_of_range_that_could_not_be_checked_are_refused_in_compute(monkeypatch):
    # an accelerator does not check them in update; here the check is taken away
    monkeypatch.setattr("lightning_robust.metrics.accumulator._check_inputs", lambda logits, labels: None)
    metric = CalibrationError()
    metric.update(torch.zeros(3, 2), torch.tensor([0, 5, -1]))
    with pytest.raises(ValueError, match="2 labels are negative or not below the number of classes"):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_labels_of_every_width(dtype):
    metric = CalibrationError()
    metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 3], dtype=dtype))
    assert metric.compute().isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 0}, "`n_bins` to be an integer >= 1"),
        ({"norm": "l3"}, "`norm` to be one of"),
        ({"closed": "both"}, "`closed` to be one of"),
        ({"from_logits": "maybe"}, "`from_logits` to be one of"),
        ({"unknown": 1}, "Unexpected keyword arguments: `unknown`"),
    ],
)
def test_refuses_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationError(**options)


@pytest.mark.parametrize("metric_class", METRICS)
def test_empty_is_nan_and_torchmetrics_warns(metric_class):
    metric = metric_class()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        value = metric.compute()
    assert (value.error("l1") if metric_class is TopLabelReliability else value).isnan()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))  # an empty batch is no error


@pytest.mark.parametrize("metric_class", METRICS)
def test_copies_and_pickles(metric_class):
    logits, labels = sample(n=50)
    metric = metric_class()
    metric.update(logits, labels)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        torch.testing.assert_close(
            tuple(twin.compute()) if metric_class is TopLabelReliability else twin.compute(),
            tuple(metric.compute()) if metric_class is TopLabelReliability else metric.compute(),
        )


def test_state_dict_round_trip_when_persistent():
    logits, labels = sample(n=50)
    metric, other = CalibrationError(), CalibrationError()
    metric.persistent(True)
    other.persistent(True)
    metric.update(logits, labels)
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.sums, metric.sums)

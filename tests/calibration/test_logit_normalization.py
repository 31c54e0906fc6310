# SPDX-License-Identifier: Apache-2.0
"""Normalised logits: the score, the choice of the norm, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_robust.calibration import LogitNormalization, logit_normalization, normalized_logit_score
from lightning_robust.metrics import aurc, confidence_score

CENTRES = ["mean", "min", 0.0, 1.5]


def random_logits(samples=200, classes=6, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).to(dtype)


def suppressed(samples=2000, classes=6):
    """Logits whose largest one is lower the surer the prediction is, which is what label smoothing does."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    sure = torch.rand(samples, generator=generator, dtype=torch.float64)
    top, answer = logits.max(1)
    right = torch.rand(samples, generator=generator, dtype=torch.float64) < 0.3 + 0.7 * sure
    labels = torch.where(right, answer, (answer + 1) % classes)
    # sure samples: other logits equal and all of them small
    others = logits * (1.2 - sure)[:, None]
    return others.scatter(1, answer[:, None], (top * (1 - 0.5 * sure))[:, None]), labels


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("p", [1, 2.5, 8, math.inf])
def test_equals_the_formula(centre, p):
    logits = random_logits()
    rows = []
    for row in logits.tolist():
        shift = {"mean": -sum(row) / len(row), "min": -min(row)}.get(centre, centre)
        moved = [z + shift for z in row]
        sizes = [abs(z) for z in moved]
        rows.append(max(moved) / (max(sizes) if p == math.inf else sum(z**p for z in sizes) ** (1 / p)))
    score = normalized_logit_score(logits, p=p, centre=centre)
    torch.testing.assert_close(score, torch.tensor(rows, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 5, 10]), st.floats(1e-30, 1e30), st.sampled_from(["mean", "min"]))
def test_neither_scale_nor_shift_of_a_sample_matters(seed, p, scale, centre):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    score = normalized_logit_score(logits, p=p, centre=centre)
    torch.testing.assert_close(normalized_logit_score(scale * logits, p=p, centre=centre), score)
    torch.testing.assert_close(normalized_logit_score(logits + 3.0, p=p, centre=centre), score, rtol=1e-9, atol=0)
    assert bool((score > 0).all())
    assert bool((score <= 1).all())


def test_low_precision_logits_are_scored_in_float64():
    logits = random_logits(dtype=torch.bfloat16)
    score = normalized_logit_score(logits, p=4)
    assert score.dtype == torch.float64
    assert torch.equal(score, normalized_logit_score(logits.double(), p=4))
    assert logits.dtype == torch.bfloat16


def test_a_row_without_spread_is_the_least_confident():
    logits = torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 2.1]])
    for centre in ("mean", "min"):
        constant, other = normalized_logit_score(logits, p=3, centre=centre).tolist()
        assert constant == 0.0
        assert other > 0.0
    assert normalized_logit_score(torch.zeros(1, 3), p=3, centre=0.0).tolist() == [0.0]


def test_fit_takes_the_candidate_with_the_smallest_area():
    logits, labels = suppressed()
    correct = logits.argmax(1) == labels
    areas = {p: aurc(normalized_logit_score(logits, p=p), correct).item() for p in (1, 2, 3, 4, 6, 8)}
    fitted = LogitNormalization(candidates=(1, 2, 3, 4, 6, 8)).fit(logits, labels)
    assert fitted.p == min(areas, key=areas.get)
    assert fitted.aurc_after == areas[fitted.p]
    assert fitted.aurc_before == aurc(confidence_score(logits), correct).item()
    assert fitted.aurc_after < fitted.aurc_before
    assert torch.equal(fitted.score(logits), normalized_logit_score(logits, p=fitted.p))


def test_fit_falls_back_to_the_maximum_probability_where_no_norm_beats_it():
    logits = random_logits()
    # right where the maximum probability is high
    order = confidence_score(logits).argsort(descending=True)
    labels = logits.argmax(1)
    labels[order[120:]] = (labels[order[120:]] + 1) % 6
    fitted = LogitNormalization().fit(logits, labels)
    assert fitted.p is None
    assert fitted.aurc_after == fitted.aurc_before
    assert torch.equal(fitted.score(logits), confidence_score(logits))
    # without any error all areas are zero
    assert LogitNormalization().fit(logits, logits.argmax(1)).p is None


def test_two_classes_work_without_centring_and_are_refused_with_it():
    logits = random_logits(classes=2)
    labels = logits.argmax(1)
    labels[::5] = 1 - labels[::5]
    assert LogitNormalization(centre=0.0).fit(logits, labels).score(logits).shape == (200,)
    assert torch.equal(LogitNormalization().score(logits), confidence_score(logits))
    for centre in ("mean", "min"):
        with pytest.raises(ValueError, match="With two classes and centre"):
            LogitNormalization(centre=centre).fit(logits, labels)
        with pytest.raises(ValueError, match="With two classes"):
            normalized_logit_score(logits, p=2, centre=centre)


def test_chunks_change_nothing(monkeypatch):
    logits, labels = suppressed(300)
    whole = LogitNormalization().fit(logits, labels)
    monkeypatch.setattr(logit_normalization, "_CHUNK", 100)
    parts = LogitNormalization().fit(logits, labels)
    assert (parts.p, parts.aurc_before, parts.aurc_after) == (whole.p, whole.aurc_before, whole.aurc_after)
    assert torch.equal(parts.score(logits), whole.score(logits))


def test_tensors_of_inference_mode_and_many_classes():
    with torch.inference_mode():
        logits = random_logits(30, 21_000, dtype=torch.float32)
        labels = logits.argmax(1).roll(1)
        fitted = LogitNormalization().fit(logits, labels)
    assert bool(fitted.score(logits).isfinite().all())


def test_repr_names_the_norm():
    assert repr(LogitNormalization(p=3, centre="min")) == "LogitNormalization(p=3, centre='min')"


def test_refusals():
    logits, labels = random_logits(), random_logits().argmax(1)
    with pytest.raises(ValueError, match=r"Expected the order `p` of the norm to be >= 1 but got 0\.5"):
        LogitNormalization(candidates=(1, 0.5))
    with pytest.raises(ValueError, match="Expected the order `p` of the norm to be >= 1 but got nan"):
        LogitNormalization(p=math.nan)
    with pytest.raises(ValueError, match="Expected `candidates` to hold at least one order but got none"):
        LogitNormalization(candidates=())
    with pytest.raises(ValueError, match="Expected `centre` to be 'mean', 'min' or a number but got 'max'"):
        LogitNormalization(centre="max")
    with pytest.raises(ValueError, match="Expected `centre` to be 'mean', 'min' or a finite number but got inf"):
        LogitNormalization(centre=math.inf)
    with pytest.raises(ValueError, match=r"Expected `logits` to be a floating point tensor \[N, C\]"):
        LogitNormalization().score(logits[0])
    with pytest.raises(ValueError, match=r"Expected `labels` to be class indices \[N\] with N = 200"):
        LogitNormalization().fit(logits, labels[:-1])
    with pytest.raises(ValueError, match="Expected `logits` to be finite"):
        LogitNormalization().fit(logits.log(), labels)

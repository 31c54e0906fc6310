# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling against scipy-free references: a fine grid, a closed form, autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.calibration import TemperatureScaling


def sample(n=400, classes=6, temperature=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 2
    gumbel = -torch.log(-torch.log(torch.rand(n, classes, generator=generator, dtype=torch.float64)))
    return (logits * temperature).to(dtype), (logits + gumbel).argmax(1)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 40.0])
def test_the_gradient_vanishes_and_the_value_is_the_smallest_of_a_grid(temperature):
    logits, labels = sample(temperature=temperature)
    scaling = TemperatureScaling().fit(logits, labels)
    log_t = torch.tensor(math.log(scaling.temperature), dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(logits / log_t.exp(), labels)
    assert abs(torch.autograd.grad(loss, log_t)[0].item()) < 1e-10
    assert not scaling.at_bound
    assert scaling.temperature == pytest.approx(temperature, rel=0.3)
    grid = [F.cross_entropy(logits / t, labels).item() for t in torch.logspace(-2, 2, 200, dtype=torch.float64)]
    assert scaling.nll_after <= min(grid)
    assert scaling.nll_after == pytest.approx(loss.item(), rel=1e-12)
    assert scaling.nll_before == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)


def test_two_classes_have_a_closed_form():
    logits = torch.tensor([[5.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 8 + [1] * 2)
    expected = 5 / math.log(8 / 2)
    assert TemperatureScaling().fit(logits, labels).temperature == pytest.approx(expected, rel=1e-9)


def test_a_constant_per_row_changes_nothing():
    logits, labels = sample()
    shift = torch.linspace(-1e6, 1e6, len(logits), dtype=torch.float64).unsqueeze(1)
    expected = TemperatureScaling().fit(logits, labels).temperature
    assert TemperatureScaling().fit(logits + shift, labels).temperature == pytest.approx(expected, rel=1e-8)


def test_chunks_give_the_same_answer(monkeypatch):
    logits, labels = sample()
    expected = TemperatureScaling().fit(logits, labels).temperature
    monkeypatch.setattr("lightning_robust.calibration.temperature._CHUNK", 100)
    assert TemperatureScaling().fit(logits, labels).temperature == pytest.approx(expected, rel=1e-12)


def test_extreme_logits():
    logits, labels = sample(temperature=1.0)
    scaling = TemperatureScaling(max_temperature=1e9).fit(logits * 1e6, labels)
    reference = TemperatureScaling().fit(logits, labels).temperature
    assert scaling.temperature == pytest.approx(1e6 * reference, rel=1e-8)


def test_works_on_inference_tensors_and_low_precision():
    with torch.inference_mode():
        logits, labels = sample(dtype=torch.bfloat16)
        scaling = TemperatureScaling().fit(logits, labels)
    assert scaling.temperature == pytest.approx(
        TemperatureScaling().fit(logits.double(), labels).temperature, rel=1e-12
    )
    assert scaling(logits).dtype == torch.float32


def test_calling_it():
    scaling = TemperatureScaling(temperature=4.0)
    logits = torch.tensor([[4.0, 8.0]], dtype=torch.float64, requires_grad=True)
    scaled = scaling(logits)
    assert scaled.tolist() == [[1.0, 2.0]]
    assert torch.autograd.grad(scaled.sum(), logits)[0].tolist() == [[0.25, 0.25]]
    assert repr(scaling) == "TemperatureScaling(temperature=4.0)"


def test_everything_right_stops_at_the_lower_bound():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    scaling = TemperatureScaling(min_temperature=0.05)
    with pytest.warns(UserWarning, match=r"lower bound 0.05: .*every sample is right"):
        scaling.fit(logits, torch.tensor([0, 1]))
    assert scaling.temperature == pytest.approx(0.05)
    assert scaling.at_bound
    assert math.isfinite(scaling.nll_after)


def test_worse_than_chance_stops_at_the_upper_bound():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    scaling = TemperatureScaling(max_temperature=50.0)
    with pytest.warns(UserWarning, match=r"upper bound 50.0: .*no better than chance"):
        scaling.fit(logits, torch.tensor([1, 0]))
    assert scaling.temperature == pytest.approx(50.0)
    assert scaling.at_bound


def test_constant_logits_leave_any_temperature():
    scaling = TemperatureScaling()
    with pytest.warns(UserWarning, match="every temperature fits alike; it stays 1"):
        scaling.fit(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert scaling.temperature == 1
    assert scaling.nll_after == pytest.approx(math.log(3))


@pytest.mark.parametrize("gap", [8.0, 50.0, 200.0])
def test_certain_and_right_everywhere_ends_at_the_bound(gap):
    labels = torch.tensor([0, 1, 2, 0])
    scaling = TemperatureScaling()
    with pytest.warns(UserWarning, match="every sample is right"):
        scaling.fit(gap * torch.nn.functional.one_hot(labels, 3).float(), labels)
    assert scaling.at_bound
    assert scaling.temperature == pytest.approx(scaling.min_temperature)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"`logits` to be a floating point tensor \[N, C\]"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "N >= 1"),
        (torch.zeros(3, 1), torch.zeros(3).long(), "C >= 2"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), "floating point"),
        (torch.zeros(3, 2), torch.zeros(4).long(), r"class indices \[N\] with N = 3"),
        (torch.zeros(3, 2), torch.zeros(3), "class indices"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "`logits` to be finite"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "`logits` to be finite"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"`labels` to be in \[0, 1\] but got labels from 0 to 2"),
    ],
)
def test_refuses_data(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        TemperatureScaling().fit(logits, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` to be a finite number > 0"),
        ({"min_temperature": -1.0}, "`min_temperature` to be a finite number > 0"),
        ({"max_temperature": math.inf}, "`max_temperature` to be a finite number > 0"),
        ({"min_temperature": 2.0, "max_temperature": 1.0}, "`min_temperature` to be < `max_temperature`"),
    ],
)
def test_refuses_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TemperatureScaling(**options)

"""Balances between losses and between teachers."""

import copy

import pytest
import torch
from torch import nn

from lightning_robust.objectives import (
    LossBalance,
    TemperatureBalance,
    balanced_temperatures,
    balanced_weights,
    entropies,
)


def test_weights_follow_a_plain_loop_over_python_floats():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(30, 3, generator=generator, dtype=torch.float64) + 0.1
    balance = LossBalance(3, exponent=1.5, initial_weights=(0.2, 0.3, 0.5))
    weights = [0.2, 0.3, 0.5]
    for row in rows.tolist():
        left = [(now / start) ** 1.5 for now, start in zip(row, rows[0].tolist(), strict=True)]
        weights = [weight - 0.1 * (weight - part / sum(left)) for weight, part in zip(weights, left, strict=True)]
        ours = balance.update(torch.tensor(row, dtype=torch.float64), 0.1)
    torch.testing.assert_close(ours, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(ours.sum()) == pytest.approx(1, abs=1e-12)


def test_what_is_proposed_is_what_an_update_gives_and_changes_nothing():
    balance = LossBalance(2)
    balance.update(torch.tensor([1.0, 2.0]), 0.1)
    before = copy.deepcopy(balance.state_dict())
    proposed = balance.proposed(torch.tensor([2.0, 1.0]), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in balance.state_dict().items())
    assert torch.equal(proposed, balance.update(torch.tensor([2.0, 1.0]), 0.1))
    assert not torch.equal(proposed, before["weights"])


def test_the_start_is_the_first_loss_or_the_mean_of_the_first_ones():
    for steps, expected in ((1, 4.0), (2, 3.0), (3, 7.0)):
        balance = LossBalance(2, init_steps=steps)
        for loss in (4.0, 2.0, 15.0, 100.0):
            balance.update(torch.tensor([loss, 1.0]), 0.1)
        assert balance.initial.tolist() == [expected, 1.0]
        assert int(balance.steps) == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_without_numbers_changes_nothing(bad):
    balance, temperatures = LossBalance(2), TemperatureBalance(2, initial_temperatures=(2.0, 3.0))
    balance.update(torch.tensor([bad, 1.0]), 0.1)  # not what everything is compared with from now on
    assert balance.weights.tolist() == [0.5, 0.5]
    assert int(balance.steps) == 0
    balance.update(torch.tensor([2.0, 1.0]), 0.1)
    assert balance.initial.tolist() == [2.0, 1.0]
    temperatures.update(torch.tensor([torch.nan, 1.0]), 0.1)
    assert temperatures.temperatures.tolist() == [2.0, 3.0]


def test_losses_that_begin_at_zero():
    balance = LossBalance(2)
    assert balance.update(torch.zeros(2), 0.1).tolist() == [0.5, 0.5]
    assert balance.update(torch.tensor([1.0, 0.0]), 0.5).tolist() == [0.75, 0.25]  # all that is left is the first
    assert balance.update(torch.tensor([1.0, 1.0]), 0.5).isfinite().all()


def test_two_temperatures_take_turns():
    balance = TemperatureBalance(2, initial_temperatures=(2.0, 2.0))
    first = balance.update(torch.tensor([0.4, 0.9]), 0.25)
    assert first.tolist() == [2.25, 1.75]
    assert balance.update(torch.tensor([0.7, 0.7]), 0.25).tolist() == [2.25, 1.75]  # equal: nothing moves
    for _ in range(20):
        last = balance.update(torch.tensor([0.4, 0.9]), 0.5)
    assert last.tolist() == [10.0, 1.0]


def test_more_teachers_are_compared_with_the_mean_of_the_others():
    moved = balanced_temperatures(torch.full((3,), 5.0), torch.tensor([0.75, 0.5, 0.25]), 0.5)
    assert moved.tolist() == [4.5, 5.0, 5.5]


def test_the_ratio_of_the_published_code_heats_both_teachers_when_one_is_saturated():
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.3, 0.2, 0.0]], dtype=torch.float64)
    exact, published = entropies(logits), entropies(logits, 1e-5)
    assert float(exact[0]) >= 0
    assert float(published[0]) < 0  # no entropy any more
    start = torch.full((2,), 2.0, dtype=torch.float64)
    assert balanced_temperatures(start, exact, 0.5).tolist() == [2.5, 1.5]
    assert balanced_temperatures(start, published, 0.5, comparison="ratio").tolist() == [2.5, 2.5]


def test_both_comparisons_agree_on_positive_entropies():
    entropy = torch.rand(200, 2, generator=torch.Generator().manual_seed(3)) + 0.01
    for pair in entropy:
        start = torch.full((2,), 5.0)
        moved = [balanced_temperatures(start, pair, 0.5, comparison=kind) for kind in ("difference", "ratio")]
        assert torch.equal(*moved)


def test_entropies_agree_with_torch_distributions():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) * 3
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropies(logits), expected)
    q = logits.double().softmax(1)
    torch.testing.assert_close(entropies(logits.double(), 1e-5), -(q * (q + 1e-5).log()).sum(1), rtol=1e-12, atol=0)
    assert entropies(torch.tensor([[1e4, 0.0]], dtype=torch.bfloat16)).tolist() == [0.0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(entropies(logits), expected.new_tensor(entropies(logits).tolist()))
        assert entropies(logits).dtype == torch.float32


def test_the_function_agrees_with_the_class():
    weights, losses, initial = torch.tensor([0.4, 0.6]), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    assert balanced_weights(weights, losses, initial, 0.1).tolist() == pytest.approx([0.385, 0.615])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_state_keeps_its_precision_in_a_module_that_does_not(dtype):
    balance, temperatures = LossBalance(2), TemperatureBalance(2)
    balance.update(torch.tensor([1.0, 2.0]), 0.1)
    nn.ModuleList([balance, temperatures]).to(dtype)
    assert balance.weights.dtype == balance.initial.dtype == temperatures.temperatures.dtype == torch.float64
    assert balance.steps.dtype == torch.int64
    assert temperatures.update(torch.tensor([0.1, 0.2]), 0.001).tolist() == [1.001, 1.0]


def test_no_step_waits_for_the_device():
    """A tensor on the meta device has no value that anything could wait for."""
    balance, temperatures = LossBalance(2).to("meta"), TemperatureBalance(2, comparison="ratio").to("meta")
    values = torch.ones(2, device="meta")
    assert balance.update(values, 0.1).device.type == balance.weights.device.type == "meta"
    assert temperatures.update(values, 0.1).device.type == "meta"


def test_state_dict_goes_on_where_it_was():
    first = LossBalance(2)
    for losses in ([3.0, 1.0], [1.0, 1.0]):
        first.update(torch.tensor(losses), 0.1)
    second = LossBalance(2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.update(torch.tensor([1.0, 2.0]), 0.1), second.update(torch.tensor([1.0, 2.0]), 0.1))
    assert set(first.state_dict()) == {"weights", "initial", "steps"}


def test_no_gradient_is_kept():
    balance = LossBalance(2)
    assert not balance.update(torch.tensor([1.0, 2.0], requires_grad=True), 0.1).requires_grad
    temperatures = TemperatureBalance(2)
    assert not temperatures.update(torch.tensor([1.0, 2.0], requires_grad=True), 0.1).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossBalance(1), "`num_losses` to be an integer >= 2 but got 1"),
        (lambda: LossBalance(exponent=-1), "`exponent` to be a finite number >= 0 but got -1"),
        (lambda: LossBalance(init_steps=0), "`init_steps` to be an integer >= 1 but got 0"),
        (lambda: LossBalance(initial_weights=(0.5, 0.6)), "`initial_weights` to be 2 numbers >= 0 that sum to 1"),
        (lambda: LossBalance(initial_weights=(1.5, -0.5)), "`initial_weights` to be 2 numbers >= 0 that sum to 1"),
        (lambda: LossBalance(3, initial_weights=(0.5, 0.5)), "`initial_weights` to be 3 numbers"),
        (lambda: LossBalance(2).update(torch.ones(3), 0.1), r"Expected 2 losses \(`num_losses`\) but got \(3,\)"),
        (lambda: TemperatureBalance(1), "`num_teachers` to be an integer >= 2 but got 1"),
        (lambda: TemperatureBalance(limits=(0, 1)), "`limits` to be a finite number > 0 but got 0"),
        (
            lambda: TemperatureBalance(limits=(3, 1)),
            r"`limits` to be \(smallest, largest\) temperature but got",
        ),
        (lambda: TemperatureBalance(initial_temperatures=(1.0,)), "`initial_temperatures` to be 2 numbers"),
        (
            lambda: TemperatureBalance(initial_temperatures=(1.0, 0.0)),
            "`initial_temperatures` to be a finite number > 0",
        ),
        (lambda: TemperatureBalance(comparison="sum"), "`comparison` to be one of 'difference', 'ratio' but got 'sum'"),
        (lambda: TemperatureBalance(2).update(torch.ones(3), 0.1), r"Expected 2 entropies \(`num_teachers`\) but got"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_names_the_settings():
    assert repr(LossBalance(2)) == "LossBalance(num_losses=2, exponent=1.0, init_steps=1)"
    assert "limits=(1.0, 10.0)" in repr(TemperatureBalance(2))

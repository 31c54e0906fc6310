"""The weight of ELLE-A against the rule over the list of all errors."""

import statistics

import pytest
import torch

from lightning_robust.attacks import FGSM
from lightning_robust.objectives import ELLEA, ObjectiveOutput
from support.attacked import CountingNet, images


def written_out(errors, max_weight, decay, sensitivity):
    """As published: mean and standard deviation of everything seen, computed anew each time."""
    seen, weight, weights = [], 0.0, []
    for error in errors:
        jump = len(seen) > 2 and error > statistics.fmean(seen) + sensitivity * statistics.pstdev(seen)
        weight = max_weight if jump else weight * decay
        weights.append(weight)
        seen.append(error)
    return weights


@pytest.mark.parametrize(("decay", "sensitivity"), [(0.99, 2.0), (0.5, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_follows_the_rule(decay, sensitivity, dtype):
    generator = torch.Generator().manual_seed(3)
    errors = torch.rand(200, generator=generator, dtype=torch.float64).exp() * 1e-3
    errors[::17] *= 4
    objective = ELLEA(decay=decay, sensitivity=sensitivity).to(dtype)
    weights = []
    for error in errors:
        objective.observe(error)
        weights.append(float(objective.weight))
    expected = written_out(errors.tolist(), 4000.0, decay, sensitivity)
    assert weights == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-12)
    assert expected.count(4000.0) > 5
    variance = float(objective.squares / objective.count)
    assert variance == pytest.approx(statistics.pvariance(errors.tolist()), rel=1e-4)
    assert int(objective.count) == 200


def test_equal_errors_are_no_jump():
    objective = ELLEA()
    for _ in range(10):
        objective.observe(torch.tensor(0.25))
    assert float(objective.weight) == 0
    objective.observe(torch.tensor(0.26))
    assert float(objective.weight) == 4000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_changes_nothing(bad):
    objective = ELLEA()
    for error in (1.0, 2.0, 3.0, 9.0):
        objective.observe(torch.tensor(error))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.observe(torch.tensor(bad))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert float(objective.weight) == 4000


def test_the_new_weight_is_that_of_the_next_batch():
    x, y = images(dtype=torch.float64)
    net = CountingNet().double().eval()
    objective = ELLEA(attack=FGSM(eps=0.1), max_weight=10.0, decay=0.5)
    objective.weight.fill_(8.0)
    prepared = objective.prepare(net, x, y)
    first = objective(net, prepared)
    objective.batch_ends(first, lambda tensor: tensor)
    second = objective(net, prepared)
    for output, weight in ((first, 8.0), (second, 4.0)):
        assert float(output.logs["weight"]) == weight
        expected = output.logs["adversarial"] + weight * output.logs["linearity"]
        torch.testing.assert_close(output.loss.detach(), expected)
    first.loss.backward()  # its graph is not touched by the change
    torch.testing.assert_close(objective.mean.double(), first.logs["linearity"], rtol=1e-6, atol=0)


def test_processes_share_the_mean_over_all_samples():
    objective = ELLEA()

    def output(error, samples):
        return ObjectiveOutput(torch.zeros(()), torch.zeros(samples, 3), {"linearity": torch.tensor(error)})

    told = []
    ELLEA().batch_ends(output(0.4, 3), lambda tensor: told.append(tensor) or tensor)
    objective.batch_ends(output(1.0, 1), lambda tensor: tensor + told[0])
    assert float(objective.mean) == pytest.approx((3 * 0.4 + 1.0) / 4)
    assert int(objective.count) == 1


def test_state_goes_into_the_state_dict():
    objective = ELLEA()
    for error in (1.0, 2.0, 3.0, 9.0, 1.0):
        objective.observe(torch.tensor(error))
    other = ELLEA()
    other.load_state_dict(objective.state_dict())
    for each in (objective, other):
        each.observe(torch.tensor(20.0))
        each.observe(torch.tensor(1.0))
    assert float(other.weight) == pytest.approx(3960)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in objective.state_dict().items())


def test_refusals_and_repr():
    with pytest.raises(ValueError, match=r"Expected `decay` to be in \[0.0, 1.0\]"):
        ELLEA(decay=1.1)
    with pytest.raises(ValueError, match="Expected `sensitivity`"):
        ELLEA(sensitivity=-1)
    assert "max_weight=4000.0, decay=0.99, sensitivity=2.0" in repr(ELLEA())

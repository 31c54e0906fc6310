"""What holds for every objective that the library exports."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support.attacked import SIZE, CountingNet, differences, images, snapshot
from support.objectives import NAMES, SAME_ARCHITECTURE, build


class Extreme(nn.Module):
    """Logits up to 120, in a type of choice; its gradient does not vanish."""

    def __init__(self, classes, dtype):
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, classes)
        self.dtype = dtype

    def forward(self, x):
        return (120 * torch.sin(20 * self.linear(x.flatten(1)))).to(self.dtype)


def seeded():
    return torch.Generator().manual_seed(0)


def objective_for(name, x, classes=4, student=None):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = CountingNet(classes).to(x.dtype)
        return build(name, student if name in SAME_ARCHITECTURE and student is not None else other, classes)


def evaluate(name, net, x, y, classes=4):
    objective = objective_for(name, x, classes, net)
    return objective(net, objective.prepare(net, x, y, generator=seeded()))


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_in_any_precision(name, dtype, classes):
    x, y = images(16, classes=classes)
    net = Extreme(classes, dtype)
    output = evaluate(name, net, x, y, classes)
    assert output.loss.dtype == torch.float32
    assert bool(output.loss.isfinite())
    if output.sample_losses is not None:
        assert bool(output.sample_losses.isfinite().all())
    output.loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())
    assert any(bool(parameter.grad.abs().sum() > 0) for parameter in net.parameters())


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name, classes):
    x, y = images(1, classes=classes)
    net = CountingNet(classes).eval()
    y[:] = classes - 1
    output = evaluate(name, net, x, y, classes)
    assert output.logits.shape == (1, classes)
    assert output.sample_losses is None or output.sample_losses.shape == (1,)
    assert bool(output.loss.isfinite())
    output.loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_that_are_certain_are_classes(name):
    x, y = images(dtype=torch.float64)
    net = CountingNet().double().eval()
    hard, soft = (evaluate(name, net, x, target) for target in (y, F.one_hot(y, 4).double()))
    torch.testing.assert_close(hard.loss, soft.loss)
    assert bool(evaluate(name, net, x, torch.rand(8, 4, dtype=torch.float64).softmax(1)).loss.isfinite())


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_samples_and_logs(name):
    x, y = images(dtype=torch.float64)
    output = evaluate(name, CountingNet().double().eval(), x, y)
    assert output.loss.shape == ()
    if output.sample_losses is not None:
        assert output.sample_losses.shape == (8,)
        torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    for value in output.logs.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert bool(value.isfinite())


@pytest.mark.parametrize("name", NAMES)
def test_preparation_leaves_the_model_alone_and_the_loss_has_no_memory(name):
    x, y = images(dtype=torch.float64)
    kept = x.clone()
    net = CountingNet().double().train()
    objective = objective_for(name, x)
    before, state = snapshot(net), torch.get_rng_state()
    prepared = objective.prepare(net, x, y, generator=seeded())
    # single-step methods attack in training mode, which moves the statistics
    moved = ("norm.running", "norm.num_batches") if objective.attack.mode == "train" else ()
    assert differences(net, before, ignore=moved) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert not any(value.requires_grad for value in [prepared.x_adv, *prepared.extra.values()] if value is not None)
    net.eval()
    first, second = objective(net, prepared), objective(net, prepared)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", NAMES)
def test_same_generator_same_loss(name):
    x, y = images()
    net = CountingNet().eval()
    assert torch.equal(evaluate(name, net, x, y).loss, evaluate(name, net, x, y).loss)


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_at_least_what_is_counted(name):
    objective = objective_for(name, torch.zeros(1))
    assert objective.passes(2) > objective.passes(1) > objective.attack.passes
    assert type(objective).__name__ in repr(objective)

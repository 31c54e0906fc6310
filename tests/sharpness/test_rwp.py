"""RWP against the published procedure, and what it asks of a loss."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.sharpness import RWP, sharp_backward, stationary_loss


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().train()


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield 3 * torch.randn(9, 2, 4, generator=generator).double(), torch.randint(3, (9,), generator=generator)


def published_step(model, optimizer, x, y, gamma, threshold, steps):
    """Two copies of the model per climb, one of which steps; raw steps add up, and are scaled as one vector."""
    names = [name for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name]
    total, scaled = {}, {}
    for _ in range(steps):
        here, there = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            for name, d in scaled.items():
                here.get_parameter(name).add_(gamma * d)
                there.get_parameter(name).add_(gamma * d)
        losses = F.cross_entropy(there(x), y, reduction="none")
        (-(losses * (losses < threshold).double()).mean()).backward()
        torch.optim.SGD(there.parameters(), lr=0.01).step()
        for name in names:
            step = (there.get_parameter(name) - here.get_parameter(name)).detach()
            total[name] = total.get(name, 0) + step
        length = torch.cat([model.get_parameter(name).detach().flatten() for name in names]).norm()
        ratio = length / (torch.cat([total[name].flatten() for name in names]).norm() + 1e-20)
        scaled = {name: ratio * d for name, d in total.items()}
    with torch.no_grad():
        for name, d in scaled.items():
            model.get_parameter(name).add_(gamma * d)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for name, d in scaled.items():
            model.get_parameter(name).sub_(gamma * d)
    return loss.detach()


@pytest.mark.parametrize(("threshold", "steps"), [(1.7, 10), (0.9, 3), (50.0, 1)])
def test_equals_the_published_loop(threshold, steps):
    ours = network()
    theirs = copy.deepcopy(ours)
    first, second = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05) for model in (ours, theirs)
    )
    method = RWP(gamma=0.1, loss_threshold=threshold, inner_steps=steps)
    for x, y in batches():
        passes = []

        def closure(x=x, y=y, passes=passes):
            passes.append(1)
            return F.cross_entropy(ours(x), y, reduction="none")

        first.zero_grad()
        value = sharp_backward(closure, method, first, module=ours)
        first.step()
        expected = published_step(theirs, second, x, y, 0.1, threshold, steps)
        assert len(passes) == method.extra_passes + 1 == steps + 1
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-8, atol=1e-11)


def test_the_loss_counts_samples_below_the_threshold_only():
    losses = torch.tensor([0.5, 1.7, 3.0, 1.0], requires_grad=True)
    value = stationary_loss(losses, 1.7)
    assert value == (0.5 + 1.0) / 4
    value.backward()
    assert losses.grad.tolist() == [0.25, 0.0, 0.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_sample_below_the_threshold_means_no_perturbation(dtype):
    model = network().to(dtype)
    x, y = next(batches())
    seen = []

    def closure():
        seen.append(model[1].weight.detach().clone())
        return F.cross_entropy(model(x.to(dtype)), y, reduction="none")

    sharp_backward(closure, RWP(loss_threshold=1e-9, inner_steps=3), model)
    assert all(torch.equal(seen[0], each) for each in seen)
    plain = network().to(dtype)
    F.cross_entropy(plain(x.to(dtype)), y, reduction="none").mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_only_large_matrices_move_and_all_weights_return():
    model = network()
    before = copy.deepcopy(model.state_dict())
    x, y = next(batches())
    moved = set()

    def closure():
        moved.update(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
        return F.cross_entropy(model(x), y, reduction="none")

    sharp_backward(closure, RWP(gamma=0.1), model)
    assert moved == {"1.weight", "4.weight"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert int(model[2].num_batches_tracked) == 1


def test_a_mean_loss_is_refused():
    model = network()
    x, y = next(batches())
    with pytest.raises(ValueError, match=r"reads the losses of single samples.*return losses \[B\]"):
        sharp_backward(lambda: F.cross_entropy(model(x), y), RWP(), model)


def test_decoupled_decay_is_refused():
    model = network()
    x, y = next(batches())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"RWP lets weight decay act .* set decay_at_perturbed=False"):
        sharp_backward(lambda: F.cross_entropy(model(x), y, reduction="none"), RWP(), optimizer, module=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "Expected `gamma` to be a finite number > 0 but got 0"),
        ({"loss_threshold": -1.0}, "Expected `loss_threshold` to be a finite number > 0"),
        ({"inner_steps": 0}, "Expected `inner_steps` to be an integer >= 1 but got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RWP(**options)

"""LAP against the published procedure: the real optimizer steps, is set back, and steps again at moved weights."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, GeneratorDraws
from lightning_robust.sharpness import (
    LAP,
    SharedGradientAttack,
    Weights,
    lap_backward,
    layer_factors,
    sharp_backward,
    trial_step,
)

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, **SGD),
    "nesterov": lambda ps: torch.optim.SGD(ps, **SGD, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.05),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5, amsgrad=True, foreach=False),
}
ATTACKS = {
    "V-LAP": FGSM(eps=0.1),
    "R-LAP": FGSM(eps=0.1, step_size=0.125, random_start=True),
    "N-LAP": FGSM(eps=0.1, random_start=True, start_scale=2, projection="box"),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        # no bias in front of BatchNorm: its gradient is rounding noise, which Adam makes large
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ).double()


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.rand(7, 2, 5, 5, generator=generator).double(), torch.randint(3, (7,), generator=generator)


def published_step(model, optimizer, x, y, start, attack, beta, gamma, layers, sign=1.0):
    names = [name for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name]
    delta = (start - x).requires_grad_()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x + delta), y)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    loss.backward()
    optimizer.step()
    moved = delta.detach() + attack.step_size * delta.grad.sign()
    if attack.projection == "ball-box":
        moved = moved.clamp(-attack.eps, attack.eps)
    x_adv = (x + moved).clamp(0, 1)
    steps = {name: model.get_parameter(name).detach() - weights[name] for name in names}
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for number, name in enumerate(names, 1):
            factor = 1 - (math.log(number) / math.log(layers)) ** gamma
            w, d = weights[name], steps[name]
            model.get_parameter(name).add_(sign * beta * factor * w.norm() / (d.norm() + 1e-20) * d)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.detach(), x_adv


def same_state(ours, theirs, rtol=1e-9):
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", ATTACKS)
def test_equals_the_published_loop(form, optimizer):
    attack = ATTACKS[form]
    ours = network().train()
    theirs = copy.deepcopy(ours)
    first, second = OPTIMIZERS[optimizer](ours.parameters()), OPTIMIZERS[optimizer](theirs.parameters())
    method = LAP(beta=0.2, gamma=0.4, layers=5)
    seen = []
    ours.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    for x, y in batches():
        start = attack.draw_start(x, GeneratorDraws(torch.Generator().manual_seed(1)))
        seen.clear()
        first.zero_grad()
        value = lap_backward(ours, x, y, method, first, attack=attack, start=start)
        first.step()
        expected, x_adv = published_step(theirs, second, x, y, start, attack, 0.2, 0.4, 5)
        assert torch.equal(seen[0], start)
        assert len(seen) == 2
        torch.testing.assert_close(seen[1], x_adv, rtol=0, atol=1e-12)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        same_state(ours, theirs)  # BatchNorm moved in both passes
        for mine, other in zip(first.state.values(), second.state.values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_the_other_direction_climbs_at_the_start():
    x, y = next(batches())
    losses = {}
    for move in ("descent", "ascent"):
        model = network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        values = []

        def criterion(logits, target, values=values):
            values.append(F.cross_entropy(logits, target))
            return values[-1]

        # an attack of no strength: both passes see the same images, at other weights
        lap_backward(model, x, y, LAP(beta=0.01, move=move), optimizer, attack=FGSM(eps=0.0), criterion=criterion)
        losses[move] = (values[1] - values[0]).item()
    assert losses["descent"] < -1e-4
    assert losses["ascent"] > 1e-4


def test_ascent_equals_the_published_loop_backwards():
    ours = network().train()
    theirs = copy.deepcopy(ours)
    first, second = (torch.optim.SGD(model.parameters(), **SGD) for model in (ours, theirs))
    attack = ATTACKS["V-LAP"]
    for x, y in batches():
        first.zero_grad()
        lap_backward(ours, x, y, LAP(beta=0.2, move="ascent"), first, attack=attack)
        first.step()
        published_step(theirs, second, x, y, x, attack, 0.2, 0.3, 3, sign=-1.0)
        same_state(ours, theirs)


def test_statistics_of_the_start_are_a_choice():
    counts = []
    for track_start in (True, False):
        model = network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lap_backward(model, *next(batches()), LAP(track_start=track_start), optimizer)
        counts.append(int(model[1].num_batches_tracked))
    assert counts == [2, 1]


def test_decay_of_the_unperturbed_weights_is_a_choice():
    x, y = next(batches())
    for name in ("sgd", "adamw"):
        results = []
        for decay_at_perturbed in (True, False):
            model = network().train()
            optimizer = OPTIMIZERS[name](model.parameters())
            method = LAP(beta=0.2, decay_at_perturbed=decay_at_perturbed)
            lap_backward(model, x, y, method, optimizer, attack=ATTACKS["V-LAP"])
            optimizer.step()
            results.append(model[0].weight.detach())
        lr, decay = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        # the first layer moved by beta of its length; so much of that has decayed
        torch.testing.assert_close(
            (results[1] - results[0]).norm(), lr * decay * 0.2 * network()[0].weight.norm(), rtol=1e-6, atol=0
        )


def test_weights_are_perturbed_after_the_step_only():
    model = network().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    lap_backward(model, *next(batches()), LAP(beta=0.2), optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.step()
    factors = dict(zip(("0.weight", "4.weight", "6.weight"), layer_factors(3), strict=True))
    for name, p in model.named_parameters():
        length = (p.detach() - before[name]).norm()
        torch.testing.assert_close(length, 0.2 * factors.get(name, 0.0) * before[name].norm(), rtol=1e-6, atol=1e-7)


def test_layers_count_in_the_order_of_the_module():
    x, y = next(batches())
    states = []
    for order in (lambda ps: ps, lambda ps: ps[::-1]):
        model = network().train()
        optimizer = torch.optim.SGD([{"params": [p]} for p in order(list(model.parameters()))], **SGD)
        lap_backward(model, x, y, LAP(beta=0.2), optimizer, attack=ATTACKS["V-LAP"])
        optimizer.step()
        states.append(model)
    same_state(*states)
    weights = Weights.of(optimizer, model)
    assert weights.names[0] == "6.bias"
    assert weights.positions == list(range(7))[::-1]


def test_accumulated_batches_average_their_moves():
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    before = model[0].weight.detach().clone()
    single = []
    for x, y in batches(2):
        twin = copy.deepcopy(model)
        own = torch.optim.SGD(twin.parameters(), lr=1e-12)
        lap_backward(twin, x, y, LAP(beta=0.2), own, attack=ATTACKS["V-LAP"])
        own.step()
        single.append(twin[0].weight.detach() - before)
    for x, y in batches(2):
        lap_backward(model, x, y, LAP(beta=0.2), optimizer, attack=ATTACKS["V-LAP"], accumulate=2)
    optimizer.step()
    torch.testing.assert_close(model[0].weight - before, (single[0] + single[1]) / 2, rtol=1e-6, atol=1e-9)


def test_a_layer_without_gradient_stays():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rest = network(), nn.Linear(4, 4).double()

        def forward(self, x):
            return self.body(x)

    model = Partial().train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    before = model.rest.weight.detach().clone()
    for x, y in batches():
        optimizer.zero_grad()
        lap_backward(model, x, y, LAP(beta=0.2), optimizer)
        optimizer.step()
    assert torch.equal(model.rest.weight, before)
    assert model.rest.weight.grad is None


def test_the_start_is_drawn_from_the_given_generator():
    x, y = next(batches())
    seen = []
    model = network().train()
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in (1, 1, 2):
        lap_backward(model, x, y, LAP(), optimizer, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(3)
    lap_backward(model, x, y, LAP(), optimizer)
    lap_backward(model, x, y, LAP(), optimizer)
    starts = seen[::2]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[3], starts[4])
    assert all(0 < (start - x).abs().max() <= 8 / 255 + 1e-9 for start in starts)
    assert not x.requires_grad


def test_images_in_half_precision_are_attacked_in_float32():
    x = torch.rand(4, 6).bfloat16()
    shared = SharedGradientAttack(FGSM(eps=0.1), x, torch.Generator())
    assert shared.start.dtype == torch.bfloat16
    shared.start.grad = torch.randn(4, 6).bfloat16()
    assert torch.equal(shared.attacked(), (x.float() + 0.1 * shared.start.grad.float().sign()).clamp(0, 1).bfloat16())


@pytest.mark.parametrize(("count", "layers"), [(1, None), (2, None), (5, None), (3, 21), (1, 1)])
def test_factors_follow_the_formula(count, layers):
    factors = layer_factors(count, gamma=0.3, layers=layers)
    assert len(factors) == count
    assert factors[0] == 1.0
    total = layers or count
    for number, factor in enumerate(factors[1:], 2):
        assert factor == pytest.approx(1 - (math.log(number) / math.log(total)) ** 0.3)
    assert factors == sorted(factors, reverse=True)
    if count == total > 1:
        assert factors[-1] == 0.0


def test_too_few_layers_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Expected `layers` to be at least the 3 weight tensors .* but got 2"):
        lap_backward(model, *next(batches()), LAP(layers=2), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trial_step_is_the_step_and_leaves_no_trace(optimizer):
    model = network().train()
    base = OPTIMIZERS[optimizer](model.parameters())
    calls = []
    base.register_step_pre_hook(lambda *_: calls.append("pre"))
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1)
    tensors = list(model.parameters())
    for x, y in batches():
        gradients = list(torch.autograd.grad(F.cross_entropy(model(x), y), tensors))
        before, state = copy.deepcopy(tensors), copy.deepcopy(base.state_dict())
        counted = len(calls)
        moves = trial_step(base, tensors, [gradient.clone() for gradient in gradients])
        assert len(calls) == counted
        assert all(torch.equal(p, b) and p.grad is None for p, b in zip(tensors, before, strict=True))
        torch.testing.assert_close(base.state_dict(), state, rtol=0, atol=0)
        for p, gradient in zip(tensors, gradients, strict=True):
            p.grad = gradient
        base.step()
        scheduler.step()
        torch.testing.assert_close(
            moves, [p.detach() - b for p, b in zip(tensors, before, strict=True)], rtol=0, atol=0
        )
        base.zero_grad()


def test_frozen_parameters_are_left_out_of_the_trial():
    model = network().train()
    model[4].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    before = model[4].weight.clone()
    for x, y in batches():
        optimizer.zero_grad()
        lap_backward(model, x, y, LAP(beta=0.2), optimizer)
        optimizer.step()
    assert torch.equal(model[4].weight, before)


def test_no_optimizer_is_refused():
    model = network()
    x, y = next(batches())
    with pytest.raises(ValueError, match="give the optimizer instead of parameters"):
        sharp_backward(lambda: F.cross_entropy(model(x), y), LAP(), model)


def test_unknown_decay_is_refused():
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"LAP lets weight decay act .* Adafactor may .* set decay_at_perturbed=False"):
        lap_backward(model, *next(batches()), LAP(), optimizer)
    lap_backward(model, *next(batches()), LAP(decay_at_perturbed=False), optimizer)


@pytest.mark.parametrize(
    "attack", [FGSM(restarts=2, random_start=True), FGSM(loss="margin"), FGSM(targeted=True)], ids=repr
)
def test_attacks_with_a_life_of_their_own_are_refused(attack):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="uses the gradient of the training loss at its start"):
        lap_backward(model, *next(batches()), LAP(), optimizer, attack=attack)


def test_images_outside_of_the_bounds_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(batches())
    with pytest.raises(ValueError, match=r"Expected pixels in \[0, 1\]"):
        lap_backward(model, 255 * x, y, LAP(), optimizer)


def test_a_loss_that_hides_the_images_is_refused():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x.detach())

    model = Detached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="No gradient reaches the images from the training loss"):
        lap_backward(model, *next(batches()), LAP(), optimizer)


def test_inputs_without_a_loss_of_their_own_are_refused():
    model = network()
    x, y = next(batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="gradient of ascent_inputs is that of ascent_closure"):
        sharp_backward(
            lambda: F.cross_entropy(model(x), y), LAP(), optimizer, module=model, ascent_inputs=[x.requires_grad_()]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "Expected `beta` to be a finite number > 0 but got 0"),
        ({"gamma": -1.0}, "Expected `gamma` to be a finite number > 0"),
        ({"layers": 0}, "Expected `layers` to be an integer >= 1 but got 0"),
        ({"move": "up"}, "Expected `move` to be one of 'descent', 'ascent' but got 'up'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LAP(**options)

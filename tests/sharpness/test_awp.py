"""AWP and its kin against the published procedure: a copy of the model climbs, the optimizer steps at moved weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.objectives import TRADES, Prepared
from lightning_robust.schedules import Linear
from lightning_robust.sharpness import (
    AWP,
    GlobalAWP,
    ParameterSelection,
    SAMStyleAWP,
    global_scales,
    layerwise_scales,
    sharp_backward,
)

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, **SGD),
    "nesterov": lambda ps: torch.optim.SGD(ps, **SGD, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.05),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, weight_decay=0.05),
    "maximize": lambda ps: torch.optim.SGD(ps, **SGD, maximize=True),
    "none": lambda ps: torch.optim.SGD(ps, lr=0.1),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.rand(7, 2, 5, 5, generator=generator, dtype=torch.float64)
        x_adv = x + 0.03 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        yield x, x_adv, torch.randint(3, (7,), generator=generator)


def cross_entropy(model, x, x_adv, y):
    return F.cross_entropy(model(x_adv), y)


def trades(model, x, x_adv, y):
    adv, clean, again = model(x_adv), model(x), model(x)
    return F.cross_entropy(again, y) + 6 * F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean")


def published_step(model, optimizer, loss, batch, gamma, chosen=lambda name, p: p.ndim > 1 and "weight" in name):
    proxy = copy.deepcopy(model).train()
    (-loss(proxy, *batch)).backward()
    torch.optim.SGD(proxy.parameters(), lr=0.37).step()  # the learning rate cancels
    diff = {}
    for (name, p), q in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if chosen(name, p):
            step = (q - p).detach()
            diff[name] = p.detach().norm() / (step.norm() + 1e-20) * step
    with torch.no_grad():
        for name, d in diff.items():
            model.get_parameter(name).add_(gamma * d)
    optimizer.zero_grad()
    value = loss(model, *batch)
    value.backward()
    optimizer.step()
    with torch.no_grad():
        for name, d in diff.items():
            model.get_parameter(name).sub_(gamma * d)
    return value.detach()


def same_state(ours, theirs, rtol=1e-9):
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", [cross_entropy, trades])
def test_equals_the_published_loop(loss, optimizer):
    ours = network().train()
    theirs = copy.deepcopy(ours)
    first, second = OPTIMIZERS[optimizer](ours.parameters()), OPTIMIZERS[optimizer](theirs.parameters())
    for batch in batches():
        first.zero_grad()
        value = sharp_backward(lambda b=batch: loss(ours, *b), AWP(gamma=0.2), first, module=ours)
        first.step()
        expected = published_step(theirs, second, loss, batch, 0.2)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        same_state(ours, theirs)  # BatchNorm statistics and counters too


def test_decay_at_the_perturbed_weights_is_a_choice():
    ours, clean = network().train(), network().train()
    for model, method in ((ours, AWP(gamma=0.2)), (clean, AWP(gamma=0.2, decay_at_perturbed=False))):
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        batch = next(batches())
        sharp_backward(lambda m=model, b=batch: cross_entropy(m, *b), method, optimizer, module=model)
    moved = [n for n, p in ours.named_parameters() if not torch.equal(p.grad, clean.get_parameter(n).grad)]
    assert moved == ["0.weight", "4.weight", "6.weight"]
    difference = ours[4].weight.grad - clean[4].weight.grad
    torch.testing.assert_close(difference.norm(), SGD["weight_decay"] * 0.2 * ours[4].weight.norm())


def test_groups_decay_each_with_its_own_rate():
    model = network().train()
    batch = next(batches())
    rates = {"0.weight": 0.0, "4.weight": 0.1, "6.weight": 0.3}
    groups = [{"params": [p], "weight_decay": rates.get(n, 0.7)} for n, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    results = []
    for method in (AWP(gamma=0.2), AWP(gamma=0.2, decay_at_perturbed=False)):
        optimizer.zero_grad()
        sharp_backward(lambda: cross_entropy(model, *batch), method, optimizer, module=model)
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, rate in rates.items():
        length = (results[0][name] - results[1][name]).norm()
        torch.testing.assert_close(length, rate * 0.2 * model.get_parameter(name).norm())
    assert torch.equal(results[0]["6.bias"], results[1]["6.bias"])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            lambda ps: torch.optim.AdamW(ps),
            "AdamW decays weights apart from the gradient; set decay_at_perturbed=False",
        ),
        (lambda ps: torch.optim.NAdam(ps, weight_decay=0.1, decoupled_weight_decay=True), "NAdam decays weights apart"),
        (lambda ps: torch.optim.Adafactor(ps, weight_decay=0.1), "Adafactor may apply its weight decay in any way"),
    ],
)
def test_decay_that_would_act_elsewhere_is_refused(optimizer, message):
    model = network()
    base = optimizer(model.parameters())
    batch = next(batches())
    with pytest.raises(ValueError, match=message):
        sharp_backward(lambda: cross_entropy(model, *batch), AWP(), base, module=model)
    assert model[0].weight.grad is None
    sharp_backward(lambda: cross_entropy(model, *batch), AWP(decay_at_perturbed=False), base, module=model)
    assert model[0].weight.grad is not None


def test_without_decay_any_optimizer_will_do():
    model = network()
    batch = next(batches())
    for base in (torch.optim.AdamW(model.parameters(), weight_decay=0.0), torch.optim.NAdam(model.parameters())):
        sharp_backward(lambda: cross_entropy(model, *batch), AWP(), base, module=model)
    model.zero_grad()
    sharp_backward(lambda: cross_entropy(model, *batch), AWP(), model)  # no optimizer is known
    assert model[6].bias.grad is not None


def visited(method, **options):
    """The weights at both passes of a step."""
    model = network().train()
    batch = next(batches())
    states = []

    def closure():
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return cross_entropy(model, *batch)

    sharp_backward(closure, method, model, **options)
    return states


def test_each_chosen_tensor_moves_by_its_share():
    before, after = visited(AWP(gamma=0.03))
    for name, value in before.items():
        share = 0.03 if name in ("0.weight", "4.weight", "6.weight") else 0.0
        torch.testing.assert_close((after[name] - value).norm(), share * value.norm())


def test_another_selection():
    before, after = visited(AWP(gamma=0.03), perturb=ParameterSelection(include="bias"))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"0.bias", "1.bias", "4.bias", "6.bias"} - {n for n, v in before.items() if not v.any()}


def test_a_schedule_and_a_group_option_set_the_length():
    model = network().train()
    batch = next(batches())
    optimizer = torch.optim.SGD(
        [{"params": model[:5].parameters()}, {"params": model[5:].parameters(), "gamma": 0.5}], lr=0.1
    )
    states = []

    def closure():
        states.append([model[4].weight.detach().clone(), model[6].weight.detach().clone()])
        return cross_entropy(model, *batch)

    schedule = Linear(start=0.0, end=0.1, denominator="T")
    sharp_backward(closure, AWP(gamma=schedule), optimizer, module=model, step=5, total_steps=10)
    first, last = [(b - a).norm() / a.norm() for a, b in zip(*states, strict=True)]
    assert first.item() == pytest.approx(0.05)
    assert last.item() == pytest.approx(0.5)


def test_global_awp_moves_all_by_one_ratio():
    model = network().train()
    gradients = torch.autograd.grad(cross_entropy(model, *next(batches())), list(model.parameters()))
    before, after = visited(GlobalAWP(rho=0.03))
    ratio = nn.utils.get_total_norm(before.values()) / nn.utils.get_total_norm(gradients)
    for name, gradient in zip(before, gradients, strict=True):
        torch.testing.assert_close(after[name] - before[name], 0.03 * ratio * gradient, rtol=1e-9, atol=1e-12)


def test_sam_style_moves_every_tensor_by_its_share():
    before, after = visited(SAMStyleAWP(rho=0.03))
    for name, value in before.items():
        # the gradient of the bias in front of BatchNorm is rounding noise, not much longer than the 1e-20 in the ratio
        rtol = 1e-3 if name == "0.bias" else 1e-9
        torch.testing.assert_close((after[name] - value).norm(), 0.03 * value.norm(), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("method", [GlobalAWP(rho=0.05), SAMStyleAWP(rho=0.05)])
def test_variants_step_and_count_at_the_clean_weights(method):
    ours = network().train()
    theirs = copy.deepcopy(ours)
    first, second = (torch.optim.SGD(model.parameters(), **SGD) for model in (ours, theirs))
    batch = next(batches())
    value = sharp_backward(lambda: cross_entropy(ours, *batch), method, first, module=ours)
    first.step()
    assert value == cross_entropy(theirs, *batch)  # and one update of BatchNorm
    before, after = visited(method)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(after[name])
    still = copy.deepcopy(theirs)
    gradients = torch.autograd.grad(cross_entropy(still, *batch), list(still.parameters()))
    for (name, p), gradient in zip(theirs.named_parameters(), gradients, strict=True):
        p.data.copy_(before[name])
        p.grad = gradient
    second.step()
    same_state(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [AWP(), GlobalAWP(), SAMStyleAWP()])
def test_zero_gradient_gives_no_perturbation(method, dtype):
    layer = nn.Linear(3, 2).to(dtype)
    seen = []

    def closure():
        seen.append(layer.weight.detach().clone())
        return (layer.weight * 0).sum() + (layer.bias * 0).sum()

    sharp_backward(closure, method, layer)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(layer.weight.grad, torch.zeros(2, 3, dtype=dtype))


def test_a_tensor_of_zeros_stays():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    seen = []

    def closure():
        seen.append(layer.weight.detach().clone())
        return layer(torch.ones(1, 3)).sum()

    sharp_backward(closure, AWP(), layer)
    assert torch.equal(seen[1], torch.zeros(2, 3))


def test_scales_are_computed_in_full_precision():
    tensor, direction = torch.full((3000,), 8.0, dtype=torch.float16), torch.full((3000,), 6.0, dtype=torch.float16)
    (scale,) = layerwise_scales([tensor], [direction], [0.3])
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.tensor(0.4))
    torch.testing.assert_close(global_scales([tensor], [direction], [0.3]), torch.tensor(0.4))
    uneven = global_scales([tensor, tensor], [direction, direction], [0.3, 0.6])
    torch.testing.assert_close(torch.stack(uneven), torch.tensor([0.4, 0.8]))


def test_accumulated_batches_add_up():
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    single = []
    for batch in batches(2):
        optimizer.zero_grad()
        sharp_backward(lambda b=batch: cross_entropy(model, *b), AWP(gamma=0.2), optimizer, module=model)
        single.append([p.grad.clone() for p in model.parameters()])
    optimizer.zero_grad()
    for batch in batches(2):
        sharp_backward(lambda b=batch: cross_entropy(model, *b), AWP(gamma=0.2), optimizer, module=model, accumulate=2)
    mean = [(a + b) / 2 for a, b in zip(*single, strict=True)]
    torch.testing.assert_close([p.grad for p in model.parameters()], mean)


def test_the_objective_keeps_its_images():
    """x' is made once, at the clean weights, and both passes see it."""
    model = network().train()
    objective = TRADES(beta=6.0)
    seen = []

    def remember(module, arguments):
        seen.append(arguments[0])

    x, x_adv, y = next(batches())
    model.register_forward_pre_hook(remember)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    sharp_backward(lambda: objective(model, Prepared(x, y, x_adv)).loss, AWP(), optimizer, module=model)
    assert [each is x_adv for each in seen] == [False, True] * 2
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize(("method", "name"), [(AWP, "gamma"), (GlobalAWP, "rho"), (SAMStyleAWP, "rho")])
def test_bad_lengths_are_refused(method, name):
    for value in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0"):
            method(**{name: value})


def test_awp_by_name_needs_names():
    model = network()
    with pytest.raises(ValueError, match="their names are not known; pass the module"):
        sharp_backward(lambda: cross_entropy(model, *next(batches())), AWP(), model.parameters())

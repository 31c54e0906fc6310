import copy

import pytest
import torch
from torch import nn

from lightning_robust.sharpness import ASAM, SAM, SharpnessMethod, WeightBackup, Weights, global_norm, sharp_backward


def problem(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    x, y = torch.randn(10, 6, dtype=dtype), torch.randint(4, (10,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def naive(model, closure, rho, scale=lambda name, w: torch.ones_like(w)):
    """The textbook formula with one loop per parameter, on a copy of nothing: weights are moved and moved back."""
    names, params = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(closure(), params)
    scales = [scale(name, p.detach()) for name, p in zip(names, params, strict=True)]
    norm = sum((s * g).square().sum() for s, g in zip(scales, gradients, strict=True)).sqrt()
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, s, g in zip(params, scales, gradients, strict=True):
            p += rho * s * s * g / (norm + 1e-12)
    result = torch.autograd.grad(closure(), params)
    with torch.no_grad():
        for p, o in zip(params, old, strict=True):
            p.copy_(o)
    return result


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (SAM(rho=0.3), lambda name, w: torch.ones_like(w)),
        (ASAM(rho=0.7, eta=0.0, scaling="all"), lambda name, w: w.abs()),
        (ASAM(rho=0.7, eta=0.2), lambda name, w: w.abs() + 0.2 if "weight" in name else torch.ones_like(w)),
    ],
    ids=["sam", "asam-all", "asam-weight"],
)
def test_direction_is_the_formula(method, scale):
    model, closure = problem()
    expected = naive(model, closure, method.rho, scale)
    before = copy.deepcopy(model.state_dict())
    loss = sharp_backward(closure, method, model)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=1e-12, atol=1e-14)
    assert loss == closure()
    assert not loss.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_group_option_rho_overrides_the_method():
    model, closure = problem()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": weights, "rho": 0.5}, {"params": biases, "rho": 0.0}], lr=0.1)
    moved = []

    def watched():
        moved.append([p.detach().clone() for p in biases + weights])
        return closure()

    sharp_backward(watched, SAM(rho=9.0), optimizer)
    for first, second, name in zip(*moved, ["b", "b", "w", "w"], strict=True):
        assert torch.equal(first, second) == (name == "b")
    delta = torch.cat([(b - a).flatten() for a, b in zip(moved[0][2:], moved[1][2:], strict=True)])
    gradients = torch.autograd.grad(closure(), weights)
    whole = global_norm(torch.autograd.grad(closure(), [*weights, *biases]))
    torch.testing.assert_close(delta, 0.5 * torch.cat([g.flatten() for g in gradients]) / whole, rtol=1e-9, atol=1e-12)


def test_negative_group_rho_is_refused():
    model, closure = problem()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "rho": -1.0}], lr=0.1)
    with pytest.raises(ValueError, match=r"group option `rho` to be a number >= 0 but got -1\.0"):
        sharp_backward(closure, SAM(), optimizer)


@pytest.mark.parametrize("rho", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [SAM, ASAM])
def test_bad_rho_is_refused(method, rho):
    with pytest.raises(ValueError, match="Expected `rho` to be a finite number > 0"):
        method(rho=rho)


def test_asam_refuses_bad_options():
    with pytest.raises(ValueError, match="Expected `eta`"):
        ASAM(eta=-1)
    with pytest.raises(ValueError, match="Expected `scaling` to be one of 'weight', 'all' but got 'some'"):
        ASAM(scaling="some")


@pytest.mark.parametrize("method", [SAM(rho=0.3), ASAM(rho=0.7, eta=0.1, scaling="all")])
def test_gradients_that_share_memory_are_not_scaled_twice(method):
    torch.manual_seed(0)
    a, b, c = (nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(3))
    x = torch.randn(5, 3, dtype=torch.float64)

    def added():  # the gradients of a and b are one tensor, that of c is expanded from one number
        return (x @ (a + b).T).square().mean() + c.sum()

    def apart():
        return (x @ a.T + x @ b.T).square().mean() + (c * torch.ones_like(c)).sum()

    results = []
    for closure in (added, apart):
        loss = sharp_backward(closure, method, [a, b, c], backward=lambda loss: (loss / 2).backward())
        results.append([p.grad.clone() for p in (a, b, c)])
        for p in (a, b, c):
            p.grad = None
    assert loss.isfinite()
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_asam_by_names_needs_names():
    model, closure = problem()
    with pytest.raises(ValueError, match=r"No parameter has 'weight' in its name.*scaling='all'"):
        sharp_backward(closure, ASAM(), model.parameters())


def test_zero_gradient_gives_no_perturbation():
    w = nn.Parameter(torch.ones(3))
    seen = []

    def closure():
        seen.append(w.detach().clone())
        return (w * 0).sum()

    sharp_backward(closure, SAM(rho=1.0), [w])
    assert torch.equal(seen[1], torch.ones(3))
    assert torch.equal(w.grad, torch.zeros(3))


def test_accumulates_like_backward():
    model, closure = problem()
    sharp_backward(closure, SAM(), model)
    once = [p.grad.clone() for p in model.parameters()]
    sharp_backward(closure, SAM(), model)
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in once])


def test_unused_and_frozen_parameters_stay_without_gradient():
    model, closure = problem()
    unused = nn.Parameter(torch.ones(2))
    model[0].bias.requires_grad_(False)
    sharp_backward(closure, SAM(), [*model.parameters(), unused])
    assert unused.grad is None
    assert model[0].bias.grad is None
    assert model[0].weight.grad is not None


def test_batchnorm_counts_the_first_pass_only_and_dropout_is_replayed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    x, y = torch.randn(16, 6), torch.randint(4, (16,))
    masks = []
    model[2].register_forward_hook(lambda m, i, o: masks.append(o == 0))
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    plain(x)
    expected_state = torch.get_rng_state()
    torch.manual_seed(3)
    masks.clear()
    sharp_backward(lambda: nn.functional.cross_entropy(model(x), y), SAM(rho=1e-6), model)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert model[1].num_batches_tracked == 1


def test_weights_return_after_an_exception():
    model, closure = problem()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        sharp_backward(failing, SAM(), model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_to_do_is_refused():
    _, closure = problem()
    with pytest.raises(ValueError, match="No trainable parameter"):
        sharp_backward(closure, SAM(), [torch.zeros(3)])
    with pytest.raises(ValueError, match="depends on none"):
        sharp_backward(closure, SAM(), [nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_half_precision_is_computed_in_float32(dtype):
    tensors = [torch.full((1000,), 7.0, dtype=dtype), torch.full((3,), 5.0, dtype=dtype)]
    norm = global_norm(tensors)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.tensor((1000 * 49 + 75.0) ** 0.5))


def test_autocast_sees_the_perturbed_weights():
    model, _ = problem(dtype=torch.float32)
    x, y = torch.randn(10, 6), torch.randint(4, (10,))
    losses = []

    def closure():
        losses.append(nn.functional.cross_entropy(model(x), y))
        return losses[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        sharp_backward(closure, SAM(rho=5.0), model)
        again = nn.functional.cross_entropy(model(x), y)
    assert losses[1] > losses[0]
    assert again == losses[0]


def test_backup_is_bit_exact_and_reuses_its_memory():
    weights = [torch.randn(100), torch.randn(5, 5)]
    before = [w.clone() for w in weights]
    backup = WeightBackup()
    backup.save(weights)
    copies = [c.data_ptr() for c in backup._copies]
    backup.move([torch.full_like(w, 1 / 3) for w in weights])
    assert not torch.equal(weights[0], before[0])
    backup.restore()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    backup.save(weights)
    assert copies == [c.data_ptr() for c in backup._copies]


def test_a_method_may_visit_several_points():
    class Average(SharpnessMethod):
        extra_passes = 2

        def direction(self, weights, gradients, probe):
            ones = [torch.ones_like(g) for g in gradients]
            up = probe.gradient_at(ones, 0.1)
            down = probe.gradient_at(ones, torch.tensor(-0.1))
            return [(a + b) / 2 for a, b in zip(up, down, strict=True)]

    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    sharp_backward(lambda: (w**3).sum(), Average(), [w])
    torch.testing.assert_close(w.grad, torch.tensor([3 * (2.1**2 + 1.9**2) / 2], dtype=torch.float64))


def test_weights_know_names_and_groups():
    model, _ = problem()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "rho": 1.0}, {"params": model[2].parameters()}], lr=1
    )
    weights = Weights.of(optimizer, model)
    assert weights.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [option.get("rho") for option in weights.options] == [1.0, 1.0, None, None]
    assert weights.subset([True, False, False, True]).names == ["0.weight", "2.bias"]

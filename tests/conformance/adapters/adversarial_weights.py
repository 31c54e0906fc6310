"""Adversarial weight perturbation and its kin against what the official classes and loops computed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.adapters.adversarial import network
from conformance.adapters.sharpness import network as linear_network
from lightning_robust.attacks import FGSM
from lightning_robust.guards import buffers_restored
from lightning_robust.objectives import TRADES, ARoW, Prepared
from lightning_robust.sharpness import (
    AWP,
    LAP,
    RWP,
    SAMStyleAWP,
    lap_backward,
    layerwise_scales,
    sharp_backward,
    trial_step,
)
from support.golden import Golden, adapter


class Passes:
    """A loss as a closure that remembers the state of the model at each pass, and the value."""

    def __init__(self, model: nn.Module, loss) -> None:
        self.model, self.loss = model, loss
        self.states: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []

    def __call__(self) -> Tensor:
        self.states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        loss = self.loss(self.model)
        self.values.append(loss.detach())
        return loss


def base_optimizer(golden: Golden, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **golden.hyper["sgd"])


def steps_of(golden: Golden) -> list[str]:
    numbers = {int(name.split("/")[0][4:]) for name in golden.arrays if name.startswith("step")}
    return [f"step{number}/" for number in sorted(numbers)] or [""]


def check_state(golden: Golden, prefix: str, state: dict[str, Tensor], unlike: tuple[str, ...] = ()) -> None:
    """All arrays of a state, but those whose name ends in one of ``unlike``."""
    for name, value in state.items():
        if prefix + name in golden and not (prefix + name).endswith(unlike):
            golden.check(prefix + name, value, rtol=1e-8)


def check_move(golden: Golden, prefix: str, before: dict[str, Tensor], after: dict[str, Tensor], gamma: float) -> None:
    """The recorded direction, of which gamma times was added."""
    for name in golden.tensors(prefix):
        golden.check(prefix + name, (after[name] - before[name]) / gamma, rtol=1e-8, atol=1e-11)


def replay(golden: Golden, method, objective=None, unlike: tuple[str, ...] = ()) -> None:
    model = network(golden)
    optimizer = base_optimizer(golden, model)
    for step in steps_of(golden):
        x_adv, y = golden.tensor(f"{step}x_adv"), golden.tensor(f"{step}labels")
        if objective is None:
            passes = Passes(model, lambda net, x=x_adv, y=y: F.cross_entropy(net(x), y))
            if f"{step}x" in golden:
                golden.tensor(f"{step}x")  # plain adversarial training sees attacked images only
        else:
            prepared = Prepared(golden.tensor(f"{step}x"), y, x_adv)
            passes = Passes(model, lambda net, batch=prepared: objective(net, batch).loss)
        optimizer.zero_grad()
        sharp_backward(passes, method, optimizer, module=model)
        optimizer.step()
        check_move(golden, f"{step}diff/", passes.states[0], passes.states[1], golden.hyper.get("gamma", 1.0))
        check_state(golden, f"{step}perturbed/", passes.states[1], unlike)
        for name, value in zip(("loss_first", "loss_second"), passes.values, strict=True):
            if step + name in golden:
                golden.check(step + name, value)
        if f"{step}loss" in golden:
            golden.check(f"{step}loss", passes.values[1])
        check_state(golden, f"{step}after/", model.state_dict(), unlike)


@adapter("adversarial", "awp_at")
def awp_at(golden: Golden) -> None:
    replay(golden, AWP(gamma=golden.hyper["gamma"]))


@adapter("adversarial", "awp_trades")
def awp_trades(golden: Golden) -> None:
    replay(golden, AWP(gamma=golden.hyper["gamma"]), TRADES(beta=golden.hyper["beta"], forwards="published-awp"))


@adapter("adversarial", "awp_arow")
def awp_arow(golden: Golden) -> None:
    hyper = golden.hyper
    objective = ARoW(beta=hyper["beta"], label_smoothing=hyper["label_smoothing"])
    replay(golden, AWP(gamma=hyper["gamma"]), objective)


@adapter("adversarial", "awp_sam_style_adr")
def awp_sam_style_adr(golden: Golden) -> None:
    counters, noise = ("num_batches_tracked",), ("perturbed/conv1.bias", "perturbed/conv2.bias")
    golden.skip(
        *(name for name in golden.arrays if name.endswith(counters)),
        reason="the recorded code counts two batches per step while the statistics move once; here both move once",
    )
    golden.skip(
        *(name for name in golden.arrays if name.endswith(noise)),
        reason="a bias before a BatchNorm has no gradient but rounding errors, which the method scales to full length",
    )
    replay(golden, SAMStyleAWP(rho=golden.hyper["rho"]), unlike=counters + noise)


@adapter("adversarial", "rwp_at")
def rwp_at(golden: Golden) -> None:
    hyper = golden.hyper
    model = network(golden)
    optimizer = base_optimizer(golden, model)
    x_adv, y = golden.tensor("x_adv"), golden.tensor("labels")
    passes = Passes(model, lambda net: F.cross_entropy(net(x_adv), y, reduction="none"))
    method = RWP(gamma=hyper["gamma"], loss_threshold=hyper["LSC_loss"], inner_steps=hyper.get("inner_steps", 10))
    loss = sharp_backward(passes, method, optimizer, module=model)
    optimizer.step()
    assert len(passes.values) == method.extra_passes + 1
    golden.check("per_sample_loss_before", passes.values[0])
    golden.check("loss", loss)
    check_move(golden, "diff/", passes.states[0], passes.states[-1], hyper["gamma"])
    check_state(golden, "perturbed/", passes.states[-1])
    check_state(golden, "after/", model.state_dict())


@adapter("adversarial", "lap_e2e")
def lap_e2e(golden: Golden) -> None:
    hyper = golden.hyper
    model = network(golden)
    optimizer = base_optimizer(golden, model)
    eps = hyper["epsilon_255"] / 255
    attack = FGSM(
        eps=eps,
        step_size=hyper["alpha_factor"] * eps,
        projection="ball-box" if hyper["clamp_to_eps"] else "box",
        mean=golden.tensor("mu").flatten().tolist(),
        std=golden.tensor("std").flatten().tolist(),
    )
    method = LAP(beta=hyper["beta"], gamma=hyper["gamma"], layers=hyper["layer_number"])
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for step in steps_of(golden):
        x, y, start = (golden.tensor(f"{step}{name}") for name in ("x_norm", "labels", "x_start"))
        check_trial(golden, step, model, optimizer, start, y)
        seen.clear()
        optimizer.zero_grad()
        loss = lap_backward(model, x, y, method, optimizer, attack=attack, start=start)
        optimizer.step()
        golden.check(f"{step}x_adv", seen[1], rtol=1e-8)
        golden.check(f"{step}loss", loss, rtol=1e-8)
        check_state(golden, f"{step}after/", model.state_dict())


def check_trial(golden: Golden, step: str, model: nn.Module, optimizer, start: Tensor, y: Tensor) -> None:
    """The direction of the move, from the gradient at the start of the attack, and the losses along it."""
    names, tensors = map(list, zip(*model.named_parameters(), strict=True))
    with buffers_restored(model):
        loss = F.cross_entropy(model(start), y)
        gradients = list(torch.autograd.grad(loss, tensors))
    golden.check(f"{step}loss_start_before", loss, rtol=1e-8)
    moves = trial_step(optimizer, tensors, gradients)
    scales = layerwise_scales([tensor.detach() for tensor in tensors], moves, [1.0] * len(tensors))
    moved = [
        (n, t, m * s) for n, t, m, s in zip(names, tensors, moves, scales, strict=True) if f"{step}diff/{n}" in golden
    ]
    for name, _, move in moved:
        golden.check(f"{step}diff/{name}", move, rtol=1e-8)
    with torch.no_grad(), buffers_restored(model):
        kept = [tensor.clone() for _, tensor, _ in moved]
        for _, tensor, move in moved:
            tensor.add_(1e-4 * move)
        golden.check(f"{step}loss_start_after_1e-4_diff", F.cross_entropy(model(start), y), rtol=1e-8)
        for (_, tensor, _), value in zip(moved, kept, strict=True):
            tensor.copy_(value)


@adapter("sharpness", "awp")
def awp(golden: Golden) -> None:
    model = linear_network(golden)
    x, y = golden.tensor("X")[0], golden.tensor("Y")[0]
    passes = Passes(model, lambda net: F.cross_entropy(net(x), y))
    sharp_backward(passes, AWP(gamma=golden.hyper["gamma"]), model)
    check_move(golden, "diff.", passes.states[0], passes.states[1], golden.hyper["gamma"])
    check_state(golden, "w_perturbed.", passes.states[1])

"""Sharpness-aware methods against the recorded optimizers."""

import torch
from torch import nn

from lightning_robust.sharpness import ASAM, SAM, SharpnessMethod, sharp_backward
from support.golden import Golden, adapter


def network(golden: Golden) -> nn.Sequential:
    state = golden.tensors("w0.")
    first, second = state["0.weight"], state["2.weight"]
    net = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.Tanh(), nn.Linear(*second.shape[::-1])).to(first.dtype)
    net.load_state_dict(state)
    return net


def base_optimizer(golden: Golden, groups) -> torch.optim.Optimizer:
    """SGD or AdamW; what is absent is 0, off, or torch's value."""
    hyper = golden.hyper
    lr = hyper["base_lr"]
    weight_decay = hyper.get("base_weight_decay", hyper.get("weight_decay", 0))
    named = f"{hyper.get('base', '')} {hyper.get('optimizer', '')} {golden.method}".lower()
    if "adamw" in named or "base_betas" in hyper:
        betas = tuple(hyper.get("base_betas", (0.9, 0.999)))
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=hyper.get("base_eps", 1e-8), weight_decay=weight_decay)
    return torch.optim.SGD(
        groups,
        lr=lr,
        momentum=hyper.get("base_momentum", hyper.get("momentum", 0)),
        weight_decay=weight_decay,
        nesterov=hyper.get("base_nesterov", hyper.get("nesterov", False)),
    )


class Recorder:
    """The loss as a closure that remembers what each pass of the first step saw."""

    def __init__(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.net, self.x, self.y = net, x, y
        self.losses: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def __call__(self) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(self.x), self.y)
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        self.losses.append(loss.detach())
        self.weights.append({name: p.detach().clone() for name, p in self.net.named_parameters()})
        self.gradients.append(dict(zip(names, gradients, strict=True)))
        return loss


def replay(golden: Golden, method: SharpnessMethod, groups=None) -> None:
    net = network(golden)
    optimizer = base_optimizer(golden, groups(net) if groups else net.parameters())
    x, y = golden.tensor("X"), golden.tensor("Y")
    losses = []
    for step in range(len(x)):
        record = Recorder(net, x[step], y[step])
        optimizer.zero_grad()
        sharp_backward(record, method, optimizer, module=net)
        optimizer.step()
        losses.append(record.losses)
        if step == 0:
            recorded = {
                "grad_clean_step1.": record.gradients[0],
                "w_perturbed_step1.": record.weights[1],
                "grad_perturbed_step1.": record.gradients[1],
            }
            for prefix, values in recorded.items():
                check_all(golden, prefix, values)
        check_all(golden, f"w{step + 1}.", dict(net.named_parameters()))
    for position, name in enumerate(("loss_clean", "loss_perturbed")):
        if name in golden:
            golden.check(name, torch.stack([pair[position] for pair in losses]))


def check_all(golden: Golden, prefix: str, values) -> None:
    for name, value in values.items():
        if prefix + name in golden:
            golden.check(prefix + name, value, rtol=1e-7, atol=1e-12)


def sam_or_adaptive(golden: Golden, rho: float) -> SharpnessMethod:
    """The two forms of the SAM class that these files were recorded with."""
    norm_eps = golden.hyper.get("eps", 1e-12)
    if golden.hyper.get("adaptive", golden.method == "asam"):
        return ASAM(rho=rho, eta=0.0, scaling="all", norm_eps=norm_eps)
    return SAM(rho=rho, norm_eps=norm_eps)


@adapter("sharpness", "sam", "sam_adamw", "asam")
def sam(golden: Golden) -> None:
    replay(golden, sam_or_adaptive(golden, golden.hyper["rho"]))


@adapter("sharpness", "asam_official")
def asam_official(golden: Golden) -> None:
    hyper = golden.hyper
    replay(golden, ASAM(rho=hyper["rho"], eta=hyper["eta"], scaling="weight", norm_eps=1e-16))


@adapter("sharpness", "sam_groups")
def sam_groups(golden: Golden) -> None:
    """The group options are recorded in words: "weights: rho 0.3, weight_decay 1e-2; biases: rho 0.05, ..."."""
    options = {}
    for clause in golden.hyper["groups"].split(";"):
        kind, _, values = clause.strip().partition(":")
        pairs = [pair.split() for pair in values.split(",")]
        options[kind] = {name: float(value) for name, value in pairs}

    def groups(net):
        weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
        return [{"params": weights, **options["weights"]}, {"params": biases, **options["biases"]}]

    # the groups name their radii
    replay(golden, sam_or_adaptive(golden, 0.05), groups)

"""Second-order and optimizer-side methods against the recorded optimizers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.adapters.sharpness import base_optimizer, check_all, network
from lightning_robust.losses import log_stablemax, stable_exp, stablemax_cross_entropy, vs_loss
from lightning_robust.optimizers import AdaHessian, DoG, SubsetNorm
from lightning_robust.sharpness import orthogonal_gradients
from support.golden import Golden, adapter

STATES = 1e-7


def replay(golden: Golden, make: Callable[[nn.Module], torch.optim.Optimizer], *, graph: bool = False) -> list[Tensor]:
    """One step per recorded batch, weights compared after each; returns the step sizes where the optimizer has some."""
    net = network(golden)
    optimizer = make(net)
    x, y = golden.tensor("X"), golden.tensor("Y")
    sizes = []
    for step in range(len(x)):
        parameters = list(net.parameters())
        loss = F.cross_entropy(net(x[step]), y[step])
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, create_graph=graph), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        if isinstance(optimizer, DoG):
            sizes.append(torch.stack(optimizer.step_sizes()))
        check_all(golden, f"w{step + 1}.", dict(net.named_parameters()))
    return sizes


class Draws:
    """The recorded random vectors, in the order in which the optimizer asks for them."""

    def __init__(self, golden: Golden, net: nn.Module, prefixes: list[str]) -> None:
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.golden = golden
        self.prefixes = iter(prefixes)

    def __call__(self, parameters: list[Tensor]) -> list[Tensor]:
        prefix = next(self.prefixes)
        return [self.golden.tensor(prefix + self.names[id(parameter)]) for parameter in parameters]


def adahessian_options(golden: Golden) -> dict[str, object]:
    hyper = golden.hyper
    return {
        "lr": hyper["lr"],
        "betas": tuple(hyper.get("betas", (0.9, 0.999))),
        "eps": hyper["eps"],
        "weight_decay": float(hyper.get("weight_decay", 0)),
        "hessian_power": float(hyper.get("hessian_power", 1)),
    }


@adapter("sharpness", "adahessian")
def adahessian(golden: Golden) -> None:
    steps = range(1, len(golden.arrays["X"]) + 1)

    def make(net: nn.Module) -> AdaHessian:
        probe = Draws(golden, net, [f"v{step}." for step in steps])
        return AdaHessian(net.parameters(), **adahessian_options(golden), probe=probe)

    replay(golden, make, graph=True)


@adapter("sharpness", "adahessian_davda54")
def adahessian_davda54(golden: Golden) -> None:
    hyper = golden.hyper
    samples = hyper.get("n_samples", 1)
    # the steps in which the code drew anything
    steps = sorted({int(name[1:].partition(".")[0]) for name in golden.arrays if name.startswith("z")})

    def make(net: nn.Module) -> AdaHessian:
        probe = Draws(golden, net, [f"z{step}.{sample}." for step in steps for sample in range(samples)])
        return AdaHessian(
            net.parameters(),
            **adahessian_options(golden),
            n_samples=samples,
            update_each=hyper.get("update_each", 1),
            average_conv_kernel=hyper.get("average_conv_kernel", False),
            probe=probe,
        )

    replay(golden, make, graph=True)


@adapter("sharpness", "dog")
def dog(golden: Golden) -> None:
    hyper = golden.hyper
    eta = golden.tensor("eta")  # per step and tensor; the tensors of DoG share one, those of L-DoG do not
    sizes = replay(
        golden,
        lambda net: DoG(
            net.parameters(),
            reps_rel=hyper["reps_rel"],
            lr=hyper.get("lr", 1.0),
            weight_decay=float(hyper.get("weight_decay", 0)),
            eps=hyper.get("eps", 1e-8),
            layer_wise=bool((eta != eta[:, :1]).any()),
        ),
    )
    golden.check("eta", torch.stack(sizes), STATES)


@adapter("sharpness", "subsetnorm")
def subsetnorm(golden: Golden) -> None:
    hyper = golden.hyper
    gradients = golden.tensor("grads")
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = SubsetNorm(
        [weight],
        betas=(0.0, hyper.get("beta2", 0.999)),
        eps=hyper.get("eps", 1e-6),
        subset_size=hyper["subset_size"],
    )
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient
        optimizer.step()
        golden.check(f"denominator_step{step}", optimizer.denominator(weight), STATES)
        golden.check(f"second_moment_step{step}", optimizer.state[weight]["exp_avg_sq"], STATES)


@adapter("sharpness", "perpgrad")
def perpgrad(golden: Golden) -> None:
    net = network(golden)
    optimizer = base_optimizer(golden, net.parameters())
    x, y = golden.tensor("X"), golden.tensor("Y")
    for step in range(len(x)):
        names, parameters = zip(*net.named_parameters(), strict=True)
        gradients = torch.autograd.grad(F.cross_entropy(net(x[step]), y[step]), parameters)
        projected = orthogonal_gradients(parameters, gradients)
        check_all(golden, f"projected_grad_step{step + 1}.", dict(zip(names, projected, strict=True)))
        for parameter, gradient in zip(parameters, projected, strict=True):
            parameter.grad = gradient
        optimizer.step()
        check_all(golden, f"w{step + 1}.", dict(net.named_parameters()))


@adapter("sharpness", "stablemax")
def stablemax(golden: Golden) -> None:
    logits = golden.tensor("logits").requires_grad_()
    golden.check("s", stable_exp(logits))
    golden.check("log_stablemax", log_stablemax(logits))
    loss = stablemax_cross_entropy(logits, golden.tensor("y"))
    golden.check("loss", loss)
    golden.check("grad", torch.autograd.grad(loss, logits)[0])


@adapter("sharpness", "vsloss")
def vsloss(golden: Golden) -> None:
    hyper = golden.hyper
    logits = golden.tensor("logits").requires_grad_()
    loss = vs_loss(
        logits,
        golden.tensor("y"),
        golden.tensor("class_counts"),
        gamma=hyper.get("gamma", 0.3),
        tau=hyper.get("tau", 1.0),
    )
    golden.check("loss", loss)
    golden.check("grad", torch.autograd.grad(loss, logits)[0])

"""Methods with more than one gradient in their direction, and the one along the momentum, against recorded runs."""

import torch

from conformance.adapters.sharpness import Recorder, base_optimizer, check_all, network, replay
from lightning_robust.sharpness import GAM, GSAM, MSAM, WSAM, SharpnessMethod, sharp_backward
from support.golden import Golden, adapter


@adapter("sharpness", "gsam")
def gsam(golden: Golden) -> None:
    hyper = golden.hyper
    method = GSAM(
        rho=hyper["rho"],
        alpha=hyper["alpha"],
        adaptive=hyper.get("adaptive", False),
        norm_eps=hyper.get("perturb_eps", 1e-12),
    )
    replay(golden, method)


@adapter("sharpness", "gam")
def gam(golden: Golden) -> None:
    hyper = golden.hyper
    method = GAM(
        grad_rho=hyper["grad_rho"],
        grad_norm_rho=hyper["grad_norm_rho"],
        beta0=hyper["beta0"],
        beta1=hyper["beta1"],
        gamma=hyper["gamma"],
        adaptive=hyper.get("adaptive", False),
        norm_eps=hyper.get("perturb_eps", 1e-12),
    )
    first_step(golden, method)
    replay(golden, method)


def first_step(golden: Golden, method: SharpnessMethod) -> None:
    """The gradients of the four passes and the direction."""
    net = network(golden)
    record = Recorder(net, golden.tensor("X")[0], golden.tensor("Y")[0])
    sharp_backward(record, method, base_optimizer(golden, net.parameters()), module=net)
    for number, gradients in enumerate(record.gradients):
        check_all(golden, f"g_{number}_step1.", gradients)
    check_all(golden, "direction_step1.", {name: p.grad for name, p in net.named_parameters()})


@adapter("sharpness", "wsam")
def wsam(golden: Golden) -> None:
    hyper = golden.hyper
    if hyper.get("adaptive", False):
        golden.skip(
            *golden.arrays,
            reason="the recorded port divides its adaptive perturbation by the norm of g; here it is that of |w| g, as "
            "in the official code",
        )
        return
    replay(golden, WSAM(rho=hyper["rho"], gamma=hyper["gamma"], decouple=hyper.get("decouple", True)))


@adapter("sharpness", "msam")
def msam(golden: Golden) -> None:
    """The recorded weights between steps are the perturbed ones; those moved back at the end are the clean ones."""
    hyper = golden.hyper
    net = network(golden)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=hyper["lr"],
        momentum=hyper.get("momentum", 0),
        weight_decay=hyper.get("weight_decay", 0),
    )
    method = MSAM(rho=hyper["rho"])
    x, y = golden.tensor("X"), golden.tensor("Y")
    for step in range(len(x)):
        optimizer.zero_grad()
        sharp_backward(Recorder(net, x[step], y[step]), method, optimizer, module=net)
        optimizer.step()
        offsets = method.offsets(optimizer)
        check_all(golden, f"w{step + 1}.", {name: p + offsets[p] for name, p in net.named_parameters()})
    check_all(golden, f"w{len(x)}_moved_back.", dict(net.named_parameters()))

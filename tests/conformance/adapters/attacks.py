"""Attacks against the official implementations."""

import torch

from lightning_robust.attacks import losses
from support.golden import Golden, adapter

LOSSES = {
    "ce": lambda z, y, target: losses.cross_entropy(z, y),
    "margin": lambda z, y, target: losses.margin(z, y),
    "prob_margin": lambda z, y, target: losses.probability_margin(z, y),
    "dlr": lambda z, y, target: losses.dlr(z, y),
    "dlr_targeted": losses.dlr_targeted,
}


@adapter("attacks", "losses")
def losses_on_logits(golden: Golden) -> None:
    y, target = golden.tensor("y"), golden.tensor("target")
    recorded = golden.tensor("logits")
    ordered = recorded.sort(dim=1).values
    # where the largest logits are equal, the gradient depends on how a sort breaks the tie
    tied = (ordered[:, 1:] == ordered[:, :-1])[:, -4:].any(1)
    for name, function in LOSSES.items():
        for suffix, dtype, rtol, atol in (("_f64", torch.float64, 1e-9, 1e-12), ("", torch.float32, 1e-5, 1e-6)):
            logits = recorded.to(dtype).requires_grad_()
            values = function(logits, y, target)
            golden.check(f"{name}{suffix}", values, rtol, atol)
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            expected = golden.tensor(f"grad_{name}{suffix}")
            torch.testing.assert_close(gradient[~tied], expected[~tied], rtol=rtol, atol=atol)

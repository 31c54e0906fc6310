"""StableMax and the orthogonal gradient as the label family recorded them."""

import torch
from torch import nn

from conformance.adapters.sharpness import base_optimizer
from lightning_robust.losses import log_stablemax, stable_exp, stablemax_cross_entropy
from lightning_robust.sharpness import orthogonal_gradients
from support.golden import Golden, adapter


@adapter("labels", "stablemax")
def stablemax(golden: Golden) -> None:
    logits, labels = golden.tensor("logits").requires_grad_(), golden.tensor("labels")
    for name, values in {"s": stable_exp(logits), "log_stablemax": log_stablemax(logits)}.items():
        if name in golden:
            golden.check(name, values)
    for reduction in ("mean", "none"):
        if f"loss_{reduction}" in golden:
            loss = stablemax_cross_entropy(logits, labels, reduction=reduction)
            golden.check(f"loss_{reduction}", loss)
            golden.check(f"grad_{reduction}", torch.autograd.grad(loss.sum(), logits)[0])
    if "grad_float32_direct" in golden:
        # the recorded code gives NaN at a logit of exactly 1 without its float64 cast; where it is finite we agree
        single = logits.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(stablemax_cross_entropy(single, labels, double=False), single)
        assert bool(gradient.isfinite().all())
        expected = golden.tensor("grad_float32_direct")
        finite = expected.isfinite()
        torch.testing.assert_close(gradient[finite], expected[finite])


@adapter("labels", "perpgrad")
def perpgrad(golden: Golden) -> None:
    """Weights and biases with gradients that were made up."""
    for name in {"lr", "betas", "eps"} & golden.hyper.keys():
        golden.hyper.setdefault(f"base_{name}", golden.hyper[name])
    weight, bias = nn.Parameter(golden.tensor("w0")), nn.Parameter(golden.tensor("b0"))
    optimizer = base_optimizer(golden, [weight, bias])
    steps = sum(name.startswith("gw") and name[2:].isdigit() for name in golden.arrays)
    for step in range(steps):
        recorded = [golden.tensor(f"gw{step}"), golden.tensor(f"gb{step}")]
        weight.grad, bias.grad = orthogonal_gradients([weight, bias], recorded)
        golden.check(f"gw_proj{step}", weight.grad)
        golden.check(f"gb_proj{step}", bias.grad)
        optimizer.step()
        golden.check(f"w{step + 1}", weight, 1e-7)
        golden.check(f"b{step + 1}", bias, 1e-7)

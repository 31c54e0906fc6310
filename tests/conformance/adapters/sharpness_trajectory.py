"""The trajectory loss against the recorded lines of the authors' training scripts."""

import torch
from torch.nn import functional as F

from lightning_robust.sharpness import trajectory_loss
from support.golden import Golden, adapter


@adapter("sharpness", "saf_mesa_loss")
def saf_mesa_loss(golden: Golden) -> None:
    labels, reference = golden.tensor("y"), golden.tensor("reference_logits")
    temperature = golden.hyper.get("temperature", 5.0)
    for method in ("saf", "mesa"):
        if f"kl_{method}" not in golden:
            continue
        logits = golden.tensor("logits").requires_grad_()
        term = trajectory_loss(logits, reference, temperature)
        total = F.cross_entropy(logits, labels) + golden.hyper["reinforce"] * term
        golden.check(f"kl_{method}", term)
        golden.check(f"total_{method}", total)
        golden.check(f"grad_{method}", torch.autograd.grad(total, logits)[0])

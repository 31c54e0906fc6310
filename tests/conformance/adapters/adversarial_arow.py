"""ARoW and CoW on recorded logits."""

import torch

from lightning_robust.objectives import arow_loss
from support.golden import Golden, adapter


@adapter("adversarial", "arow_loss")
def arow(golden: Golden) -> None:
    hyper = golden.hyper
    labels = golden.tensor("labels")
    flavours = {
        "arow": {},
        "arow_ce": {"label_smoothing": 0.0},
        "cow": {"weighting": "cow"},
    }
    for name, options in flavours.items():
        if f"{name}/loss" not in golden:
            continue
        clean = golden.tensor("clean_logits").requires_grad_()
        adv = golden.tensor("adv_logits").requires_grad_()
        arguments = {"label_smoothing": hyper.get("label_smoothing", 0.2), **options}
        loss, natural, robust = arow_loss(clean, adv, labels, hyper["lamb"], **arguments)
        golden.check(f"{name}/loss", loss)
        golden.check(f"{name}/sup", natural)
        golden.check(f"{name}/rob", robust)
        gradients = torch.autograd.grad(loss, [clean, adv])
        golden.check(f"{name}/grad_clean_logits", gradients[0])
        golden.check(f"{name}/grad_adv_logits", gradients[1])

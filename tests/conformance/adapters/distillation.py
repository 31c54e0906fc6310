"""Clean distillation of logits."""

import torch
from torch import Tensor

from lightning_robust.distillation import KD, kd_loss
from lightning_robust.losses import cross_entropy
from support.golden import Golden, adapter


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


@adapter("distillation", "kd")
def kd(golden: Golden) -> None:
    student, teacher = golden.tensor("student").requires_grad_(), golden.tensor("teacher")
    hyper = golden.hyper
    loss = KD(temperature=hyper.get("temperature", 4.0))(student, teacher)
    total = (
        hyper.get("ce_weight", 0.1) * cross_entropy(student, golden.tensor("labels"))
        + hyper.get("kd_weight", 0.9) * loss
    )
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))
    golden.check("total", total)
    golden.check("grad_total", gradient(total, student))


@adapter("distillation", "torchdistill_kd")
def torchdistill_kd(golden: Golden) -> None:
    student, teacher = golden.tensor("student").requires_grad_(), golden.tensor("teacher")
    alpha, beta = golden.hyper.get("alpha"), golden.hyper.get("beta")
    # Without labels or a weight for them this project leaves out the squared temperature too.
    labels = golden.tensor("labels") if "labels" in golden else None
    supervised = bool(alpha) and labels is not None
    loss = kd_loss(student, teacher, golden.hyper.get("temperature", 4.0), temperature_squared=supervised)
    if supervised:
        loss = alpha * cross_entropy(student, labels) + (1 - alpha if beta is None else beta) * loss
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))

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
    loss = KD(temperature=hyper["temperature"])(student, teacher)
    total = hyper["ce_weight"] * cross_entropy(student, golden.tensor("labels")) + hyper["kd_weight"] * loss
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))
    golden.check("total", total)
    golden.check("grad_total", gradient(total, student))


@adapter("distillation", "torchdistill_kd")
def torchdistill_kd(golden: Golden) -> None:
    student, teacher = golden.tensor("student").requires_grad_(), golden.tensor("teacher")
    alpha, beta = golden.hyper.get("alpha"), golden.hyper.get("beta")
    # Without a weight for the labels this project leaves out the squared temperature too.
    distilled = kd_loss(student, teacher, golden.hyper["temperature"], temperature_squared=bool(alpha))
    labels = golden.tensor("labels")
    loss = distilled
    if alpha:
        loss = alpha * cross_entropy(student, labels) + (1 - alpha if beta is None else beta) * distilled
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))

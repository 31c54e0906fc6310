"""Distillation with trainable heads, and the alignment of two gradients."""

import torch
from torch import Tensor

from lightning_robust.distillation import DHKD, USKD, align_gradients, binary_kl, binary_kl_norm
from lightning_robust.losses import cross_entropy
from support.golden import Golden, adapter


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True, materialize_grads=True)


@adapter("distillation", "uskd")
def uskd(golden: Golden) -> None:
    student, feature = golden.tensor("student").requires_grad_(), golden.tensor("feature").requires_grad_()
    options = {key: golden.hyper[key] for key in ("alpha", "beta", "mu") if key in golden.hyper}
    loss = USKD("layer", width=feature.shape[1], num_classes=student.shape[1], **options).double()
    loss.head.load_state_dict({"weight": golden.tensor("weak_weight"), "bias": golden.tensor("weak_bias")})
    value = loss(student, None, golden.tensor("labels"), student_features=[feature])
    golden.check("loss", value)
    found = gradients(value, student, feature, loss.head.weight, loss.head.bias)
    for name, gradient in zip(("student", "feature", "weak_weight", "weak_bias"), found, strict=True):
        golden.check(f"grad_{name}", gradient)


@adapter("distillation", "dhkd")
def dhkd(golden: Golden) -> None:
    first, second = golden.tensor("s1").requires_grad_(), golden.tensor("s2").requires_grad_()
    teacher, labels, hyper = golden.tensor("teacher"), golden.tensor("labels"), golden.hyper
    told = {"temperature": hyper.get("temperature", 2.0), "eps": hyper.get("eps", 1e-8)}
    for name, function in (("norm", binary_kl_norm), ("binarykl", binary_kl)):
        value = function(second, teacher, **told)
        golden.check(f"loss_{name}", value)
        golden.check(f"grad_{name}", gradients(value, second)[0])
    total = hyper.get("gamma", 1.0) * cross_entropy(first, labels)
    total = total + hyper.get("alpha", 1.0) * binary_kl_norm(second, teacher, **told)
    golden.check("total", total)
    for name, gradient in zip(("s1", "s2"), gradients(total, first, second), strict=True):
        golden.check(f"grad_{name}", gradient)


@adapter("distillation", "dhkd_gradalign")
def dhkd_gradalign(golden: Golden) -> None:
    x, labels, hyper = golden.tensor("x"), golden.tensor("labels"), golden.hyper
    weights = [golden.tensor(name).requires_grad_() for name in ("Wb", "W1", "W2")]
    hidden = (x @ weights[0].T).tanh()
    loss = DHKD(temperature=hyper.get("temperature", 2.0), width=weights[2].shape[1], num_classes=weights[2].shape[0])
    supervised = hyper.get("gamma", 1.0) * cross_entropy(hidden @ weights[1].T, labels)
    distilled = hyper.get("alpha", 1.0) * torch.func.functional_call(
        loss.double(),
        {"head.weight": weights[2], "head.bias": torch.zeros(len(weights[2]), dtype=x.dtype)},
        (hidden @ weights[1].T, golden.tensor("teacher")),
        {"student_features": [hidden]},
    )
    golden.check("loss_ce", supervised)
    golden.check("loss_kd", distilled)
    of_labels, of_teacher = gradients(supervised, *weights), gradients(distilled, *weights)
    golden.check("grad_ce_backbone", of_labels[0])
    golden.check("grad_kd_backbone", of_teacher[0])
    flat = [torch.cat([gradient.flatten() for gradient in each]) for each in (of_labels, of_teacher)]
    merged = (flat[0] + align_gradients(flat[1], flat[0])).split([weight.numel() for weight in weights])
    for name, gradient, weight in zip(("Wb", "W1", "W2"), merged, weights, strict=True):
        golden.check(f"grad_{name}", gradient.view_as(weight))

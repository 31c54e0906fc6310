"""Losses that compare logits, and labels made of a teacher's."""

import torch
from torch import Tensor

from lightning_robust.distillation import (
    DIST,
    DKD,
    NKD,
    PLD,
    FocalDistillation,
    FocalLogitMatching,
    compress_soft_labels,
    recover_soft_labels,
)
from lightning_robust.losses import MarginBias, cross_entropy
from support.golden import Golden, adapter


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


@adapter("distillation", "dkd")
def dkd(golden: Golden) -> None:
    student, teacher, labels = (
        golden.tensor("student").requires_grad_(),
        golden.tensor("teacher"),
        golden.tensor("labels"),
    )
    alpha, beta = golden.hyper.get("alpha", 1.0), golden.hyper.get("beta", 8.0)
    temperature = golden.hyper.get("temperature", 4.0)
    loss = DKD(alpha=alpha, beta=beta, temperature=temperature)(student, teacher, labels)
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))
    for name, weights in {"tckd": (1.0, 0.0), "nckd": (0.0, 1.0)}.items():
        golden.check(name, DKD(alpha=weights[0], beta=weights[1], temperature=temperature)(student, teacher, labels))


@adapter("distillation", "dist")
def dist(golden: Golden) -> None:
    student, teacher = golden.tensor("student").requires_grad_(), golden.tensor("teacher")
    beta, gamma, tau = (golden.hyper.get(name, 1.0) for name in ("beta", "gamma", "tau"))
    loss = DIST(beta=beta, gamma=gamma, temperature=tau)(student, teacher)
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))
    golden.check("inter_scaled", DIST(beta=1.0, gamma=0.0, temperature=tau)(student, teacher))
    golden.check("intra_scaled", DIST(beta=0.0, gamma=1.0, temperature=tau)(student, teacher))


@adapter("distillation", "nkd")
def nkd(golden: Golden) -> None:
    student, teacher, labels = (
        golden.tensor("student").requires_grad_(),
        golden.tensor("teacher"),
        golden.tensor("labels"),
    )
    gamma, temperature = golden.hyper.get("gamma", 1.5), golden.hyper.get("temperature", 1.0)
    loss = NKD(gamma=gamma, temperature=temperature)(student, teacher, labels)
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))
    golden.check("target_term", NKD(gamma=0.0, temperature=temperature)(student, teacher, labels))


@adapter("distillation", "pld")
def pld(golden: Golden) -> None:
    student = golden.tensor("student").requires_grad_()
    loss = PLD(temperature=golden.hyper.get("temperature", 1.0))(
        student, golden.tensor("teacher"), golden.tensor("labels")
    )
    golden.check("loss", loss)
    golden.check("grad", gradient(loss, student))


@adapter("distillation", "fkd_labels")
def fkd_labels(golden: Golden) -> None:
    stored, told = golden.tensor("label"), golden.hyper.get("label_type", "marginal_smoothing_k5")
    classes = golden.tensor("student").shape[1]
    index, value = (stored.long(), None) if stored.ndim == 1 else (stored[:, 0].long(), stored[:, 1])
    if "probs" in golden:
        top, mass = compress_soft_labels(golden.tensor("probs"), index.shape[1] if index.ndim > 1 else 1)
        torch.testing.assert_close(top.view_as(index), index)
        if value is not None:
            torch.testing.assert_close(mass.view_as(value), value)
    spread = "marginal_smoothing" if index.ndim > 1 else "smoothing"
    forms = {"smoothing": spread, "renorm": "marginal_renorm", "hard": "hard"}
    recovered = {}
    for name, form in forms.items():
        if value is not None or form == "hard":
            recovered[name] = recover_soft_labels(index, value, num_classes=classes, form=form).to(torch.float64)
            if f"recovered_{name}" in golden:
                golden.check(f"recovered_{name}", recovered[name])
    student = golden.tensor("student").requires_grad_()
    loss = cross_entropy(student, next(label for name, label in recovered.items() if name in told))
    golden.check("soft_ce", loss)
    golden.check("grad", gradient(loss, student))


@adapter("distillation", "mpt")
def mpt(golden: Golden) -> None:
    student, labels = golden.tensor("student").requires_grad_(), golden.tensor("labels")
    old, new = golden.tensor("old"), golden.tensor("new")
    hyper = golden.hyper
    weights = {"alpha": hyper.get("alpha", 1.0), "beta": hyper.get("beta", 5.0)}
    labelled = MarginBias(old_classes=hyper.get("n_old", old.shape[1]), bias=hyper.get("bias", 4.0))(student, labels)
    kl = FocalDistillation(temperature=hyper.get("tau", 5.0), **weights)
    matching = FocalLogitMatching(**weights)
    factors = {"kl": (kl, 1.0), "lm": (matching, hyper.get("lm_weight", 0.4))}
    for name, (loss, factor) in factors.items():
        total = labelled + factor * (loss(student, old, labels) + loss(student, new, labels))
        golden.check(f"total_{name}", total)
        golden.check(f"grad_{name}", gradient(total, student))
    golden.skip("naive", reason="a cross-entropy of samples that the old model got right, of another method")

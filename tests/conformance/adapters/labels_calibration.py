"""Penalties that act on calibration."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.losses import (
    ACLS,
    CALS,
    CPC,
    MMCE,
    ConfidencePenalty,
    MbLS,
    SoftECE,
    binary_discrimination,
    binary_exclusion,
    cross_entropy,
)
from support.golden import Golden, adapter

EPS = 1e-8  # two of the recorded codes keep probabilities above 1e-10, ours does not


def check(golden: Golden, name: str, logits: Tensor, loss: Callable[[Tensor], Tensor], *tolerance: float) -> None:
    """Compare `NAME_loss` and `NAME_grad`, those that were recorded."""
    if f"{name}_loss" not in golden and f"{name}_grad" not in golden:
        return
    leaf = logits.clone().requires_grad_()
    result = loss(leaf)
    (gradient,) = torch.autograd.grad(result, leaf)
    for array, actual in ((f"{name}_loss", result), (f"{name}_grad", gradient)):
        if array in golden:
            golden.check_finite(array, actual, *tolerance)


@adapter("labels", "calib_losses")
def calib_losses(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    classes = logits.shape[1]
    acls = hyper.get("acls", {})
    ent, bdc, bec = hyper.get("ent", 0.1), hyper.get("bdc", 1.0), hyper.get("bec", 1.0)
    alpha = hyper.get("alpha", 0.1)
    mbls = MbLS(alpha=alpha, margin=hyper.get("margin", 10.0))
    smoothing = ACLS(
        alpha=acls.get("alpha", 0.1),
        margin=acls.get("margin", 10.0),
        positive_weight=acls.get("pos_lambda", 1.0),
        negative_weight=acls.get("neg_lambda", 0.1),
    )
    for name in [name for name in golden.arrays if name.endswith("_ce")]:
        golden.check(name, cross_entropy(logits, labels))
    for name, penalty in {"mbls": mbls, "acls": smoothing}.items():
        check(golden, name, logits, lambda z, p=penalty: cross_entropy(z, labels) + p(z))
        if f"{name}_reg" in golden:
            golden.check(f"{name}_reg", penalty.mean_penalty(logits))
    # 1e-10 is added to each difference of logits there
    cpc = CPC(discrimination=bdc, exclusion=bec)
    check(golden, "cpc", logits, lambda z: cpc(z, labels), 1e-8, 1e-10)
    if "cpc_bdc" in golden:
        golden.check("cpc_bdc", binary_discrimination(logits, labels).mean())
    if "cpc_bec" in golden:
        golden.check("cpc_bec", binary_exclusion(logits, labels).mean(), 1e-8)
    # recorded as a mean over samples and classes
    elementwise = ConfidencePenalty(beta=ent / classes)
    check(golden, "ent", logits, lambda z: cross_entropy(z, labels) + elementwise(z), EPS, EPS)
    if "ent_mean_elementwise" in golden:
        golden.check("ent_mean_elementwise", -elementwise.mean_penalty(logits) / classes, EPS, EPS)
    confident(golden, logits, labels, hyper)
    golden.skip(
        *[name for name in golden.arrays if name.startswith("l1_")],
        reason="the L1 distance of the probabilities from 1 / C, which no paper proposes",
    )


def confident(golden: Golden, logits: Tensor, labels: Tensor, hyper: dict[str, float]) -> None:
    """torch-uncertainty adds a constant to the penalty, and 1e-6 to each probability inside the logarithm."""
    penalty = ConfidencePenalty(beta=hyper.get("tu", hyper.get("ent", 0.1)))
    constant = -penalty(torch.zeros_like(logits))
    check(golden, "confpen_tu", logits, lambda z: cross_entropy(z, labels) + penalty(z) + constant, 1e-5, 1e-5)


@adapter("labels", "mbls_plus")
def mbls_plus(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    alpha = hyper.get("alpha", 0.1)
    cals = CALS(
        num_classes=logits.shape[1],
        alpha=alpha,
        margin=hyper.get("margin", 10.0),
        gamma=hyper.get("gamma", 1.1),
        tau=hyper.get("tau", 1.1),
        every=hyper.get("step_size", 1),
    )
    epochs = sum(name.startswith("lambda") for name in golden.arrays)
    for epoch in range(epochs):
        cals.observe(logits * (1 + 0.3 * epoch), labels)
        cals.validation_ends(lambda tensor: tensor)
        # there alpha is part of the weights; the factors were in float32 in one recording
        golden.check(f"lambda{epoch}", alpha * cals.class_weights.double(), 2e-7)
        golden.check(f"score{epoch}", alpha * cals.score, 1e-6)
    leaf = logits.clone().requires_grad_()
    penalty = cals(leaf)
    loss = cross_entropy(leaf, labels) + penalty
    golden.check("ce", cross_entropy(logits, labels))
    golden.check("reg", penalty, 2e-7)
    golden.check("loss", loss, 2e-7)
    golden.check("grad", torch.autograd.grad(loss, leaf)[0], 2e-7, 1e-9)


def check_penalty(golden: Golden, value: str, gradient: str, criterion: MMCE | SoftECE, *tolerance: float) -> None:
    """The penalty alone: the criterion less its base."""
    leaf, labels = golden.tensor("logits").requires_grad_(), golden.tensor("labels")
    penalty = criterion(leaf, labels) - cross_entropy(leaf, labels)
    golden.check(value, penalty, *tolerance)
    golden.check_finite(gradient, torch.autograd.grad(penalty, leaf)[0], *tolerance)


@adapter("labels", "mmce")
def mmce(golden: Golden) -> None:
    width = golden.hyper.get("kernel_width", 0.4)
    # masks and counts were float32, and the cross-entropy that is taken off again leaves its rounding
    for name, weighted in (("m", False), ("w", True)):
        criterion = MMCE(weight=1.0, kernel_width=width, weighted=weighted)
        check_penalty(golden, f"mmce_{name}", f"grad_mmce_{name}", criterion, 1e-6, 1e-12)


@adapter("labels", "soft_ece")
def soft_ece(golden: Golden) -> None:
    hyper = golden.hyper
    criterion = SoftECE(
        weight=1.0,
        bins=hyper.get("bins", 15),
        temperature=None if hyper.get("use_decay", "temp" not in hyper) else hyper["temp"],
        decay_factor=hyper.get("decay_factor", 80.0),
    )
    check_penalty(golden, "soft_ece", "grad", criterion, 1e-7, 1e-9)

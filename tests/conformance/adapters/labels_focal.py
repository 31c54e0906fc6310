"""Focal loss and its kin."""

import torch
from torch import Tensor

from conformance.adapters.labels import check
from lightning_robust.losses import (
    FLSD,
    AdaFocal,
    DualFocal,
    Focal,
    PolyLoss,
    Target,
    adafocal_gammas,
    adafocal_loss,
    focal_loss,
)
from support.golden import Golden, adapter


@adapter("labels", "focal")
def focal(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    gamma, weight = hyper["gamma"], golden.tensor("class_weight")
    criteria = {
        "focal_sum": Focal(gamma=gamma, reduction="sum"),
        "focal_mean": Focal(gamma=gamma),
        "focal_detached_mean": Focal(gamma=gamma, detach_modulator=True),
        "flsd53_sum": FLSD(gamma=hyper["flsd_gamma"], reduction="sum"),
        "poly1": PolyLoss(eps1=hyper["poly_eps"]),
    }
    for name, criterion in criteria.items():
        check(golden, name, logits, lambda z, c=criterion: c(z, labels))
    # recorded with the mean over samples, where ours divides by the sum of the weights as torch does
    check(
        golden,
        "focal_tu_weighted_mean",
        logits,
        lambda z: focal_loss(z, Target.of(z, labels, weight=weight), gamma=gamma).mean(),
    )


@adapter("labels", "adafocal")
def adafocal(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    limits = {"rate": hyper["lam"], "switch": hyper["switch"], "gamma_min": hyper["gmin"], "gamma_max": hyper["gmax"]}
    start = AdaFocal(n_bins=hyper["num_bins"], gamma=hyper["gamma_initial"], **limits).double()
    golden.check("gammas0", start.gammas, 1e-7)  # ours are float32
    gammas, bounds = torch.full_like(start.gammas, hyper["gamma_initial"]), start.bounds
    gaps = golden.tensor("gaps")
    for step in range(len(gaps) + 1):
        if step:
            gammas, bounds = adafocal_gammas(gammas, gaps[step - 1], **limits), golden.tensor("bounds")[1:-1]
            golden.check(f"gammas{step}", gammas)
        # the recorded code has the exponents, and its gradient the exponents less one, in float32
        leaf = logits.clone().requires_grad_()
        loss = adafocal_loss(leaf, labels, gammas=gammas.float(), bounds=bounds).sum()
        loss.backward()
        golden.check(f"loss{step}_sum", loss, 1e-7)
        golden.check_finite(f"grad{step}_sum", leaf.grad, 1e-7)


@adapter("labels", "dual_focal")
def dual_focal(golden: Golden) -> None:
    logits, labels, gamma = golden.tensor("logits"), golden.tensor("labels"), golden.hyper["gamma"]
    rows = one_runner_up(logits, labels)
    for reduction in ("sum", "mean", "none"):
        if f"loss_{reduction}" in golden:
            criterion = DualFocal(gamma=gamma, reduction=reduction)
            check(golden, reduction, logits, lambda z, c=criterion: c(z, labels), None if bool(rows.all()) else rows)


def one_runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows where one class is next below the label; among several any may have the gradient of p_j."""
    below = torch.where(logits < logits.gather(1, labels[:, None]), logits, -torch.inf)
    top = below.amax(1, keepdim=True)
    return ((below == top).sum(1) == 1) | top.isinf()[:, 0]

"""Losses for noisy labels, without state or with one weight per sample."""

import torch

from conformance.adapters.labels import check
from lightning_robust.losses import GCE, MAE, NCE, NFL, NGCE, RCE, SCE, ActivePassive, CompSum, TruncatedGCE
from support.golden import Golden, adapter

# The recorded code clamps probabilities, and takes the logarithm of 1e-4 in float32.
CLAMPED = {"min_probability": 1e-7}
REVERSE = {**CLAMPED, "log_zero": float(torch.tensor(1e-4).log())}


@adapter("labels", "gce_apl")
def gce_apl(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    q, gamma = hyper["q"], hyper["gamma"]
    share = {"alpha": hyper["alpha"], "beta": hyper["beta"]}
    criteria = {
        "gce": GCE(q=q, **CLAMPED),
        "ngce": NGCE(q=q, **CLAMPED),
        "nce": NCE(),
        "nfl": NFL(gamma=gamma),
        "mae": MAE(),
        "rce": RCE(**REVERSE),
    }
    for active in ("nce", "nfl"):
        criteria[f"{active}_rce"] = ActivePassive(active=active, passive="rce", gamma=gamma, **share, **REVERSE)
        criteria[f"{active}_mae"] = ActivePassive(active=active, passive="mae", gamma=gamma, **share)
    for name, criterion in criteria.items():
        check(golden, name, logits, lambda z, c=criterion: c(z, labels))
    symmetric = SCE(alpha=hyper.get("sce_alpha", 0.1), beta=hyper.get("sce_beta", 1.0), **REVERSE)
    check(golden, "sce", logits, lambda z: symmetric(z, labels))
    golden.skip("loss_nmae", "grad_nmae", reason="the mean absolute error over a constant, 2 (C - 1)")
    golden.skip("loss_nrce", "grad_nrce", reason="a slip of precedence in the recorded code, see the method sheet")
    truncated(golden)


def truncated(golden: Golden) -> None:
    logits, labels, index = golden.tensor("logits"), golden.tensor("labels"), golden.tensor("trunc_idx")
    weights = golden.tensor("trunc_weight")
    criterion = TruncatedGCE(q=golden.hyper["q"], k=golden.hyper["k"])
    criterion.samples_known(len(weights))
    for step in range(2):
        leaf = logits.clone().requires_grad_()
        loss = criterion(leaf, labels, index=index)
        golden.check(f"trunc_loss{step}", loss)
        golden.check(f"trunc_grad{step}", torch.autograd.grad(loss, leaf)[0])
        criterion.prune(logits, labels, index=index)
    golden.check("trunc_weight", criterion.weights.look_up(torch.arange(len(weights)), like=logits[:, 0]))


@adapter("labels", "compsum_own")
def compsum_own(golden: Golden) -> None:
    logits, labels = golden.tensor("logits"), golden.tensor("labels")
    for tau in golden.hyper["tau"]:
        criterion = CompSum(tau=tau)
        check(golden, f"tau{tau}", logits, lambda z, c=criterion: c(z, labels))

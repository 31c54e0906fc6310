"""Label smoothing and logit penalties."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.losses import Linear, LogitPenalty, MaxSup, cross_entropy, maxsup_penalty
from support.golden import Golden, adapter


def check(
    golden: Golden, name: str, logits: Tensor, loss: Callable[[Tensor], Tensor], rows: Tensor | None = None
) -> None:
    """Compare `loss_NAME` and `grad_NAME` (on some rows); per-sample losses are summed for the gradient."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    golden.check(f"loss_{name}", value)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    if rows is None:
        golden.check_finite(f"grad_{name}", gradient)
    else:
        expected = golden.tensor(f"grad_{name}")
        torch.testing.assert_close(gradient[rows], expected[rows], rtol=1e-9, atol=1e-12)


def ignored_label(golden: Golden, labels: Tensor, ignored: Tensor) -> int:
    """The label that the ignored rows carry: named, or the one that replaced theirs, or the default."""
    replaced = ignored[ignored != labels].unique().tolist()
    return golden.hyper.get("ignore_index", replaced[0] if len(replaced) == 1 else -100)


@adapter("labels", "ls_torch")
def ls_torch(golden: Golden) -> None:
    logits, labels, soft = golden.tensor("logits"), golden.tensor("labels"), golden.tensor("soft")
    ignored, weight = golden.tensor("labels_ignore"), golden.tensor("class_weight")
    eps = golden.hyper["eps"]
    skipping = {"ignore_index": ignored_label(golden, labels, ignored)}
    cases = {
        "hard_mean": (labels, {}),
        "hard_sum": (labels, {"reduction": "sum"}),
        "hard_none": (labels, {"reduction": "none"}),
        "weighted_mean": (labels, {"weight": weight}),
        "weighted_none": (labels, {"weight": weight, "reduction": "none"}),
        "ignore_mean": (ignored, skipping),
        "ignore_weighted_mean": (ignored, {"weight": weight, **skipping}),
        "ignore_none": (ignored, {"reduction": "none", **skipping}),
        "soft_mean": (soft, {}),
        "soft_weighted_mean": (soft, {"weight": weight}),
        "soft_weighted_none": (soft, {"weight": weight, "reduction": "none"}),
        "ce_mean": (labels, {"label_smoothing": 0.0}),
        "timm_ls": (labels, {}),
        "timm_soft": (soft, {"label_smoothing": 0.0}),
    }
    for name, (target, options) in cases.items():
        if f"loss_{name}" in golden:
            arguments = {"label_smoothing": eps, **options}
            check(golden, name, logits, lambda z, t=target, a=arguments: cross_entropy(z, t, **a))
    golden.skip("loss_timm_bce", "grad_timm_bce", reason="a sigmoid loss of timm's own; not a cross-entropy of logits")


@adapter("labels", "ls_variants")
def ls_variants(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    wrong_only = {"off_value": "k_minus_1"}
    adaptive = hyper["els_adaptive_alpha"] * logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    cases = {
        "km1": {"label_smoothing": hyper["eps"], **wrong_only},
        "gls_negative": {"label_smoothing": hyper["negative"]},
        "els": {"label_smoothing": hyper["eps"], **wrong_only},
        "els_adaptive": {"label_smoothing": adaptive, **wrong_only},
    }
    for name, options in cases.items():
        check(golden, name, logits, lambda z, o=options: cross_entropy(z, labels, **o))


@adapter("labels", "maxsup")
def maxsup(golden: Golden) -> None:
    logits, labels, hyper = golden.tensor("logits"), golden.tensor("labels"), golden.hyper
    if golden.meta["case"].startswith("t_"):
        return maxsup_ties(golden, logits, labels)

    soft = golden.tensor("soft")
    ffcv = MaxSup(alpha=Linear(start=hyper["begin"], end=hyper["end"], denominator="T"))
    ffcv.set_progress(hyper["epoch"], hyper["epochs"])
    # The other two write their 0.1 and 0.2 (and DeiT its 300 epochs) into the code.
    lt = MaxSup(alpha=Linear(start=0.1, end=0.2))
    lt.set_progress(hyper["lt_epoch"], hyper["lt_epochs"])
    deit = MaxSup(alpha=Linear(start=0.1, end=0.2, epochs=300))
    deit.set_progress(hyper["deit_epoch"], -1)

    for name, regularizer in {"alpha_ffcv": ffcv, "alpha_lt": lt, "lam_deit": deit}.items():
        golden.check(name, torch.tensor(regularizer.coefficient, dtype=torch.float64))
    golden.check("reg_per_sample", maxsup_penalty(logits))
    rows = same_top(logits)
    check(golden, "ffcv", logits, lambda z: cross_entropy(z, labels) + ffcv(z))
    check(golden, "lt", logits, lambda z: cross_entropy(z, labels) + lt(z), rows)
    check(golden, "deit_hard", logits, lambda z: cross_entropy(z, labels) + deit(z), rows)
    check(golden, "deit_mix", logits, lambda z: cross_entropy(z, soft) + deit(z), rows)
    # Recorded with constants that the file names only in its note.
    smoothed = {"label_smoothing": hyper.get("eps", 0.1)}
    penalty = LogitPenalty(beta=hyper.get("beta", 2e-3))
    check(
        golden,
        "ls_logit_term",
        logits,
        lambda z: cross_entropy(z, labels, **smoothed) - cross_entropy(z, labels),
    )
    check(golden, "logit_penalty", logits, lambda z: cross_entropy(z, labels) + penalty(z))
    return None


def same_top(logits: Tensor) -> Tensor:
    """Rows where `topk` (LT and DeiT code) picks the index that `max` (ffcv code, ours) picks; ties may differ."""
    return logits.topk(1, 1).indices[:, 0] == logits.max(1).indices


def maxsup_ties(golden: Golden, logits: Tensor, labels: Tensor) -> None:
    for name, rows in {"ffcv": None, "deit": same_top(logits)}.items():
        penalty = MaxSup(alpha=golden.hyper[f"{name}_alpha"])
        check(golden, name, logits, lambda z, p=penalty: cross_entropy(z, labels) + p(z), rows)
    leaf = logits.clone().requires_grad_()
    golden.check("grad_ce", torch.autograd.grad(cross_entropy(leaf, labels), leaf)[0])
    golden.skip("grad_amax_variant", reason="the other sub-gradient at a tie; we follow the published code")

"""Criteria that remember samples, classes or groups, and criteria on transformed logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.losses import (
    ALDRKL,
    ELR,
    LDRKL,
    OKO,
    Criterion,
    GroupDRO,
    LogitClip,
    LogitNorm,
    OnlineLabelSmoothing,
    SampleTable,
    Sparsemax,
    elr_loss,
    elr_ramp,
    elr_update,
    oko_loss,
    sparsemax,
)
from support.golden import Golden, adapter

Loss = Callable[[Tensor], Tensor]


def check(golden: Golden, loss_name: str, grad_name: str, logits: Tensor, loss: Loss, **tolerance: float) -> None:
    """Compare a loss and its gradient; per-sample losses are summed for the gradient."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    golden.check(loss_name, value, **tolerance)
    golden.check_finite(grad_name, torch.autograd.grad(value.sum(), leaf)[0], **tolerance)


def steps(golden: Golden, name: str) -> range:
    return range(sum(key.startswith(name) and key[len(name) :].isdigit() for key in golden.arrays))


@adapter("labels", "elr")
def elr(golden: Golden) -> None:
    hyper = golden.hyper
    samples, beta, lam = hyper["N"], hyper.get("beta", 0.7), hyper.get("lam", 3.0)
    plain = ELR(beta=beta, lam=lam, num_samples=samples).double()
    for step in steps(golden, "logits"):
        logits, labels = golden.tensor(f"logits{step}"), golden.tensor(f"labels{step}")
        index = golden.tensor(f"index{step}")
        check(
            golden,
            f"loss{step}",
            f"grad{step}",
            logits,
            lambda z, labels=labels, index=index: plain(z, labels, index=index),
        )
        assert plain.memory.rows is not None
        golden.check(f"target{step}", plain.memory.rows)
    if "plus" in hyper:
        elr_plus(golden, samples, beta, lam, **hyper["plus"])


def elr_plus(golden: Golden, samples: int, beta: float, lam: float, coef_step: int, mix_lambda: float) -> None:
    memory = SampleTable(num_samples=samples)
    for step in steps(golden, "plus_loss"):
        logits, soft, index = (golden.tensor(f"{name}{step}") for name in ("logits", "plus_soft", "index"))
        memory.record(index, elr_update(memory.look_up(index, like=logits), logits, beta=beta, clamp=False))
        remembered = memory.look_up(index, like=logits)
        mixed = torch.lerp(remembered.flip(0), remembered, mix_lambda)
        ramp = elr_ramp(step, coef_step)
        refine = logits.shape[1] == 100  # the recorded code takes 100 classes for CIFAR-100
        golden.check(f"plus_q{step}", mixed)
        golden.check(f"plus_ramp{step}", ramp)
        check(
            golden,
            f"plus_loss{step}",
            f"plus_grad{step}",
            logits,
            lambda z, soft=soft, mixed=mixed, ramp=ramp, refine=refine: elr_loss(
                z, soft, mixed, lam=lam * ramp, refine_target=refine
            ).mean(),
        )


@adapter("labels", "ldr_aldr")
def ldr_aldr(golden: Golden) -> None:
    hyper = golden.hyper
    lam, alpha = hyper["lam"], hyper.get("alpha", 2.0)
    # constants of the recorded code have the precision of float32: margin, lambda_0 and log K
    margin, lam0 = (float(torch.tensor(value, dtype=torch.float32)) for value in (hyper["thr"], lam))
    single = {"rtol": 1e-7, "atol": 1e-9}
    logits, labels = golden.tensor("logits"), golden.tensor("labels")
    cases: dict[str, Criterion] = {
        "ldr": LDRKL(lam=lam, margin=margin),
        "ce_mean_k": LDRKL(lam=1.0, margin=0.0, normalize="none"),
    }
    for name, criterion in cases.items():
        check(golden, f"loss_{name}", f"grad_{name}", logits, lambda z, c=criterion: c(z, labels))
    samples = len(golden.tensor("aldr_lambda0"))
    for prefix, normalize in {"aldr": "l1", "aldr_sp": "softplus"}.items():
        adaptive = ALDRKL(lam0=lam0, alpha=alpha, margin=margin, normalize=normalize, num_samples=samples)
        for step in steps(golden, f"{prefix}_loss"):
            z, ids = golden.tensor(f"{prefix}_logits{step}"), golden.tensor(f"{prefix}_ids{step}")
            check(
                golden,
                f"{prefix}_loss{step}",
                f"{prefix}_grad{step}",
                z,
                lambda z, ids=ids, adaptive=adaptive: adaptive(z, labels, index=ids),
                **single,
            )
            assert adaptive.lambdas.rows is not None
            golden.check(f"{prefix}_lambda{step}", adaptive.lambdas.rows, **single)


@adapter("labels", "ols")
def ols(golden: Golden) -> None:
    """The class is the published one: a class without a correct sample loses its soft label."""
    hyper, classes = golden.hyper, golden.tensor("logits0").shape[1]
    criterion = OnlineLabelSmoothing(
        num_classes=classes,
        alpha=hyper.get("alpha", 0.5),
        smoothing=hyper.get("smoothing", 0.1),
        keep_empty=False,
    ).double()
    golden.skip("labels", reason="each step has labels of its own")
    last = len(steps(golden, "logits")) - 1
    for step in range(last + 1):
        if step == last:  # the epoch ends before the last step
            criterion.epoch_ends(0, lambda tensor: tensor)
            golden.check("supervise_after_epoch", criterion.soft_labels.T)
        labels = golden.tensor(f"labels{step}")
        check(
            golden,
            f"loss{step}",
            f"grad{step}",
            golden.tensor(f"logits{step}"),
            lambda z, labels=labels: criterion(z, labels),
        )


@adapter("labels", "logitclip")
def logitclip(golden: Golden) -> None:
    hyper = golden.hyper
    logits, labels = golden.tensor("logits"), golden.tensor("labels")
    bound, order = 1 / hyper["temp"], hyper.get("lp", 2)
    cases = {
        "code": LogitClip(max_norm=bound, p=order, reference_compat=True),
        "code_tau1": LogitClip(max_norm=1.0, p=order, reference_compat=True),
        "paper_own": LogitClip(max_norm=hyper.get("delta", bound), p=order),
    }
    for name, criterion in cases.items():
        if f"loss_{name}" in golden:
            check(golden, f"loss_{name}", f"grad_{name}", logits, lambda z, c=criterion: c(z, labels))
    golden.skip("norms", reason="norms of the inputs, recorded to read the file")


@adapter("labels", "logitnorm_loss")
def logitnorm_loss(golden: Golden) -> None:
    criterion, labels = LogitNorm(temperature=golden.hyper["t"]), golden.tensor("labels")
    check(golden, "loss", "grad", golden.tensor("logits"), lambda z: criterion(z, labels))


@adapter("labels", "sparsemax")
def sparsemax_(golden: Golden) -> None:
    logits, labels = golden.tensor("logits"), golden.tensor("labels")
    leaf = logits.clone().requires_grad_()
    p = sparsemax(leaf)
    golden.check("sparsemax", p)
    golden.check("sparsemax_vjp", torch.autograd.grad(p, leaf, golden.tensor("v"))[0])
    check(golden, "loss_none", "grad_sum", logits, lambda z: Sparsemax(reduction="none")(z, labels))
    check(golden, "loss_mean", "grad_mean", logits, lambda z: Sparsemax()(z, labels))
    golden.skip("entmax15", "entmax15_loss", "entmax15_grad", reason="another member of the family, not offered")


@adapter("labels", "group_dro")
def group_dro(golden: Golden) -> None:
    hyper = golden.hyper
    labels, groups = golden.tensor("labels"), golden.tensor("groups")
    adjustment = hyper.get("adj")
    each = adjustment if isinstance(adjustment, list) else [adjustment]
    # the recorded code leaves the term out unless every entry is above zero
    used = adjustment if adjustment is not None and min(each) > 0 else None
    criterion = GroupDRO(
        num_groups=len(golden.tensor("q0")),
        step_size=hyper.get("step_size", 0.01),
        normalize=hyper.get("normalize", False),
        adjustment=used,
        group_counts=None if used is None else hyper.get("counts", [50, 30, 20]),  # named in the note of the file
    ).double()
    # the recorded adjustment has the precision of float32
    tolerance = {} if used is None else {"rtol": 1e-7, "atol": 1e-10}
    for step in steps(golden, "logits"):
        check(
            golden,
            f"loss{step}",
            f"grad{step}",
            golden.tensor(f"logits{step}"),
            lambda z: criterion(z, labels, group=groups),
            **tolerance,
        )
        golden.check(f"q{step}", criterion.q, **tolerance)


@adapter("labels", "oko")
def oko(golden: Golden) -> None:
    """Features, a linear head, and sets whose members follow each other."""
    hyper = golden.hyper
    k, sets = hyper["k"], hyper["sets"]
    features, weight, bias = (golden.tensor(name).requires_grad_() for name in ("features", "W", "b"))
    pair, odd = golden.tensor("pair"), golden.tensor("odd")
    # which member has which class does not matter to the loss of its set
    labels = torch.cat([pair[:, None], pair[:, None], odd.view(sets, k)], 1).flatten()
    logits = features @ weight + bias
    golden.check("eval_logits", logits)
    golden.check("set_logits", logits.view(sets, k + 2, -1).sum(1))
    for targets in ("hard", "soft"):
        loss = OKO(k=k, targets=targets)(logits, labels)
        torch.testing.assert_close(loss, oko_loss(logits, labels, k=k, targets=targets).mean())
        golden.check(f"{targets}_loss", loss)
        gradients = torch.autograd.grad(loss, [weight, bias, features], retain_graph=True)
        for name, gradient in zip(("gW", "gb", "gfeatures"), gradients, strict=True):
            golden.check(f"{targets}_{name}", gradient)
    shares = torch.nn.functional.one_hot(labels.view(sets, k + 2), weight.shape[1]).double().mean(1)
    golden.check("soft_target", shares)

"""Objectives of adversarial training that look at margins, iterates, linearity or a standard model."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from conformance.adapters.adversarial import (
    L2_NOTE,
    NORMS,
    TinyCNN,
    TinyMLP,
    check_buffers,
    check_loss_and_gradients,
    network,
    tolerance,
)
from lightning_robust.attacks import FGSM, PGD
from lightning_robust.attacks.losses import margin
from lightning_robust.losses import cross_entropy
from lightning_robust.objectives import (
    AAER,
    ELLE,
    ELLEA,
    HAT,
    Prepared,
    aaer_loss,
    abnormal_examples,
    gairat_weights,
    important_samples,
    one_vs_rest,
    sovr_loss,
)
from support.golden import Golden, adapter

NO_BOUNDS = (-1e6, 1e6)  # the authors' code knows none
AAER_WEIGHTS = {"lamda1": "weight", "lamda2": "ce_weight", "lamda3": "variation_weight"}


class RecordedFGSM(FGSM):
    """Begins where the official code began."""

    recorded: Tensor

    @override
    def draw_start(self, x: Tensor, *args: Any) -> Tensor:
        return self.recorded


class RecordedPGD(PGD):
    """Begins where the official code began."""

    recorded: Tensor

    @override
    def draw_start(self, x: Tensor, *args: Any) -> Tensor:
        return self.recorded


def built(state: dict[str, Tensor]) -> nn.Module:
    model = (TinyCNN if "bn1.weight" in state else TinyMLP)(state).double()
    model.load_state_dict(state)
    return model.eval()


@adapter("adversarial", "sovr_formula")
def sovr(golden: Golden) -> None:
    percent, weight = golden.hyper["M_percent"], golden.hyper["lam"]
    logits, labels = golden.tensor("adv_logits").requires_grad_(), golden.tensor("labels")
    golden.check("logit_margin_loss", margin(logits, labels))
    golden.check("important_mask", important_samples(logits, labels, percent))
    golden.check("ce", cross_entropy(logits, labels, reduction="none"))
    golden.check("ovr", one_vs_rest(logits, labels))
    loss, _ = sovr_loss(logits, labels, percent, weight)
    golden.check("loss", loss)
    golden.check("grad_adv_logits", torch.autograd.grad(loss, logits)[0])


@adapter("adversarial", "gairat_weights")
def gairat(golden: Golden) -> None:
    for name in ("Tanh", "Sigmoid", "Discrete"):
        weights = gairat_weights(
            golden.tensor("kappa"), golden.hyper["num_steps"], shift=golden.hyper["Lambda"], assignment=name.lower()
        )
        golden.check(name, weights)


@adapter("adversarial", "hat_e2e")
def hat(golden: Golden) -> None:
    hyper = golden.hyper
    given = next((hyper[name] for name in ("attack", "distance", "norm") if name in hyper), "linf")
    norm = NORMS[given.removesuffix("-pgd")]
    attack = RecordedPGD(
        eps=hyper["epsilon"],
        norm=norm,
        steps=hyper["perturb_steps"],
        step_size=hyper["step_size"],
        random_start="normal",
        loss="kl",
        projection="ball-box" if norm == "linf" else "box-ball",
    )
    x = golden.tensor("x")
    attack.recorded = x + golden.tensor("noise")
    objective = HAT(
        built(golden.tensors("helper/")), beta=hyper["beta"], gamma=hyper["gamma"], distance=hyper["h"], attack=attack
    )
    model = network(golden)
    prepared = objective.prepare(model, x, golden.tensor("labels"))
    atol = 1e-12 if norm == "linf" else L2_NOTE * hyper["epsilon"]
    golden.check("x_adv", prepared.x_adv, tolerance(norm), atol)
    golden.check("x_helper", prepared.extra["helper"], tolerance(norm), hyper["h"] * atol)
    output = objective(model, prepared)
    rtol = 1e-8 if norm == "linf" else L2_NOTE
    check_loss_and_gradients(golden, model, output.loss, rtol)
    check_buffers(golden, "after/", model, rtol)


@adapter("adversarial", "elle")
def elle(golden: Golden) -> None:
    hyper = golden.hyper
    attack = RecordedFGSM(
        eps=hyper["attack_eps"],
        step_size=hyper["attack_step"],
        projection="ball-box" if hyper["clamp"] else "box",
        mode="train",
        bounds=NO_BOUNDS,
    )
    attack.recorded = golden.tensor("x_start")
    objective = ELLE(attack=attack, weight=hyper["lin_reg"])
    model = network(golden)
    x, labels = golden.tensor("x"), golden.tensor("labels")
    prepared = objective.prepare(model, x, labels)
    golden.check("x_adv", prepared.x_adv, 1e-8)
    triplet = torch.cat([golden.tensor("x_ab"), golden.tensor("x_c")])
    drawn = Prepared(x, labels, prepared.x_adv, {"triplet": triplet, "alpha": golden.tensor("alpha")})
    output = objective(model, drawn)
    golden.check("lin_err", output.logs["linearity"], 1e-8)
    model(x)  # the authors' forward for their log
    check_loss_and_gradients(golden, model, output.loss, 1e-8)
    check_buffers(golden, "after/", model, 1e-8)


@adapter("adversarial", "elle_a_schedule")
def elle_a_schedule(golden: Golden) -> None:
    hyper = golden.hyper
    objective = ELLEA(
        max_weight=hyper["lambda_max"], decay=hyper["decay_rate"], sensitivity=hyper["sensitivity"]
    ).double()
    used, after = [], []
    for error in golden.tensor("lin_err"):
        used.append(objective.weight)
        objective.observe(error)
        after.append(objective.weight)
    golden.check("lambda_used", torch.stack(used))
    golden.check("lambda_after", torch.stack(after))


def weights_of(golden: Golden) -> dict[str, float]:
    return {ours: golden.hyper[theirs] for theirs, ours in AAER_WEIGHTS.items()}


@adapter("adversarial", "aaer_loss")
def aaer_on_logits(golden: Golden) -> None:
    start, labels = golden.tensor("init_logits"), golden.tensor("labels")
    adv = golden.tensor("adv_logits").requires_grad_()
    for prefix, changed in {"": {}, "lamda2_zero/": {"ce_weight": 0.0}}.items():
        loss, _, penalty = aaer_loss(start, adv, labels, **{**weights_of(golden), **changed})
        golden.check(f"{prefix}loss", loss)
        golden.check(f"{prefix}regulariser", penalty, 1e-9, 1e-12)
        golden.check(f"{prefix}grad_adv_logits", torch.autograd.grad(loss, adv)[0])
    found = abnormal_examples(start, adv, labels)
    golden.check("abnormal_mask", found.mask)
    means = {
        "abnormal_variation": (found.abnormal_variation, found.mask),
        "normal_variation": (found.normal_variation, ~found.mask),
        "abnormal_ce": (found.ce_drop, found.mask),
    }
    for name, (mean, members) in means.items():
        if name in golden and members.any():
            golden.check(name, mean)
        else:
            golden.skip(name, reason="the mean over no samples has no value there and is 0 here; nothing depends on it")


@adapter("adversarial", "aaer_e2e")
def aaer_e2e(golden: Golden) -> None:
    hyper = golden.hyper
    eps = hyper["epsilon_255"] / 255
    attack = RecordedFGSM(
        eps=eps,
        step_size=hyper["alpha_factor"] * eps,
        projection="ball-box" if hyper["clamp_to_eps"] else "box",
        mode="train",
        mean=golden.tensor("mu").flatten().tolist(),
        std=golden.tensor("std").flatten().tolist(),
    )
    attack.recorded = golden.tensor("x_start")
    objective = AAER(attack=attack, **weights_of(golden))
    model = network(golden)
    prepared = objective.prepare(model, golden.tensor("x_norm"), golden.tensor("labels"))
    golden.check("x_adv", prepared.x_adv, 1e-8)
    output = objective(model, prepared)
    golden.check("n_abnormal", (output.logs["abnormal"] * len(prepared.x)).round())
    check_loss_and_gradients(golden, model, output.loss, 1e-8)
    check_buffers(golden, "after/", model, 1e-8)

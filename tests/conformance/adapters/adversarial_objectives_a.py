"""MART, SCORE, WEAT, AVmixup and DAFA against what the official implementations computed."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from conformance.adapters.adversarial import NORMS, check_buffers, network, tolerance
from lightning_robust.attacks import PGD
from lightning_robust.objectives import (
    DAFA,
    MART,
    SCORE,
    Prepared,
    avmixup_images,
    avmixup_labels,
    dafa_sums,
    dafa_weights,
    energy_weights,
    mart_loss,
    score_bound,
    score_loss,
    score_pgd_loss,
    weat_loss,
)
from support.golden import Golden, adapter

DISTANCES = {
    "LSE": "lse",
    "1": "l1",
    "2": "l2",
    "L1square": "l1-squared",
    "JS": "js",
    "JSsqrt": "js-sqrt",
    "KL": "kl",
    "KLsqrt": "kl-sqrt",
}
FLOAT32, FLOAT32_ATOL = 1e-6, 1e-7  # the official bounds of clipped losses are sums of float32 numbers around 1


def logits(golden: Golden) -> list[torch.Tensor]:
    return [golden.tensor(f"{name}_logits").requires_grad_() for name in ("clean", "adv")]


def check_gradients(golden: Golden, prefix: str, loss: torch.Tensor, pair: list[torch.Tensor], **options) -> None:
    gradients = torch.autograd.grad(loss, pair, allow_unused=True)
    for name, gradient, values in zip(("clean", "adv"), gradients, pair, strict=True):
        recorded = f"{prefix}grad_{name}_logits"
        if recorded in golden:
            golden.check(recorded, torch.zeros_like(values) if gradient is None else gradient, **options)


def check_parameters(golden: Golden, prefix: str, model: nn.Module, loss: torch.Tensor, rtol: float = 1e-8) -> None:
    golden.check(f"{prefix}loss", loss, rtol)
    loss.backward()
    for name, parameter in model.named_parameters():
        golden.check(f"{prefix}grad/{name}", parameter.grad, rtol)
    model.zero_grad()


@adapter("adversarial", "mart_loss")
def mart_on_logits(golden: Golden) -> None:
    pair = logits(golden)
    loss, _, _ = mart_loss(*pair, golden.tensor("labels"), golden.hyper["beta"])
    golden.check("loss", loss)
    check_gradients(golden, "", loss, pair)


@adapter("adversarial", "mart_e2e")
def mart_e2e(golden: Golden) -> None:
    hyper = golden.hyper
    attack = PGD(
        eps=hyper["epsilon"], step_size=hyper["step_size"], steps=hyper["perturb_steps"], random_start="normal"
    )
    objective = MART(beta=hyper["beta"], attack=attack)
    model = network(golden)
    x, labels = golden.tensor("x"), golden.tensor("labels")
    golden.check("x_adv", attack(model, x, labels, start=x + golden.tensor("noise")), 1e-8)
    output = objective(model, Prepared(x, labels, golden.tensor("x_adv")))
    check_parameters(golden, "", model, output.loss)
    check_buffers(golden, "after/", model, 1e-8)


@adapter("adversarial", "score_loss")
def score_on_logits(golden: Golden) -> None:
    hyper = golden.hyper
    labels = golden.tensor("labels")
    classes = golden.arrays["clean_logits"].shape[1]
    recorded = {name.split("/")[1] for name in golden.arrays if "/" in name}
    for theirs in sorted(recorded):
        if theirs not in DISTANCES:
            names = [name for name in golden.arrays if theirs in name.split("/")]
            golden.skip(*names, reason="not offered: infinite for hard labels, or a norm that the paper does not use")
            continue
        distance = DISTANCES[theirs]
        bound = score_bound(distance, hyper["clip_loss"], classes)
        if f"clip_bound/{theirs}" in golden:
            golden.check(f"clip_bound/{theirs}", bound, FLOAT32, FLOAT32_ATOL)
            bound = float(golden.tensor(f"clip_bound/{theirs}"))  # a loss just above it shows its rounding
        options = {"distance": distance, "bound": bound, "label_smoothing": hyper.get("label_smoothing_arg", 0.0)}
        forms = {
            "TRADES": {"beta": hyper["TRADESlambda"], "clip_on": "whole"},
            "TRADES_clipKLonly": {"beta": hyper["TRADESlambda"], "clip_on": "penalty"},
        }
        for form, more in forms.items():
            pair = logits(golden)
            samples, _, _ = score_loss(*pair, labels, **options, **more, reduction="none")
            check_score(golden, f"{form}/{theirs}/", samples, pair)
        pair = logits(golden)
        samples = score_pgd_loss(pair[1], labels, **options, reduction="none")
        check_score(golden, f"PGD/{theirs}/", samples, pair)


def check_score(golden: Golden, prefix: str, samples: torch.Tensor, pair: list[torch.Tensor]) -> None:
    if f"{prefix}loss" not in golden:
        return
    golden.check(f"{prefix}per_sample", samples)
    golden.check(f"{prefix}loss", samples.mean())
    check_gradients(golden, prefix, samples.mean(), pair)


@adapter("adversarial", "score_lse_e2e")
def score_lse_e2e(golden: Golden) -> None:
    hyper = golden.hyper
    norm = NORMS[hyper.get("norm", hyper.get("attack", "linf").removesuffix("-pgd"))]
    steps = hyper["perturb_steps"]
    objective = SCORE(
        beta=hyper["beta"],
        bound=hyper["clip_value"],
        label_smoothing=hyper["label_smoothing"],
        attack=PGD(
            eps=hyper["epsilon"],
            norm=norm,
            step_size=hyper["step_size"] if norm == "linf" else 2 * hyper["epsilon"] / steps,
            steps=steps,
            loss="lse",
            mode="train-frozen-stats",
            projection="ball-box" if norm == "linf" else "box-ball",
        ),
    )
    model = network(golden)
    x, labels = golden.tensor("x"), golden.tensor("labels")
    x_adv = objective.attack(model, x, labels, start=golden.tensor("x_start"))
    golden.check("x_adv", x_adv, tolerance(norm), 1e-12 if norm == "linf" else 1e-6 * hyper["epsilon"])
    output = objective(model, Prepared(x, labels, golden.tensor("x_adv")))
    check_parameters(golden, "", model, output.loss)
    check_buffers(golden, "after/", model, 1e-8)


@adapter("adversarial", "weat_loss")
def weat_on_logits(golden: Golden) -> None:
    labels = golden.tensor("labels")
    clean = golden.tensor("clean_logits")
    golden.check("energy", -clean.logsumexp(1))
    golden.check("weights", energy_weights(clean))
    for form in ("nat", "adv"):
        pair = logits(golden)
        loss, _, _ = weat_loss(*pair, labels, golden.hyper[f"beta_{form}"], form=form)
        golden.check(f"WEAT_{form}/loss", loss)
        check_gradients(golden, f"WEAT_{form}/", loss, pair)


class Linear(nn.Module):
    """The recorded model: a linear map of pixels from 0 to 255."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight + self.bias


@adapter("adversarial", "avmixup")
def avmixup(golden: Golden) -> None:
    hyper = golden.hyper
    attack = PGD(
        eps=hyper["epsilon_255"],
        step_size=hyper["step_size_255"],
        steps=hyper["num_steps"],
        mode="train",
        bounds=(0.0, 255.0),
    )
    x, labels, weights = (golden.tensor(name) for name in ("x_nat", "labels", "beta_weight"))
    model = Linear(golden.tensor("W"), golden.tensor("b"))
    start = (x + golden.tensor("start_noise")).clamp(0, 255)
    x_adv = attack(model, x, labels, start=start)
    golden.check("x_adv", x_adv, 1e-8)
    golden.check("x_mixed", avmixup_images(x, x_adv, weights, gamma=hyper["gamma"], bounds=(0.0, 255.0)), 1e-8)
    one_hot = F.one_hot(labels, len(model.bias)).double()
    confidences = {"clean_confidence": hyper["lambda1"], "vertex_confidence": hyper["lambda2"]}
    golden.check("y_mixed", avmixup_labels(one_hot, weights, **confidences))
    golden.check("y_nat_smoothed", avmixup_labels(one_hot, torch.ones_like(weights), **confidences))
    golden.check("y_vertex_smoothed", avmixup_labels(one_hot, torch.zeros_like(weights), **confidences))


@adapter("adversarial", "dafa_weights")
def dafa_class_weights(golden: Golden) -> None:
    probabilities = golden.tensor("probs").double()
    # predictions that were rounded to float32 do not add up to 1, which those of logits do
    rounded = bool((probabilities.sum(1) - 1).abs().max() > 1e-12)
    rtol = FLOAT32 if rounded else 1e-9
    sums, counts = dafa_sums(probabilities.log(), golden.tensor("labels"))
    golden.check("class_similarity", sums / counts.unsqueeze(1), rtol)
    weights = dafa_weights(sums, counts, golden.hyper["dafa_lambda"], min_weight=-math.inf, ties="both-lose")
    golden.check("class_weights", weights, rtol)


@adapter("adversarial", "dafa_loss")
def dafa_training_loss(golden: Golden) -> None:
    hyper = golden.hyper
    x, labels, weights = (golden.tensor(name) for name in ("x", "labels", "class_weights"))
    model = network(golden)
    for form in ("trades", "pgd"):
        if f"{form}/loss" not in golden:
            continue
        attack = PGD(
            eps=hyper["epsilon"],
            step_size=hyper["step_size"],
            steps=hyper["steps"],
            loss="kl" if form == "trades" else "ce",
            random_start="normal",
        )
        objective = DAFA(num_classes=len(weights), beta=hyper["beta"], form=form, warmup=1, attack=attack).double()
        objective.weights.copy_(weights)
        start = x + golden.tensor(f"{form}/noise")
        if form == "trades":
            golden.check("trades/x_adv", attack(model, x, labels, start=start, scale=weights[labels]), 1e-8)
        objective.epoch_starts(0, 1)
        output = objective(model, Prepared(x, labels, golden.tensor(f"{form}/x_adv")))
        check_parameters(golden, f"{form}/", model, output.loss)
        with torch.no_grad():
            golden.check(f"{form}/memory_probs", model(golden.tensor(f"{form}/x_adv")).softmax(1), 1e-8)
    golden.skip("pgd/x_adv", reason="the published attack moves twice per step, the second time by the plain budget")

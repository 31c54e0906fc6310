"""Single-teacher adversarial distillation against what the official implementations computed."""

from functools import partial

import torch
from torch import Tensor

from conformance.adapters.distillation_networks import attack, network, start_scale
from lightning_robust.attacks import PGD
from lightning_robust.objectives import (
    RSLAD,
    AdaAD,
    adaad_loss,
    ard_loss,
    iad_i_loss,
    iad_ii_loss,
    iad_trust,
    igdm_loss,
    rslad_loss,
    saad_loss,
    saad_weights,
)
from support.golden import Golden, adapter


def pair(golden: Golden) -> tuple[Tensor, Tensor]:
    """The student's logits of the clean and of the attacked images."""
    return golden.tensor("student_nat").requires_grad_(), golden.tensor("student_adv").requires_grad_()


def check_gradients(golden: Golden, prefix: str, loss: Tensor, logits: dict[str, Tensor]) -> None:
    gradients = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
    for (name, values), gradient in zip(logits.items(), gradients, strict=True):
        golden.check(f"{prefix}{name}", torch.zeros_like(values) if gradient is None else gradient)


@adapter("distillation", "ard")
def ard(golden: Golden) -> None:
    clean, adv = pair(golden)
    teacher, labels = golden.tensor("teacher_clean"), golden.tensor("labels")
    hyper = golden.hyper
    loss, *_ = ard_loss(
        clean, adv, teacher, labels, alpha=hyper.get("alpha", 1.0), temperature=hyper.get("temperature", 30.0)
    )
    golden.check("loss", loss)
    check_gradients(golden, "grad_", loss, {"adv": adv, "nat": clean})


@adapter("distillation", "iad_i", "iad_ii")
def iad(golden: Golden) -> None:
    hyper = golden.hyper
    clean, adv = pair(golden)
    labels, on_clean, on_adv = (golden.tensor(name) for name in ("labels", "teacher_clean", "teacher_adv"))
    standard = golden.tensor("teacher_st_adv")
    first = golden.method == "iad_i"
    trust = iad_trust(on_adv, labels, hyper.get("beta", 0.1))
    if hyper["epoch"] < hyper.get("begin", 60 if first else 40):
        trust = None
    golden.check("weight", torch.ones(len(adv)) if trust is None else trust)
    temperature = hyper.get("temperature", 1.0)
    if first:
        loss, _ = iad_i_loss(
            clean, adv, on_clean, labels, trust, alpha=hyper.get("alpha", 1.0), temperature=temperature
        )
    else:
        weights = {"alpha": hyper.get("alpha1", 0.5), "clean_alpha": hyper.get("alpha2", 0.25)}
        loss, _ = iad_ii_loss(clean, adv, on_adv, standard, labels, trust, **weights, temperature=temperature)
    golden.check("loss", loss)
    check_gradients(golden, "grad_", loss, {"adv": adv, "nat": clean})


@adapter("distillation", "rslad")
def rslad(golden: Golden) -> None:
    hyper = golden.hyper
    clean, adv = pair(golden)
    loss, robust, natural = rslad_loss(
        clean,
        adv,
        golden.tensor("teacher"),
        adv_weight=hyper.get("adv_weight", 5 / 6),
        clean_weight=hyper.get("nat_weight", 1 / 6),
        loss_factor=hyper.get("loss_factor", 1),
        eps_log=hyper.get("eps_log", 1e-5),
    )
    golden.check("kl_adv", robust)
    golden.check("kl_nat", natural)
    golden.check("loss", loss)
    check_gradients(golden, "grad_", loss, {"adv": adv, "nat": clean})
    if "x" in golden:
        rslad_step(golden)


def rslad_step(golden: Golden) -> None:
    """The attack and the pass that follows it."""
    told, layers = golden.hyper.get("attack", ""), golden.hyper.get("net", "")
    x, labels = golden.tensor("x"), golden.tensor("labels")
    student = network(golden.tensors("student."), layers)
    objective = RSLAD(network(golden.tensors("teacher."), layers), attack=attack(told, loss="kl"))
    logits = objective.ask("teacher", x)
    golden.check("teacher_logits_tiny", logits)
    start = x + start_scale(told) * golden.tensor("noise")
    x_adv = objective.attack(student, x, labels, start=start, against=logits)
    golden.check("x_adv", x_adv)
    golden.check("adv_logits_train_mode", student(x_adv))


def by_elements(hyper: dict) -> bool:
    """Whether the divergences are means over the classes too: the code averages so on CIFAR-10 alone."""
    dataset = hyper.get("dataset", "").upper().replace("-", "")
    if dataset in ("CIFAR10", "CIFAR100"):
        return dataset == "CIFAR10"
    return "reduction" not in hyper or "B*C" in hyper["reduction"] or "element" in hyper["reduction"]


@adapter("distillation", "adaad")
def adaad(golden: Golden) -> None:
    hyper = golden.hyper
    clean, adv = pair(golden)
    loss, *_ = adaad_loss(
        clean,
        adv,
        golden.tensor("teacher_nat"),
        golden.tensor("teacher_adv"),
        alpha=hyper.get("alpha", 1.0),
        reduction="elementmean" if by_elements(hyper) else "batchmean",
    )
    golden.check("loss", loss)
    check_gradients(golden, "grad_", loss, {"adv": adv, "nat": clean})
    if "x" in golden:
        adaad_attack(golden)


def adaad_attack(golden: Golden) -> None:
    hyper = golden.hyper
    radius, step, steps = hyper.get("eps", 8), hyper.get("step", 2), hyper.get("steps", 10)
    layers = hyper.get("net", "")
    published = PGD(eps=radius / 255, step_size=step / 255, steps=steps, loss="kl", random_start="normal")
    objective = AdaAD(network(golden.tensors("teacher."), layers), attack=published)
    student, x = network(golden.tensors("student."), layers), golden.tensor("x")
    labels = torch.zeros(len(x), dtype=torch.long)  # not looked at
    teacher = partial(objective.ask, "teacher", input_grad=True)
    golden.check("x_adv", published(student, x, labels, start=x + 0.001 * golden.tensor("noise"), against=teacher))


@adapter("distillation", "igdm_saad")
def igdm_saad(golden: Golden) -> None:
    hyper = golden.hyper
    plus, minus, clean = (golden.tensor(f"s_{name}").requires_grad_() for name in ("plus", "minus", "clean"))
    t_plus, t_minus, t_clean = (golden.tensor(f"t_{name}") for name in ("plus", "minus", "clean"))
    alpha, epoch = hyper.get("igdm_alpha", 1.0), hyper["epoch"]
    # this script divides by 200 whatever the number of epochs, and adds the term to the attacked part of AdaAD
    loss, *_ = adaad_loss(clean, plus, t_clean, t_plus, reduction="batchmean")
    loss = loss + alpha * epoch / 200 * igdm_loss(plus, minus, t_plus, t_minus).mean()
    golden.check("igdm_loss", loss)
    check_gradients(golden, "igdm_grad_", loss, {"plus": plus, "minus": minus})
    weight = alpha * epoch / hyper.get("epochs", 200)
    entropy = {"gamma": hyper["gamma"], "eps_log": 1e-12}
    golden.check("saad_weight", saad_weights(t_plus, **entropy))
    loss, _ = saad_loss(clean, plus, minus, t_clean, t_plus, t_minus, beta=hyper["beta"], igdm_weight=weight, **entropy)
    golden.check("saad_loss", loss)
    check_gradients(golden, "saad_grad_", loss, {"plus": plus, "minus": minus, "clean": clean})

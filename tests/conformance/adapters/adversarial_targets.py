"""ADR, LTD and SRST-AWR of the adversarial family, ADR as a whole training loop with its average."""

import re
from functools import partial

import torch

from conformance.adapters.adversarial import network
from conformance.adapters.distillation_networks import number, sgd
from lightning_robust.attacks import PGD
from lightning_robust.losses import cross_entropy
from lightning_robust.objectives import (
    ADR,
    TRADES,
    AdversarialCrossEntropy,
    Prepared,
    Running,
    adr_targets,
    ltd_targets,
    srst_awr_loss,
    trades_loss,
)
from lightning_robust.schedules import Cosine
from lightning_robust.sharpness import SAMStyleAWP, sharp_backward
from support.golden import Golden, adapter

RTOL = 1e-8
COUNTERS = "the recorded average rounds counters of batches down, and its AWP counts both passes; ours do not"
DEFAULT = "SGD lr .1 momentum .9 nesterov wd 5e-4"


@adapter("adversarial", "adr_targets")
def adr_rectified(golden: Golden) -> None:
    hyper = golden.hyper
    steps = hyper["total_epoch"] * hyper["iters_per_epoch"]
    temperature = Cosine(start=hyper["temperature_high"], end=hyper["temperature_low"], denominator="T")
    interpolation = Cosine(start=hyper["interpolation_low"], end=hyper["interpolation_high"], denominator="T")
    for name, schedule in (("temperature", temperature), ("interpolation", interpolation)):
        values = [schedule.at(step, steps) for step in range(steps)]
        golden.check(f"{name}_schedule", torch.tensor(values, dtype=torch.float64))
    teacher, labels = golden.tensor("teacher_logits"), golden.tensor("labels")
    for step in hyper["steps"]:
        values = temperature.at(step, steps), interpolation.at(step, steps)
        golden.check(f"step{step}/rectified", adr_targets(teacher, labels, *values))


def sharpness(hyper: dict) -> SAMStyleAWP | None:
    """The perturbation of the weights, where the recorded optimizer is the AWP of that repository."""
    told = hyper.get("optimizer", "")
    if "awp" not in told.lower() and "rho" not in hyper:
        return None
    return SAMStyleAWP(rho=hyper.get("rho", number(told, r"rho[ =]([\d.e-]+)", 0.005)))


def adr_objective(hyper: dict) -> ADR:
    attack = {"eps": hyper["attack"]["eps"], "step_size": hyper["attack"]["alpha"], "steps": hyper["attack"]["steps"]}
    if hyper["adv_train_mode"] == "TRADES":
        attack = PGD(**attack, loss="kl", random_start="normal", mode="train")
        inside = TRADES(beta=hyper["adv_beta"], attack=attack, forwards="joint")
    else:
        inside = AdversarialCrossEntropy(attack=PGD(**attack, mode="train"))
    return ADR(
        objective=inside,
        temperature=Cosine(start=hyper["temperature_high"], end=hyper["temperature_low"], denominator="T"),
        interpolation=Cosine(start=hyper["interpolation_low"], end=hyper["interpolation_high"], denominator="T"),
        decay=hyper["model_ema_decay"],
    )


def loss_of(objective: ADR, model: torch.nn.Module, prepared: Prepared) -> torch.Tensor:
    return objective(model, prepared).loss


@adapter("adversarial", "adr_train")
def adr_train(golden: Golden) -> None:
    """The start of the attack is recorded, so targets, attack and loss are called one after the other."""
    hyper = golden.hyper
    model = network(golden)
    objective, optimizer = adr_objective(hyper), sgd(hyper.get("optimizer", DEFAULT), model)
    method = sharpness(hyper)
    owners = "ema" if method is None else "ema|student"
    unlike = re.compile(rf"step\d+/({owners})/.*num_batches")
    golden.skip(*filter(unlike.match, golden.arrays), reason=COUNTERS)
    steps = len({name.split("/")[0] for name in golden.arrays if name.startswith("step")})
    for step in range(steps):
        prefix = f"step{step}/"
        objective.running = Running(step=step, max_steps=hyper["total_epoch"] * hyper["iters_per_epoch"])
        x, labels = golden.tensor(f"{prefix}x"), golden.tensor(f"{prefix}labels")
        targets = objective.targets(model, x, labels)
        golden.check(f"{prefix}rectified", targets, RTOL)
        x_adv = objective.attack(model, x, targets, start=golden.tensor(f"{prefix}x_start"))
        golden.check(f"{prefix}x_adv", x_adv, RTOL)
        prepared = Prepared(x, targets, x_adv)
        optimizer.zero_grad()
        if method is None:
            objective(model, prepared).loss.backward()
        else:
            sharp_backward(partial(loss_of, objective, model, prepared), method, optimizer, module=model)
        optimizer.step()
        objective.step_ends(model, total=lambda tensor: tensor)
        for part, state in (("student", model.state_dict()), ("ema", objective.averaged().state_dict())):
            for name, value in state.items():
                if not unlike.match(f"{prefix}{part}/{name}"):
                    golden.check(f"{prefix}{part}/{name}", value, RTOL, 1e-11)


@adapter("adversarial", "ltd_formula")
def ltd_formula(golden: Golden) -> None:
    hyper = golden.hyper
    student = hyper.get("student_temperature", 1.0)
    golden.skip("labels", reason="not used by the recorded loss")
    targets = ltd_targets(golden.tensor("teacher_logits"), hyper["teacher_temperature"])
    golden.check("soft_targets", targets)
    clean, adv = (golden.tensor(f"{name}_logits").requires_grad_() for name in ("clean", "adv"))
    loss, natural, robust = trades_loss(clean / student, adv / student, targets, hyper.get("beta", 6.0))
    golden.check("loss_soft", natural)
    golden.check("loss_kl", robust)
    golden.check("loss_trades", loss)
    golden.check("loss_at", cross_entropy(adv / student, targets))
    for name, gradient in zip(("clean", "adv"), torch.autograd.grad(loss, [clean, adv]), strict=True):
        golden.check(f"grad_{name}_logits", gradient)


@adapter("adversarial", "srst_awr")
def srst_awr(golden: Golden) -> None:
    hyper = golden.hyper
    names = ("labelled", "unlabelled", "unlabelled_adv")
    students = [golden.tensor(f"{name}_logits").requires_grad_() for name in names]
    parts = srst_awr_loss(
        students[0],
        golden.tensor("labels"),
        *students[1:],
        golden.tensor("teacher_logits"),
        lam=hyper.get("lamb", 20.0),
        gamma=hyper.get("gamma", 4.0),
        beta=hyper.get("beta", 0.5),
        temperature=hyper.get("tau", 1.2),
        label_smoothing=hyper.get("smoothing", 0.2),
    )
    golden.check("loss", parts.loss)
    golden.check("sup", parts.supervised)
    golden.check("reg", parts.regularizer)
    golden.check("kd", parts.knowledge)
    for name, gradient in zip(names, torch.autograd.grad(parts.loss, students), strict=True):
        golden.check(f"grad_{name}", gradient)

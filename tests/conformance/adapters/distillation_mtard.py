"""MTARD and B-MTARD, on logits and end to end."""

import torch
from torch import Tensor, nn

from conformance.adapters.distillation_networks import attack, network, sgd, start_scale
from lightning_robust.objectives import MTARD, ObjectiveOutput, Prepared
from support.golden import Golden, adapter

KINDS = {"nat": "clean", "adv": "robust"}


class Part(nn.Module):
    """A network whose answer is written in its input."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, 1)[0 if self.first else 1]


def options(hyper: dict, *, temperatures: bool) -> dict:
    """The arguments of MTARD that a recording names."""
    factor = hyper.get("loss_factor", 1)
    told = {
        "temperature_balance": temperatures,
        "weight_lr": hyper.get("weight_lr", 0.025),
        "exponent": float(hyper.get("bert", 1)),
        "loss_factor": float(factor),
        "entropy": "published",
    }
    if temperatures:
        start = hyper.get("temp_init", 1)
        told |= {
            "temperature_lr": hyper.get("temp_lr", 0.001),
            "temperature_range": (hyper.get("temp_min", 1), hyper.get("temp_max", 10)),
            "initial_temperatures": (hyper.get("temp_init_nat", start), hyper.get("temp_init_adv", start)),
        }
    return told


def on_logits(golden: Golden, objective: MTARD) -> None:
    names = ("student_nat", "student_adv", "teacher_nat", "teacher_adv")
    steps = zip(*(golden.tensor(name) for name in names), strict=True)
    seen: dict[str, list[Tensor]] = {}
    for student_clean, student_adv, teacher_clean, teacher_adv in steps:
        clean, adv = (torch.cat(pair, 1) for pair in ((student_clean, teacher_clean), (student_adv, teacher_adv)))
        inputs = [clean.requires_grad_(), adv.requires_grad_()]
        labels = torch.zeros(len(clean), dtype=torch.long)  # of no consequence without an attack
        output, numbers = step(objective, Part(True), Prepared(inputs[0], labels, inputs[1]))
        gradients = [gradient.chunk(2, 1)[0] for gradient in torch.autograd.grad(output.loss, inputs)]
        numbers |= {"grad_nat": gradients[0], "grad_adv": gradients[1]}
        for name, value in numbers.items():
            seen.setdefault(name, []).append(value)
    check(golden, seen | initial(objective), 1e-9)


def step(objective: MTARD, student: nn.Module, prepared: Prepared) -> tuple[ObjectiveOutput, dict[str, Tensor]]:
    """The loss of a step, and all numbers that a recording may hold of it."""
    used = objective.temperature_balance.temperatures.clone()
    output = objective(student, prepared)
    weights, after = objective.loss_balance.weights.clone(), objective.temperature_balance.temperatures.clone()
    numbers = {"total": output.loss.detach()}
    for place, (kind, ours) in enumerate(KINDS.items()):
        numbers |= {f"w_{kind}": weights[place], f"kl_{kind}": output.logs[f"mtard_{ours}_loss"]}
        if objective.adapts_temperatures:
            numbers |= {f"T_{kind}_used": used[place], f"T_{kind}_next": after[place]}
            numbers[f"negent_{kind}"] = -output.logs[f"mtard_{ours}_entropy"] / output.logits.shape[1]
    return output, numbers


def initial(objective: MTARD) -> dict[str, list[Tensor]]:
    """The losses of the first step."""
    return {f"init_{kind}": [value] for kind, value in zip(KINDS, objective.loss_balance.initial, strict=True)}


def check(golden: Golden, seen: dict[str, list[Tensor]], rtol: float) -> None:
    for name, numbers in seen.items():
        if name in golden:
            golden.check(name, torch.stack(numbers), rtol)


@adapter("distillation", "mtard_eccv")
def mtard_eccv(golden: Golden) -> None:
    on_logits(golden, MTARD(Part(False), Part(False), **options(golden.hyper, temperatures=False)))


@adapter("distillation", "bmtard")
def bmtard(golden: Golden) -> None:
    on_logits(golden, MTARD(Part(False), Part(False), **options(golden.hyper, temperatures=True)))


def end_to_end(golden: Golden, *, temperatures: bool) -> None:
    hyper = golden.hyper
    told, layers = hyper.get("attack", ""), hyper.get("net", "")
    objective = MTARD(
        network(golden.tensors("teacher_nat."), layers),
        network(golden.tensors("teacher_adv."), layers),
        attack=attack(told),
        **options(hyper, temperatures=temperatures),
    )
    student = network(golden.tensors("student_init."), layers)
    optimizer = sgd(hyper.get("opt", "SGD lr=0.1 momentum=0.9 wd=2e-4"), student)
    scale = start_scale(told)
    seen: dict[str, list[Tensor]] = {}
    for x, labels, noise in zip(*(golden.tensor(name) for name in ("x", "labels", "noise")), strict=True):
        x_adv = objective.attack(student, x, labels, start=x + scale * noise)
        output, numbers = step(objective, student, Prepared(x, labels, x_adv))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for name, value in (numbers | {"x_adv": x_adv}).items():
            seen.setdefault(name, []).append(value)
    check(golden, seen | initial(objective), 1e-8)
    for name, value in student.state_dict().items():
        golden.check(f"student_final.{name}", value, 1e-8)


@adapter("distillation", "mtard_eccv_e2e")
def mtard_eccv_e2e(golden: Golden) -> None:
    end_to_end(golden, temperatures=False)


@adapter("distillation", "bmtard_e2e")
def bmtard_e2e(golden: Golden) -> None:
    end_to_end(golden, temperatures=True)

"""MTARD and B-MTARD in the family of adversarial training: five steps on given logits."""

import torch

from conformance.adapters.distillation_mtard import KINDS, Part
from lightning_robust.objectives import MTARD, Prepared
from support.golden import Golden, adapter


def five_steps(golden: Golden, objective: MTARD) -> None:
    steps = sorted({int(name.partition("/")[0].removeprefix("step")) for name in golden.arrays})
    for step in (f"step{number}/" for number in steps):
        pairs = [
            torch.cat([golden.tensor(f"{step}{network}_{kind}_logits") for network in ("student", "teacher")], 1)
            for kind in KINDS
        ]
        clean, adv = (pair.requires_grad_() for pair in pairs)
        used = objective.temperature_balance.temperatures.clone()
        output = objective(Part(True), Prepared(clean, torch.zeros(len(clean), dtype=torch.long), adv))
        golden.check(f"{step}total_loss", output.loss)
        gradients = torch.autograd.grad(output.loss, (clean, adv))
        for place, (kind, ours) in enumerate(KINDS.items()):
            golden.check(f"{step}grad_student_{kind}", gradients[place].chunk(2, 1)[0])
            golden.check(f"{step}loss_{kind}", output.logs[f"mtard_{ours}_loss"])
            golden.check(f"{step}weight_{kind}", objective.loss_balance.weights[place])
            if f"{step}temp_{kind}_used" in golden:
                golden.check(f"{step}temp_{kind}_used", used[place])
                golden.check(f"{step}temp_{kind}_after", objective.temperature_balance.temperatures[place])


def objective(golden: Golden, **options) -> MTARD:
    hyper = golden.hyper
    # the script for CIFAR-100 multiplies both losses, which is not among the recorded hyper-parameters
    usual = 10 if "cifar100" in (golden.meta.get("source", {}).get("file") or "") else 1
    factor, rate = float(hyper.get("loss_factor") or usual), hyper.get("weight_learn_rate", 0.025)
    exponent = float(hyper.get("bert") or 1)
    return MTARD(Part(False), Part(False), weight_lr=rate, loss_factor=factor, exponent=exponent, **options)


@adapter("adversarial", "mtard")
def mtard(golden: Golden) -> None:
    five_steps(golden, objective(golden, temperature_balance=False))


@adapter("adversarial", "bmtard")
def bmtard(golden: Golden) -> None:
    hyper = golden.hyper
    low, high = hyper.get("temp_range") or (1, 10)
    start = hyper.get("temp_init", 1)
    temperatures = (hyper.get("temp_init_nat", start), hyper.get("temp_init_adv", start))
    rate = hyper.get("temp_learn_rate", 0.001)
    told = {"temperature_lr": rate, "temperature_range": (low, high), "initial_temperatures": temperatures}
    five_steps(golden, objective(golden, entropy="published", **told))

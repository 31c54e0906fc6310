"""Targets that replace labels, and semi-supervised training, of the distillation family."""

import torch

from lightning_robust.losses import PSKD, cross_entropy
from lightning_robust.objectives import adr_targets, ltd_targets, srst_awr_loss, trades_loss
from lightning_robust.schedules import Cosine
from support.golden import Golden, adapter


@adapter("distillation", "adr")
def adr(golden: Golden) -> None:
    hyper = golden.hyper
    steps = hyper["epochs"] * hyper["steps_per_epoch"]
    temperature = Cosine(start=hyper["temperature_high"], end=hyper["temperature_low"], denominator="T")
    interpolation = Cosine(start=hyper["interp_low"], end=hyper["interp_high"], denominator="T")
    teacher, labels = golden.tensor("teacher"), golden.tensor("labels")
    values = [[schedule.at(step, steps) for step in range(steps)] for schedule in (temperature, interpolation)]
    golden.check("temperature_schedule", torch.tensor(values[0], dtype=torch.float64))
    golden.check("interp_schedule", torch.tensor(values[1], dtype=torch.float64))
    targets = [adr_targets(teacher, labels, values[0][step], values[1][step]) for step in hyper["steps"]]
    golden.check("targets", torch.stack(targets))
    student = golden.tensor("student").requires_grad_()
    loss = cross_entropy(student, targets[1])
    golden.check("loss", loss)
    golden.check("grad", torch.autograd.grad(loss, student)[0])


@adapter("distillation", "ltd")
def ltd(golden: Golden) -> None:
    hyper = golden.hyper
    targets = ltd_targets(golden.tensor("teacher"), hyper["teacher_temperature"])
    golden.check("soft_label", targets)
    adv, nat = (golden.tensor(f"student_{name}").requires_grad_() for name in ("adv", "nat"))
    student = hyper.get("student_temperature", 1.0)
    loss = cross_entropy(adv / student, targets)
    golden.check("pgd_loss", loss)
    golden.check("pgd_grad_adv", torch.autograd.grad(loss, adv)[0])
    loss, _, _ = trades_loss(nat / student, adv / student, targets, hyper.get("trades_beta", 6.0))
    golden.check("trades_loss", loss)
    for name, gradient in zip(("adv", "nat"), torch.autograd.grad(loss, [adv, nat]), strict=True):
        golden.check(f"trades_grad_{name}", gradient)


@adapter("distillation", "srst_awr")
def srst_awr(golden: Golden) -> None:
    hyper = golden.hyper
    students = [golden.tensor(f"student_{name}").requires_grad_() for name in ("lb", "ul", "adv")]
    parts = srst_awr_loss(
        students[0],
        golden.tensor("labels"),
        students[1],
        students[2],
        golden.tensor("teacher_ul"),
        lam=hyper.get("lamb", 20.0),
        gamma=hyper.get("gamma", 4.0),
        beta=hyper.get("beta", 0.5),
        temperature=hyper.get("tau", 1.2),
        label_smoothing=hyper.get("smoothing", 0.2),
    )
    golden.check("sup", parts.supervised)
    golden.check("reg", parts.regularizer)
    golden.check("know", parts.knowledge)
    golden.check("total", parts.loss)
    for name, gradient in zip(("lb", "ul", "adv"), torch.autograd.grad(parts.loss, students), strict=True):
        golden.check(f"grad_{name}", gradient)


@adapter("distillation", "pskd")
def pskd(golden: Golden) -> None:
    hyper = golden.hyper
    labels, order, logits = golden.tensor("labels"), golden.tensor("order"), golden.tensor("logits")
    epochs, batch = hyper["epochs_run"], logits.shape[1]
    per_epoch = len(logits) // len(epochs)
    criterion = PSKD(alpha=hyper["alpha_T"], num_samples=len(labels))
    losses, gradients = [], []
    for position, z in enumerate(logits):
        run, part = divmod(position, per_epoch)
        criterion.epoch_starts(epochs[run], hyper["end_epoch"])
        index = order[run][part * batch : (part + 1) * batch]
        z = z.clone().requires_grad_()
        losses.append(criterion(z, labels[index], index=index))
        gradients.append(torch.autograd.grad(losses[-1], z)[0])
    golden.check("loss", torch.stack(losses))
    golden.check("grad", torch.stack(gradients))
    golden.check("table_final", criterion.predictions.rows)
    golden.skip("alpha_t", "soft_targets", reason="inside of the criterion; losses and gradients determine them")

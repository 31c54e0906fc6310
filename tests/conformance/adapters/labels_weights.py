"""Penalties on weights, Mixout, drop schedules and automatic weight decay as the label family recorded them."""

import torch
from torch import Tensor, nn

from lightning_robust.regularization import GOR, AutoWeightDecay, NormLoss, drop_schedule, filter_norms, mixout
from support.golden import Golden, adapter


@adapter("labels", "norm_loss")
def norm_loss(golden: Golden) -> None:
    weight, lr = golden.tensor("weight").requires_grad_(), golden.hyper["lr"]
    loss = NormLoss(lam=golden.hyper["factor"])({"weight": weight})
    (gradient,) = torch.autograd.grad(loss, weight)
    golden.check("loss_own", loss)
    golden.check("grad_own", gradient)
    golden.check("ranger21_unit_norm", filter_norms(weight).reshape(golden.tensor("ranger21_unit_norm").shape))
    # Ranger21 adds its eps, 1e-8, to the norm that it divides by, which its correction shows
    row = gradient.flatten(1) / weight.detach().flatten(1)
    golden.check("ranger21_correction", row.mean(1).reshape(golden.tensor("ranger21_correction").shape), 1e-7)
    golden.check("ranger21_weight_after", weight.detach() - lr * gradient, 1e-7)


class Layers(nn.Module):
    """Layers made from the recorded weights, by name."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        for name in sorted({key.partition(".")[0] for key in golden.arrays if key.endswith(".weight")}):
            if name.startswith(("inter_grad_", "intra_grad_")):
                continue
            weight = golden.tensor(f"{name}.weight")
            layer = nn.Conv2d(1, 1, 1) if weight.ndim == 4 else nn.Linear(1, 1)
            layer.weight = nn.Parameter(weight)
            layer.bias = nn.Parameter(golden.tensor(f"{name}.bias")) if f"{name}.bias" in golden else None
            self.add_module(name, layer)


@adapter("labels", "gor")
def gor(golden: Golden) -> None:
    hyper = golden.hyper
    network = Layers(golden)
    for mode in ("inter", "intra"):
        if f"{mode}_loss" not in golden:
            continue
        penalty = GOR(
            lam=1.0,
            num_groups=hyper.get("num_groups", 32),
            mode=mode,
            linear=hyper.get("fc", False),
            min_filters=hyper.get("min_num_filters", 4),
        )
        loss = penalty(network)
        golden.check(f"{mode}_loss", loss)
        weights = penalty.weights(penalty.layers(network))
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            golden.check(f"{mode}_grad_{name}.weight", gradient)


@adapter("labels", "mixout")
def mixed(golden: Golden) -> None:
    p = golden.hyper["p"]
    weight, target, v = golden.tensor("weight").requires_grad_(), golden.tensor("target"), golden.tensor("v")
    keep = kept(golden)
    out = mixout(weight, target, keep, p=p)
    golden.check("out", out)
    golden.check("grad", torch.autograd.grad((out * v).sum(), weight)[0])
    golden.check("keep_mask", keep.expand_as(weight))
    golden.check("eval_out", mixout(weight, target, torch.ones_like(keep), p=0.0))
    # one entry per output unit: the first column, with a mask that its gradient shows
    vector, mask = golden.tensor("vec_weight").requires_grad_(), golden.tensor("vec_grad")
    out = mixout(vector, target[:, 0], mask, p=p)
    golden.check("vec_out", out)
    golden.check("vec_grad", torch.autograd.grad(out.sum(), vector)[0])


def kept(golden: Golden) -> Tensor:
    return golden.tensor("keep_mask")[0].abs()


@adapter("labels", "drop_schedule")
def schedule(golden: Golden) -> None:
    hyper = golden.hyper
    # the rates are those that the recorded values show
    cases = {"standard": ("standard", "constant", 0), "early_const": ("early", "constant", 0)}
    cases |= {"early_linear": ("early", "linear", 1), "late": ("late", "constant", 2)}
    for name, (mode, kind, cutoff) in cases.items():
        if name in golden:
            recorded = golden.tensor(name)
            values = drop_schedule(
                recorded.max().item(),
                epochs=hyper["epochs"],
                steps_per_epoch=hyper["iters"],
                cutoff_epochs=hyper["cutoff"][cutoff],
                mode=mode,
                kind=kind,
            )
            golden.check(name, torch.tensor(values, dtype=torch.float64))


@adapter("labels", "oui_autowd")
def automatic_weight_decay(golden: Golden) -> None:
    hyper = golden.hyper
    controller = AutoWeightDecay(epochs=hyper["epochs"], initial=hyper.get("wd0", 1e-4), ideal=hyper.get("ideal", 0.55))
    found = [
        controller.step(int(epoch), oui=oui, training_loss=loss).weight_decay
        for epoch, oui, loss in golden.tensor("seq").tolist()
    ]
    golden.check("wd", torch.tensor(found, dtype=torch.float64))

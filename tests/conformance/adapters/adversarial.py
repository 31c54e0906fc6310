"""Adversarial training: attacks and objectives against what the official implementations computed."""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.objectives import TRADES, AdversarialCrossEntropy, Prepared, trades_loss
from support.golden import Golden, adapter

NORMS = {"l_inf": "linf", "linf": "linf", "l_2": "l2", "l2": "l2"}
L2_NOTE = 1e-6  # the official l2 steps normalise with small constants of their own


class TinyCNN(nn.Module):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        first, second, last = (state[f"{name}.weight"].shape for name in ("conv1", "conv2", "fc"))
        self.conv1 = nn.Conv2d(first[1], first[0], first[2], padding=1)
        self.bn1 = nn.BatchNorm2d(first[0])
        self.conv2 = nn.Conv2d(second[1], second[0], second[2], stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(second[0])
        self.fc = nn.Linear(last[1], last[0])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class TinyMLP(nn.Module):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        layers = sorted({name.rpartition(".")[0] for name in state})
        for name in layers:
            outputs, inputs = state[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(inputs, outputs))
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.layers)
        return second(torch.tanh(first(x.flatten(1))))


def network(golden: Golden) -> nn.Module:
    """The recorded network, in float64 and training mode."""
    state = golden.tensors("init/")
    model = (TinyCNN if "bn1.weight" in state else TinyMLP)(state).double()
    model.load_state_dict(state)
    return model.train()


def check_buffers(golden: Golden, prefix: str, model: nn.Module, rtol: float) -> None:
    for name, buffer in model.named_buffers():
        if f"{prefix}{name}" in golden:
            golden.check(f"{prefix}{name}", buffer, rtol)


def check_loss_and_gradients(golden: Golden, model: nn.Module, loss: Tensor, rtol: float, atol: float = 1e-12) -> None:
    golden.check("loss", loss, rtol, atol)
    loss.backward()
    for name, parameter in model.named_parameters():
        golden.check(f"grad/{name}", parameter.grad, rtol, atol)


def tolerance(norm: str) -> float:
    return 1e-8 if norm == "linf" else L2_NOTE


@adapter("adversarial", "pgd_at_e2e")
def pgd_at_e2e(golden: Golden) -> None:
    hyper = golden.hyper
    norm = NORMS[hyper["norm"]]
    modes = re.findall("train|eval", hyper.get("model_mode", "train"))  # of the attack, then of the loss
    attack = PGD(
        eps=hyper["epsilon"],
        norm=norm,
        steps=hyper["attack_iters"],
        step_size=hyper["alpha"],
        random_start="uniform" if norm == "linf" else "radial",
        restarts=hyper.get("restarts", 1),
        mode=modes[0],
        evaluate_result=True,
    )
    model = network(golden)
    x, labels = golden.tensor("x"), golden.tensor("labels")
    x_adv = attack(model, x, labels, start=golden.tensor("x_start"))
    # in l2, errors of an entry are measured against the length of the whole perturbation
    atol = 1e-12 if norm == "linf" else L2_NOTE * hyper["epsilon"]
    golden.check("x_adv", x_adv, tolerance(norm), atol)
    golden.check("delta", x_adv - x, tolerance(norm), max(atol, 1e-9))
    check_buffers(golden, "after_attack/", model, tolerance(norm))
    model.train(modes[-1] == "train")
    trained_on = Prepared(x, labels, x_adv if norm == "linf" else golden.tensor("x_adv"))
    loss = AdversarialCrossEntropy(attack=attack)(model, trained_on).loss
    check_loss_and_gradients(golden, model, loss, 1e-8)


def single_step(golden: Golden, radius: float, **options: object) -> None:
    hyper = golden.hyper
    attack = FGSM(
        eps=radius,
        step_size=hyper["alpha_255"] / 255,
        random_start=True,
        mode="train",
        mean=golden.tensor("mu").flatten().tolist(),
        std=golden.tensor("std").flatten().tolist(),
        **options,
    )
    model = network(golden)
    x, labels = golden.tensor("x_norm"), golden.tensor("labels")
    x_adv = attack(model, x, labels, start=golden.tensor("x_start"))
    golden.check("x_adv", x_adv, 1e-8)
    loss = AdversarialCrossEntropy(attack=attack)(model, Prepared(x, labels, x_adv)).loss
    check_loss_and_gradients(golden, model, loss, 1e-8)


@adapter("adversarial", "fgsm_rs_e2e")
def fgsm_rs_e2e(golden: Golden) -> None:
    single_step(golden, golden.hyper["epsilon_255"] / 255)


@adapter("adversarial", "nfgsm_e2e")
def nfgsm_e2e(golden: Golden) -> None:
    eps, clip = golden.hyper["epsilon_255"] / 255, golden.hyper["clip"]
    # an ablation of the paper projects on a ball of radius clip * eps; the step size and the start are given
    if clip > 0:
        single_step(golden, clip * eps)
    else:
        single_step(golden, eps, start_scale=golden.hyper["unif"], projection="box")


@adapter("adversarial", "trades_loss")
def trades_loss_on_logits(golden: Golden) -> None:
    clean = golden.tensor("clean_logits").requires_grad_()
    adv = golden.tensor("adv_logits").requires_grad_()
    loss, natural, robust = trades_loss(clean, adv, golden.tensor("labels"), golden.hyper["beta"])
    golden.check("loss", loss)
    golden.check("loss_natural", natural)
    golden.check("loss_robust", robust)
    loss.backward()
    golden.check("grad_clean_logits", clean.grad)
    golden.check("grad_adv_logits", adv.grad)


@adapter("adversarial", "trades_e2e")
def trades_e2e(golden: Golden) -> None:
    hyper = golden.hyper
    norm = NORMS[hyper["distance"]]
    steps = hyper["perturb_steps"]
    attack = PGD(
        eps=hyper["epsilon"],
        norm=norm,
        steps=steps,
        # the official l2 branch ignores its step size
        step_size=hyper["step_size"] if norm == "linf" else 2 * hyper["epsilon"] / steps,
        random_start="normal",
        loss="kl",
        projection="ball-box" if norm == "linf" else "box-ball",
    )
    objective = TRADES(beta=hyper["beta"], attack=attack, forwards="published")
    model = network(golden)
    x, labels = golden.tensor("x"), golden.tensor("labels")
    x_adv = attack(model, x, labels, start=x + golden.tensor("noise"))
    golden.check("x_adv", x_adv, tolerance(norm), 1e-12 if norm == "linf" else L2_NOTE * hyper["epsilon"])
    output = objective(model, Prepared(x, labels, golden.tensor("x_adv")))
    check_loss_and_gradients(golden, model, output.loss, 1e-8)
    check_buffers(golden, "after/", model, 1e-8)

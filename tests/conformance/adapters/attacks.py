"""Attacks against the official implementations, in their float32."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks import FGSM, MIM, PGD, losses
from support.golden import Golden, adapter

LOSSES = {
    "ce": lambda z, y, target: losses.cross_entropy(z, y),
    "margin": lambda z, y, target: losses.margin(z, y),
    "prob_margin": lambda z, y, target: losses.probability_margin(z, y),
    "dlr": lambda z, y, target: losses.dlr(z, y),
    "dlr_targeted": losses.dlr_targeted,
}


@adapter("attacks", "losses")
def losses_on_logits(golden: Golden) -> None:
    y = golden.tensor("y")
    target = golden.tensor("target") if "target" in golden else y
    recorded = golden.tensor("logits")
    ordered = recorded.sort(dim=1).values
    # where the largest logits are equal, the gradient depends on how a sort breaks the tie
    tied = (ordered[:, 1:] == ordered[:, :-1])[:, -4:].any(1)
    for name, function in LOSSES.items():
        if name not in golden:  # of two or three classes the ratios are not defined
            continue
        for suffix, dtype, rtol, atol in (("_f64", torch.float64, 1e-9, 1e-12), ("", torch.float32, 1e-5, 1e-6)):
            logits = recorded.to(dtype).requires_grad_()
            values = function(logits, y, target)
            golden.check(f"{name}{suffix}", values, rtol, atol)
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            expected = golden.tensor(f"grad_{name}{suffix}")
            torch.testing.assert_close(gradient[~tied], expected[~tied], rtol=rtol, atol=atol)


class Net(nn.Module):
    """The recorded network: two convolutions of stride 2 and a linear layer."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        first, second, last = (state[f"{name}.weight"].shape for name in ("c1", "c2", "fc"))
        self.c1 = nn.Conv2d(first[1], first[0], first[2], stride=2, padding=1)
        self.c2 = nn.Conv2d(second[1], second[0], second[2], stride=2, padding=1)
        self.fc = nn.Linear(last[1], last[0])
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.c2(torch.relu(self.c1(x)))).flatten(1))


def check_attack(golden: Golden, name: str, model: Net, attack: PGD, y: Tensor, rows: list[int]) -> None:
    """Compare points on the rows that do not hang on rounding, and losses (of the target, if any) on all."""
    x = golden.tensor("x")
    x_adv = attack(model, x, y, start=x)
    kept = [row for row in range(len(x)) if row not in rows]
    torch.testing.assert_close(x_adv[kept], golden.tensor(name)[kept], rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = model(x_adv)
    golden.check(f"{name}_ce", losses.cross_entropy(logits, y), rtol=1e-3, atol=1e-5)
    assert torch.equal(logits.argmax(1)[kept], golden.tensor(f"{name}_pred")[kept]), name


def schedule(text: str, eps: float) -> dict[str, Any]:
    """Read "steps 10, alpha eps/4, ..."."""
    found = re.search(r"steps (\d+), (?:alpha|step) eps/([\d.]+)", text)
    assert found, text
    return {"steps": int(found[1]), "step_size": eps / float(found[2])}


@adapter("attacks", "fgsm_pgd")
def fgsm_pgd(golden: Golden) -> None:
    hyper = golden.hyper
    linf, l2 = hyper["eps_Linf"], hyper["eps_L2"]
    model = Net(golden.tensors("w."))
    y, target = golden.tensor("y"), golden.tensor("target")
    signed = PGD(eps=linf, **schedule(hyper["pgd"], linf))
    round_ball = PGD(eps=l2, norm="l2", **schedule(hyper["pgdl2"], l2))
    decay = re.search(r"decay ([\d.]+)", hyper["mifgsm"])
    momentum = schedule(hyper["mifgsm"], linf) | ({"decay": float(decay[1])} if decay else {})
    attacks = {
        "fgsm": (FGSM(eps=linf), y),
        "pgd": (signed, y),
        "pgd_targeted": (PGD(eps=linf, **schedule(hyper["pgd"], linf), targeted=True), target),
        "pgdl2": (round_ball, y),
        "mifgsm": (MIM(eps=linf, **momentum), y),
        "nifgsm": (MIM(eps=linf, **momentum, nesterov=True), y),
        "foolbox_linfpgd": (signed, y),
        "foolbox_l2pgd": (round_ball, y),
    }
    for name, (attack, goal) in attacks.items():
        # the second implementation of an attack hangs on rounding where the first does
        listed = hyper["checks"].get({"foolbox_linfpgd": "pgd", "foolbox_l2pgd": "pgdl2"}.get(name, name), {})
        check_attack(golden, name, model, attack, goal, listed.get("rows_differing_over_1e5", []))
    golden.skip(
        "foolbox_l1pgd",
        "foolbox_l1pgd_ce",
        "foolbox_l1pgd_pred",
        reason="steps along the plain l1-normalised gradient hardly move a point, so they are not offered",
    )

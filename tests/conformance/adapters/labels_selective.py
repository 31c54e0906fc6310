"""Normalised logits for selective classification, and the risk-coverage curve."""

import torch
from torch import Tensor

from lightning_robust.calibration import normalized_logit_score
from lightning_robust.metrics import aurc, risk_coverage_curve
from support.golden import Golden, adapter


@adapter("labels", "logitnorm_sc")
def logitnorm_sc(golden: Golden) -> None:
    logits, correct = golden.tensor("logits"), golden.tensor("correct")
    assert torch.equal(logits.argmax(1) == golden.tensor("labels"), correct)
    for name in golden.arrays:
        kind, _, rest = name.partition("_")
        if kind == "score" and logits.shape[1] == 2 and rest.endswith(("_mean", "_min")):
            golden.skip(name, reason="the same number for every sample, up to rounding; refused here")
        elif kind == "score":
            check_score(golden, name, normalized(logits, rest))
    for name in golden.arrays:
        kind, _, rest = name.partition("_")
        if kind in ("risk", "aurc"):
            scores = logits.softmax(1).max(1).values if rest == "msp" else golden.tensor(f"score_{rest}")
            check_area(golden, kind, name, scores, correct)
        elif kind == "coverage":
            coverage = risk_coverage_curve(logits[:, 0], correct).coverage
            golden.check(name, torch.cat([coverage.new_zeros(1), coverage]), 1e-6)


def normalized(logits: Tensor, setting: str) -> Tensor:
    """The score of a setting such as "p4_mean" or "p2_0.0"."""
    order, _, centre = setting.removeprefix("p").partition("_")
    return normalized_logit_score(logits, p=float(order), centre=centre if centre in ("mean", "min") else float(centre))


def check_score(golden: Golden, name: str, actual: Tensor) -> None:
    expected = golden.tensor(name)
    # a row without any spread is 0/0 there; here it is the least confident
    recorded = torch.where(expected.isnan(), 0.0, expected)
    torch.testing.assert_close(actual, recorded, rtol=1e-9, atol=1e-12)


def check_area(golden: Golden, kind: str, name: str, scores: Tensor, correct: Tensor) -> None:
    """A point (0, 0) comes first; the order of ties is that of the sort; NaN scores have no place in an order."""
    if bool(scores.isnan().any()):
        golden.skip(name, reason="an order of NaN scores is whatever the sort makes of them")
        return
    order = scores.argsort(descending=True)
    scores, correct = scores[order], correct[order]
    if kind == "risk":
        risk = risk_coverage_curve(scores, correct, ties="order").risk
        golden.check(name, torch.cat([risk.new_zeros(1), risk]), 1e-6)
    else:
        golden.check(name, aurc(scores, correct, ties="order", area="from_zero"), 1e-6)

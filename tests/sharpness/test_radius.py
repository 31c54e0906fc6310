"""Radii that change during a run."""

import pytest
import torch
from torch import nn

from lightning_robust.schedules import Cosine, Linear, Piecewise
from lightning_robust.sharpness import ASAM, SAM, ProportionalToLR, sharp_backward


def offsets(method, optimizer, w, **kwargs):
    """How far each weight is moved, seen from inside the closure."""
    seen = []

    def closure():
        seen.append(w.detach().clone())
        return (w**2).sum()

    sharp_backward(closure, method, optimizer, **kwargs)
    return seen[1] - seen[0]


def weight():
    return nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))  # gradient direction (0.6, 0.8)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(start=0.0, end=1.0), {0: 0.0, 5: 0.5, 10: 1.0}),
        (Linear(start=0.2, end=0.4, epochs=3), {0: 0.2, 1: 0.3, 2: 0.4, 9: 0.4}),
        (Cosine(start=1.0, end=0.0), {0: 1.0, 5: 0.5, 10: 0.0}),
        (Piecewise(values={0: 0.05, 3: 0.1}), {0: 0.05, 2: 0.05, 3: 0.1, 10: 0.1}),
    ],
    ids=repr,
)
def test_schedules_count_optimizer_steps(schedule, values):
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.1)
    for step, rho in values.items():
        moved = offsets(SAM(rho=schedule), optimizer, w, step=step, total_steps=11)
        torch.testing.assert_close(moved.norm(), torch.tensor(rho, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_radius_follows_the_learning_rate_of_each_group():
    first, second = weight(), weight()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.025}], lr=1.0)
    seen = []

    def closure():
        seen.append((first.detach().clone(), second.detach().clone()))
        return (first**2).sum() + (second**2).sum()

    sharp_backward(closure, SAM(rho=ProportionalToLR(rho_max=0.4, rho_min=0.2, lr_max=0.1)), optimizer)
    lengths = [(moved - clean).norm() * 2**0.5 for clean, moved in zip(*seen, strict=True)]  # one norm for both
    torch.testing.assert_close(torch.stack(lengths), torch.tensor([0.4, 0.25], dtype=torch.float64))


def test_a_group_may_have_a_schedule():
    w = weight()
    optimizer = torch.optim.SGD([{"params": [w], "rho": Linear(start=0.0, end=1.0)}], lr=0.1)
    assert offsets(SAM(rho=9.0), optimizer, w, step=1, total_steps=3).norm() == pytest.approx(0.5)
    optimizer.param_groups[0]["rho"] = 0.25
    assert offsets(ASAM(rho=9.0, scaling="all", eta=0), optimizer, w).norm() > 0


def test_refusals():
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match=r"pass step=\.\.\. \(and total_steps=\.\.\.\)"):
        offsets(SAM(rho=Linear(start=0, end=1)), optimizer, w)
    with pytest.raises(ValueError, match=r"`max_epochs` to be known for a linear schedule"):
        offsets(SAM(rho=Linear(start=0, end=1)), optimizer, w, step=0)
    with pytest.raises(ValueError, match=r"follows the learning rate, which is not known; give the optimizer"):
        offsets(SAM(rho=ProportionalToLR(rho_max=1.0, lr_max=1.0)), [w], w)
    with pytest.raises(ValueError, match=r"Expected the radius `rho` to be a number >= 0 but got -1"):
        offsets(SAM(rho=Linear(start=-1, end=-1)), optimizer, w, step=0, total_steps=2)
    with pytest.raises(ValueError, match=r"`lr_max` to be above `lr_min`"):
        ProportionalToLR(rho_max=1.0, lr_max=0.1, lr_min=0.1)
    with pytest.raises(ValueError, match=r"`rho` to be a finite number > 0 but got 0"):
        SAM(rho=0)
    with pytest.raises(ValueError, match=r"begin with epoch 0"):
        Piecewise(values={3: 0.1})
    optimizer.param_groups[0]["rho"] = True
    with pytest.raises(ValueError, match=r"optimizer group option `rho` to be a number >= 0 but got True"):
        offsets(SAM(), optimizer, w)

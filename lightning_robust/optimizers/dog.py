# SPDX-License-Identifier: Apache-2.0
"""DoG and L-DoG: step sizes from the distance travelled and the gradients seen."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.optimizers.base import ExactOptimizer

__all__ = ["DoG", "PolynomialAverage", "distance_over_gradients"]


def distance_over_gradients(distance: Tensor, squared_gradients: Tensor, lr: float = 1.0) -> Tensor:
    r"""The step size :math:`c\,\bar r / \sqrt{G}`.

    Args:
        distance: largest distance from the start so far.
        squared_gradients: sum of the squared gradient norms so far, positive.
        lr: the factor ``c``.

    Example:
        >>> distance_over_gradients(torch.tensor(3.0), torch.tensor(4.0))
        tensor(1.5000)
    """
    return lr * distance / squared_gradients.sqrt()


class DoG(ExactOptimizer):
    r"""Distance over gradients: SGD without a learning rate to tune.

    .. math::
        \eta_t = c\,\frac{\max_{i \le t} \lVert w_i - w_0 \rVert}{\sqrt{\epsilon + \sum_{i \le t} \lVert g_i \rVert^2}},
        \qquad w_{t+1} = w_t - \eta_t g_t

    where the distance begins with ``reps_rel * (1 + |w_0|)``. One step size per parameter group, or per tensor with
    ``layer_wise`` (L-DoG). :meth:`step_sizes` tells the latest.

    The paper's results are those of the *average* of the iterates, which takes the place of a decaying learning rate:
    ``torch.optim.swa_utils.AveragedModel(model, avg_fn=PolynomialAverage())``, or in Lightning
    ``WeightAveraging(avg_fn=PolynomialAverage())``. Do not add a learning-rate schedule.

    A parameter without a gradient is left alone, and starts to count with its first one.

    Cost: 1 pass per step; a copy of the initial weights in memory and in checkpoints.

    Args:
        params: parameters or groups.
        reps_rel: the initial distance relative to ``1 + |w_0|``; 1e-6, or 1e-4 for networks with BatchNorm.
        lr: the factor ``c``; the paper advises against changing it.
        weight_decay: added to the gradient times the weights.
        eps: added once to the sum of squared gradients.
        layer_wise: L-DoG, a step size per tensor; the paper fine-tunes large networks with it.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: in a step, for sparse gradients.

    References:
        Ivgi et al., DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule, arXiv 2302.12022. Their code
        crashes on parameters without gradient, adds weight decay to ``.grad`` in place and can fix the first step size;
        here neither is touched and it is not offered.

    Example:
        >>> from lightning_robust.optimizers import DoG
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = DoG([weight], reps_rel=0.5)
        >>> weight.grad = torch.tensor([0.0, 6.0])
        >>> optimizer.step()
        >>> weight.data, optimizer.step_sizes()[0]
        (tensor([3., 1.]), tensor(0.5000))
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reps_rel: float = 1e-6,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        layer_wise: bool = False,
    ) -> None:
        check_positive("reps_rel", reps_rel)
        check_positive("lr", lr)
        check_non_negative("weight_decay", weight_decay)
        check_positive("eps", eps)
        defaults = {"reps_rel": reps_rel, "lr": lr, "weight_decay": weight_decay, "eps": eps, "layer_wise": layer_wise}
        super().__init__(params, defaults)

    @override
    def update(self) -> None:
        for group in self.param_groups:
            parameters = self.with_gradient(group)
            if parameters:
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                if group["weight_decay"]:
                    gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
                etas = self._step_sizes(group, parameters, gradients)
                torch._foreach_sub_(parameters, torch._foreach_mul(gradients, etas))

    def step_sizes(self) -> list[Tensor]:
        """The step size that each parameter took last, a scalar each, in the order of the groups.

        Parameters that took no step yet have none, and with one step size per group its parameters share it.
        """
        return [
            self.state[parameter]["eta"] if group["layer_wise"] else group["eta"]
            for group in self.param_groups
            for parameter in group["params"]
            if "start" in self.state.get(parameter, {})
        ]

    def _step_sizes(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        new = [parameter for parameter in parameters if "start" not in self.state[parameter]]
        for parameter in new:
            self.state[parameter]["start"] = parameter.detach().clone()
        moved = _norms(list(torch._foreach_sub(parameters, [self.state[each]["start"] for each in parameters])))
        squares = [norm.square() for norm in _norms(gradients)]
        if not group["layer_wise"]:
            return self._of_the_group(group, parameters, moved, squares)
        for parameter, norm in zip(new, _norms(new), strict=True):
            self.state[parameter]["distance"] = group["reps_rel"] * (1 + norm)
            self.state[parameter]["squared_gradients"] = torch.full_like(norm, group["eps"])
        states = [self.state[parameter] for parameter in parameters]
        for state, distance, square in zip(states, moved, squares, strict=True):
            state["distance"] = torch.maximum(state["distance"], distance)
            state["squared_gradients"] = state["squared_gradients"] + square
            state["eta"] = distance_over_gradients(state["distance"], state["squared_gradients"], group["lr"])
        return [state["eta"] for state in states]

    @staticmethod
    def _of_the_group(
        group: dict[str, Any], parameters: list[Tensor], moved: list[Tensor], squares: list[Tensor]
    ) -> list[Tensor]:
        device = parameters[0].device
        total = _stack(squares, device).sum()
        if "distance" not in group:
            group["distance"] = group["reps_rel"] * (1 + torch.linalg.vector_norm(_stack(_norms(parameters), device)))
            group["squared_gradients"] = torch.full_like(total, group["eps"])
        # unlike the state of parameters, options of groups stay where a checkpoint was loaded to
        before = group["distance"].to(device), group["squared_gradients"].to(device)
        group["distance"] = torch.maximum(before[0], torch.linalg.vector_norm(_stack(moved, device)))
        group["squared_gradients"] = before[1] + total
        group["eta"] = distance_over_gradients(group["distance"], group["squared_gradients"], group["lr"])
        return [group["eta"].to(parameter.device) for parameter in parameters]


class PolynomialAverage:
    r"""Average of iterates in which early ones fade polynomially; a function for ``AveragedModel(avg_fn=...)``.

    .. math:: \bar w_t = \Big(1 - \frac{1 + \gamma}{t + \gamma}\Big)\,\bar w_{t-1} + \frac{1 + \gamma}{t + \gamma}\,w_t

    Integer buffers (BatchNorm's counter) take the present value.

    Cost: one pass over the weights per average.

    Args:
        gamma: 0 is the plain mean; 8 in the DoG paper.

    Raises:
        ValueError: ``gamma`` is negative.

    References:
        Shamir and Zhang, Stochastic Gradient Descent for Non-smooth Optimization, arXiv 1212.1824; its use with DoG:
        arXiv 2302.12022.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> averaged = AveragedModel(torch.nn.Linear(2, 1), avg_fn=PolynomialAverage(gamma=8.0))
    """

    def __init__(self, *, gamma: float = 8.0) -> None:
        check_non_negative("gamma", gamma)
        self.gamma = gamma

    def __repr__(self) -> str:
        return f"PolynomialAverage(gamma={self.gamma})"

    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        """Return the new average.

        Args:
            averaged: the average so far.
            current: the newest weights.
            num_averaged: how many went into the average.
        """
        if not (current.is_floating_point() or current.is_complex()):
            return current
        share = (1 + self.gamma) / (num_averaged + 1 + self.gamma)
        return averaged + (current - averaged) * share


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norm of each tensor, in float32 at least."""
    if not tensors:
        return []
    return list(torch._foreach_norm([each if each.dtype == torch.float64 else each.float() for each in tensors]))


def _stack(scalars: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack([scalar.to(device) for scalar in scalars])

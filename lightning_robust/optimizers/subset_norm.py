# SPDX-License-Identifier: Apache-2.0
"""Adam and AdaGrad whose second moment is shared by a subset of the weights."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.optimizers.base import ExactOptimizer

__all__ = ["SubsetNorm", "SubsetSize", "subset_layout", "subset_second_moment"]

SubsetSize = int | Literal["heuristics"]


def subset_layout(shape: torch.Size | tuple[int, ...], subset_size: SubsetSize) -> tuple[tuple[int, int], int]:
    """The matrix form of a tensor, and the dimension along which its subsets lie.

    Args:
        shape: shape of the tensor.
        subset_size: ``"heuristics"``: the smaller dimension of a matrix, with the dimensions of a convolution kernel
            after the first taken together, and single entries for vectors; ``k > 0``: ``k`` consecutive entries of the
            flattened tensor; ``k < 0``: ``sqrt(numel) / |k|`` of them. A size that does not divide the tensor is
            lowered to the nearest that does.

    Example:
        >>> subset_layout((6, 8), "heuristics"), subset_layout((6, 8), 10), subset_layout((6, 8), -2)
        (((6, 8), 0), ((6, 8), 1), ((16, 3), 1))
    """
    entries = math.prod(shape)
    if subset_size == "heuristics":
        if len(shape) < 2 or entries == 0:
            return (entries, 1), 1
        rows, columns = shape[0], entries // shape[0]
        return (rows, columns), 1 if rows >= columns else 0
    wanted = subset_size if subset_size > 0 else int(math.sqrt(entries) / -subset_size)
    size = next(size for size in range(min(max(wanted, 1), max(entries, 1)), 0, -1) if entries % size == 0)
    return (entries // size, size), 1


def subset_second_moment(gradient: Tensor, subset_size: SubsetSize) -> Tensor:
    """Sum of squares of the gradient over each subset, in float32 at least; its matrix form keeps both dimensions.

    Args:
        gradient: any shape.
        subset_size: see :func:`subset_layout`.

    Example:
        >>> subset_second_moment(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "heuristics")
        tensor([[17., 29., 45.]])
    """
    matrix, dimension = subset_layout(gradient.shape, subset_size)
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    return wide.reshape(matrix).square().sum(dimension, keepdim=True)


class SubsetNorm(ExactOptimizer):
    r"""Adam with one second moment per subset of weights, a small part of Adam's memory.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1)\, g, \qquad
        v_S \leftarrow \beta_2 v_S + (1-\beta_2) \sum_{i \in S} g_i^2, \qquad
        w_i \leftarrow w_i - \eta\, \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, \frac{m_i}{\sqrt{v_S} + \epsilon}

    With :math:`\beta_2 = 1` the squares are summed, as in AdaGrad. Over a subset they are summed, not averaged, so
    steps are smaller than Adam's by the square root of the subset's size and the learning rate is larger: about ten
    times Adam's. Meant for large linear layers; ``subset_size=1`` in the group of the others is Adam for them:

    ``SubsetNorm([{"params": matrices}, {"params": others, "subset_size": 1}], lr=1e-2)``.

    Cost: 1 pass per step; the momentum and one number per subset in memory.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of momentum and second moment; the first may be 0 (no momentum, no memory for it), the second 1
            (AdaGrad).
        eps: added to the square root.
        weight_decay: shrinks the weights by ``lr * weight_decay`` after the step, apart from the gradient.
        subset_size: which weights share a second moment; see :func:`subset_layout`. An option of groups, too.
        bias_correction: undo the start of the averages at zero; AdaGrad's sum has none to undo.

    Raises:
        ValueError: an argument or a group option is out of range.
        RuntimeError: in a step, for sparse gradients.

    References:
        Nguyen and Nguyen, Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum with Convergence
        Guarantees, arXiv 2411.07120; the subspace momentum is not implemented. Their code accepts matrices only for
        "heuristics", and with bias correction its AdaGrad takes steps of length zero.

    Example:
        >>> from lightning_robust.optimizers import SubsetNorm
        >>> weight = torch.nn.Parameter(torch.zeros(6, 8))
        >>> optimizer = SubsetNorm([weight], lr=1e-2)
        >>> weight.grad = torch.ones(6, 8)
        >>> optimizer.step()
        >>> optimizer.denominator(weight).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        subset_size: SubsetSize = "heuristics",
        bias_correction: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "subset_size": subset_size,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            check_non_negative(name, options[name])
        first, second = options["betas"]
        if not (0 <= first < 1 and 0 <= second <= 1):
            raise ValueError(f"Expected `betas` to be in [0, 1) and [0, 1] but got {options['betas']!r}.")
        size = options["subset_size"]
        if size != "heuristics" and (isinstance(size, bool) or not isinstance(size, int) or size == 0):
            raise ValueError(f"Expected `subset_size` to be 'heuristics' or an integer other than 0 but got {size!r}.")
        super().add_param_group(param_group)

    @override
    def update(self) -> None:
        for group in self.param_groups:
            for parameter in self.with_gradient(group):
                assert parameter.grad is not None
                self._step(group, parameter, parameter.grad)

    def denominator(self, parameter: Tensor) -> Tensor:
        """What the last step of a parameter was divided by, one number per subset.

        Args:
            parameter: one that this optimizer has stepped.

        Raises:
            KeyError: it has not been stepped.
        """
        group = next(group for group in self.param_groups if any(each is parameter for each in group["params"]))
        if not self.state.get(parameter):
            raise KeyError("This parameter has taken no step yet, so it was divided by nothing.")
        return _denominator(self.state[parameter], group["eps"])

    def _step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        first, second = group["betas"]
        squares = subset_second_moment(gradient, group["subset_size"])
        if not state:
            state["step"] = 0
            state["exp_avg_sq"] = torch.zeros_like(squares)
            if first > 0:
                state["exp_avg"] = torch.zeros_like(gradient)
        state["step"] += 1
        if second < 1:
            state["exp_avg_sq"].mul_(second).add_(squares, alpha=1 - second)
        else:
            state["exp_avg_sq"].add_(squares)
        numerator = state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first) if first > 0 else gradient
        size = group["lr"]
        if group["bias_correction"]:
            undo = math.sqrt(1 - second ** state["step"]) if second < 1 else 1.0
            size *= undo / (1 - first ** state["step"])
        matrix, _ = subset_layout(gradient.shape, group["subset_size"])
        step = numerator.reshape(matrix) / _denominator(state, group["eps"])
        parameter.sub_(step.reshape(parameter.shape), alpha=size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _denominator(state: dict[str, Any], eps: float) -> Tensor:
    denominator: Tensor = state["exp_avg_sq"].sqrt().add_(eps)
    return denominator

# SPDX-License-Identifier: Apache-2.0
"""Mixout: weights are mixed with those that fine-tuning began with."""

from typing import Literal

from torch import Tensor

from lightning_robust.checks import check_choice, check_in_range

__all__ = ["mixout"]


def mixout(
    weight: Tensor, target: Tensor, keep: Tensor, *, p: float = 0.7, grad: Literal["reference", "true"] = "reference"
) -> Tensor:
    r"""Weights of which a part is replaced by those of another network, with the mean kept.

    .. math:: \tilde w = \frac{M w + (1 - M)\,w_0 - p\,w_0}{1 - p} = w_0 + \frac{M\,(w - w_0)}{1 - p},
        \qquad \mathrm{E}[\tilde w] = w \text{ for } M \sim \mathrm{Bernoulli}(1 - p)

    Dropout is the special case :math:`w_0 = 0`.

    Args:
        weight: The weights :math:`w` that are trained.
        target: The weights :math:`w_0` that take their place, of the same shape.
        keep: The mask :math:`M` of zeros and ones. A row ``[in]`` holds for all rows of a weight ``[out, in]``, so that
            whole inputs are switched, as dropout of the inputs would.
        p: Probability with which a weight is replaced; with 1 the result is ``target``.
        grad: Derivative with respect to ``weight``: ``"true"`` is that of the formula, :math:`M / (1 - p)`;
            ``"reference"`` is :math:`M`, as in the authors' code.

    Shape:
        That of ``weight``.

    Raises:
        ValueError: If an argument is out of range or the shapes differ.

    References:
        Lee et al., Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models,
        arXiv 1909.11299.

    Example:
        >>> import torch
        >>> from lightning_robust.regularization import mixout
        >>> mixout(torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 0.0]), p=0.5)
        tensor([[5., 1.]])
    """
    check_in_range("p", p, 0.0, 1.0)
    check_choice("grad", grad, ("reference", "true"))
    if weight.shape != target.shape:
        raise ValueError(f"Expected `target` of shape {tuple(weight.shape)} but got {tuple(target.shape)}.")
    if grad == "reference":
        # the same value to the last bit, with 1 - p times the derivative
        fixed = weight.detach()
        weight = fixed + (1 - p) * (weight - fixed)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return target + keep * (weight - target) * scale

# SPDX-License-Identifier: Apache-2.0
"""Soft labels of a teacher in few numbers, and back."""

from typing import Literal

import torch
from torch import Tensor

from lightning_robust.checks import check_choice, check_integer

__all__ = ["Form", "compress_soft_labels", "recover_soft_labels"]

#: What the classes that are not stored get.
Form = Literal["hard", "smoothing", "marginal_smoothing", "marginal_renorm"]
FORMS = ("hard", "smoothing", "marginal_smoothing", "marginal_renorm")


def compress_soft_labels(probabilities: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """The ``k`` most probable classes and their probabilities.

    Args:
        probabilities: Class probabilities of a teacher, ``[B, C]`` or ``[B, C, ...]``.
        k: How many classes to keep; all of them where there are fewer.

    Shape:
        Classes and probabilities ``[B, k, ...]``, the most probable first.

    References:
        Shen and Xing, arXiv:2112.01528.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import compress_soft_labels
        >>> compress_soft_labels(torch.tensor([[0.1, 0.7, 0.2]]), k=2)
        (tensor([[1, 2]]), tensor([[0.7000, 0.2000]]))
    """
    check_integer("k", k, 1)
    value, index = probabilities.topk(min(k, probabilities.shape[1]), dim=1)
    return index, value


def recover_soft_labels(
    index: Tensor, value: Tensor | None = None, *, num_classes: int, form: Form = "marginal_smoothing"
) -> Tensor:
    r"""Class probabilities from the few that were stored.

    ``"hard"`` is one for the first stored class. ``"smoothing"`` keeps the probability of the first class and spreads
    what is missing to one evenly over all others, ``"marginal_smoothing"`` does so with all ``k`` stored classes, and
    ``"marginal_renorm"`` gives nothing to the others and divides the stored ones by their sum.

    Args:
        index: The stored classes, ``[B]`` or ``[B, k]`` or ``[B, k, ...]``, the most probable first.
        value: Their probabilities, of the same shape; not needed for ``"hard"``.
        num_classes: Number of all classes ``C``.
        form: What the other classes get.

    Shape:
        ``[B, C, ...]``; of the type of ``value``, float32 without it.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Shen and Xing, arXiv:2112.01528, whose code has ``k`` 5 or 10 in the name of the form.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import recover_soft_labels
        >>> index, value = torch.tensor([[1, 3]]), torch.tensor([[0.6, 0.2]])
        >>> recover_soft_labels(index, value, num_classes=4)
        tensor([[0.1000, 0.6000, 0.1000, 0.2000]])
        >>> recover_soft_labels(index, value, num_classes=4, form="marginal_renorm")
        tensor([[0.0000, 0.7500, 0.0000, 0.2500]])
    """
    check_integer("num_classes", num_classes, 1)
    check_choice("form", form, FORMS)
    if value is None and form != "hard":
        raise ValueError(f"Expected `value`, the probabilities of the stored classes, for `form` = {form!r}.")
    value = torch.ones_like(index, dtype=torch.float32) if value is None else value
    if index.ndim < 1 or index.is_floating_point() or value.shape != index.shape:
        raise ValueError(
            f"Expected `index` to be classes [B] or [B, k] and `value` their probabilities but got {index.dtype} "
            f"{tuple(index.shape)} and {tuple(value.shape)}."
        )
    if index.ndim == 1:
        index, value = index.unsqueeze(1), value.unsqueeze(1)
    if form in ("hard", "smoothing"):
        index, value = index[:, :1], value[:, :1]
    if index.shape[1] > num_classes:
        raise ValueError(f"Expected at most `num_classes` = {num_classes} stored classes but got {index.shape[1]}.")
    return _spread(index.long(), value, num_classes, form)


def _spread(index: Tensor, value: Tensor, num_classes: int, form: Form) -> Tensor:
    if form == "hard":
        value = torch.ones_like(value)
    elif form == "marginal_renorm":
        value = value / value.sum(1, keepdim=True).clamp(min=1e-12)
    others = max(num_classes - index.shape[1], 1)
    # Rounding may leave less than nothing for the others.
    missing = (1 - value.sum(1, keepdim=True)).clamp(min=0) / others
    left = torch.zeros_like(missing) if form in ("hard", "marginal_renorm") else missing
    shape = (len(index), num_classes, *index.shape[2:])
    return left.expand(shape).scatter(1, index, value)

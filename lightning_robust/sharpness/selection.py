# SPDX-License-Identifier: Apache-2.0
"""Which weights a sharpness-aware method perturbs."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from lightning_robust.checks import check_integer
from lightning_robust.sharpness.weights import Weights

__all__ = ["ParameterSelection"]

# by name: timm and others bring normalisation layers of their own; a linear layer that normalises its weights is none
_NORM = re.compile(r"Norm(?!ed|Lin|Mlp|aliz)")


class ParameterSelection:
    """Chooses parameters by name, shape and kind; every condition must hold.

    A method perturbs the chosen parameters only, and takes its norms over them; all parameters still get their gradient
    at the perturbed point. An option ``perturb=False`` in an optimizer group leaves out that group whatever is chosen
    here.

    Args:
        include: regular expressions, one of which must occur in the name; any name when ``None``.
        exclude: regular expressions, none of which may occur in the name.
        min_ndim: least number of dimensions: 2 leaves out biases and the weights of normalisation layers.
        bias: whether parameters called "bias" count.
        norm: whether parameters of normalisation layers count.
        only_norm: only parameters of normalisation layers count, as in SAM-ON.

    Raises:
        ValueError: a pattern that is not a regular expression, or ``only_norm`` without ``norm``; in the first step, if
            nothing is chosen.

    References:
        Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226
        (``only_norm``, with a radius about ten times larger).

    Example:
        >>> from torch import nn
        >>> from lightning_robust.sharpness import ParameterSelection, Weights
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> weights = ParameterSelection(bias=False, norm=False).apply(Weights.of(net))
        >>> weights.perturbed.names
        ['0.weight', '2.weight']
    """

    def __init__(
        self,
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        bias: bool = True,
        norm: bool = True,
        only_norm: bool = False,
    ) -> None:
        check_integer("min_ndim", min_ndim, 0)
        if only_norm and not norm:
            raise ValueError("Expected `norm` to be True when `only_norm` is; nothing would be left.")
        self.include = None if include is None else _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.min_ndim = min_ndim
        self.bias = bias
        self.norm = norm
        self.only_norm = only_norm

    def __repr__(self) -> str:
        return f"ParameterSelection({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def mask(self, weights: Weights) -> list[bool]:
        """One entry per weight: whether it may be perturbed.

        Args:
            weights: the weights to choose from.
        """
        owners = weights.owners or [None] * len(weights)
        return [
            self._chooses(name, tensor, owner, option)
            for name, tensor, owner, option in zip(weights.names, weights.tensors, owners, weights.options, strict=True)
        ]

    def apply(self, weights: Weights) -> Weights:
        """The same weights, of which only the chosen ones may be perturbed.

        Args:
            weights: the weights to choose from.

        Raises:
            ValueError: nothing is chosen, or a choice by kind lacks the module that knows the kinds.
        """
        if self._needs_names() and len(weights) and all(owner is None for owner in weights.owners or [None]):
            raise ValueError(
                "Parameters are chosen by name or kind, but their names are not known; pass the module (module=...)."
            )
        mask = self.mask(weights)
        if len(weights) and not any(mask):
            raise ValueError(
                f"{self!r} chooses none of the {len(weights)} trainable parameters, so nothing would be perturbed; the "
                f"names begin with {weights.names[:3]}."
            )
        return weights.with_movable(mask)

    def _needs_names(self) -> bool:
        return self.include is not None or bool(self.exclude) or self.only_norm or not (self.bias and self.norm)

    def _chooses(self, name: str, tensor: torch.Tensor, owner: nn.Module | None, options: dict[str, object]) -> bool:
        is_norm = owner is not None and _NORM.search(type(owner).__name__) is not None
        return (
            bool(options.get("perturb", True))
            and tensor.ndim >= self.min_ndim
            and (self.include is None or any(re.search(pattern, name) for pattern in self.include))
            and not any(re.search(pattern, name) for pattern in self.exclude)
            and (self.bias or not name.rpartition(".")[2].startswith("bias"))
            and (self.norm or not is_norm)
            and (is_norm or not self.only_norm)
        )


def _patterns(argument: str, value: str | Sequence[str]) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Expected `{argument}` to hold regular expressions but got {pattern!r}: {error}."
            ) from error
    return patterns

# SPDX-License-Identifier: Apache-2.0
"""Normalised logits as the confidence of selective classification."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.metrics.selective import aurc, confidence_score

__all__ = ["LogitNormalization", "normalized_logit_score"]

Centre = Literal["mean", "min"] | float

_CHUNK = 2**22  # float64 elements worked on at once


def normalized_logit_score(logits: Tensor, *, p: float, centre: Centre = "mean") -> Tensor:
    r"""Largest normalised logit, :math:`\max_k z'_k / \lVert z'\rVert_p`, of each sample, in float64.

    Scores of different samples often differ in the last digits, so the computation is in float64 whatever the dtype of
    the logits. Where the centred logits are all zero the score is 0.

    Args:
        logits: Scores before the softmax, ``[N, C]``.
        p: Order of the norm, at least 1 (infinity is allowed).
        centre: What :math:`z'` is: ``"mean"`` or ``"min"`` subtract the row's mean or minimum; a number is added to all
            logits, so 0.0 leaves them as they are.

    Shape:
        ``[N]``.

    Raises:
        ValueError: If ``logits`` are not ``[N, C]`` with ``C >= 2``, if ``p`` is below 1, or for two classes with
            ``"mean"`` or ``"min"``, where every sample has the same score.

    Example:
        >>> import torch
        >>> from lightning_robust.calibration import normalized_logit_score
        >>> normalized_logit_score(torch.tensor([[2.0, -1.0, -1.0]]), p=1).tolist()
        [0.5]
    """
    _check_norm(p, centre)
    _check_logits(logits, centre)
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    shifted = logits.double()
    if centre == "mean":
        shifted = shifted - shifted.mean(1, keepdim=True)
    elif centre == "min":
        shifted = shifted - shifted.min(1, keepdim=True).values
    else:
        shifted = shifted + centre
    largest = shifted.abs().max(1, keepdim=True).values
    # Powers of large logits overflow, those of small ones vanish; a common factor cancels.
    scaled = shifted / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled, p, dim=1)
    return scaled.max(1).values / torch.where(norm > 0, norm, 1.0)


class LogitNormalization:
    r"""Confidence for selective classification that repairs the ranking of models trained with label smoothing.

    .. math:: s(x) = \max_k z'_k / \lVert z'\rVert_p, \quad z' = z - \mathrm{mean}_k\,z_k

    Label smoothing lowers the largest logit most where the prediction is probably right, so the maximum softmax
    probability ranks right and wrong predictions worse. The normalisation cancels that. ``fit`` takes the :math:`p`
    with the smallest AURC on held-out data; where no :math:`p` beats the maximum softmax probability, that stays the
    score. Predictions never change.

    Cost: one pass over the logits in float64 per candidate, in chunks, and a sort of the scores.

    Args:
        candidates: The orders of the norm that ``fit`` tries.
        centre: What is done to a row first; ``"mean"`` or ``"min"`` subtract its mean or minimum, a number is added to
            all logits, so that 0.0 leaves them as they are.
        p: Order of the norm before any fit; ``None`` for the maximum softmax probability.

    Shape:
        Logits ``[N, C]`` and labels ``[N]``; scores ``[N]``.

    Raises:
        ValueError: If an order is below 1, shapes are wrong, logits are not finite, or there are two classes and
            ``centre`` is not a number.

    References:
        Xia et al., arXiv:2403.14715 (who try 1 to 10, and 8 without centring for segmentation). The score is the
        MaxLogit-pNorm of Cattelan and Silva, arXiv:2305.15508, from whom the fall-back is.

    Example:
        >>> import torch
        >>> from lightning_robust.calibration import LogitNormalization
        >>> logits = torch.tensor([[9.0, 7.0, 0.0], [4.0, 1.0, 1.0], [5.0, 1.0, 2.0], [2.0, 2.5, 2.0]])
        >>> normalization = LogitNormalization().fit(logits, torch.tensor([1, 0, 0, 1]))
        >>> normalization.p, round(normalization.aurc_before, 4), round(normalization.aurc_after, 4)
        (1, 0.1458, 0.0625)
        >>> normalization.score(logits).shape
        torch.Size([4])
    """

    def __init__(
        self,
        *,
        candidates: Sequence[float] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        centre: Centre = "mean",
        p: float | None = None,
    ) -> None:
        if len(candidates) == 0:
            raise ValueError("Expected `candidates` to hold at least one order but got none.")
        for order in candidates if p is None else (*candidates, p):
            _check_norm(order, centre)
        self.candidates = tuple(candidates)
        self.centre: Centre = centre
        self.p = p
        self.aurc_before = math.nan  # NaN until the first fit
        self.aurc_after = math.nan

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p!r}, centre={self.centre!r})"

    @torch.no_grad()
    def score(self, logits: Tensor) -> Tensor:
        """Confidence of each sample in float64; without ``p`` the logarithm of the maximum softmax probability.

        Args:
            logits: Scores before the softmax, ``[N, C]``.
        """
        return self._score(logits, self.p)

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor) -> "LogitNormalization":
        """Choose ``p`` on held-out data; the fit on the data of the evaluation is optimistic.

        Args:
            logits: Scores before the softmax, ``[N, C]``.
            labels: Class indices ``[N]``.
        """
        _check_logits(logits, self.centre)
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"Expected `labels` to be class indices [N] with N = {len(logits)} "
                f"but got {labels.dtype} {list(labels.shape)}."
            )
        if not bool(logits.isfinite().all()):
            raise ValueError("Expected `logits` to be finite but got NaN or infinite values.")
        correct = (logits.argmax(1) == labels).cpu()
        areas = {order: float(aurc(self._score(logits, order).cpu(), correct)) for order in (None, *self.candidates)}
        # The first of equals: the maximum softmax probability stays unless it is beaten.
        self.p = min(areas, key=lambda order: areas[order])
        self.aurc_before, self.aurc_after = areas[None], areas[self.p]
        return self

    def _score(self, logits: Tensor, p: float | None) -> Tensor:
        if p is None:
            _check_logits(logits, 0.0)
        rows = max(1, _CHUNK // logits.shape[1])
        return torch.cat(
            [
                confidence_score(part) if p is None else normalized_logit_score(part, p=p, centre=self.centre)
                for part in torch.split(logits, rows)
            ]
        )


def _check_norm(p: float, centre: Centre) -> None:
    if not p >= 1:
        raise ValueError(f"Expected the order `p` of the norm to be >= 1 but got {p!r}.")
    if isinstance(centre, str):
        if centre not in ("mean", "min"):
            raise ValueError(f"Expected `centre` to be 'mean', 'min' or a number but got {centre!r}.")
    elif not math.isfinite(centre):
        raise ValueError(f"Expected `centre` to be 'mean', 'min' or a finite number but got {centre!r}.")


def _check_logits(logits: Tensor, centre: Centre) -> None:
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            "Expected `logits` to be a floating point tensor [N, C] with N >= 1 and C >= 2 "
            f"but got {logits.dtype} {list(logits.shape)}."
        )
    if logits.shape[1] == 2 and isinstance(centre, str):
        raise ValueError(
            f'With two classes and centre="{centre}" every sample has the same score; use a number such as centre=0.0, '
            "or the maximum softmax probability."
        )

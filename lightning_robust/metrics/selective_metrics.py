# SPDX-License-Identifier: Apache-2.0
"""Areas under the risk-coverage curve as metrics."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.metrics.selective import (
    Area,
    RiskCoverage,
    Ties,
    augrc,
    aurc,
    confidence_score,
    excess_aurc,
    risk_coverage_curve,
)

__all__ = ["AUGRC", "AURC", "ExcessAURC", "SelectiveAccumulator"]


class SelectiveAccumulator(Metric):
    """Base of the selective metrics: keeps a score and the correctness of every sample.

    The state is 16 bytes per sample, in float64 in every precision of the module: a rank decides, and scores of
    confident samples differ in the last digits. Processes may have different numbers of samples, or none; the value is
    that of all samples together. All subclasses share one state in a `torchmetrics.MetricCollection`.

    Args:
        **kwargs: Options of `torchmetrics.Metric`, such as ``process_group`` or ``compute_on_cpu``.
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    selective_scores: list[Tensor]
    selective_correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A process without samples sends an empty tensor of this dtype; it has to be that of the others.
        super().set_dtype(torch.float64)
        self.add_state("selective_scores", default=[], dist_reduce_fx="cat")
        self.add_state("selective_correct", default=[], dist_reduce_fx="cat")

    @override
    def update(self, logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: Scores before the softmax, ``[B, C]``.
            labels: Class indices ``[B]``.
            scores: Confidences ``[B]`` in place of the maximum softmax probability, such as those of
                `lightning_robust.calibration.LogitNormalization`.

        Raises:
            ValueError: If a shape is not the expected one.
        """
        if logits.ndim != 2 or not logits.is_floating_point() or labels.shape != logits.shape[:1]:
            raise ValueError(
                "Expected `logits` to be a floating point tensor [B, C] and `labels` to be class indices [B] but got "
                f"{logits.dtype} {list(logits.shape)} and {list(labels.shape)}."
            )
        if scores is not None and scores.shape != labels.shape:
            raise ValueError(f"Expected `scores` of shape {list(labels.shape)} but got {list(scores.shape)}.")
        scores = confidence_score(logits) if scores is None else scores.to(torch.float64)
        self.selective_scores.append(scores.detach())
        self.selective_correct.append((logits.argmax(1) == labels).to(scores))

    def samples(self) -> tuple[Tensor, Tensor]:
        """Scores and correctness of all samples, ``[N]`` each."""
        if len(self.selective_scores) == 0:  # a list, or one tensor once processes have exchanged theirs
            return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        return dim_zero_cat(self.selective_scores), dim_zero_cat(self.selective_correct)

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Do nothing: the scores stay in float64.

        Args:
            dst_type: Ignored.
        """
        return self


class AURC(SelectiveAccumulator):
    r"""Area under the risk-coverage curve: how well the confidence ranks right predictions before wrong ones.

    .. math:: \text{AURC} = \frac{1}{N}\sum_{i=1}^{N} \frac{E_i}{i}

    with :math:`E_i` the errors among the :math:`i` most confident samples. The confidence is the maximum softmax
    probability, or whatever is passed as ``scores``. ``compute`` returns a float64 scalar, NaN if there was no sample;
    ``curve`` returns the curve itself.

    Cost: one softmax per batch in float64, 16 bytes per sample, one sort at the end.

    Args:
        ties: ``"expected"`` averages over all orders of samples with equal scores, ``"order"`` keeps the order in which
            they came.
        area: ``"mean"`` for the sum above, ``"trapezoid"`` as in torch-uncertainty, ``"from_zero"`` with a point (0, 0)
            before the curve; see :func:`~lightning_robust.metrics.aurc`.
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        ``update(logits, labels)`` with ``[B, C]`` and ``[B]``, and ``scores`` ``[B]``.

    Raises:
        ValueError: In ``update`` for wrong shapes, in ``compute`` if a score was NaN.

    References:
        Geifman and El-Yaniv, arXiv:1705.08500.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import AURC
        >>> metric = AURC()
        >>> metric.update(torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 0, 0]))
        >>> round(metric.compute().item(), 4)
        0.1111
    """

    def __init__(self, *, ties: Ties = "expected", area: Area = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("ties", ties, ("expected", "order"))
        check_choice("area", area, ("mean", "trapezoid", "from_zero"))
        self.ties: Ties = ties
        self.area: Area = area

    def curve(self) -> RiskCoverage:
        """The curve of the samples that this process has seen."""
        return risk_coverage_curve(*self.samples(), ties=self.ties)

    @override
    def compute(self) -> Tensor:
        """The area for all samples seen."""
        scores, correct = self.samples()
        return aurc(scores, correct, ties=self.ties, area=self.area) if len(scores) else _nothing(self)


class ExcessAURC(AURC):
    """E-AURC: the AURC minus that of the best possible order; does not reward accuracy.

    Cost: as `AURC`.

    Args:
        ties: As for `AURC`.
        area: As for `AURC`.
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        As `AURC`.

    References:
        Geifman et al., arXiv:1805.08206; see :func:`~lightning_robust.metrics.excess_aurc`.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import ExcessAURC
        >>> metric = ExcessAURC()
        >>> metric.update(torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 0, 0]))
        >>> metric.compute().item()
        0.0
    """

    @override
    def compute(self) -> Tensor:
        """The area for all samples seen."""
        scores, correct = self.samples()
        return excess_aurc(scores, correct, ties=self.ties, area=self.area) if len(scores) else _nothing(self)


class AUGRC(SelectiveAccumulator):
    r"""Area under the generalised risk-coverage curve, which does not overweight the most confident samples.

    .. math:: \text{AUGRC} = (1 - \text{AUROC})\,a\,(1-a) + \tfrac12 (1-a)^2

    with the accuracy :math:`a` and the AUROC of the confidence for telling right predictions from wrong ones.

    Cost: as `AURC`.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        As `AURC`.

    References:
        Traub et al., arXiv:2407.01032; see :func:`~lightning_robust.metrics.augrc`.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import AUGRC
        >>> metric = AUGRC()
        >>> metric.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> metric.compute().item()
        0.125
    """

    @override
    def compute(self) -> Tensor:
        """The area for all samples seen."""
        scores, correct = self.samples()
        return augrc(scores, correct) if len(scores) else _nothing(self)


def _nothing(metric: Metric) -> Tensor:
    return torch.tensor(torch.nan, dtype=torch.float64, device=metric.device)

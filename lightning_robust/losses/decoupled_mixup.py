# SPDX-License-Identifier: Apache-2.0
"""Decoupled mixup: each of two mixed classes is also told apart from all others without its competitor."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["DecoupledMixup", "decoupled_mixup_loss"]

Mode = Literal["both", "less", "more"]


def decoupled_mixup_loss(
    logits: Tensor,
    target: Tensor | MixedTarget | Target,
    *,
    eta: float | tuple[float, float] = 0.1,
    mode: Mode = "both",
) -> Tensor:
    r"""Per-sample cross-entropy of a mixture plus a decoupled term for each of its two classes.

    .. math:: \ell = -\sum_k t_k \log p_k + \sum_{(i,j)} \eta_i \Big(\log \sum_{k \ne j} e^{z_k} - z_i\Big)

    with :math:`(i, j)` the two labels in both orders. Samples mixed with their own class have the cross-entropy alone.

    Args:
        logits: Scores before the softmax, ``[B, C]``.
        target: A mixture of two labels, or class probabilities, in which the two largest are that mixture; for class
            indices this is the cross-entropy.
        eta: Weight of the decoupled terms, each times the share of its label; a pair of numbers is used as it is, for
            the first label and the second.
        mode: Which labels have a decoupled term: "both", the one with the smaller share ("less") or the larger.

    Shape:
        ``[B]``, not reduced.

    References:
        Liu et al., arXiv:2203.10761.

    Example:
        >>> import torch
        >>> target = MixedTarget(torch.tensor([0]), torch.tensor([2]), torch.tensor(0.75))
        >>> decoupled_mixup_loss(torch.zeros(1, 3), target)  # log 3 + 0.1 log 2
        tensor([1.1679])
    """
    with autocast_off(logits):
        wide = full_precision(logits)
        seen = Target.of(wide, target)
        if not seen.soft:
            return -seen.expected(wide.log_softmax(1))
        if seen.pair is not None:
            plain, decoupled = _terms(wide, seen, seen.pair, eta, mode)
            return plain + decoupled
        _, decoupled = _terms(wide, seen, _two_largest(seen.probabilities(wide)), eta, mode)
        return decoupled - seen.expected(wide.log_softmax(1))


def _terms(
    logits: Tensor, target: Target, pair: MixedTarget, eta: float | tuple[float, float], mode: Mode
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each sample and its decoupled terms."""
    first, second = pair.first.unsqueeze(1), pair.second.unsqueeze(1)
    z_first, z_second = (logits.gather(1, index).squeeze(1) for index in (first, second))
    rest = _log_sum_of_others(logits, first, second)  # from it follow the three sums that are needed
    without_second, without_first = torch.logaddexp(rest, z_first), torch.logaddexp(rest, z_second)
    same = pair.first == pair.second
    of_all = torch.logaddexp(without_second, torch.where(same, -torch.inf, z_second))
    plain = pair.lam * (of_all - z_first), (1 - pair.lam) * (of_all - z_second)
    weights = _weights(pair.lam, eta, mode)
    decoupled = weights[0] * (without_second - z_first), weights[1] * (without_first - z_second)
    if target.weight is not None:
        of_first, of_second = target.weight[pair.first], target.weight[pair.second]
        plain = of_first * plain[0], of_second * plain[1]
        decoupled = of_first * decoupled[0], of_second * decoupled[1]
    return plain[0] + plain[1], torch.where(same, 0.0, decoupled[0] + decoupled[1])


def _log_sum_of_others(logits: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of all classes beside two, ``[B, ...]``."""
    others = logits.scatter(1, torch.cat([first, second], 1), -torch.inf)
    if logits.shape[1] == 2:
        return others.logsumexp(1)
    # Any third class serves as the label of a cross-entropy, whose kernel is several times faster than logsumexp.
    third = torch.zeros_like(first)
    for _ in range(2):
        third = torch.where((third == first) | (third == second), third + 1, third)
    return F.cross_entropy(others, third.squeeze(1), reduction="none") + logits.gather(1, third).squeeze(1)


def _weights(lam: Tensor, eta: float | tuple[float, float], mode: Mode) -> tuple[Tensor, Tensor]:
    """Weights of the decoupled terms of both labels."""
    if isinstance(eta, tuple):
        weights = torch.full_like(lam, eta[0]), torch.full_like(lam, eta[1])
    else:
        weights = eta * lam, eta * (1 - lam)
    if mode == "both":
        return weights
    chosen = (lam < 0.5) == (mode == "less")
    return torch.where(chosen, weights[0], 0.0), torch.where(chosen, 0.0, weights[1])


def _two_largest(probabilities: Tensor) -> MixedTarget:
    shares, labels = probabilities.topk(2, 1)
    alone = shares[:, 1] == 0  # mixed with its own class, or not at all
    return MixedTarget(labels[:, 0], torch.where(alone, labels[:, 0], labels[:, 1]), shares[:, 0])


class DecoupledMixup(SampleCriterion):
    r"""Decoupled mixup: the cross-entropy of a mixture, and each mixed class against all others but its competitor.

    .. math:: \ell = -\sum_k t_k \log p_k
              + \eta \sum_{(i,j)} \lambda_i \Big(\log \sum_{k \ne j} e^{z_k} - z_i\Big)

    with :math:`(i, j)` the two labels in both orders and :math:`\lambda_i` their shares. It lets the network be
    confident about both classes at once, which the cross-entropy of a mixture punishes. Class indices give the
    cross-entropy. Do not smooth the labels of a mixture: the classes that were mixed would no longer be known.

    Cost: a copy of the logits and a cross-entropy on it, together some 2.5 cross-entropies; another cross-entropy and a
    search for the two largest entries when the target is class probabilities.

    Args:
        eta: Weight of the decoupled terms; 0.1 as in the official configurations.
        mode: Which labels have a decoupled term: "both", the one with the smaller share ("less") or the one with the
            larger ("more").
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        ``logits`` ``[B, C]``; a mixture of labels ``[B]``, class probabilities ``[B, C]``, in which the two largest
        are the mixture, or class indices ``[B]``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Liu et al., Harnessing Hard Mixed Samples with Decoupled Regularizer, arXiv:2203.10761. The official code
        drops the decoupled terms of a batch with a share of exactly one half, and assigns weights to labels by
        comparing shares with those of the first sample; here each label has its own. The form for binary
        cross-entropy is left out.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import DecoupledMixup, MixedTarget
        >>> target = MixedTarget(torch.tensor([0]), torch.tensor([2]), torch.tensor(0.75))
        >>> DecoupledMixup(eta=0.1)(torch.zeros(1, 3), target)
        tensor(1.1679)
    """

    def __init__(
        self,
        *,
        eta: float = 0.1,
        mode: Mode = "both",
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_non_negative("eta", eta)
        check_choice("mode", mode, get_args(Mode))
        self.eta = eta
        self.mode: Mode = mode

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return decoupled_mixup_loss(logits, target, eta=self.eta, mode=self.mode)

    @override
    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, mode={self.mode!r}, {super().extra_repr()}"

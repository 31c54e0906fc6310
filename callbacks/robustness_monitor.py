# SPDX-License-Identifier: Apache-2.0
"""Accuracy and calibration under attack during validation and test."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.losses import labels_of
from lightning_robust.callbacks._attacked_validation import PREFIXES, AttackedValidation
from lightning_robust.losses import full_precision
from lightning_robust.metrics.accumulator import calibration_sums, table_from_sums
from lightning_robust.metrics.reliability import ReliabilityTable
from lightning_robust.training import BatchAdapter

__all__ = ["RobustnessMonitor"]

_BINS = 15


class RobustnessMonitor(AttackedValidation):
    """Attacks some validation or test images and logs ``val/adv_acc`` and its calibration beside the clean one.

    Logged are, over the attacked images (``test/...`` in tests): ``val/adv_acc``, the accuracy under attack;
    ``val/adv_nll``, its negative log-likelihood; ``val/adv_ece``, its calibration error (15 bins); and
    ``val/adv_conf_right`` and ``val/adv_conf_wrong``, the mean confidence of right and of wrong answers: errors made
    with high confidence are those that nobody suspects. ``val/adv_clean_acc`` and so on are the same numbers of the
    same images without the attack.

    A confidence of answers that do not occur is not logged. ``tables`` holds the reliability tables of both.

    Looks only: the attack runs in ``on_validation_batch_end`` on the batch that was just validated, in the Trainer's
    precision, with the same random starts at every epoch, and leaves weights, gradients, modes and generators alone.
    Lightning's inference mode needs no change, and what ``forward`` logs or counts is counted once.

    Attacked is ``forward`` (or the only network, or ``logits_from``). The first batch of a run compares its logits with
    those of the validation step: a step that normalises the images itself, say, validates another function, and is
    refused. A step that shows no logits, or is run in training mode, is not compared.

    ``ModelCheckpoint(monitor="val/adv_acc", mode="max")`` then keeps the most robust epoch, which matters because
    robust accuracy falls in late epochs while clean accuracy still rises
    (:class:`~lightning_robust.callbacks.OverfittingGuard` watches for that). With ``every_n_epochs`` above 1 the value
    exists in attacked epochs only: elsewhere ``ModelCheckpoint`` and ``EarlyStopping`` find the key missing (an error
    before the first attacked epoch) or old. Let them look equally often: ``ModelCheckpoint(every_n_epochs=N)``, and no
    ``EarlyStopping`` on it.

    Counts and sums are added up over ranks. A distributed sampler pads uneven data with repeated samples, which are
    then counted twice, as in every validation metric. A strong number here is no certificate: stronger attacks only
    lower it.

    Cost: ``attack.passes`` forwards and input-backwards per attacked image, and two forwards; by default 20 passes over
    512 images in every validation.

    Args:
        attack: the attack; when ``None`` ``PGD(eps=8/255, step_size=2/255, steps=20)``. With its ``early_stop`` the
            logged NLL is that of the first point that fools the model, not of the worst.
        every_n_epochs: attack in every n-th epoch of a fit only; see above for callbacks that monitor the value.
        max_samples: attack this many images, the first of the loader, which should not shuffle; ``None`` for all. They
            are shared out over the ranks.
        stages: when to attack: ``"validate"``, ``"test"`` or both.
        dataloader_idx: which loader is attacked if there are several.
        name: distinguishes the values of several monitors: ``val/NAME_acc`` and so on.
        seed: seed of the random starts.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: an argument out of range; when running, images outside the bounds, logits that are not finite, or
            a step that validates another function than the attacked one.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.callbacks import RobustnessMonitor
        >>> monitor = RobustnessMonitor(PGD(eps=4 / 255, steps=20), every_n_epochs=5)
    """

    sums: ClassVar[tuple[int, ...]] = (2, _BINS + 1, 8)
    sum_dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(
        self,
        attack: Attack | None = None,
        *,
        every_n_epochs: int = 1,
        max_samples: int | None = 512,
        stages: Sequence[Literal["validate", "test"]] = ("validate", "test"),
        dataloader_idx: int = 0,
        name: str = "adv",
        seed: int = 0,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(
            every_n_epochs=every_n_epochs,
            max_samples=max_samples,
            stages=stages,
            dataloader_idx=dataloader_idx,
            seed=seed,
            logits_from=logits_from,
            batch=batch,
        )
        self.attack = PGD(eps=8 / 255, step_size=2 / 255, steps=20) if attack is None else attack
        self.name = name
        #: Reliability of the ``"clean"`` and the ``"attacked"`` images of the last validation or test.
        self.tables: dict[str, ReliabilityTable] = {}

    @override
    def measure(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, seed: int) -> Tensor:
        x_adv = self.attack(model, x, y, generator=torch.Generator(x.device).manual_seed(seed))
        with torch.no_grad():
            clean, attacked = (full_precision(model(images)) for images in (x, x_adv))
        labels = labels_of(y)
        return torch.stack([calibration_sums(logits, labels, n_bins=_BINS) for logits in (clean, attacked)])

    @override
    def conclude(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, totals: Tensor) -> None:
        if totals[:, -1].any():
            raise ValueError(
                f"{type(pl_module).__name__} returned NaN or infinite logits for clean or attacked images, which would "
                "pass for robustness; look for diverged weights or overflow in half precision."
            )
        clean, attacked = self.tables["clean"], self.tables["attacked"] = [table_from_sums(sums) for sums in totals]
        prefix = f"{PREFIXES[stage]}/{self.name}"
        values = {f"{prefix}_{key}": value for key, value in _values(attacked).items()}
        values |= {f"{prefix}_clean_{key}": value for key, value in _values(clean).items()}
        for key, value in values.items():
            # every rank has the same sums, so the mean over ranks changes nothing
            pl_module.log(key, value, prog_bar=key == f"{prefix}_acc", sync_dist=True)


def _values(table: ReliabilityTable) -> dict[str, float]:
    right, total = int(table.correct.sum()), int(table.total)
    values = {"acc": float(table.overall_accuracy), "nll": float(table.nll), "ece": float(table.error("l1"))}
    sure_and_right, sure = float(table.correct_confidence_sum.sum()), float(table.confidence_sum.sum())
    if right:
        values["conf_right"] = sure_and_right / right
    if total > right:
        values["conf_wrong"] = (sure - sure_and_right) / (total - right)
    return values

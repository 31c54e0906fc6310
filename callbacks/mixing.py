# SPDX-License-Identifier: Apache-2.0
"""Mixup, CutMix and their kin in the training step of any LightningModule."""

from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_robust.callbacks._label_watch import LabelWatch
from lightning_robust.callbacks._mixing_partners import class_count, refuse_partners, refuse_smoothed_pairs
from lightning_robust.callbacks._smoothing import warn_of_smoothing
from lightning_robust.callbacks.criterion import Criterion
from lightning_robust.checks import check_choice, check_in_range, check_integer, check_kind
from lightning_robust.mixing import Mixer, Mixture
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepCallback, StepContext

__all__ = ["Mixing"]

CPU = torch.device("cpu")


class Mixing(StepCallback):
    """Mixes the samples of each training batch, and their labels.

    Runs in the ``batch`` stage: drawn once per batch, so every pass of a sharpness-aware step sees the same mixture.
    The draws depend on the global seed, rank, epoch and batch, on every device alike, and continue exactly after a
    resume. Validation and test batches are never mixed.

    With ``targets="soft"`` the batch holds class probabilities, which cross-entropies accept; with ``targets="hard"``
    it keeps the label with the larger share of each sample, so that metrics and whatever else a ``training_step``
    does with labels go on working, and the callback :class:`~lightning_robust.callbacks.Criterion` computes the loss of
    both labels. That callback gets both labels in either case. Batches that are not mixed have the same form.

    Cost: that of the mixer; no forward pass, except that ``RegMixup`` doubles the batch.

    Args:
        mixer: Mixes the batch, for example ``Mixup(alpha=1.0)``.
        targets: What takes the place of the labels in the batch: "soft" or "hard".
        num_classes: Number of classes, for soft targets; that of the module, its hyper-parameters or the data when
            ``None``.
        probability: Probability with which a batch is mixed.
        off_epoch: First epoch (counted from 0) without mixing; ``None`` mixes to the end.
        batch: How to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: If an argument is out of range; at setup, if the number of classes is unknown, for hard targets
            without the callback ``Criterion`` or with a mixer that smooths labels, together with another callback that
            mixes or one that remembers single samples; in a step, for labels that cannot be mixed.
        TypeError: In a step, for inputs that are no floating-point numbers.

    References:
        See the mixer, for example :class:`~lightning_robust.mixing.Mixup`.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import Mixing
        >>> from lightning_robust.mixing import CutMix
        >>> callback = Mixing(CutMix(alpha=1.0), probability=0.5)
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    stage: ClassVar[Stage] = Stage.BATCH
    manual_optimization: ClassVar[bool] = True
    #: For other callbacks: the labels of single samples are not known inside.
    mixes_samples: ClassVar[bool] = True

    def __init__(
        self,
        mixer: Mixer,
        *,
        targets: Literal["soft", "hard"] = "soft",
        num_classes: int | None = None,
        probability: float = 1.0,
        off_epoch: int | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(batch=batch)
        check_kind(
            "mixer", mixer, Mixer, "use one of lightning_robust.mixing, Mixup(alpha=1.0) or TimmMixup(...) for example"
        )
        check_choice("targets", targets, ("soft", "hard"))
        check_in_range("probability", probability, 0.0, 1.0)
        if num_classes is not None:
            check_integer("num_classes", num_classes, 2)
        if off_epoch is not None:
            check_integer("off_epoch", off_epoch, 0)
        self.mixer = mixer
        self.targets = targets
        self.num_classes = num_classes
        self.probability = probability
        self.off_epoch = off_epoch
        self._classes = num_classes
        self._looked = False  # whether the first batch of the fit was looked at

    @property
    def label_smoothing(self) -> float:
        """By how much the mixer smooths the labels."""
        return self.mixer.label_smoothing

    @override
    def passes(self, inner: float) -> float:
        return 2 * inner if self.mixer.adds_rows else inner

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        refuse_partners(trainer, self)
        name = type(self).__name__
        if self.targets == "hard":
            if self.mixer.label_smoothing:
                raise ValueError(
                    f"{type(self.mixer).__name__} smooths labels (label_smoothing={self.mixer.label_smoothing:g}), "
                    "which hard targets cannot show; smooth in the criterion, or use targets='soft'."
                )
            if not any(isinstance(callback, Criterion) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError(
                    f"{name}(targets='hard') leaves one label per sample in the batch, so the loss of the other would "
                    "be missing; add the callback Criterion, for example Criterion(CrossEntropy()), which gets both, "
                    "or use targets='soft'."
                )
            return
        self._classes = self.num_classes if self.num_classes is not None else class_count(trainer, pl_module)
        if self._classes is None:
            raise ValueError(
                f"{name} makes class probabilities, but neither {type(pl_module).__name__} nor its hyper-parameters or "
                f"data say how many classes there are; pass {name}(..., num_classes=...)."
            )
        refuse_smoothed_pairs(trainer, pl_module, self.label_smoothing)
        warn_of_smoothing(trainer, pl_module, self)

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._looked = False

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        x, y = self.batch.unpack(batch)
        self._check_labels(x, y)
        generator = context.generator(CPU, "mixing")
        mixture = self._draw(x, generator) if self._mixes(context, generator) else Mixture.unmixed(x)
        context.mixed = None if y.is_floating_point() or self.mixer.label_smoothing else mixture.target(y)
        mixed = self._mixed_batch(batch, x, y, mixture)
        if self._looked or self.targets == "hard":
            return run(mixed)
        self._looked = True
        return self._watched(context, mixed, run)

    def _mixes(self, context: StepContext, generator: torch.Generator) -> bool:
        on = self.off_epoch is None or context.trainer.current_epoch < self.off_epoch
        return on and bool(torch.rand((), generator=generator) < self.probability)

    def _draw(self, x: Tensor, generator: torch.Generator) -> Mixture:
        """The mixture of a batch.

        Args:
            x: Its inputs.
            generator: To draw from.
        """
        return self.mixer.mix(x, generator)

    def _mixed_batch(self, batch: Any, x: Tensor, y: Tensor, mixture: Mixture) -> Any:
        if self.targets == "hard":
            labels = mixture.dominant(y)
        else:
            assert self._classes is not None, "known since setup"
            labels = mixture.probabilities(y, self._classes, label_smoothing=self.mixer.label_smoothing)
        if len(mixture.x) != len(x):  # whatever else the batch holds of each sample goes along with its first row
            batch = _rows(batch, len(x), mixture.first)
        return self.batch.repack(batch, x=mixture.x, y=labels)

    def _check_labels(self, x: Tensor, y: Tensor) -> None:
        if y.is_floating_point():
            if self.targets == "hard":
                raise ValueError(
                    "The batch holds class probabilities, of which targets='hard' cannot keep a label; use "
                    "targets='soft', which mixes them."
                )
            if y.ndim != 2 or len(y) != len(x) or y.shape[1] != self._classes:
                raise ValueError(
                    f"Expected class indices [{len(x)}] or class probabilities [{len(x)}, {self._classes}] but got "
                    f"floating-point targets of shape {tuple(y.shape)}."
                )
            return
        if y.ndim != 1 or len(y) != len(x):
            raise ValueError(
                f"Expected one class index per sample, [{len(x)}], but got targets of shape {tuple(y.shape)}: the "
                "targets of whole images are mixed, not those of their pixels."
            )
        # looking at values waits for the device, so on accelerators only the first batch is looked at
        if self.targets == "soft" and (not self._looked or y.device.type == "cpu"):
            self._refuse_values(y)

    def _refuse_values(self, y: Tensor) -> None:
        assert self._classes is not None, "known since setup"
        bad = (y < 0) | (y >= self._classes)
        if bool(bad.any()):
            raise ValueError(
                f"Expected labels in [0, {self._classes - 1}] but got {int(y[bad][0])}: {type(self).__name__} makes "
                "class probabilities, which cannot say that a sample is ignored; pass the right num_classes, or use "
                "targets='hard' with a criterion that has `ignore_index`."
            )

    def _watched(self, context: StepContext, mixed: Any, run: RunStep) -> Any:
        """The first batch: metrics that want class indices fail with class probabilities, or do not even notice."""
        advice = (
            f"{type(self).__name__} replaced the labels of the batch by class probabilities [B, {self._classes}]. "
            "Metrics that want class indices work with targets='hard' and the callback Criterion, which gets both "
            "labels."
        )
        try:
            with LabelWatch(context.pl_module, self.batch.target_of(mixed)) as watch:
                output = run(mixed)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            error.add_note(advice)
            raise
        if watch.found:
            rank_zero_warn(f"{', '.join(sorted(watch.found))} may be wrong in training: {advice}")
        return output


def _rows(batch: Any, count: int, rows: Tensor) -> Any:
    def take(leaf: Any) -> Any:
        one_per_sample = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count
        return leaf[rows.to(leaf.device)] if one_per_sample else leaf

    return tree_map(take, batch)

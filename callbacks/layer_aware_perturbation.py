# SPDX-License-Identifier: Apache-2.0
"""Single-step adversarial training with layer-aware weight perturbation, in two passes."""

from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lightning_robust.attacks import FGSM
from lightning_robust.callbacks._trainer_step import TrainerStep
from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.callbacks.sharpness_aware import SharpnessAware
from lightning_robust.sharpness import LAP, Gradients, ParameterSelection, SharedGradientAttack
from lightning_robust.sharpness.lap_loop import single_step
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepContext

__all__ = ["LayerAwarePerturbation"]


class LayerAwarePerturbation(SharpnessAware):
    """Trains on the images of a single-step attack and pushes the weights of early layers, against overfitting to it.

    The first pass runs the training step on the start of the attack; its one backward gives the gradient of the images,
    which makes the attacked ones, and that of the weights, which makes the perturbation of
    :class:`~lightning_robust.sharpness.LAP`. The second pass, the one that logs and counts, runs on the attacked images
    at the perturbed weights; after the optimizer's step the perturbation stays in the weights. What the training step
    does to its images (normalisation) is part of the attack by itself. The published forms:

    - V-LAP: ``FGSM(eps=8/255)``;
    - R-LAP: ``FGSM(eps=8/255, step_size=10/255, random_start=True)``, the default;
    - N-LAP: ``FGSM(eps=8/255, random_start=True, start_scale=2, projection="box")``;

    with the values of ``beta`` in :class:`~lightning_robust.sharpness.LAP`. Random starts depend on the global seed,
    rank, epoch and batch. Everything else is as in :class:`~lightning_robust.callbacks.SharpnessAware`: accumulation,
    precision, DDP (each process perturbs by itself; what stays in the weights is the mean).

    Cost: 2 passes per step, the attack included, as with FGSM alone, plus a copy of weights and optimizer state and one
    step of it.

    Args:
        method: the perturbation; ``LAP(beta=0.002)`` when ``None``.
        attack: a single-step attack; its ``mode`` does not matter, for the training step itself runs the model.
        perturb: which weights are perturbed; those of the method when ``None``.
        replay: both passes see the same random numbers (dropout masks); ``False`` draws fresh ones, as published.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: an attack with several steps, starts, or a loss of its own; at setup, together with
            :class:`~lightning_robust.callbacks.AdversarialTraining` or an objective, and for all that
            :class:`~lightning_robust.callbacks.SharpnessAware` refuses.

    References:
        Lin et al., Layer-Aware Analysis of Catastrophic Overfitting, arXiv 2405.16262.

    Example:
        >>> from lightning_robust.attacks import FGSM
        >>> from lightning_robust.callbacks import LayerAwarePerturbation
        >>> from lightning_robust.sharpness import LAP
        >>> LayerAwarePerturbation(LAP(beta=0.03), attack=FGSM(eps=8 / 255)).passes(1)
        2.0
    """

    def __init__(
        self,
        method: LAP | None = None,
        *,
        attack: FGSM | None = None,
        perturb: ParameterSelection | None = None,
        replay: bool = True,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(
            method if method is not None else LAP(),
            perturb=perturb,
            replay=replay,
            log_gap=False,
            logits_from=logits_from,
            batch=batch,
        )
        self.attack = single_step(attack)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        for rival in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(rival, AdversarialTraining) or getattr(rival, "stage", None) is Stage.OBJECTIVE:
                raise ValueError(
                    f"LayerAwarePerturbation attacks the images of the module's own loss in one pass with the weights, "
                    f"which {type(rival).__name__} would replace; remove {type(rival).__name__}, or use "
                    "SharpnessAware(AWP()) with it."
                )

    @override
    def make_step(self, context: StepContext, batch: Any, run: RunStep) -> TrainerStep:
        return _AttackedStep(self, context, batch, run, self.attack)


class _AttackedStep(TrainerStep):
    """The ascent starts where the attack does, and the other pass sees what it made."""

    def __init__(self, callback: SharpnessAware, context: StepContext, batch: Any, run: RunStep, attack: FGSM) -> None:
        super().__init__(callback, context, batch, run)
        self.ascent_apart = True
        self._adapter = callback.batch
        x = self._adapter.input_of(batch)
        self._images = SharedGradientAttack(attack, x, context.generator(x.device, "attack"))
        self.inputs = [self._images.start]
        self._ready = False

    @override
    def batch_for(self, *, ascent: bool) -> Any:
        batch = self._batch.fresh()
        if not ascent and not self._ready:  # the training step skipped this batch
            return batch
        return self._adapter.repack(batch, x=self._images.start if ascent else self._images.attacked())

    @override
    def ready_for_ascent(self, gradients: Gradients) -> Gradients:
        self._ready = True
        if self._scaler is not None and self._images.start.grad is not None:
            # an overflow keeps its sign; the step will be skipped, but BatchNorm sees the images
            largest = torch.finfo(self._images.start.dtype).max
            self._images.start.grad.nan_to_num_(nan=0.0, posinf=largest, neginf=-largest)
        return super().ready_for_ascent(gradients)

# SPDX-License-Identifier: Apache-2.0
"""Training on attacked images."""

from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.callbacks._network_input import NetworkInput
from lightning_robust.checks import check_in_range
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepCallback, StepContext

__all__ = ["AdversarialTraining"]


class AdversarialTraining(StepCallback):
    r"""Replaces the images of each training batch by attacked ones; the module's own loss is computed on them.

    .. math:: \min_w \frac1B \sum_i \ell\big(f_w(x'_i), y_i\big), \qquad
              x'_i = \arg\max_{\|x' - x_i\| \le \epsilon} \ell_{\mathrm{attack}}\big(f_w(x'), y_i\big)

    Runs in the ``batch`` stage: once per batch at the current weights, so every pass of a sharpness-aware step sees the
    same images. It only rewrites the batch, so any loss, mixed-up targets (probabilities) and manual optimization work.
    Random starts depend on the global seed, rank, epoch and batch, and continue exactly after a resume. A step that
    normalises or augments its images itself trains the network on others than the attack made; the first batch of a
    fit is watched for that, with a warning.

    Published recipes differ in the mode of the model during the attack, which decides what BatchNorm learns. The
    default attack works in evaluation mode, which Bag of Tricks recommends and which leaves the running statistics to
    the training forward; Madry et al. and Rice et al. attack in training mode, ``PGD(mode="train")``, with one update
    of the statistics per attack step.

    Cost: ``attack.passes`` forward-and-backward passes more per step: 10 with the default attack.

    Args:
        attack: the attack; when ``None`` ``PGD(eps=8/255, step_size=2/255, steps=10)``, the usual one for CIFAR. A
            :class:`~lightning_robust.attacks.ScheduledAttack` changes with the epoch.
        clean_fraction: part of each batch, its first images, that stays clean.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: ``clean_fraction`` outside [0, 1], or images outside the bounds of the attack.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083; Rice et al.,
        Overfitting in Adversarially Robust Deep Learning, arXiv 2002.11569, whose code also runs a clean forward in
        training mode for its log, which is left out; Pang et al., Bag of Tricks for Adversarial Training, arXiv
        2010.00467.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.callbacks import AdversarialTraining
        >>> AdversarialTraining(PGD(eps=8 / 255, steps=7)).passes(1)
        8.0
    """

    stage: ClassVar[Stage] = Stage.BATCH
    exclusive: ClassVar[bool] = True
    manual_optimization: ClassVar[bool] = True

    def __init__(
        self,
        attack: Attack | None = None,
        *,
        clean_fraction: float = 0.0,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        check_in_range("clean_fraction", clean_fraction, 0.0, 1.0)
        self.attack = PGD(eps=8 / 255, step_size=2 / 255, steps=10) if attack is None else attack
        self.clean_fraction = clean_fraction
        self._looked = False  # whether the first batch of the fit was watched

    @override
    def passes(self, inner: float) -> float:
        return (1 - self.clean_fraction) * self.attack.passes + inner

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        inside = callbacks[callbacks.index(self) + 1 :]
        # samples that are mixed inside are what the network should see
        self._looked = any(getattr(callback, "mixes_samples", False) for callback in inside)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        x, y = self.batch.unpack(batch)
        clean = round(self.clean_fraction * len(x))
        generator = context.generator(x.device, "attack")
        attack = self.attack.at(context.trainer.current_epoch, context.max_epochs)
        x_adv = attack(context.model(self), x[clean:], y[clean:], generator=generator)
        shown = torch.cat([x[:clean], x_adv]) if clean else x_adv
        attacked = self.batch.repack(batch, x=shown)
        if self._looked:
            return run(attacked)
        self._looked = True
        with NetworkInput(context.pl_module, shown) as watch:
            output = run(attacked)
        # a step may do by itself what forward does too; then the attack aimed at the function that is trained
        if watch.changed and not watch.same_as_in(context.model(self)):
            name = type(context.pl_module).__name__
            rank_zero_warn(
                f"The training_step of {name} changes its images before the network sees them, so the network is not "
                "trained on what the attack made. Normalise inside forward (a layer in front of the network), and "
                "augment in the data set or in on_after_batch_transfer."
            )
        return output

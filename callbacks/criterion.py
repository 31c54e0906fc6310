# SPDX-License-Identifier: Apache-2.0
"""Another loss in place of the cross-entropy of any LightningModule."""

import copy
from functools import partial
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_robust import losses
from lightning_robust.callbacks._criterion_fit import refuse_misfits
from lightning_robust.callbacks._criterion_swap import CriterionSwap, find_criterion
from lightning_robust.callbacks._processes import total
from lightning_robust.callbacks._smoothing import warn_of_smoothing
from lightning_robust.callbacks._validation_watch import LearnsFromValidation
from lightning_robust.checks import check_kind
from lightning_robust.training import (
    BatchAdapter,
    PerSampleCallback,
    RunStep,
    Stage,
    StepContext,
    loss_of,
    replace_loss,
)
from lightning_robust.training.features import FeatureCapture
from lightning_robust.training.indices import entry_of

__all__ = ["Criterion"]


class Criterion(LearnsFromValidation, PerSampleCallback):
    r"""Trains any LightningModule with another loss on its logits, without a change to the module.

    A module that holds its loss as a sub-module, ``self.criterion = nn.CrossEntropyLoss()``, calls the new one in its
    place during training steps: whatever else its loss consists of stays, and what it logs is the new loss. Any other
    module has the whole loss of its training step replaced by the criterion of the logits that the step computed; a
    first batch whose own loss is not their cross-entropy is warned about, and the new loss is logged as
    ``train/criterion``. Validation and test steps are never changed.

    What a criterion needs beyond logits and labels, it gets: the index of each sample (read off the loader's sampler),
    the epoch, validation logits, the group of each sample, the features before the classifier. Labels that
    :class:`~lightning_robust.callbacks.Mixing` mixed arrive as a :class:`~lightning_robust.losses.MixedTarget`.

    What a criterion remembers is in the checkpoint, the same in all processes of a DDP run, and continues exactly.
    Lightning leaves a validation out when it continues from a checkpoint of the last batch before it, so a criterion
    that learns from validation misses one then.

    Cost: that of the criterion; no forward pass.

    Args:
        criterion: The loss, for example ``Focal(gamma=3.0)``. A second fit begins with a fresh copy of it.
        replaces: Dotted name of the module's own criterion; found by itself when ``None``. ``"loss"`` replaces the
            whole loss of the step.
        group_key: Key or position of the group of each sample in a batch, for criteria that need it.
        features_from: Dotted name of the layer whose output is the features, for criteria that need them; the input of
            the classifier when ``None``.
        index_key: Key or position of the indices in a batch, for datasets that return them; read off the loader's
            sampler when ``None``.
        num_samples: Number of training samples; that of the training loader's dataset when ``None``.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: How to read targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: At setup, for manual optimization, several candidates or none of the name ``replaces``, together
            with an objective, for a criterion that returns one value per sample, that needs a group without
            ``group_key``, for an option that the criterion has no use for, or for one that cannot have mixed labels;
            before the first step, without the validation data that the criterion needs, or with another number of
            samples than the checkpoint's.
        TypeError: If ``criterion`` is none of this library; when loaders are set up, if the samples of a batch cannot
            be known but the criterion needs them.

    References:
        See the criterion, for example :class:`~lightning_robust.losses.CrossEntropy`.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import Criterion
        >>> from lightning_robust.losses import CrossEntropy
        >>> callback = Criterion(CrossEntropy(label_smoothing=0.1))
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    exclusive: ClassVar[bool] = True

    def __init__(
        self,
        criterion: losses.Criterion,
        *,
        replaces: str | None = None,
        group_key: int | str | None = None,
        features_from: str | None = None,
        index_key: int | str | None = None,
        num_samples: int | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(index_key=index_key, num_samples=num_samples, logits_from=logits_from, batch=batch)
        remedy = (
            f"add a penalty on the logits with LogitRegularization({type(criterion).__name__}(...))"
            if isinstance(criterion, losses.LogitRegularizer)
            else "use one of lightning_robust.losses, CrossEntropy(label_smoothing=0.1) for example, or a subclass of "
            "losses.Criterion"
        )
        check_kind("criterion", criterion, losses.Criterion, remedy)
        self.criterion = criterion
        self.replaces = replaces
        self.group_key = group_key
        self.features_from = features_from
        self._told = {  # what it says of which need of the criterion
            "group_key": (group_key, "group"),
            "features_from": (features_from, "features"),
            "index_key": (index_key, "index"),
            "num_samples": (num_samples, "index"),
        }
        self._fresh = copy.deepcopy(criterion)
        self._fits = 0
        self._swap: CriterionSwap | None = None  # None: the loss is computed from the captured logits
        self._features: FeatureCapture | None = None
        self._epoch = -1  # of the last batch of this fit
        self._open = -1  # the epoch that began and has not ended, also over a restart
        self._compared = False  # whether the first batch's own loss was looked at

    @property
    @override
    def follows_samples(self) -> bool:
        return "index" in self.criterion.needs

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(criterion=type(self.criterion).__qualname__)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"criterion": self.criterion.state_dict(), "open_epoch": self._open}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.criterion.load_state_dict(state_dict["criterion"])
        self._open = state_dict["open_epoch"]

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        if self._fits:
            self.criterion = copy.deepcopy(self._fresh)
        self._fits += 1
        self._open = -1
        refuse_misfits(trainer, self.criterion, self._told)
        warn_of_smoothing(trainer, pl_module, self)
        name = find_criterion(pl_module, self.replaces)
        self._swap = None if name is None else CriterionSwap(pl_module, name)
        self.needs_logits = name is None
        if name is not None and self.logits_from is not None and not self.criterion.needs_validation:
            raise ValueError(
                f"logits_from={self.logits_from!r} would be ignored: {type(pl_module).__name__} calls its {name} with "
                'the logits itself; leave it out, or replace the whole loss with replaces="loss".'
            )
        self.learn(self.criterion if self.criterion.needs_validation else None)

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.criterion.to(pl_module.device)
        self.criterion.train()
        if "features" in self.criterion.needs:
            self._features = FeatureCapture(pl_module, self.features_from, needs_grad=True)
            self._features.attach()
        self._epoch = -1
        self._compared = False

    @override
    def on_pipeline_end(self) -> None:
        super().on_pipeline_end()
        if self._features is not None:
            self._features.detach()
            self._features = None

    @override
    def on_samples_known(self, trainer: L.Trainer, pl_module: L.LightningModule, num_samples: int) -> None:
        self.criterion.samples_known(num_samples)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        self._follow_epochs(context)
        self.criterion.counted(context.counted)
        if self._features is not None:
            self._features.clear()
        if self._swap is not None:
            with self._swap.by(partial(self._loss, context)):
                output = run(batch)
            if loss_of(output) is not None:  # else the step left the batch out
                self._swap.refuse_uncalled()
            return output
        target = self.batch.target_of(batch)  # read first: a step may take its batch apart
        context.adapt_core(partial(self._replace, context, target))
        return run(batch)

    def _follow_epochs(self, context: StepContext) -> None:
        epoch = context.trainer.current_epoch
        if epoch == self._epoch:
            return
        # Lightning has no hook for the start of an epoch that is continued in its middle, nor for the end of one whose
        # checkpoint was written in that hook, before this callback's turn.
        if self._open not in (-1, epoch):
            self._end_epoch(context.trainer, self._open)
        self._epoch = self._open = epoch
        self.criterion.epoch_starts(epoch, context.max_epochs)

    def _end_epoch(self, trainer: L.Trainer, epoch: int) -> None:
        self.criterion.synchronise(partial(total, trainer))
        self.criterion.epoch_ends(epoch, partial(total, trainer))
        self._open = -1

    def _loss(self, context: StepContext, logits: Tensor, target: Tensor) -> Tensor:
        extras: dict[str, Tensor] = {}
        if "index" in self.criterion.needs:
            extras["index"] = self.indices_of(context, len(logits))
        if "group" in self.criterion.needs:
            assert self.group_key is not None  # checked at setup
            extras["group"] = entry_of(context.batch_as_loaded, self.group_key, "group_key")[: len(logits)].to(
                logits.device
            )
        if self._features is not None:
            extras["features"] = self._features.take(logits)
        # a sharpness-aware ascent may run on the first samples of the batch
        seen = target if context.mixed is None else context.mixed.head(len(logits))
        loss: Tensor = self.criterion(logits, seen, **extras)
        return loss

    def _replace(self, context: StepContext, target: Tensor, output: Any) -> Any:
        own = loss_of(output)
        if own is None:
            return output
        logits = context.logits(self)
        if not self._compared:
            self._compared = True
            self._compare(context, logits, target, own)
        loss = self._loss(context, logits, target)
        context.log("train/criterion", loss, batch_size=len(logits))
        return replace_loss(output, loss)

    def _compare(self, context: StepContext, logits: Tensor, target: Tensor, own: Tensor) -> None:
        with torch.no_grad():
            plain = losses.cross_entropy(logits, target if context.mixed is None else context.mixed.head(len(logits)))
        # a module that keeps its hard labels while samples are mixed has another loss for a good reason
        if context.mixed is None and not torch.allclose(own.detach().to(plain), plain, rtol=2e-3, atol=1e-3):
            rank_zero_warn(
                f"The loss of {type(context.pl_module).__name__}.training_step ({float(own.detach()):.4g}) is not the "
                f"cross-entropy of its logits ({float(plain):.4g}): whatever else it holds, "
                f"{type(self.criterion).__name__} takes the place of all of it. To keep further terms, make the "
                "cross-entropy a sub-module of yours, self.criterion = nn.CrossEntropyLoss(), which is then replaced "
                "alone."
            )

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._open != -1:  # a run may continue behind the end of an epoch, and hear of it once more
            self._end_epoch(trainer, self._open)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["label_smoothing"] = losses.label_smoothing_of(self.criterion)
        # the first process writes the file, for all of them
        if trainer.world_size > 1:
            self.criterion.synchronise(partial(total, trainer))
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._swap = None
        if stage == "fit":
            self.criterion.to("cpu")  # the Trainer takes the module off the device as well

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_swap": None, "_features": None}

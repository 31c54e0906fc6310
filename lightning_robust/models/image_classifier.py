# SPDX-License-Identifier: Apache-2.0
"""A LightningModule for image classification that every method of this library fits."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer
from lightning_robust.losses import Criterion, CrossEntropy, label_smoothing_of
from lightning_robust.models.create import create_backbone
from lightning_robust.models.inputs import check_image_form, check_image_values, check_labels
from lightning_robust.models.normalize import normalization
from lightning_robust.models.optimization import Interval, Scheduler, optimization
from lightning_robust.objectives import Objective
from lightning_robust.training import BatchAdapter

__all__ = ["ImageClassifier"]

SHAPES_KEY = "image_classifier"  # in checkpoints
TRAINING_PARTS = ("criterion.", "objective_parameters.")  # take no part in predictions


class ImageClassifier(L.LightningModule):
    """Any timm model, or module of your own, as a LightningModule over images in [0, 1].

    The steps return ``{"loss", "logits"}`` and log ``train/loss``, ``train/acc``, ``val/...`` and ``test/...`` per
    epoch. Images are normalised inside the model, so attacks and monitors work on pixels. Methods come from callbacks;
    an ``objective`` is only a short form of ``ObjectiveTraining(objective)`` among the Trainer's callbacks, and then
    ``train/acc`` is not logged, because this module's own training step does not run. A ``criterion`` that needs to
    know samples, epochs or validation data is a short form of the callback ``Criterion(criterion)``; evaluation then
    logs the cross-entropy.

    Checkpoints open with ``weights_only=True`` and rebuild by ``ImageClassifier.load_from_checkpoint(path)``; the
    recipe of the training (criterion, objective, optimizer) is not in them, and neither is a backbone that was given
    as a module: pass ``backbone=`` again then.

    Args:
        backbone: timm name, for example "resnet8_cifar", "preact_resnet18", "wide_resnet28_10"; or a module that maps
            images to logits.
        num_classes: number of classes.
        in_chans: number of channels of the images.
        mean: mean of each channel for the normalisation; ``None`` for no normalisation.
        std: standard deviation of each channel; goes with ``mean``.
        criterion: the loss; cross-entropy when ``None``.
        objective: a training loss with forward passes of its own, for example TRADES.
        optimizer: makes the optimizer from parameters; SGD with the usual values of the CIFAR papers.
        lr_scheduler: "cosine" (to zero over the whole run), makes a scheduler from the optimizer, or ``None``.
        scheduler_interval: step the scheduler per "epoch" or per "step".
        backbone_options: further options of ``timm.create_model``, for example drop_path_rate or pretrained.
        channels_last: store images and weights with the channels last, faster on recent GPUs and CPUs.

    Shape:
        Images ``[B, in_chans, H, W]``, labels ``[B]`` or class probabilities ``[B, num_classes]``; logits
        ``[B, num_classes]``.

    Raises:
        ValueError: an argument is out of range; at the first batch of an epoch, for images outside [0, 1], NaN, labels
            that are no class; when a checkpoint has another number of classes or channels.
        TypeError: at a batch of integer images.

    Example:
        >>> model = ImageClassifier("resnet8_cifar", num_classes=10, in_chans=1, mean=[0.3], std=[0.3])
        >>> model(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: str | Callable[..., Any],
        *,
        num_classes: int,
        in_chans: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        criterion: Criterion | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: Scheduler = None,
        scheduler_interval: Interval = "epoch",
        backbone_options: dict[str, Any] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 2)
        check_choice("scheduler_interval", scheduler_interval, ("epoch", "step"))
        if isinstance(lr_scheduler, str):
            check_choice("lr_scheduler", lr_scheduler, ("cosine",))
        options = dict(backbone_options or {})
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.normalize = normalization(mean, std, in_chans)
        self.backbone = create_backbone(backbone, num_classes, in_chans, **options)
        asks = criterion is not None and bool(criterion.needs or criterion.needs_epoch or criterion.needs_validation)
        self.criterion = CrossEntropy() if criterion is None or asks else criterion
        self.metrics = _metrics(num_classes)  # by the name under which each is logged
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.scheduler_interval = scheduler_interval
        self.channels_last = channels_last
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        self._callbacks: list[Callback] = []
        self._set_training(objective, criterion if asks else None)
        self._batch = BatchAdapter()
        self._values_checked = False
        self.save_hyperparameters(
            {
                "backbone": backbone if isinstance(backbone, str) else f"<{type(backbone).__name__}>",
                "num_classes": num_classes,
                "in_chans": in_chans,
                "mean": None if mean is None else [float(value) for value in mean],
                "std": None if std is None else [float(value) for value in std],
                "scheduler_interval": scheduler_interval,
                # the weights are in the checkpoint: rebuilding must not download others
                "backbone_options": {key: value for key, value in options.items() if key != "pretrained"} or None,
                "channels_last": channels_last,
            }
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        check_image_form(x, self.in_chans)
        if not self._values_checked and not torch.compiler.is_compiling():
            check_image_values(x)
            self._values_checked = True
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.backbone(self.normalize(x))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"Expected logits [B, {self.num_classes}] of the backbone but got {list(logits.shape)}.")
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "train")

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self(batch if isinstance(batch, Tensor) else self._batch.unpack(batch)[0])
        return logits

    # Values are looked at here and not in the steps, because an objective takes the place of training_step.
    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._check_first(batch, batch_idx)

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check_first(batch, batch_idx)

    @override
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check_first(batch, batch_idx)

    @override
    def configure_callbacks(self) -> list[Callback]:
        return self._callbacks

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # only "cosine" asks for the Trainer, so that the rest works without one
        trainer = self.trainer if self.lr_scheduler == "cosine" else None
        return optimization(self.optimizer(parameters), self.lr_scheduler, self.scheduler_interval, trainer)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # load_from_checkpoint overwrites the stored hyperparameters with its arguments before anybody can compare
        checkpoint[SHAPES_KEY] = {"num_classes": self.num_classes, "in_chans": self.in_chans}
        # whoever takes this network as a teacher wants to know; a callback that replaced the criterion knows better
        checkpoint.setdefault("label_smoothing", label_smoothing_of(self.criterion))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, theirs in checkpoint.get(SHAPES_KEY, {}).items():
            ours = getattr(self, name)
            if theirs != ours:
                raise ValueError(f"The checkpoint has {name}={theirs} but this model has {name}={ours}.")
        own, weights = self.state_dict(), checkpoint.get("state_dict", {})
        unknown = [key for key in weights if key.startswith(TRAINING_PARTS) and key not in own]
        if unknown:
            rank_zero_warn(
                f"Left out of the checkpoint, because this model has no place for it: {', '.join(unknown)}. "
                "Predictions do not depend on it; to continue training, pass the same criterion and objective."
            )
        for key in unknown:
            del weights[key]

    def _step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        x, y = self._batch.unpack(batch)
        logits = self(x)
        loss = self.criterion(logits, y)
        mean_loss, accuracy = self._metric(f"{stage}/loss"), self._metric(f"{stage}/acc")
        # one value per sample: MeanMetric ignores `weight` when it does not look for NaN
        mean_loss.update(loss.detach().expand(len(x)))
        accuracy.update(logits, y if y.ndim == 1 else y.argmax(1))
        for name, metric in (("loss", mean_loss), ("acc", accuracy)):
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(x))
        return {"loss": loss, "logits": logits}

    def _metric(self, name: str) -> Metric:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def _check_first(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            x, y = self._batch.unpack(batch)
            check_image_form(x, self.in_chans)
            check_image_values(x)
            check_labels(y, len(x), self.num_classes)
            self._values_checked = True

    def _set_training(self, objective: Objective | None, criterion: Criterion | None) -> None:
        # One callback each for the module's lifetime: they hold the state, also over several fits.
        from lightning_robust import callbacks  # they stand above the models

        if criterion is not None:
            self._callbacks.append(callbacks.Criterion(criterion))
        if objective is None:
            return
        self._callbacks.append(callbacks.ObjectiveTraining(objective))
        trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        if trainable:
            self.objective_parameters = nn.ParameterList(trainable)


def _metrics(num_classes: int) -> nn.ModuleDict:
    # The mean of a plain logged value is rounded by Lightning when processes have different numbers of samples.
    metrics: dict[str, nn.Module] = {}
    for stage in ("train", "val", "test"):
        metrics[f"{stage}/loss"] = MeanMetric(nan_strategy="disable")  # looking for NaN waits for the device
        metrics[f"{stage}/acc"] = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
    return nn.ModuleDict(metrics)

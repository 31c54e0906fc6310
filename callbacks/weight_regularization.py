# SPDX-License-Identifier: Apache-2.0
"""A penalty on the weights of any LightningModule's training step."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.callbacks._names import refuse_same_name
from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.checks import check_kind
from lightning_robust.regularization import WeightRegularizer
from lightning_robust.training import RunStep, Stage, StepCallback, StepContext, loss_of, replace_loss

__all__ = ["WeightRegularization"]


class WeightRegularization(StepCallback):
    r"""Adds a penalty on the weights to the loss of the training step of any LightningModule.

    .. math:: L + \lambda \sum_{\text{layers}} r(w)

    Runs inside the training step, so a sharpness-aware method differentiates the penalty where it differentiates the
    loss, at its perturbed weights. The coefficient may follow a schedule, whose value is set at the start of every
    epoch and continues after a resume. The penalty without its coefficient is logged as ``train/NAME`` (the mean over
    the epoch). With gradient accumulation it counts once per batch, divided by their number like the loss.

    Cost: one pass over the weights per forward and backward pass, independent of the batch size.

    Args:
        regularizer: The penalty with its coefficient, for example ``GOR(lam=0.01)``.
        name: Tells two penalties apart in the logs, ``train/NAME``; the regularizer's own name when ``None``.

    Raises:
        ValueError: At setup, for manual optimization, for strategies that do not keep whole weights on one device, for
            a schedule over a run of unknown length, or for two penalties of one Trainer with the same name; when the
            fit starts, if the regularizer finds no weights or one that it cannot handle.

    References:
        See the regularizer, for example :class:`~lightning_robust.regularization.GOR`.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import WeightRegularization
        >>> from lightning_robust.regularization import GOR
        >>> callback = WeightRegularization(GOR(lam=0.01))
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS

    def __init__(self, regularizer: WeightRegularizer, *, name: str | None = None) -> None:
        super().__init__()
        check_kind(
            "regularizer",
            regularizer,
            WeightRegularizer,
            "use one of lightning_robust.regularization, GOR(lam=0.01) for example, and the callback "
            "LogitRegularization for a penalty on logits",
        )
        self.regularizer = regularizer
        self.name = regularizer.name if name is None else name
        self._layers: dict[str, nn.Module] = {}

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        refuse_same_name(trainer, self)
        self._set_progress(trainer)
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"WeightRegularization looks at whole weights, which {type(trainer.strategy).__name__} does not keep "
                'on one device; use strategy="ddp" or a single device.'
            )

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layers = self.regularizer.layers(pl_module)
        if self.regularizer.replaces_weight_decay:
            self._warn_of_decay(trainer)

    @override
    def on_pipeline_end(self) -> None:
        self._layers = {}

    # A run that continues in the middle of an epoch gets no call at the start of that epoch.
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set_progress(trainer)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set_progress(trainer)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        output = run(batch)
        loss = loss_of(output)
        if loss is None:
            return output
        penalty: Tensor = self.regularizer.total(self.regularizer.weights(self._layers))
        context.log(f"train/{self.name}", penalty)
        return replace_loss(output, loss + self.regularizer.coefficient * penalty)

    def _set_progress(self, trainer: L.Trainer) -> None:
        max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        self.regularizer.set_progress(trainer.current_epoch, max_epochs)

    def _warn_of_decay(self, trainer: L.Trainer) -> None:
        """Both would shrink the weights, and nobody means that."""
        own = {id(parameter) for layer in self._layers.values() for parameter in _made_from(layer)}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        decays = [
            (group["weight_decay"], sum(id(parameter) in own for parameter in group["params"]))
            for group in groups
            if group.get("weight_decay", 0)
        ]
        count = sum(number for _, number in decays)
        if count:
            factors = ", ".join(sorted({f"{decay:g}" for decay, number in decays if number}))
            rank_zero_warn(
                f"{type(self.regularizer).__name__} takes the place of weight decay, but the optimizer decays {count} "
                f"of the same weights (weight_decay={factors}); set weight_decay=0 for them."
            )


def _made_from(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that are a layer's weight, or that a parametrization makes it from."""
    return [parameter for name, parameter in layer.named_parameters() if "bias" not in name.split(".")]

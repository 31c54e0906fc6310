# SPDX-License-Identifier: Apache-2.0
"""The model, data, Trainer and attack of ``eval``."""

from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_robust.cli.attack_choice import attack_config
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.eval_arguments import EvalArguments
from lightning_robust.cli.targets import UNREADABLE, Target, no_checkpoint
from lightning_robust.cli.train import load_checkpoint, refuse_other_classes
from lightning_robust.training import BatchAdapter, LogitsFunction

__all__ = ["EvaluatedModel", "EvaluationCLI", "built_evaluation"]


class EvaluationCLI(RecipeCLI):
    """A recipe of which only model, data, Trainer and attack are built.

    Args:
        target: What is evaluated.
        arguments: What the user asked for.

    Raises:
        UsageError: If the configuration is not accepted.
    """

    def __init__(self, target: Target, arguments: EvalArguments) -> None:
        self.linked = target.linked
        trainer = {
            "accelerator": "auto",
            **target.config.get("trainer", {}),
            "devices": arguments.devices or 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
        }
        attack = attack_config(arguments, target)
        super().__init__({**target.config, "evaluation": {"attack": attack}, "trainer": trainer}, arguments.changes)


class EvaluatedModel(L.LightningModule):
    """A test step around a module that has none.

    Args:
        module: the module.
    """

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module
        self._function = LogitsFunction(module)
        self._batch = BatchAdapter()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self(self._batch.unpack(batch)[0])}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.test_step(batch, batch_idx)


def built_evaluation(target: Target, arguments: EvalArguments) -> EvaluationCLI:
    """Build what is evaluated, with its weights.

    Args:
        target: What is evaluated.
        arguments: What the user asked for.

    Raises:
        UsageError: If something is refused, or does not fit.
    """
    if "data" not in target.config and not any(word.partition("=")[0] == "--data" for word in arguments.changes):
        raise UsageError(
            f"Which data? {target.name} does not say; for example: --data ImageFolderDataModule --data.root FOLDER"
        )
    try:
        cli = EvaluationCLI(target, arguments)
        cli.build()
    except UsageError as error:
        # the user wrote --attack.steps, which is evaluation.attack.steps in a recipe
        raise UsageError(str(error).replace("evaluation.attack", "attack")) from error
    _refuse_other_data(cli, target)
    if target.weights is not None:
        _load(cli.model, target.weights)
    return cli


def _refuse_other_data(cli: EvaluationCLI, target: Target) -> None:
    for name, what in (("num_classes", "classes"), ("in_chans", "channels")):
        ours, theirs = getattr(cli.model, name, None), getattr(cli.datamodule, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise UsageError(f"{target.name} has {ours} {what} but {type(cli.datamodule).__name__} has {theirs}.")


def _load(model: L.LightningModule, weights: Path) -> None:
    try:
        checkpoint = load_checkpoint(weights)
    except UNREADABLE as error:
        raise no_checkpoint(weights, error) from error
    refuse_other_classes(model, weights)
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"{weights} does not fit the model:", *str(error).splitlines()[1:4]) from error

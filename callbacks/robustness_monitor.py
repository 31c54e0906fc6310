# SPDX-License-Identifier: Apache-2.0
"""Accuracy under attack during validation and test."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.losses import cross_entropy, labels_of
from lightning_robust.callbacks._evaluation_tap import EvaluationTap, refuse_other_function
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.guards import evaluation_mode
from lightning_robust.losses import full_precision
from lightning_robust.training import BatchAdapter, LogitsFunction, QuietGate, derive_seed

__all__ = ["RobustnessMonitor"]

_PREFIXES = {"validate": "val", "test": "test"}
_STEPS = {"validate": "validation_step", "test": "test_step"}


class RobustnessMonitor(Callback):
    """Attacks some validation or test images and logs ``val/adv_acc`` and ``val/adv_nll`` (``test/...`` in tests).

    Looks only: the attack runs in ``on_validation_batch_end`` on the batch that was just validated, in the Trainer's
    precision, with the same random starts at every epoch, and leaves weights, gradients, modes and generators alone.
    Lightning's inference mode needs no change, and what ``forward`` logs or counts is counted once.

    Attacked is ``forward`` (or the only network, or ``logits_from``). The first batch of a run compares its logits with
    those of the validation step: a step that normalises the images itself, say, validates another function, and is
    refused. A step that shows no logits, or is run in training mode, is not compared.

    ``ModelCheckpoint(monitor="val/adv_acc", mode="max")`` then keeps the
    most robust epoch, which matters because robust accuracy falls in late epochs while clean accuracy still rises. With
    ``every_n_epochs`` above 1 the value exists in attacked epochs only: elsewhere ``ModelCheckpoint`` and
    ``EarlyStopping`` find the key missing (an error before the first attacked epoch) or old. Let them look equally
    often: ``ModelCheckpoint(every_n_epochs=N)``, and no ``EarlyStopping`` on it.

    Counts and sums are added up over ranks. A distributed sampler pads uneven data with repeated samples, which are
    then counted twice, as in every validation metric. A strong number here is no certificate: stronger attacks only
    lower it.

    Cost: ``attack.passes`` forwards and input-backwards per attacked image, and one forward; by default 20 passes over
    512 images in every validation.

    Args:
        attack: the attack; when ``None`` ``PGD(eps=8/255, step_size=2/255, steps=20)``. With its ``early_stop`` the
            logged NLL is that of the first point that fools the model, not of the worst.
        every_n_epochs: attack in every n-th epoch of a fit only; see above for callbacks that monitor the value.
        max_samples: attack this many images, the first of the loader, which should not shuffle; ``None`` for all. They
            are shared out over the ranks.
        stages: when to attack: ``"validate"``, ``"test"`` or both.
        dataloader_idx: which loader is attacked if there are several.
        name: distinguishes the values of several monitors: ``val/NAME_acc`` and ``val/NAME_nll``.
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
        super().__init__()
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("dataloader_idx", dataloader_idx, 0)
        check_integer("seed", seed, 0)
        if max_samples is not None:
            check_integer("max_samples", max_samples, 1)
        for stage in stages:
            check_choice("stages", stage, tuple(_PREFIXES))
        self.attack = PGD(eps=8 / 255, step_size=2 / 255, steps=20) if attack is None else attack
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.stages = tuple(stages)
        self.dataloader_idx = dataloader_idx
        self.name = name
        self.seed = seed
        self.logits_from = logits_from
        self.batch = batch if batch is not None else BatchAdapter()
        self._model: LogitsFunction | None = None  # None: nothing is attacked in this loop
        self._tap: EvaluationTap | None = None  # watches the step up to the first attacked batch of a run
        self._compared = False
        self._gate: QuietGate | None = None  # keeps the attack's forwards out of logs and metrics
        self._own_gate: QuietGate | None = None  # the same, in the monitor that installs and removes it
        self._left = 0.0
        self._totals = torch.zeros(3)  # correct, sum of NLL, count

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._compared = False

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, "validate")

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._attack(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "validate")

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, "test")

    on_test_batch_end = on_validation_batch_end

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def should_attack(self, trainer: L.Trainer, stage: str) -> bool:
        """Whether the loop that begins now is one to attack in.

        Args:
            trainer: the Trainer.
            stage: ``"validate"`` or ``"test"``.
        """
        due = trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return stage in self.stages and due and not trainer.sanity_checking

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()
        # all monitors share the gate of the first: two would be removed in the order of their installation
        first = next(each for each in trainer.callbacks if isinstance(each, RobustnessMonitor))  # type: ignore[attr-defined]
        if first is self:
            self._own_gate = QuietGate(pl_module)
            self._own_gate.install()
        self._gate = first._own_gate
        if not self.should_attack(trainer, stage):
            return
        self._model = LogitsFunction(pl_module, self.logits_from)
        if not self._compared:
            self._tap = EvaluationTap(pl_module, _STEPS[stage], self.logits_from)
            self._tap.attach()
        self._left = float("inf")
        if self.max_samples is not None:
            share, rest = divmod(self.max_samples, trainer.world_size)
            self._left = share + (trainer.global_rank < rest)
        # sums in float64 are exact; Apple's GPUs know no such type
        dtype = torch.float32 if pl_module.device.type == "mps" else torch.float64
        self._totals = torch.zeros(3, dtype=dtype, device=pl_module.device)

    def _attack(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._model is None or self._left <= 0 or dataloader_idx != self.dataloader_idx:
            return
        assert self._gate is not None
        x, y = self.batch.unpack(batch)
        if self._tap is not None:
            with trainer.precision_plugin.forward_context(), self._gate.silence(), torch.no_grad():
                refuse_other_function(self._tap, self._model, x)
            self._tap.detach()
            self._tap, self._compared = None, True
        count = int(min(self._left, len(x)))
        self._left -= count
        x, y = x[:count], y[:count]
        seed = derive_seed(self.seed, trainer.global_rank, batch_idx)
        generator = torch.Generator(x.device).manual_seed(seed)
        with trainer.precision_plugin.forward_context(), evaluation_mode(pl_module), self._gate.silence():
            x_adv = self.attack(self._model, x, y, generator=generator)
            with torch.no_grad():
                logits = full_precision(self._model(x_adv))
        self._totals += self._sums(logits, y)

    def _end(self) -> None:
        self._model = None
        if self._tap is not None:
            self._tap.detach()
            self._tap = None
        if self._own_gate is not None:
            self._own_gate.remove()
        self._gate = self._own_gate = None

    def _sums(self, logits: Tensor, y: Tensor) -> Tensor:
        correct = (logits.argmax(1) == labels_of(y)).sum()
        count = torch.full_like(correct, len(y))
        nll = cross_entropy(logits, y).to(self._totals.dtype).sum()
        return torch.stack([correct.to(nll.dtype), nll, count.to(nll.dtype)])

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        model = self._model
        self._end()
        if model is None:
            return
        correct, nll, count = trainer.strategy.reduce(self._totals, reduce_op="sum").tolist()
        if not count:
            return
        if not torch.isfinite(torch.tensor(nll)):
            raise ValueError(
                f"{type(pl_module).__name__} returned NaN or infinite logits for attacked images, which would pass for "
                "robustness; look for diverged weights or overflow in half precision."
            )
        # every rank has the same totals, so the mean over ranks changes nothing
        prefix = _PREFIXES[stage]
        pl_module.log(f"{prefix}/{self.name}_acc", correct / count, prog_bar=True, sync_dist=True)
        pl_module.log(f"{prefix}/{self.name}_nll", nll / count, sync_dist=True)

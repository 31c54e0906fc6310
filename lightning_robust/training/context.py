# SPDX-License-Identifier: Apache-2.0
"""What a callback may see and do during one training step."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_robust.guards import buffers_restored, module_devices
from lightning_robust.losses import MixedTarget
from lightning_robust.training.logits import LogitsCapture, LogitsFunction
from lightning_robust.training.quiet import QuietGate

if TYPE_CHECKING:
    from lightning_robust.training.callback import StepCallback

__all__ = ["RunStep", "StepContext", "derive_seed", "logits_of_copy"]

RunStep = Callable[[Any], Any]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of its arguments alone, the same on every platform and in every process.

    Args:
        *parts: anything with a stable text form: the global seed, rank, epoch, batch index, a purpose.

    Example:
        >>> derive_seed(0, 1, "attack") == derive_seed(0, 1, "attack") != derive_seed(0, 2, "attack")
        True
    """
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class StepContext:
    """One training step as the wrapping callbacks see it.

    Attributes:
        trainer: the running Trainer.
        pl_module: the LightningModule.
        batch_idx: index of the batch in the epoch.
        batch_as_loaded: the batch as the loader gave it.
        current_batch: the batch that the innermost step saw last.
        counted: whether the running pass is the one that logs and counts; a sharpness-aware step has others too.
        mixed: the two labels of each sample and their shares, when a callback mixed the samples of the batch.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        captures: dict[str | None, LogitsCapture],
        gate: QuietGate,
        seed: str,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.batch_idx = batch_idx
        self.batch_as_loaded = batch
        self.current_batch = batch
        self.counted = True
        self.mixed: MixedTarget | None = None
        self._captures = captures
        self._gate = gate
        self._seed = seed
        self._core: RunStep | None = None
        self._adapt: RunStep | None = None
        self._output: Any = None

    @property
    def max_epochs(self) -> int:
        """Epochs of the run; -1 if unknown."""
        return self.trainer.max_epochs if self.trainer.max_epochs is not None else -1

    @property
    def devices(self) -> set[torch.device]:
        """Devices that hold parameters of the module."""
        return module_devices(self.pl_module)

    def logits(self, callback: "StepCallback") -> Tensor:
        """Logits ``[B, C]`` of the innermost step's last pass, with their graph."""
        capture = self._captures[callback.logits_from]
        # A replaced step says itself which of its forwards counts; `logits_from` is about the module's own step.
        return capture.take(self._output, returned_first=self._core is not None)

    def model(self, callback: "StepCallback") -> Callable[[Tensor], Tensor]:
        """The map ``x -> logits`` of the module; its calls are neither logged nor counted."""
        return _QuietLogits(self._gate, LogitsFunction(self.pl_module, callback.logits_from))

    def generator(self, device: torch.device, salt: str) -> torch.Generator:
        """A generator that depends on the global seed, rank, epoch, batch and ``salt`` only.

        It therefore continues exactly after a resume, and draws differ between ranks and between callbacks.
        """
        seed = derive_seed(self._seed, self.trainer.global_rank, self.trainer.current_epoch, self.batch_idx, salt)
        return torch.Generator(device).manual_seed(seed)

    def log(self, name: str, value: Tensor, *, batch_size: int = 1, **kwargs: Any) -> None:
        """Log the mean of ``value`` over the epoch and the processes.

        Only the counted pass logs; a Trainer that logs nothing (``barebones``) stays silent.
        """
        if not self.trainer.barebones:
            options = {"on_step": False, "on_epoch": True, "sync_dist": True, **kwargs}
            self.pl_module.log(name, value.detach(), batch_size=batch_size, **options)

    def replace_core(self, step: RunStep) -> None:
        """Let ``step(batch)`` take the place of the module's own training step in this batch."""
        if self._core is not None:
            raise RuntimeError("Two objectives want to replace the same training step; keep one of them.")
        self._core = step

    def adapt_core(self, change: RunStep) -> None:
        """Let ``change(output)`` take the place of what the innermost step returns, in every pass over this batch.

        Terms that other callbacks add to the loss come after it, wherever they stand in the Trainer's list.
        """
        self._adapt = change

    @contextmanager
    def uncounted_pass(self, *, restore_buffers: bool = True) -> Iterator[None]:
        """A further pass over the same batch: silent, and with buffers put back.

        Args:
            restore_buffers: ``False`` lets the pass move BatchNorm statistics.
        """
        before, self.counted = self.counted, False
        try:
            with self._gate.silence(), buffers_restored(self.pl_module) if restore_buffers else nullcontext():
                yield
        finally:
            self.counted = before

    def _run_core(self, step: RunStep, batch: Any) -> Any:
        self.current_batch = batch
        for capture in self._captures.values():
            capture.clear()
        self._output = (self._core or step)(batch)
        if self._adapt is not None:
            self._output = self._adapt(self._output)
        return self._output


class _QuietLogits:
    def __init__(self, gate: QuietGate, function: LogitsFunction) -> None:
        self.module = function.module
        self._gate = gate
        self._function = function

    def on(self, copied: nn.Module) -> Callable[[Tensor], Tensor]:
        """The same map on a copy of the module, an average of its weights say."""
        trainer = self.module.trainer if isinstance(self.module, L.LightningModule) else None
        return logits_of_copy(copied, trainer, self._function.logits_from)

    def __call__(self, x: Tensor) -> Tensor:
        with self._gate.silence():
            return self._function(x)


def logits_of_copy(copied: nn.Module, trainer: L.Trainer | None, logits_from: str | None) -> LogitsFunction:
    """The map ``x -> logits`` of a copy of the module in training, which logs nothing.

    Args:
        copied: the copy.
        trainer: the Trainer of the module, which a forward may ask for the epoch; ``None`` for a plain module.
        logits_from: dotted name of the sub-module whose output is the logits.
    """
    if trainer is not None:
        follower: Any = copied
        follower.trainer = trainer
        follower.log = follower.log_dict = _nothing
    return LogitsFunction(copied, logits_from)


def _nothing(*_: Any, **__: Any) -> None:
    return None

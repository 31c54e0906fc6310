# SPDX-License-Identifier: Apache-2.0
"""Flatness of the loss, watched while training."""

import copy
from contextlib import ExitStack
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_robust.callbacks._evaluation_tap import EvaluationTap, refuse_other_function
from lightning_robust.callbacks._fixed_samples import FixedSamples
from lightning_robust.callbacks._names import refuse_same_name
from lightning_robust.callbacks._separate_weights import SeparateWeights
from lightning_robust.callbacks._sharpness_reading import Reading, SampleLoss, reduction, silenced
from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.guards import buffers_restored, evaluation_mode, module_devices, rng_preserved
from lightning_robust.losses import Criterion, CrossEntropy
from lightning_robust.sharpness import stability_ratio
from lightning_robust.sharpness.surface import HessianMethod
from lightning_robust.training import BatchAdapter, LogitsFunction, derive_seed

__all__ = ["SharpnessMonitor"]


class SharpnessMonitor(Callback):
    r"""Measures how sharp the loss of any LightningModule is around its weights, without changing the module.

    On the same few samples each time it logs, as ``val/sharpness/...`` (``train/sharpness/...``):

    - ``top_eigenvalue``: the largest eigenvalue :math:`\lambda` of the Hessian of the mean loss; ``converged`` is 1 if
      it met the tolerance;
    - ``epsilon_sharpness``: :math:`\max_{\lVert e\rVert\le\rho} L(w+e) - L(w)` by gradient ascent, and
      ``keskar_sharpness``, the same in percent of :math:`1 + L(w)`;
    - ``gradient_norm`` and ``loss`` of these samples;
    - ``edge_of_stability``: :math:`\eta\lambda/2` with the largest learning rate :math:`\eta` of the optimizers; plain
      gradient descent is stable below 1, with momentum :math:`\beta` below :math:`1+\beta`; only while fitting;
    - ``trace`` of the Hessian with its standard error ``trace_error``, if ``trace_products`` is not 0;
    - ``top_eigenvalue_class_N``: the same for the loss of one class's samples, with ``per_class``;
    - ``products``: the Hessian-vector products that all of this took.

    Runs in ``on_validation_epoch_end`` (``on_train_epoch_end`` for training samples), and after every n-th optimizer
    step on demand. The network is evaluated at separate float32 copies of its weights and buffers (float64 for float64
    modules), in evaluation mode, without autocast and without compilation: weights, gradients, modes, generators and
    metrics stay as they are, whatever the precision of the run. Under DDP every process evaluates its share of the
    samples, with the buffers of process zero, and the products are added up, so that all do the same number of them.

    Validation samples are drawn evenly from the whole loader in its first run; with a loader that does not shuffle, a
    resumed run draws the same. Training samples are the first that pass, augmented once, and others after a resume: for
    a clean and lasting choice give them as a second validation loader and name it with ``dataloader_idx``. Before the
    samples are complete, steps are not measured. ``every_n_epochs`` above 1 leaves ``ModelCheckpoint(monitor=...)``
    without a value in other epochs.

    Measured is ``forward`` (or the only network, or ``logits_from``). The first validation batch of a run compares its
    logits with those of the validation step, which a compiled LightningModule compiles once more for it; a step that
    computes another function is refused.

    Cost: a pass, then 4 to 10 Hessian-vector products of about three passes each for the eigenvalue, as often again for
    each class; ``ascent_steps + 1`` passes; one product per unit of ``trace_products``. With the default 64 samples and
    without ascent this took as long as 8 to 12 training steps of 64 images for a ResNet-8 on 8 x 8 digits, and 19 to 32
    for a ResNet-18 on 32 x 32 images (3 to 4 % of an epoch of CIFAR-10), on one CPU core. Memory: a copy of the weights
    per product (``solver="power"``: two), and the graph of one batch with its second derivatives.

    Args:
        data: where the samples come from.
        max_samples: how many, shared out over the ranks; ``None`` for all of a loader. They stay on the device.
        every_n_epochs: measure in every n-th epoch of a fit; ``None`` for none. ``trainer.validate`` always measures
            validation samples.
        every_n_steps: measure after every n-th optimizer step too; ``None`` for none.
        solver: ``"lanczos"`` finds the largest eigenvalue, ``"power"`` that of the largest magnitude, in less memory.
        method: how products are computed: ``"double-backward"``, or ``"finite-difference"`` for operations that have no
            second derivative.
        tolerance: of the solver: relative residual (``"lanczos"``) or relative change (``"power"``).
        max_products: largest number of Hessian-vector products for an eigenvalue.
        trace_products: products for the trace; 0 leaves it out.
        radius: radius :math:`\rho` of the ball, in units of the weights.
        ascent_steps: steps of the ascent; 0 leaves it out.
        per_class: whether to measure the loss of each class that has samples, or of the listed ones, one at a time.
        criterion: the loss; cross-entropy when ``None``. It must be a mean over samples.
        batch_size: samples per forward pass. With more samples than that, forward passes are repeated for every product
            to save memory.
        dataloader_idx: which validation loader gives the samples if there are several.
        name: distinguishes the values of several monitors, ``val/NAME/...``.
        seed: seed of the choice of samples and of the start vectors.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: an argument out of range; at setup, a strategy that shards weights, or two monitors of one name;
            when running, no samples, a listed class without any, a loss that is not a finite number, or a step that
            validates another function than the measured one.
        RuntimeError: an operation has no second derivative; use ``method="finite-difference"``.

    References:
        Yao et al., PyHessian, arXiv 1912.07145. Keskar et al., arXiv 1609.04836. Cohen et al., arXiv 2103.00065 (edge
        of stability). Rangwani et al., arXiv 2212.13827 (one class at a time, for long-tailed data).

    Example:
        >>> from lightning_robust.callbacks import SharpnessMonitor
        >>> monitor = SharpnessMonitor(max_samples=128, every_n_epochs=5, trace_products=20)
    """

    def __init__(
        self,
        *,
        data: Literal["val", "train"] = "val",
        max_samples: int | None = 64,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        solver: Literal["lanczos", "power"] = "lanczos",
        method: HessianMethod = "double-backward",
        tolerance: float = 1e-2,
        max_products: int = 50,
        trace_products: int = 0,
        radius: float = 0.05,
        ascent_steps: int = 5,
        per_class: bool | list[int] = False,
        criterion: Criterion | None = None,
        batch_size: int = 256,
        dataloader_idx: int = 0,
        name: str = "sharpness",
        seed: int = 0,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__()
        check_choice("data", data, ("val", "train"))
        for label, number in (
            ("max_samples", max_samples),
            ("every_n_epochs", every_n_epochs),
            ("every_n_steps", every_n_steps),
        ):
            if number is not None:
                check_integer(label, number, 1)
        check_integer("batch_size", batch_size, 1)
        check_integer("dataloader_idx", dataloader_idx, 0)
        check_integer("seed", seed, 0)
        self.reading = Reading(
            solver, method, tolerance, max_products, trace_products, radius, ascent_steps, per_class, seed
        )
        self.data = data
        self.max_samples = max_samples
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.criterion = criterion if criterion is not None else CrossEntropy()
        self.batch_size = batch_size
        self.dataloader_idx = dataloader_idx
        self.name = name
        self.seed = seed
        self.logits_from = logits_from
        self.batch = batch if batch is not None else BatchAdapter()
        self._samples = FixedSamples(0, 0, first=True)
        self._tap: EvaluationTap | None = None  # watches the step up to the first batch of a run
        self._compared = False
        self._measured_at = 0  # optimizer step

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_same_name(trainer, self, lambda other: other.data == self.data)
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"SharpnessMonitor needs whole weights, which {type(trainer.strategy).__name__} does not keep on one "
                'device; use strategy="ddp" or a single device.'
            )
        limit = self.max_samples
        if limit is not None:
            share, rest = divmod(limit, trainer.world_size)
            limit = share + (trainer.global_rank < rest)
        seed = derive_seed(self.seed, trainer.global_rank)
        self._samples = FixedSamples(limit, seed, first=self.data == "train")
        self._compared = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measured_at = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.data == "train":
            self._samples.offer(*self.batch.unpack(batch))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps is None or step % self.every_n_steps or step == self._measured_at:
            return
        self._measured_at = step
        if trainer.strategy.reduce_boolean_decision(self._samples.ready):
            self._log_step(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.data == "train":
            self._samples.closed = True
            if self._is_due(trainer):
                self._log(trainer, pl_module)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.data == "val" and not trainer.sanity_checking and not self._compared:
            self._tap = EvaluationTap(pl_module, "validation_step", self.logits_from)
            self._tap.attach()

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.data == "val" and dataloader_idx == self.dataloader_idx and not trainer.sanity_checking:
            self._samples.offer(*self.batch.unpack(batch))

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
        if self._tap is None or dataloader_idx != self.dataloader_idx:
            return
        function = LogitsFunction(pl_module, self.logits_from)
        with ExitStack() as stack:
            for context in (
                trainer.precision_plugin.forward_context(),
                silenced(pl_module),
                rng_preserved(module_devices(pl_module)),
                buffers_restored(pl_module),
                torch.no_grad(),
            ):
                stack.enter_context(context)
            refuse_other_function(self._tap, function, self.batch.input_of(batch))
        self._compared = True
        self._end()

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()
        if self.data == "val" and not trainer.sanity_checking:
            self._samples.closed = True
            if self._is_due(trainer):
                self._log(trainer, pl_module)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._tap is not None:
            self._tap.detach()
            self._tap = None

    def _is_due(self, trainer: L.Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for key, value in self._measure(trainer, pl_module).items():
            # every rank has the same values, so the mean over ranks changes nothing
            pl_module.log(key, value, sync_dist=True)

    def _log_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # self.log(on_step=True) would repeat the values at every following step, as if they were measured there
        values = self._measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        if trainer.barebones:
            return {}
        taken = self._samples.take()
        if trainer.strategy.reduce_boolean_decision(taken is None):
            where = "training" if self.data == "train" else f"validation loader {self.dataloader_idx}"
            raise ValueError(
                f"SharpnessMonitor found no samples in {where}; let it have batches, or choose `data` and "
                "`dataloader_idx` otherwise."
            )
        reduce = reduction(trainer)
        with torch.inference_mode(False), evaluation_mode(pl_module), silenced(pl_module):
            weights = SeparateWeights(pl_module, self.logits_from, reduce)
            criterion = copy.deepcopy(self.criterion).to(pl_module.device)
            values = self.reading.of(SampleLoss(taken, weights, criterion, self.batch_size, reduce))
        rates = [float(group["lr"]) for each in trainer.optimizers for group in each.param_groups if "lr" in group]
        if rates:
            values["edge_of_stability"] = stability_ratio(values["top_eigenvalue"], max(rates))
        return {f"{self.data}/{self.name}/{key}": value for key, value in values.items()}

# SPDX-License-Identifier: Apache-2.0
"""Robustness of any LightningModule, evaluated on its test set on any number of processes."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import Attack
from lightning_robust.callbacks._calibration_files import output_folder
from lightning_robust.callbacks._evaluation_tap import EvaluationTap, refuse_other_function
from lightning_robust.callbacks._names import refuse_same_name
from lightning_robust.callbacks._patient_group import PatientGroup
from lightning_robust.callbacks._robust_display import EvaluationDisplay, RobustDisplay, write_report
from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.evaluation import RobustnessEvaluator, RobustnessReport, build_report
from lightning_robust.evaluation.plan import Mode, check_attacks, named_attacks
from lightning_robust.evaluation.sanity import SAMPLES, CheckBudget, sanity_checks
from lightning_robust.evaluation.stage_runner import CraftDtype
from lightning_robust.training import BatchAdapter, EvaluationIndices, LogitsFunction, QuietGate

__all__ = ["RobustEvaluation"]

_PREFIXES = {TrainerFn.VALIDATING: "val", TrainerFn.TESTING: "test"}
_STEPS = {TrainerFn.VALIDATING: "validation_step", TrainerFn.TESTING: "test_step"}


class RobustEvaluation(Callback):
    """Attacks the test set of any LightningModule in ``trainer.test`` and reports what withstood.

    Logs ``test/robust_acc``, the share of samples that are right clean and under every attack, the accuracy without
    attack ``test/robust_clean_acc`` and, with several attacks, ``test/robust_acc_NAME``; writes ``robust_test.json``
    and ``.png``; shows how far it is and a table. The whole result is in :attr:`report`. In ``trainer.validate`` the
    names begin with ``val``. It does nothing in a fit: see :class:`~lightning_robust.callbacks.RobustnessMonitor`.

    What counts: samples by their index in the dataset, each once, however many processes share them and whatever a
    distributed sampler pads; points that are within the budget and fool the plain model in float32, whatever the
    precision of the Trainer; images that the model gets wrong without attack as not robust. Random draws depend on
    the sample's index alone, so that batch sizes and the number of processes change nothing. See
    :class:`~lightning_robust.evaluation.RobustnessEvaluator`.

    The attacked function is ``forward`` (or the only network, or ``logits_from``), compared with the logits of the step
    in the first batch. Modes, buffers, logs and metrics of the module are left alone.

    Cost: one forward per sample, that of the attacks for each sample that is still robust, and a forward per point;
    the sanity checks on top, on the first samples of the first process.

    Args:
        attacks: one attack, or several by name.
        mode: ``"exact"``: every attack on all correct samples; ``"union"``: each on those that the ones before it left,
            which is cheaper when only the union matters.
        seed: seed in place of those of the attacks; theirs when ``None``.
        batch_size: samples per attacked batch; that of the loader when ``None``.
        max_samples: evaluate the samples of index below this only; all when ``None``.
        craft_dtype: run the attacks under autocast in ``"bfloat16"`` or ``"float16"``; points are verified in float32.
        eight_bit: look at adversarial points after rounding to 8 bits as well.
        checks: make the sanity checks, ``"quick"`` or ``"full"``; none when ``None``.
        state_dir: folder, the same in all processes, for flags and adversarial points: a killed evaluation continues
            from it, with any number of processes.
        save_every_s: seconds from one save to the next.
        out: folder for the report; ``robustness/`` in the Trainer's log folder when ``None``. Without a logger and a
            ``default_root_dir`` nothing is written.
        display: ``"auto"``, ``"line"`` for plain lines only, or ``"off"``.
        name: distinguishes the values of several evaluations: ``test/NAME_acc``.
        dataloader_idx: which loader is evaluated if there are several.
        index_key: key or position of the indices in a batch, for loaders whose sampler cannot be followed.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: an argument out of range, an attack that cannot be evaluated, weights that are spread over
            processes; when running, images outside the bounds, logits that are not finite, a step that evaluates
            another function than the attacked one, or a `state_dir` of another evaluation.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.callbacks import RobustEvaluation
        >>> evaluation = RobustEvaluation({"linf": PGD(eps=8 / 255, steps=20), "l2": PGD(norm="l2", eps=0.5)})
        >>> trainer = L.Trainer(callbacks=[evaluation], logger=False)  # doctest: +SKIP
        >>> trainer.test(module, test_loader)  # doctest: +SKIP
        >>> evaluation.report.robust_accuracy  # doctest: +SKIP
    """

    def __init__(
        self,
        attacks: Attack | dict[str, Attack],
        *,
        mode: Mode = "exact",
        seed: int | None = None,
        batch_size: int | None = None,
        max_samples: int | None = None,
        craft_dtype: CraftDtype | None = None,
        eight_bit: bool = True,
        checks: CheckBudget | None = "quick",
        state_dir: str | Path | None = None,
        save_every_s: float = 30.0,
        out: str | Path | None = None,
        display: RobustDisplay = "auto",
        name: str = "robust",
        dataloader_idx: int = 0,
        index_key: int | str | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__()
        check_attacks(named_attacks(attacks), mode)
        check_choice("checks", checks, (None, *SAMPLES))
        check_choice("display", display, ("auto", "line", "off"))
        if max_samples is not None:
            check_integer("max_samples", max_samples, 1)
        self.attacks = attacks
        self.options: dict[str, Any] = {
            "mode": mode,
            "seed": seed,
            "batch_size": batch_size,
            "craft_dtype": craft_dtype,
            "eight_bit": eight_bit,
            "state_dir": None if state_dir is None else str(state_dir),
            "save_every_s": save_every_s,
            "keep": 0 if checks is None else SAMPLES[checks],
        }
        RobustnessEvaluator(
            torch.nn.Identity(), attacks, **{**self.options, "state_dir": None}
        )  # refuses what is wrong
        self.max_samples, self.checks, self.display, self.name = max_samples, checks, display, name
        self.out = None if out is None else str(out)
        self.dataloader_idx, self.logits_from = dataloader_idx, logits_from
        self.batch = batch if batch is not None else BatchAdapter()
        self.report: RobustnessReport | None = None
        self._indices = EvaluationIndices(index_key=index_key, dataloader_idx=dataloader_idx)
        self._folder: Path | None = None
        self._evaluator: RobustnessEvaluator | None = None
        self._model: LogitsFunction | None = None
        self._display: EvaluationDisplay | None = None
        self._gate: QuietGate | None = None
        self._tap: EvaluationTap | None = None  # watches the step in the first batch
        self._group: PatientGroup | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn not in _PREFIXES:
            return
        refuse_same_name(trainer, self)
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"RobustEvaluation attacks different numbers of samples in different processes, which {_name(trainer)} "
                "with its spread weights does not allow; evaluate on one device, or with strategy='ddp'."
            )
        self._folder = output_folder(trainer, self.out, "robustness")
        self._indices.install(trainer)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fn = trainer.state.fn
        if fn not in _PREFIXES:
            return
        self._model = LogitsFunction(pl_module, self.logits_from)
        self._tap = EvaluationTap(pl_module, _STEPS[fn], self.logits_from)
        self._tap.attach()
        self._gate = QuietGate(pl_module)
        self._gate.install()
        self._display = EvaluationDisplay(trainer, self.display)
        self._evaluator = RobustnessEvaluator(
            self._model,
            self.attacks,
            rank=trainer.global_rank,
            total=self._total(trainer),
            progress=self._display,
            **self.options,
        )
        # no process writes into the state before all have seen what is there
        trainer.strategy.barrier("robust evaluation")
        self._group = PatientGroup()

    on_test_epoch_start = on_validation_epoch_start

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
        if self._evaluator is None or dataloader_idx != self.dataloader_idx:
            return
        assert self._gate is not None
        assert self._model is not None
        x, y = self.batch.unpack(batch)
        indices = self._indices.current(batch, count=len(x)).to(x.device)
        with trainer.precision_plugin.forward_context(), self._gate.silence():
            if self._tap is not None:
                with torch.no_grad():
                    refuse_other_function(self._tap, self._model, x)
                self._tap.detach()
                self._tap = None
            self._evaluator.feed(*self._wanted(x, y, indices))

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluator is None:
            return
        assert self._gate is not None
        assert self._group is not None
        assert trainer.state.fn is not None
        with trainer.precision_plugin.forward_context(), self._gate.silence():
            shard = self._evaluator.finish()
            # before the others are told, who wait without a limit only there
            found = sanity_checks(self._evaluator, self.checks) if trainer.is_global_zero else []
        parts = self._group.gather((shard, found))
        self.report = build_report([each for each, _ in parts], parts[0][1])
        prefix, display = _PREFIXES[trainer.state.fn], self._display
        self._end()
        self._log(trainer, pl_module, self.report, prefix)
        if trainer.is_global_zero:
            assert display is not None
            display.report(self.report)
            write_report(trainer, self.report, self._folder, f"{self.name}/{prefix}")

    on_test_epoch_end = on_validation_epoch_end

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._evaluator is not None:
            self._evaluator.save()
        self._end()
        self._indices.remove()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()
        self._indices.remove()

    def _wanted(self, x: Tensor, y: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.max_samples is None:
            return x, y, indices
        wanted = indices < self.max_samples
        return x[wanted], y[wanted], indices[wanted]

    def _total(self, trainer: L.Trainer) -> int | None:
        """Samples of this process, about."""
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        dataset: Any = (
            getattr(loaders[self.dataloader_idx], "dataset", None) if len(loaders) > self.dataloader_idx else None
        )
        if not hasattr(dataset, "__len__"):
            return self.max_samples
        total = len(dataset) if self.max_samples is None else min(len(dataset), self.max_samples)
        return -(-total // trainer.world_size)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, report: RobustnessReport, prefix: str) -> None:
        if trainer.barebones:
            return
        values = {f"{self.name}_acc": report.robust_accuracy, f"{self.name}_clean_acc": report.clean_accuracy}
        if len(report.attacks) > 1:
            values |= {f"{self.name}_acc_{each.name}": each.robust_accuracy for each in report.attacks}
        for key, value in values.items():
            # every process has the same report, so the mean over processes changes nothing
            pl_module.log(f"{prefix}/{key}", value, sync_dist=True)

    def _end(self) -> None:
        if self._tap is not None:
            self._tap.detach()
        if self._gate is not None:
            self._gate.remove()
        if self._display is not None:
            self._display.forget()
        if self._group is not None:
            self._group.close()
        self._evaluator = self._model = self._display = self._gate = self._tap = self._group = None


def _name(trainer: L.Trainer) -> str:
    return type(trainer.strategy).__name__

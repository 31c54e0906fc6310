# SPDX-License-Identifier: Apache-2.0
"""Finding mislabelled training samples while training."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._calibration_files import output_folder
from lightning_robust.checks import check_in_range, check_integer
from lightning_robust.metrics import MarginTable, flag_suspicious
from lightning_robust.training import BatchAdapter, PerSampleCallback, RunStep, Stage, StepContext

__all__ = ["MislabelMonitor"]


class MislabelMonitor(PerSampleCallback):
    r"""Ranks the training samples of any LightningModule by their area under the margin and writes the suspects.

    .. math:: \text{AUM}_i = \frac1{|T_i|} \sum_{t\in T_i} \Big(z^{(t)}_{y_i} - \max_{k\ne y_i} z^{(t)}_k\Big)

    The margin of each visit is taken from the logits of the training step itself. Samples with a wrong label have the
    smallest areas, because the others teach the network against it; hard samples come next to them. At the end of the
    fit, ``mislabels/suspicious_samples.csv`` in the log folder holds ``index``, ``label``, ``aum``, ``visits``,
    ``suggested`` (the largest other logit at the last visit) and ``flagged``, the smallest area first.

    With threshold samples, which got a made-up class
    (:func:`~lightning_robust.metrics.assign_threshold_samples`), samples below their 99th percentile are flagged;
    without, there is only the ranking. As the authors do it: train at a constant high learning rate, stop before it
    drops (``end_epoch``), and do it twice with disjoint threshold samples; then train anew without the flagged samples.

    Which samples a batch holds is read off the loader's sampler, so dataset and step stay as they are. All processes
    of a DDP run share one table; checkpoints hold it, so a run continues exactly. Of a sharpness-aware step the pass
    that counts is recorded.

    Cost: one pass over the logits; 40 bytes per training sample, on the device of the logits and in checkpoints.

    Args:
        start_epoch: first epoch that counts, from 0.
        end_epoch: first epoch that does not count any more; ``None`` for no end.
        threshold_samples: indices of the threshold samples; the attribute ``threshold_samples`` of the training
            dataset when ``None``.
        percentile: percentile of the threshold samples' areas below which a sample is flagged.
        max_rows: number of samples in the file; all of them when ``None``.
        dirpath: folder for the file; ``mislabels/`` in the Trainer's log folder when not given. Without a logger and a
            ``default_root_dir`` nothing is written, and the numbers are in :attr:`table`.
        name: tells this monitor from others: ``suspicious_samples_NAME.csv``.
        index_key: key or position of the indices in a batch, for datasets that return them; read off the loader's
            sampler when ``None``.
        num_samples: number of training samples; that of the training loader's dataset when ``None``.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read the labels from a batch; the usual forms are understood when ``None``.

    Raises:
        TypeError: when loaders are set up, if the samples of a batch cannot be known.
        ValueError: at setup, beside a callback that mixes samples, whose margins belong to no sample; before the first
            step, for a checkpoint of another number of samples or threshold samples out of range; in a step, for labels
            that are no class indices.

    References:
        Pleiss et al., arXiv:2001.10528. The authors' script rounds logits to half precision; this does not.

    Example:
        >>> from lightning_robust.callbacks import MislabelMonitor
        >>> trainer = L.Trainer(callbacks=[MislabelMonitor(end_epoch=30)], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    only_looks = True
    needs_logits = True
    manual_optimization = True

    def __init__(
        self,
        *,
        start_epoch: int = 1,
        end_epoch: int | None = None,
        threshold_samples: Sequence[int] | None = None,
        percentile: float = 99.0,
        max_rows: int | None = None,
        dirpath: str | Path | None = None,
        name: str | None = None,
        index_key: int | str | None = None,
        num_samples: int | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(index_key=index_key, num_samples=num_samples, logits_from=logits_from, batch=batch)
        check_integer("start_epoch", start_epoch, 0)
        if end_epoch is not None:
            check_integer("end_epoch", end_epoch, start_epoch + 1)
        check_in_range("percentile", percentile, 0, 100)
        if max_rows is not None:
            check_integer("max_rows", max_rows, 1)
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.threshold_samples = None if threshold_samples is None else list(threshold_samples)
        self.percentile = percentile
        self.max_rows = max_rows
        self.dirpath = None if dirpath is None else str(dirpath)
        self.name = name
        #: The areas of all samples, complete in every process after the fit.
        self.table: MarginTable | None = None
        self._thresholds: Tensor | None = None
        self._folder: Path | None = None
        self._restored: dict[str, Any] = {}
        self._merged_at = -1

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._restored if self.table is None else self.table.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        mixing = [type(other).__name__ for other in trainer.callbacks if getattr(other, "mixes_samples", False)]  # type: ignore[attr-defined]
        if mixing:
            raise ValueError(
                f"MislabelMonitor needs the margin of each sample but {mixing[0]} mixes them; train without it to find "
                "mislabelled samples."
            )
        epochs = trainer.max_epochs
        if epochs is not None and -1 < epochs <= self.start_epoch and trainer.max_steps == -1:
            rank_zero_warn(
                f"MislabelMonitor counts from epoch {self.start_epoch} on and this run has {epochs}; lower start_epoch."
            )
        self.table = None
        self._thresholds = None
        self._restored = {}
        self._merged_at = -1
        self._folder = output_folder(trainer, self.dirpath, "mislabels")

    @override
    def on_samples_known(self, trainer: L.Trainer, pl_module: L.LightningModule, num_samples: int) -> None:
        device = trainer.strategy.root_device
        self.table = MarginTable(num_samples, device="cpu" if device.type == "mps" else device)
        if self._restored:
            self.table.load_state_dict(self._restored)
            self._restored = {}
        given: Any = self.threshold_samples
        if given is None:
            given = getattr(getattr(trainer.train_dataloader, "dataset", None), "threshold_samples", None)
        if given is not None:
            self._thresholds = torch.as_tensor(given, dtype=torch.long).flatten().cpu()
            if not len(self._thresholds) or self._thresholds.min() < 0 or self._thresholds.max() >= num_samples:
                raise ValueError(
                    f"Expected `threshold_samples` to be indices from 0 to {num_samples - 1}, at least one, but got "
                    f"{self._thresholds[:5].tolist()}{' ...' if len(self._thresholds) > 5 else ''}."
                )

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        output = run(batch)
        epoch = context.trainer.current_epoch
        ended = self.end_epoch is not None and epoch >= self.end_epoch
        skipped = output is None and context.pl_module.automatic_optimization
        if skipped or not context.counted or epoch < self.start_epoch or ended:
            return output
        logits, labels = context.logits(self), self.batch.target_of(context.current_batch)
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                "MislabelMonitor needs one row of logits [B, C] and one class index [B] per sample but the step has "
                f"logits {list(logits.shape)} and {labels.dtype} targets {list(labels.shape)}."
            )
        assert self.table is not None, "made in on_train_start"
        indices = self.indices_of(context, len(logits))
        self.table.record(indices, logits, labels, step=context.trainer.fit_loop.total_batch_idx)
        return output

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._merge(trainer)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # the first process writes the file, for all of them
        self._merge(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._merge(trainer)
        if trainer.is_global_zero and self._folder is not None and self.table is not None:
            ending = "" if self.name is None else f"_{self.name}"
            self._write(self._folder / f"suspicious_samples{ending}.csv")

    def suspects(self) -> list[dict[str, Any]]:
        """The rows of the file: every judged sample, the smallest area first; ``flagged`` only with threshold samples.

        Raises:
            RuntimeError: nothing was trained yet.
        """
        if self.table is None:
            raise RuntimeError("MislabelMonitor has no samples yet; call trainer.fit first.")
        table, thresholds = self.table, self._thresholds
        aum = table.aum.cpu()
        judged = ~aum.isnan()
        columns: dict[str, Tensor] = {"index": torch.arange(len(aum)), "label": table.labels, "aum": aum}
        columns |= {"visits": table.visits, "suggested": table.suggested}
        if thresholds is not None and judged[thresholds].any():
            columns["flagged"] = flag_suspicious(aum, thresholds, percentile=self.percentile).int()
        if thresholds is not None:
            judged[thresholds] = False  # their labels are made up
        order = aum.argsort(stable=True)
        order = order[judged[order]][: self.max_rows]
        values = [column.cpu()[order].tolist() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def _write(self, path: Path) -> None:
        rows = self.suspects()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["index", "label", "aum"])
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, path)
            rank_zero_info(f"Training samples by their area under the margin: {path}")
        except OSError as error:  # a full disk must not cost a training
            rank_zero_warn(f"The suspicious samples could not be written to {path}: {error!r}")
        finally:
            if temporary.exists():
                temporary.unlink()

    def _merge(self, trainer: L.Trainer) -> None:
        now = trainer.fit_loop.total_batch_idx
        if self.table is not None and trainer.world_size > 1 and now != self._merged_at:
            self.table.merge(
                lambda part: trainer.strategy.reduce(part.clone(), reduce_op="sum"),
                lambda part: trainer.strategy.reduce(part.clone(), reduce_op="max"),
            )
            self._merged_at = now

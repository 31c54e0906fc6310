# SPDX-License-Identifier: Apache-2.0
"""What training does to the penultimate features of any LightningModule."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_robust.callbacks._feature_statistics import FeatureStatistics
from lightning_robust.callbacks._feature_tap import FeatureTap
from lightning_robust.callbacks._names import refuse_same_name
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.training import (
    BatchAdapter,
    FeatureCapture,
    RunStep,
    Stage,
    StepCallback,
    StepContext,
    derive_seed,
)

__all__ = ["FeatureMonitor"]


class FeatureMonitor(StepCallback):
    r"""Measures class separation, neural collapse and rank of the features of any LightningModule, per epoch.

    On the features :math:`h` that enter the classifier it logs, as ``val/...``, ``test/...`` and ``train/...``:

    - ``d_within``, the variation inside the classes (mean cosine distance of two samples of one class; label smoothing
      lowers it, MaxSup less), and ``r2``, how much of the whole spread the classes explain;
    - ``nc1`` :math:`= \operatorname{tr}(S_W S_B^+)/C` and ``nc1_trace`` :math:`= \operatorname{tr} S_W /
      \operatorname{tr} S_B`; ``cdnv``; ``nc2``, the distance of the class means from a simplex, and its parts
      ``nc2_norms`` and ``nc2_angles``; ``nc3``, :math:`\lVert W/\lVert W\rVert - M/\lVert M\rVert\rVert_F^2` for the
      classifier weights :math:`W` as they are at the end of the epoch; ``nc4``, the share of samples for which the
      nearest class mean is not the predicted class. All are 0 in full neural collapse;
    - ``effective_rank`` and ``stable_rank`` of the centred features.

    Validation features are those of the validation step itself, no second forward pass. Training features are those of
    the training step: augmented, with dropout, of a network that changes during the epoch, adversarial if the step is;
    of a sharpness-aware step the pass that counts. Class means are those of the same split. One pass gives everything
    but ``nc4``, which needs each sample once more when the means are known: for that up to ``keep`` features per
    process are remembered, all of them or a uniform sample. Classes without samples are left out.

    Sums are added up over the processes, so their number does not matter. The sanity check is not counted; an epoch
    that a run continues in the middle is measured on the rest of it.

    Cost: per batch of ``B``, ``2 B D^2`` operations in float64 (``covariance=False``: ``4 B D``); per epoch one
    reduction and a decomposition of a ``C x D`` and a ``D x D`` matrix. Memory
    :math:`8(2CD+D^2)` bytes and :math:`4D` for each kept feature: 4 and 20 MB for 100 classes and 512 features.

    Args:
        data: which features: ``"val"`` (and test), ``"train"`` or ``"both"``.
        every_n_epochs: measure in every n-th epoch of a fit. Above 1, ``ModelCheckpoint(monitor="val/nc1")`` has no
            value in other epochs.
        covariance: whether to sum outer products, which ``nc1`` and the ranks need, a ``D x D`` matrix.
        keep: number of features per process that ``nc4`` is measured on; 0 leaves it out.
        features_from: dotted name of the layer whose output is the features (then there is no ``nc3`` and, in a step
            with several forward passes, the last one counts); the input of the classifier when ``None``.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        name: tells this monitor from others: ``val/NAME/nc1``.
        seed: seed of the sample that ``nc4`` is measured on.
        batch: how to read the labels from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: at setup, for an unknown ``features_from``, two monitors of one name, or training features of mixed
            samples, which belong to no class; in a step, for labels that are no class indices.
        FeaturesNotCaptured: at the first batch, if the classifier cannot be told; the message says what to name.
        LogitsNotCaptured: at the first batch, if the step shows no logits.

    References:
        Kornblith et al., arXiv:2010.16402 (``d_within``, ``r2``); Zhou et al. (MaxSup), arXiv:2502.15798. Papyan et
        al., arXiv:2008.08186 (neural collapse; the authors measure a network at rest, in two more passes over the
        training set). Galanti et al., arXiv:2112.15121 (CDNV). Roy and Vetterli, EUSIPCO 2007 (effective rank).

    Example:
        >>> from lightning_robust.callbacks import FeatureMonitor
        >>> trainer = L.Trainer(callbacks=[FeatureMonitor(data="both")], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    only_looks = True
    manual_optimization = True

    def __init__(
        self,
        *,
        data: Literal["val", "train", "both"] = "val",
        every_n_epochs: int = 1,
        covariance: bool = True,
        keep: int = 10_000,
        features_from: str | None = None,
        logits_from: str | None = None,
        name: str | None = None,
        seed: int = 0,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        check_choice("data", data, ("val", "train", "both"))
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("keep", keep, 0)
        check_integer("seed", seed, 0)
        self.data = data
        self.every_n_epochs = every_n_epochs
        self.covariance = covariance
        self.keep = keep
        self.features_from = features_from
        self.name = name
        self.seed = seed
        self.needs_logits = data != "val"
        self._features: FeatureCapture | None = None
        self._tap: FeatureTap | None = None
        self._evaluated: list[FeatureStatistics] = []  # one per dataloader
        self._trained: FeatureStatistics | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_same_name(trainer, self)
        self._end()
        super().setup(trainer, pl_module, stage)
        self._features = FeatureCapture(pl_module, self.features_from)
        # now, because a compiled network overlooks hooks that come after its first run
        self._features.attach()
        self._features.active = False

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        mixing = [type(other).__name__ for other in trainer.callbacks if getattr(other, "mixes_samples", False)]  # type: ignore[attr-defined]
        if mixing and self.data != "val":
            raise ValueError(
                f"FeatureMonitor(data={self.data!r}) needs training samples of one class each but {mixing[0]} mixes "
                'them; use data="val".'
            )

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        if self.data == "val" or not context.counted or not self._due(context.trainer):
            return run(batch)
        features = self._capture
        features.clear()
        features.active = True
        try:
            output = run(batch)
        finally:
            features.active = False
        if output is None and context.pl_module.automatic_optimization:  # a skipped step
            return output
        logits = context.logits(self)
        labels = self.batch.target_of(context.current_batch)
        if self._trained is None:
            self._trained = self._new(context.trainer, 0)
        self._trained.update(features.take(logits), logits, labels)
        features.clear()
        return output

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.data != "val" and self._due(trainer):
            statistics, self._trained = self._trained or self._new(trainer, 0), None
            self._log(trainer, pl_module, "train", "", statistics)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due(trainer):
            loaders = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._begin(trainer, pl_module, "validation_step", len(loaders))

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, "test_step", len(trainer.num_test_batches))

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
        if self._tap is not None:  # also in the sanity check: what cannot be found is found early
            self._evaluated[dataloader_idx].update(*self._tap.take_both(), self.batch.target_of(batch))

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_tap()

    on_test_end = on_validation_end

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._end()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_features": None, "_tap": None, "_evaluated": [], "_trained": None}

    @property
    def _capture(self) -> FeatureCapture:
        assert self._features is not None, "made in setup"
        return self._features

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.state.fn != TrainerFn.FITTING or trainer.current_epoch % self.every_n_epochs == 0

    def _new(self, trainer: L.Trainer, loader: int) -> FeatureStatistics:
        seed = derive_seed(self.seed, trainer.global_rank, trainer.current_epoch, loader)
        return FeatureStatistics(covariance=self.covariance, keep=self.keep, seed=seed)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, step: str, loaders: int) -> None:
        self._stop_tap()
        if self.data != "train":
            self._tap = FeatureTap(pl_module, step, self.logits_from, self._capture)
            self._tap.attach()
            self._evaluated = [self._new(trainer, loader) for loader in range(loaders)]

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for index, statistics in enumerate(self._evaluated):
            loader = f"/dataloader_idx_{index}" if len(self._evaluated) > 1 else ""
            self._log(trainer, pl_module, stage, loader, statistics)

    def _log(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, loader: str, statistics: FeatureStatistics
    ) -> None:
        stage = stage if self.name is None else f"{stage}/{self.name}"
        values = statistics.compute(trainer, self._capture.classifier, stage + loader)
        for name, value in values.items():
            # equal in all processes already; sync_dist only tells Lightning that nothing is missing
            pl_module.log(f"{stage}/{name}{loader}", value, sync_dist=True, add_dataloader_idx=False)

    def _stop_tap(self) -> None:
        if self._tap is not None:
            self._tap.detach()
            self._tap = None
        self._evaluated = []

    def _end(self) -> None:
        self._stop_tap()
        self._trained = None
        if self._features is not None:
            self._features.detach()
            self._features = None

# SPDX-License-Identifier: Apache-2.0
"""How much a network tells training samples apart, watched while training."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.metrics import ActivationPatterns, draw_pairs, oui
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepCallback, StepContext

__all__ = ["OverfittingMonitor"]


class OverfittingMonitor(StepCallback):
    r"""Logs the overfitting-underfitting indicator of any LightningModule as ``train/oui``.

    .. math:: \text{OUI} = \frac{1}{|P|\,L} \sum_{(i,j)\in P} \sum_{l}
              \frac{\min\big(d(b_{li}, b_{lj}),\,\lfloor n_l/2\rfloor\big)}{\lfloor n_l/2\rfloor}

    In every n-th training batch it compares which units are active (:math:`b`) for fixed pairs of positions in the
    batch, in each ReLU, SiLU and GELU module. It needs no labels and no validation data. The authors found the best
    weight decay where it stays between 0.6 and 0.8: below, the network underfits (decay is too strong), near 1 it
    overfits. The value of an epoch is the mean over its measured batches and the processes.

    Layers that are called several times count with their last call. Of a sharpness-aware step the pass that counts is
    measured. Batches that are too short for a pair leave it out.

    Cost: in a measured batch one comparison for each activation of the chosen rows; otherwise a Python call per layer.

    Args:
        every_n_batches: measure in every n-th training batch of an epoch, from the first on.
        pairs: number of pairs, drawn at the first measured batch; fewer if the batch has fewer.
        layers: names of sub-modules, patterns of names (``"*.act"``), or names of classes (``"Hardswish"``) whose
            outputs are read; every ReLU, SiLU and GELU module when ``None``.
        seed: seed of the pairs.
        batch: how to read the inputs from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: at setup, if the module has no such layer: activations that are called as functions cannot be seen.
        RuntimeError: in a step, if none of the layers ran.

    References:
        Fernández-Hernández et al., arXiv:2504.17160. In the authors' code a batch of fewer than 8 samples is an error.

    Example:
        >>> from lightning_robust.callbacks import OverfittingMonitor
        >>> trainer = L.Trainer(callbacks=[OverfittingMonitor()], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    only_looks = True
    manual_optimization = True

    def __init__(
        self,
        *,
        every_n_batches: int = 10,
        pairs: int = 28,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(batch=batch)
        check_integer("every_n_batches", every_n_batches, 1)
        check_integer("pairs", pairs, 1)
        check_integer("seed", seed, 0)
        self.every_n_batches = every_n_batches
        self.pairs = pairs
        self.layers = None if layers is None else list(layers)
        self.seed = seed
        self._patterns: ActivationPatterns | None = None
        self._drawn: Tensor | None = None  # positions in the batch, [P, 2]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._drawn is None else {"pairs": self._drawn}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn = state_dict.get("pairs")

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        self._drawn = None
        self._patterns = ActivationPatterns(pl_module, self.layers)
        # now, because a compiled network overlooks hooks that come after its first run
        self._patterns.attach()

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        patterns = self._patterns
        assert patterns is not None, "made in setup"
        if context.batch_idx % self.every_n_batches or not context.counted:
            return run(batch)
        rows = len(self.batch.input_of(batch))
        if self._drawn is None and rows > 1:
            self._drawn = draw_pairs(rows, self.pairs, seed=self.seed)
        pairs = self._drawn[(self._drawn < rows).all(1)] if self._drawn is not None else torch.empty(0, 2)
        if not len(pairs):
            return run(batch)
        patterns.least = rows
        patterns.rows = pairs.flatten().to(context.pl_module.device, non_blocking=True)
        try:
            output = run(batch)
        finally:
            patterns.rows = None
        bits = list(patterns.take().values())
        if not bits:
            raise RuntimeError(self._explain(context.pl_module))
        value = oui(bits, torch.arange(pairs.numel(), device=bits[0].device).view(-1, 2))
        context.log("train/oui", value)
        return output

    @override
    def on_pipeline_end(self) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stop()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_patterns": None}

    def _explain(self, pl_module: L.LightningModule) -> str:
        watched = ", ".join(list(self._patterns.names)[:5]) if self._patterns is not None else ""
        return (
            f"None of the layers that OverfittingMonitor watches in {type(pl_module).__name__} ({watched}) ran in the "
            "training step with one row for each sample; name layers that do with layers=[...], and call "
            "torch.compiler.reset() if the network was compiled and run before."
        )

    def _stop(self) -> None:
        if self._patterns is not None:
            self._patterns.detach()
            self._patterns = None

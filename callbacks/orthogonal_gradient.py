# SPDX-License-Identifier: Apache-2.0
"""Training with gradients that are orthogonal to the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.sharpness import ParameterSelection, orthogonalize

__all__ = ["OrthogonalGradient"]


class OrthogonalGradient(Callback):
    r"""Removes from each gradient its part along the weights, so that a step turns them instead of stretching them.

    .. math:: g_\perp = g - \frac{\langle w, g\rangle}{\langle w, w\rangle}\, w, \qquad
              g \leftarrow g_\perp \,\lVert g\rVert_2 / \lVert g_\perp\rVert_2

    tensor by tensor (perpGrad, OrthoGrad). A network that classifies everything can lower its loss for ever by growing
    its logits, until they overflow what float32 resolves; without that direction it has to go on learning.

    Runs before each optimizer step: accumulated gradients, reduced over processes and unscaled, before Lightning's
    clipping (which by norm gives the same either way, because lengths stay). Works with every optimizer that steps once
    per gradient, with several of them, manual optimization, DDP, and together with
    :class:`~lightning_robust.callbacks.SharpnessAware`, whose direction is projected. Weight decay of the optimizer
    acts afterwards and stays radial.

    Cost: a few element-wise operations per parameter; no pass.

    Args:
        parameters: which gradients are projected, by name, shape or kind; all of them when ``None``, biases too, as
            published.

    Raises:
        ValueError: sharded strategies, which keep no weight whole; LBFGS, which needs the true gradient; sparse
            gradients; or a choice of no parameter.
        RuntimeError: an optimizer stepped past Lightning, so that its gradients were not projected.

    References:
        Prieto et al., Grokking at the Edge of Numerical Stability, arXiv 2501.04697. The published optimizer wrapper
        projects before the closure has computed gradients, so under Lightning it does nothing.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import OrthogonalGradient
        >>> trainer = L.Trainer(callbacks=[OrthogonalGradient()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, parameters: ParameterSelection | None = None) -> None:
        super().__init__()
        self.parameters = parameters
        self._projected: set[int] = set()
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"OrthogonalGradient compares gradients with whole weights, which {type(trainer.strategy).__name__} "
                'does not keep on one device; use strategy="ddp" or a single device.'
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "OrthogonalGradient cannot be combined with LBFGS, whose line search needs the true gradient."
                )
            self._handles.append(optimizer.register_step_post_hook(self._check_step))

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        orthogonalize(optimizer, parameters=self.parameters, module=pl_module)
        self._projected.add(id(optimizer))

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _check_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._projected:
            raise RuntimeError(
                f"{type(optimizer).__name__} stepped without Lightning's knowledge, so its gradients were not "
                "projected; step the optimizer that self.optimizers() returns, or call orthogonalize(optimizer) in "
                "your own loop."
            )
        self._projected.discard(id(optimizer))

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._projected.clear()

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no fit
        return {**vars(self), "_handles": [], "_projected": set()}

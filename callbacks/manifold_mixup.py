# SPDX-License-Identifier: Apache-2.0
"""Manifold mixup in the training step of any LightningModule."""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.callbacks.distillation import Distillation
from lightning_robust.callbacks.mesa import MESA
from lightning_robust.callbacks.mixing import CPU, Mixing
from lightning_robust.callbacks.sharpness_aware import SharpnessAware
from lightning_robust.mixing import HiddenMixing, Mixture, Mixup
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepContext

__all__ = ["ManifoldMixup"]


class ManifoldMixup(Mixing):
    r"""Mixes what goes into a randomly drawn layer, and the labels, in the training step of any LightningModule.

    .. math:: \tilde h_i = \lambda\,h_i + (1-\lambda)\,h_{p(i)}, \qquad
              \tilde t_i = \lambda\,e_{y_i} + (1-\lambda)\,e_{y_{p(i)}}, \qquad
              \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Layer, share and permutation are drawn once per batch, so every pass of a sharpness-aware step sees the same
    mixture, and so does a layer that activation checkpointing runs again. The layer is mixed in the training step
    only, in training mode. Everything else is as in :class:`~lightning_robust.callbacks.Mixing`.

    Cost: one pass over the input of one layer. A compiled module is compiled once per layer.

    Args:
        layers: Dotted names of the sub-modules whose input may be mixed, each as likely as the others; each is called
            once in the training step with the batch in the first dimension. The published choice for a residual network
            is the network itself and its second and third stage.
        alpha: Parameter of the Beta distribution.
        targets: What takes the place of the labels in the batch: "soft" or "hard".
        num_classes: Number of classes, for soft targets; that of the module, its hyper-parameters or the data when
            ``None``.
        probability: Probability with which a batch is mixed.
        off_epoch: First epoch (counted from 0) without mixing; ``None`` mixes to the end.
        batch: How to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: As for ``Mixing``; at setup, for a layer that does not exist, together with callbacks whose further
            passes through the network would be mixed or not mixed wrongly: objectives, ``AdversarialTraining`` behind
            this one, ``Distillation``, ``MESA``, a sharpness-aware ascent on part of the batch.
        RuntimeError: In a step that does not call the layer, or calls it with something else than one row per sample.

    References:
        Verma et al., Manifold Mixup: Better Representations by Interpolating Hidden States, arXiv:1806.05236. Its code
        trains with a binary cross-entropy over softmax outputs (a mean over classes too, so its learning rates are for
        a loss some ``C`` times smaller); here the loss is the module's own, the cross-entropy of the paper's text.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import ManifoldMixup
        >>> callback = ManifoldMixup(["backbone", "backbone.layer2", "backbone.layer3"])
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: list[str],
        *,
        alpha: float = 2.0,
        targets: Literal["soft", "hard"] = "soft",
        num_classes: int | None = None,
        probability: float = 1.0,
        off_epoch: int | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(
            Mixup(alpha=alpha),
            targets=targets,
            num_classes=num_classes,
            probability=probability,
            off_epoch=off_epoch,
            batch=batch,
        )
        self.layers = layers
        self._hidden: HiddenMixing | None = None

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        behind = False
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            behind = behind or other is self
            reason = _reason_against(other, behind)
            if reason:
                raise ValueError(f"ManifoldMixup and {type(other).__name__} cannot work together: {reason}")
        self._let_go()
        self._hidden = HiddenMixing(pl_module, self.layers)
        self._hidden.attach()  # before anything is compiled

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        hidden = self._hidden
        assert hidden is not None, "made at setup"
        hidden.stop()
        output = super().around_step(context, batch, run)
        if hidden.active is not None and not hidden.applied and output is not None:
            raise RuntimeError(
                f"The training_step of {type(context.pl_module).__name__} did not call the layer {hidden.active!r} in "
                "training mode, so nothing was mixed; name layers that it calls."
            )
        return output

    @override
    def _draw(self, x: Tensor, generator: torch.Generator) -> Mixture:
        hidden = self._hidden
        assert hidden is not None, "made at setup"
        # Only rows and shares are drawn: inputs may be anything that the network takes, words for example.
        rows = torch.zeros(len(x), device=x.device, dtype=x.dtype if x.is_floating_point() else None)
        drawn = self.mixer.mix(rows, generator)
        names = list(hidden.layers)
        hidden.start(names[int(torch.randint(len(names), (), generator=generator, device=CPU))], drawn)
        return drawn._replace(x=x)

    # The backward pass may run the layer again, so this ends later than the step.
    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._hidden is not None:
            self._hidden.stop()

    @override
    def on_pipeline_end(self) -> None:
        self._let_go()

    # A fit that fails before its first hook has no pipeline yet.
    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hidden": None}

    def _let_go(self) -> None:
        if self._hidden is not None:
            self._hidden.detach()
            self._hidden = None


def _reason_against(other: L.Callback, behind: bool) -> str:
    """Why another callback of the Trainer would do something wrong; empty if it would not."""
    if getattr(other, "stage", None) is Stage.OBJECTIVE:
        return (
            "an objective runs the network several times per batch, on clean and attacked images, and only its loss "
            "knows which of them belong to mixed labels. Use Mixing(Mixup()), which mixes the images before."
        )
    if isinstance(other, AdversarialTraining) and behind:
        return (
            "its attack would run through the mixed layer. List AdversarialTraining before ManifoldMixup, so that "
            "attacked images are mixed, or use Mixing(Mixup())."
        )
    if isinstance(other, Distillation | MESA):
        return (
            "the network that it learns from sees the images without the mixing inside, so their answers do not belong "
            "together. Use Mixing(Mixup()), whose mixed images both see."
        )
    if isinstance(other, SharpnessAware) and other.ascent_fraction < 1:
        return "its ascent sees part of the batch, without the partners of its samples. Set ascent_fraction=1."
    return ""

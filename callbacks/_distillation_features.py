# SPDX-License-Identifier: Apache-2.0
"""Answers of teachers, and features of both networks for the losses that compare them."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_robust.callbacks._answers import OncePerInput
from lightning_robust.distillation import FeatureDistillationLoss, LayerOutputs, Teacher, TeacherBank
from lightning_robust.distillation.layers import check_layers, classifier_sizes, layer_width
from lightning_robust.guards import TransientHook
from lightning_robust.training import FeatureCapture, FeaturesNotCaptured
from lightning_robust.training.logits import as_logits

__all__ = ["Answers", "Features", "build_parts"]


class Features:
    """What the layers of a network put out in a run, and what its classifier got.

    Args:
        network: The network.
        layers: Dotted names of layers; ``None`` stands for the input of the classifier.
        owner: What messages call the network.
        argument: What messages call the argument that names a layer.
        needs_grad: Keep the graphs, and overlook runs without one.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str | None], *, owner: str, argument: str, needs_grad: bool
    ) -> None:
        self.layers = list(layers)
        self._said = f"The features before the classifier of the {owner}", argument
        named = [layer for layer in layers if layer is not None]
        self._outputs = LayerOutputs(network, named, owner=owner, needs_grad=needs_grad) if named else None
        self._classifier = FeatureCapture(network, needs_grad=needs_grad) if None in layers else None

    def attach(self) -> None:
        """Start watching."""
        for each in (self._outputs, self._classifier):
            if each is not None:
                each.attach()

    def detach(self) -> None:
        """Stop watching and forget what was seen."""
        for each in (self._outputs, self._classifier):
            if each is not None:
                each.detach()

    def clear(self) -> None:
        """Forget what was seen."""
        for each in (self._outputs, self._classifier):
            if each is not None:
                each.clear()

    def take(self, logits: Tensor) -> list[Tensor]:
        """Return the features that belong to the logits of a run, in the order of the layers.

        Args:
            logits: What the network computed, ``[B, C]``.

        Raises:
            ValueError: Some were not seen.
        """
        named = iter(self._outputs.take(len(logits)) if self._outputs is not None else [])
        return [self._before_classifier(logits) if layer is None else next(named) for layer in self.layers]

    def _before_classifier(self, logits: Tensor) -> Tensor:
        assert self._classifier is not None  # a layer is None
        try:
            return self._classifier.take(logits)
        except FeaturesNotCaptured as error:
            what, argument = self._said
            reason = str(error).partition(";")[0]
            raise ValueError(f"{what} were not found ({reason}); name their layer with `{argument}`.") from error


class Answers:
    """Answers of one teacher with its features, from one forward pass however often a step is repeated.

    Args:
        bank: The teachers, one or none.
        layers: Dotted names of the teacher's layers; ``None`` stands for the input of its classifier.
    """

    def __init__(self, bank: TeacherBank, layers: Sequence[str | None]) -> None:
        self._bank = bank
        self._name = next(iter(bank), None)
        self._layers = layers
        self._remembered = OncePerInput()

    def ask(self, x: Tensor, index: Callable[[], Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Return logits and features of ``x``; nothing if there is no teacher.

        Args:
            x: Inputs.
            index: Tells the positions of the samples in the training set, for a cache.
        """
        name = self._name
        if name is None:
            return None, []
        if self._layers:
            teacher = self._bank.teacher(name)
            return self._remembered.ask(lambda x: self._with_features(teacher, x), x)
        asked = index if self._bank.needs_index else _nothing
        return self._remembered.ask(lambda x: self._bank.ask(name, x, index=asked()), x), []

    def forget(self) -> None:
        """Let go of the last answer."""
        self._remembered.forget()

    def _with_features(self, teacher: Teacher, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = _Output()
        features = Features(
            teacher.network, self._layers, owner=teacher.name, argument="teacher_layer", needs_grad=False
        )
        handle = teacher.network.register_forward_hook(seen)
        features.attach()
        try:
            logits = teacher(x)
            assert seen.logits is not None  # the teacher would have refused
            return logits, features.take(seen.logits)
        finally:
            features.detach()
            handle.remove()


def _nothing() -> None:
    return None


class _Output(TransientHook):
    """Remembers the logits as the network gave them, before temperatures and class mappings."""

    logits: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.logits = as_logits(output)


def build_parts(
    loss: FeatureDistillationLoss, pl_module: L.LightningModule, teacher: Teacher | None, num_classes: int | None
) -> None:
    """Refuse layers that do not exist, and make the trainable parts of a loss.

    Args:
        loss: The loss.
        pl_module: The student.
        teacher: The teacher, if there is one.
        num_classes: Number of classes of the student, if known.

    Raises:
        ValueError: There is no such layer, or a part needs a size that cannot be read off.
    """
    try:
        check_layers(pl_module, [layer for layer in loss.student_layers if layer is not None], "student")
    except ValueError as error:
        late = [name for name in ("setup", "configure_model") if is_overridden(name, pl_module, L.LightningModule)]
        if late:
            raise ValueError(f"{error} A network that is made in `{late[0]}` is made too late to be seen.") from error
        raise
    features, classes = classifier_sizes(pl_module)
    mine = [features if layer is None else layer_width(pl_module, layer) for layer in loss.student_layers]
    others: list[int | None] = []
    if teacher is not None:
        check_layers(teacher.network, [layer for layer in loss.teacher_layers if layer is not None], teacher.name)
        features, _ = classifier_sizes(teacher.network)
        others = [features if layer is None else layer_width(teacher.network, layer) for layer in loss.teacher_layers]
    loss.build(mine, others, classes if num_classes is None else num_classes)

# SPDX-License-Identifier: Apache-2.0
"""A teacher term in the loss of any LightningModule's training step."""

import copy
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._distillation_features import Answers, Features, build_parts
from lightning_robust.callbacks._distillation_gradients import conflict_of
from lightning_robust.callbacks._distillation_parts import TrainedParts
from lightning_robust.callbacks._network_input import NetworkInput
from lightning_robust.callbacks._teacher_checks import (
    bank_for,
    check_cached_data,
    refuse_changed_inputs,
    refuse_different_processes,
    refuse_other_shape,
    warn_of_smoothed_teachers,
)
from lightning_robust.callbacks._told import told
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.distillation import KD, DistillationLoss, FeatureDistillationLoss, Source, Teacher
from lightning_robust.guards import rng_preserved
from lightning_robust.training import (
    BatchAdapter,
    PerSampleCallback,
    RunStep,
    Stage,
    StepContext,
    loss_of,
    replace_loss,
)

__all__ = ["Distillation"]


class Distillation(PerSampleCallback):
    r"""Trains any LightningModule with a frozen teacher, by a term added to the loss of its training step.

    .. math:: b\,L + w\,D(z_{student}, z_{teacher})

    Runs inside the training step: the teacher sees the batch first, then the module's own step runs, and the loss
    compares the logits that the step computed with the teacher's. Losses on features get the outputs of the layers
    that they name, from the same passes. A first batch whose inputs the step changes (mixup, augmentation) before the
    student sees them is warned about. The teacher term is logged as ``train/kd`` (the loss's name, with the teacher's
    name behind it when it has another than ``"teacher"``).

    The teacher lives outside the module tree: it is in no checkpoint, optimizer, weight average or DDP reduction,
    always in evaluation mode and without gradients. It follows the module's device and true precision, and runs under
    the step's autocast. It is read in ``setup`` of a fit, so a missing file is refused before the first step, and
    evaluating the student needs no teacher. A checkpoint holds the teacher's fingerprint, and a fit that resumes with
    another teacher is refused. A cache of the teacher's answers is asked by the samples' positions instead.

    What a loss learns itself (a projector, a second head) is trained with the module, whose optimizer has to be made of
    ``self.parameters()``. It is in the callback's part of a checkpoint and continues exactly, while the module's own
    weights are those of the student and nothing else. A second fit begins with fresh ones.

    Cost: one forward pass of the teacher per batch; a sharpness-aware method does not repeat it. Two more backward
    passes with ``align_gradients``, and under DDP a sum of two gradients.

    Args:
        teacher: A network, which is copied; a :class:`~lightning_robust.distillation.Teacher`; the path of a file
            with weights; the name of a timm model; one of these with options, as a
            :class:`~lightning_robust.distillation.TeacherSource`; a
            :class:`~lightning_robust.distillation.TeacherCache`. ``None`` for a loss that needs none, as
            :class:`~lightning_robust.distillation.USKD`.
        loss: Compares the student with the teacher; ``KD(temperature=4.0)`` when ``None``.
        weight: Factor ``w`` of the teacher term; 0.9 as in the common CIFAR-100 comparison (mdistiller).
        base_weight: Factor ``b`` of the loss that this callback finds; 0.1 there. That is the module's own loss with
            the terms of the loss callbacks listed behind this one, so of several teachers only the last should
            rescale it: give the others ``base_weight=1``.
        teacher_sees: ``"step"`` shows the teacher the batch of the module's step, ``"loaded"`` the batch as the
            loader gave it, for example clean images while the student sees adversarial ones.
        align_gradients: Take out of the term's gradient what points against that of the loss found, over all
            parameters and in each batch; see :func:`~lightning_robust.distillation.align_gradients`.
        name: Tells several teachers apart, in logs, messages and checkpoints.
        index_key: For a cache: key or position of the indices in a batch, for datasets that return them; read off the
            loader's sampler when ``None``.
        num_samples: For a cache: number of training samples; that of the training loader's dataset when ``None``.
        logits_from: Dotted name of the student's sub-module whose output is the logits; found by itself when ``None``.
        batch: How to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: If a cache cannot answer what the loss asks, or no teacher is given to a loss that needs one; at
            setup, for manual optimization, a teacher that cannot be built, a layer that does not exist or a part whose
            size is unknown; when the fit starts, for a checkpoint with another teacher, or an optimizer without the
            parts of the loss; in the first step, for teachers with another number of classes.
        FileNotFoundError: At setup, if there is no such file.

    References:
        Hinton et al., arXiv:1503.02531. See the loss for its own paper.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning_robust.callbacks import Distillation
        >>> from lightning_robust.distillation import KD
        >>> teacher = torch.nn.Linear(4, 3)  # a trained network
        >>> callback = Distillation(teacher, KD(temperature=4.0))
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    needs_logits = True

    def __init__(
        self,
        teacher: Source | None = None,
        loss: DistillationLoss | None = None,
        *,
        weight: float = 0.9,
        base_weight: float = 0.1,
        teacher_sees: Literal["step", "loaded"] = "step",
        align_gradients: bool = False,
        name: str = "teacher",
        index_key: int | str | None = None,
        num_samples: int | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(index_key=index_key, num_samples=num_samples, logits_from=logits_from, batch=batch)
        check_non_negative("weight", weight)
        check_non_negative("base_weight", base_weight)
        check_choice("teacher_sees", teacher_sees, ("step", "loaded"))
        if align_gradients and not (weight and base_weight):
            raise ValueError(
                "Aligned gradients need both losses; set `weight` and `base_weight` above 0, or leave out "
                "`align_gradients`."
            )
        self.loss = KD() if loss is None else loss
        self.weight = weight
        self.base_weight = base_weight
        self.teacher_sees = teacher_sees
        self.align_gradients = align_gradients
        #: The teacher, under :attr:`name`; nothing for a loss that needs none.
        self.teachers = bank_for(self.loss, teacher, name)
        self.name = name if len(self.teachers) or name != "teacher" else self.loss.name
        self._fresh = copy.deepcopy(self.loss)
        self._fits = 0
        self._stage = ""  # what the Trainer does
        self._recorded: dict[str, Any] = {}  # what a checkpoint says about the loss, outside a fit
        self._parts = TrainedParts(self.loss, self.name)
        self._answers = Answers(self.teachers, getattr(self.loss, "teacher_layers", ()))
        self._student: Features | None = None
        self._epoch = -1  # of the last batch of this fit
        self._looked = False  # whether the first batch of the fit was watched

    @property
    @override
    def follows_samples(self) -> bool:
        return self.teachers.needs_index

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.name}]"

    @override
    def passes(self, inner: float) -> float:
        return inner + 4 / 3 if self.align_gradients else inner

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teachers": self.teachers.state_dict(), "loss": dict(self._recorded or self.loss.state_dict())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Teachers are compared when a fit starts: validating a checkpoint needs none.
        self.teachers.load_state_dict(state_dict["teachers"])
        if self._stage != "fit":
            self._recorded = dict(state_dict["loss"])
            return
        try:
            self.loss.load_state_dict(state_dict["loss"])
        except RuntimeError as error:
            raise ValueError(
                f"The checkpoint was trained with another loss than {type(self.loss).__name__} under the name "
                f"{self.name!r}; resume with the same loss, or start a new fit from the student's weights."
            ) from error

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = stage
        self._recorded = {}
        self.teachers.forget()
        super().setup(trainer, pl_module, stage)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        if self._fits:
            self.loss = copy.deepcopy(self._fresh)
        self._fits += 1
        self._parts.remove()
        classes = told("num_classes", trainer, pl_module)
        self.teachers.build(num_classes=classes, in_chans=told("in_chans", trainer, pl_module))
        warn_of_smoothed_teachers(self.teachers)
        if isinstance(self.loss, FeatureDistillationLoss):
            with rng_preserved():  # a new part changes nothing else in the run
                build_parts(self.loss, pl_module, self._network(), classes)
        self._parts = TrainedParts(self.loss, self.name)
        self._parts.install(trainer, pl_module)

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._looked = False
        self._epoch = -1
        self.teachers.build()  # compared with the checkpoint's
        refuse_different_processes(trainer, self.teachers)
        self._parts.check_optimized(trainer)
        self.teachers.to(trainer.strategy.root_device)
        self.loss.to(trainer.strategy.root_device).train()
        if isinstance(self.loss, FeatureDistillationLoss):
            told_by = {"owner": "student", "argument": "student_layer"}
            self._student = Features(pl_module, self.loss.student_layers, needs_grad=True, **told_by)
            self._student.attach()

    @override
    def on_pipeline_end(self) -> None:
        super().on_pipeline_end()
        if self._student is not None:
            self._student.detach()
        self._student = None

    @override
    def on_samples_known(self, trainer: L.Trainer, pl_module: L.LightningModule, num_samples: int) -> None:
        check_cached_data(trainer, self.teachers)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        self._follow_epochs(context)
        # Before the step: the teacher's activations are gone when the student's graph is built.
        teacher_logits, teacher_features = self._ask(context, batch)
        target = self.batch.target_of(batch) if self.loss.needs_target else None
        if self._student is not None:
            self._student.clear()
        output = run(batch) if self._looked or teacher_logits is None else self._watched(context, batch, run)
        loss = loss_of(output)
        if loss is None:
            return output
        student_logits = context.logits(self)
        if teacher_logits is not None:
            same = self.loss.same_classes
            refuse_other_shape(self.teachers, self.name, student_logits, teacher_logits, same_classes=same)
        told_of: dict[str, Any] = {}
        if self._student is not None:
            told_of = {"student_features": self._student.take(student_logits), "teacher_features": teacher_features}
            self._student.clear()
        seen = _labels(context, target, student_logits)
        term: Tensor = self.loss(student_logits, teacher_logits, seen, **told_of)
        suffix = "" if self.name in ("teacher", self.loss.name) else f"_{self.name}"
        context.log(f"train/{self.loss.name}{suffix}", term, batch_size=len(student_logits))
        return replace_loss(output, self._sum(context, loss, term))

    def _sum(self, context: StepContext, loss: Tensor, term: Tensor) -> Tensor:
        base, term = self.base_weight * loss, self.weight * term
        if self.align_gradients:
            base = base * (1 + conflict_of(context.trainer, context.pl_module, term, base))
        return base + term

    def _follow_epochs(self, context: StepContext) -> None:
        # Lightning has no hook for the start of an epoch that is continued in its middle.
        epoch = context.trainer.current_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self.loss.epoch_starts(epoch, context.max_epochs)

    def _ask(self, context: StepContext, batch: Any) -> tuple[Tensor | None, list[Tensor]]:
        x = self.batch.input_of(context.batch_as_loaded if self.teacher_sees == "loaded" else batch)
        if self.follows_samples and context.counted and not self._looked:
            refuse_changed_inputs(self.teachers, x, self.batch.input_of(context.batch_as_loaded))
        return self._answers.ask(x, lambda: self.indices_of(context, len(x)))

    def _watched(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        self._looked = True
        with NetworkInput(context.pl_module, self.batch.input_of(batch)) as watch:
            output = run(batch)
        if watch.changed:
            rank_zero_warn(
                f"The training_step of {type(context.pl_module).__name__} changes its inputs before the student sees "
                f"them, while the {self.name} got them as they are. That is right only if it normalises what the "
                f"{self.name} normalises itself; mixup and augmentation belong in the data set or in "
                "on_after_batch_transfer, where both networks get the same samples."
            )
        return output

    def _network(self) -> Teacher | None:
        answers = [self.teachers.answers(name) for name in self.teachers]
        return next((each for each in answers if isinstance(each, Teacher)), None)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._answers.forget()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._parts.remove()
        self._answers.forget()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._parts.remove()
        self._answers.forget()
        if stage == "fit":  # the Trainer takes the student off the device as well
            self.teachers.to("cpu")
            self.loss.to("cpu")

    @override
    def __getstate__(self) -> dict[str, Any]:
        # the copy's parts are on no module
        return {**super().__getstate__(), "_parts": TrainedParts(self.loss, self.name), "_student": None}


def _labels(context: StepContext, target: Tensor | None, logits: Tensor) -> Tensor | None:
    """Labels of the batch; shares of both labels of each sample where a callback mixed them and the batch has one."""
    if target is None or context.mixed is None or target.is_floating_point():
        return target
    return context.mixed.head(len(logits)).probabilities(logits.shape[1])

# SPDX-License-Identifier: Apache-2.0
"""A teacher term in the loss of any LightningModule's training step."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.callbacks._answers import OncePerInput
from lightning_robust.callbacks._network_input import NetworkInput
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.distillation import KD, DistillationLoss, Network, Teacher, build_teacher
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepCallback, StepContext, loss_of, replace_loss

__all__ = ["Distillation"]


class Distillation(StepCallback):
    r"""Trains any LightningModule with a frozen teacher, by a term added to the loss of its training step.

    .. math:: b\,L + w\,D(z_{student}, z_{teacher})

    Runs inside the training step: the teacher sees the batch first, then the module's own step runs, and the loss
    compares the logits that the step computed with the teacher's. A first batch whose inputs the step changes (mixup,
    augmentation) before the student sees them is warned about. The teacher term is logged as ``train/kd`` (the
    loss's name, with the teacher's name behind it when it has another than ``"teacher"``).

    The teacher lives outside the module tree: it is in no checkpoint, optimizer, weight average or DDP reduction,
    always in evaluation mode and without gradients. It follows the module's device and true precision, and runs under
    the step's autocast. It is read in ``setup`` of a fit, so a missing file is refused before the first step, and
    evaluating the student needs no teacher. A checkpoint holds the teacher's fingerprint, and a fit that resumes with
    another teacher is refused.

    Cost: one forward pass of the teacher per batch; a sharpness-aware method does not repeat it.

    Args:
        teacher: A network, which is copied; a :class:`~lightning_robust.distillation.Teacher`; the path of a file
            with weights; or the name of a timm model.
        loss: Compares the logits of student and teacher; ``KD(temperature=4.0)`` when ``None``.
        weight: Factor ``w`` of the teacher term; 0.9 as in the common CIFAR-100 comparison (mdistiller).
        base_weight: Factor ``b`` of the loss that this callback finds; 0.1 there. That is the module's own loss with
            the terms of the loss callbacks listed behind this one, so of several teachers only the last should
            rescale it: give the others ``base_weight=1``.
        teacher_sees: ``"step"`` shows the teacher the batch of the module's step, ``"loaded"`` the batch as the
            loader gave it, for example clean images while the student sees adversarial ones.
        backbone: Name of the timm model whose weights the file holds; a checkpoint of ``ImageClassifier`` knows it.
        num_classes: Number of classes of a timm teacher; that of the module or its data when ``None``.
        in_chans: Number of input channels of a timm teacher; that of the module when ``None``.
        pretrained: Download the published weights of a timm teacher.
        prefix: What the names of the weights in the file carry in front; found by itself when ``None``.
        name: Tells several teachers apart, in logs, messages and checkpoints.
        logits_from: Dotted name of the student's sub-module whose output is the logits; found by itself when ``None``.
        batch: How to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: At setup, for manual optimization or a teacher that cannot be built; when the fit starts, for a
            checkpoint with another teacher; in the first step, for teachers with another number of classes.
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
        teacher: str | Path | Network | Teacher,
        loss: DistillationLoss | None = None,
        *,
        weight: float = 0.9,
        base_weight: float = 0.1,
        teacher_sees: Literal["step", "loaded"] = "step",
        backbone: str | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        pretrained: bool = False,
        prefix: str | None = None,
        name: str = "teacher",
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        check_non_negative("weight", weight)
        check_non_negative("base_weight", base_weight)
        check_choice("teacher_sees", teacher_sees, ("step", "loaded"))
        self.loss = KD() if loss is None else loss
        self.weight = weight
        self.base_weight = base_weight
        self.teacher_sees = teacher_sees
        self.name = name
        self._options: dict[str, Any] = {"backbone": backbone, "pretrained": pretrained, "prefix": prefix}
        self._shape: dict[str, int | None] = {"num_classes": num_classes, "in_chans": in_chans}
        self.teacher: Teacher | None = None  # a file is read at setup
        if isinstance(teacher, nn.Module | Teacher):
            self.teacher = build_teacher(teacher, num_classes=num_classes, name=name)
        # The given network was copied: nothing here keeps it alive.
        self._source = teacher if self.teacher is None else self.teacher
        self._recorded: dict[str, str] = {}  # what the checkpoint says about its teacher
        self._looked = False  # whether the first batch of the fit was watched
        self._answers = OncePerInput()

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.name}]"

    @override
    def state_dict(self) -> dict[str, str]:
        return self._recorded if self.teacher is None else self.teacher.manifest()

    @override
    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        # Compared when a fit starts: validating a checkpoint needs no teacher.
        self._recorded = dict(state_dict)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._recorded = {}
        super().setup(trainer, pl_module, stage)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        if self.teacher is None:
            shape: dict[str, Any] = {
                key: _look_up(key, trainer, pl_module) if size is None else size for key, size in self._shape.items()
            }
            self.teacher = build_teacher(self._source, name=self.name, **shape, **self._options)
        if self.teacher.label_smoothing > 0:
            rank_zero_warn(
                f"The {self.name} {self.teacher.source} was trained with label smoothing ("
                f"{self.teacher.label_smoothing:g}), which erases what it knows about the likeness of classes: a "
                "student usually learns less from it than from a teacher trained without (arXiv:1906.02629)."
            )

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._looked = False
        teacher = self._built()
        self._refuse_another_teacher(trainer, teacher)
        teacher.network = trainer.precision_plugin.convert_module(teacher.network)
        teacher.to(trainer.strategy.root_device)
        self.loss.to(trainer.strategy.root_device)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        # Before the step: the teacher's activations are gone when the student's graph is built.
        seen = context.batch_as_loaded if self.teacher_sees == "loaded" else batch
        teacher_logits = self._answers.ask(self._built(), self.batch.input_of(seen))
        target = self.batch.target_of(batch) if self.loss.needs_target else None
        output = run(batch) if self._looked else self._watched(context, batch, run)
        loss = loss_of(output)
        if loss is None:
            return output
        student_logits = context.logits(self)
        self._refuse_other_shape(student_logits, teacher_logits)
        term = self.loss(student_logits, teacher_logits, target)
        suffix = "" if self.name == "teacher" else f"_{self.name}"
        context.log(f"train/{self.loss.name}{suffix}", term, batch_size=len(student_logits))
        return replace_loss(output, self.base_weight * loss + self.weight * term)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._answers.forget()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._answers.forget()
        if stage == "fit" and self.teacher is not None:
            self.teacher.to("cpu")  # the Trainer takes the student off the device as well

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

    def _built(self) -> Teacher:
        assert self.teacher is not None, "setup builds the teacher"
        return self.teacher

    def _refuse_another_teacher(self, trainer: L.Trainer, teacher: Teacher) -> None:
        recorded = self._recorded.get("fingerprint", teacher.fingerprint)
        if recorded != teacher.fingerprint:
            raise ValueError(
                f"The checkpoint was trained with the {self.name} {self._recorded['source']} (fingerprint {recorded}) "
                f"but this run has {teacher.source} ({teacher.fingerprint}); resume with the same teacher, or start a "
                "new fit from the student's weights."
            )
        first: str = trainer.strategy.broadcast(teacher.fingerprint)
        if first != teacher.fingerprint:
            raise ValueError(
                f"The {self.name} {teacher.source} differs between processes (fingerprint {first} in the first, "
                f"{teacher.fingerprint} in process {trainer.global_rank}); load it from a file, or seed before it is "
                "built."
            )

    def _refuse_other_shape(self, student: Tensor, teacher: Tensor) -> None:
        if student.shape == teacher.shape:
            return
        if student.shape[:1] + student.shape[2:] == teacher.shape[:1] + teacher.shape[2:]:
            raise ValueError(
                f"The {self.name} {self._built().source} has {teacher.shape[1]} classes but the student has "
                f"{student.shape[1]}; take a teacher for the student's classes."
            )
        raise ValueError(
            f"The student's logits have shape {tuple(student.shape)} but those of the {self.name} "
            f"{tuple(teacher.shape)}; show both the same samples (`teacher_sees`), or name the right logits "
            "(`logits_from`)."
        )


def _look_up(name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
    """What the module, its hyper-parameters or the data say about ``name``."""
    owners = (pl_module, getattr(trainer, "datamodule", None))
    told = [getattr(owner, name, None) for owner in owners] + [pl_module.hparams.get(name)]
    return next((value for value in told if isinstance(value, int)), None)

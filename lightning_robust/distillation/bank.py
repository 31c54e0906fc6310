# SPDX-License-Identifier: Apache-2.0
"""The teachers of a method: built when they are needed, known to checkpoints by their fingerprints."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lightning_robust.distillation.cache import TeacherCache
from lightning_robust.distillation.sources import Network, TeacherSource
from lightning_robust.distillation.teacher import Teacher

__all__ = ["Source", "TeacherBank"]

#: What may stand for a teacher: a network, a file, a timm name; or one of these with options; or stored answers.
Source = str | Path | Network | Teacher | TeacherSource | TeacherCache


class TeacherBank:
    """Frozen teachers by name.

    It is not an ``nn.Module``: whatever holds it has no weights of teachers in its checkpoints, optimizers, averages
    and process groups. Files are read by :meth:`build`, at the latest when a teacher is first asked, so that evaluating
    a student needs none. The state names source, fingerprint, type and options of each teacher; after another state was
    loaded, a teacher that differs is refused when it is asked, and one that computes in another type is warned about.

    Cost: that of the teachers; see :class:`Teacher`.

    Args:
        sources: What each teacher is built from, by the name that messages use.
        cacheable: Names of teachers that only see clean images of the training set and may therefore be a
            :class:`TeacherCache`.

    Raises:
        ValueError: If a cache stands for a teacher that is not cacheable; when asked, for a teacher that cannot be
            built or is another one than the state names.
        FileNotFoundError: When asked, if there is no such file.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import TeacherBank
        >>> bank = TeacherBank({"clean teacher": torch.nn.Linear(4, 3)})
        >>> bank.ask("clean teacher", torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, sources: Mapping[str, Source], *, cacheable: Collection[str] = ()) -> None:
        for name, source in sources.items():
            if isinstance(source, TeacherCache) and name not in cacheable:
                raise ValueError(
                    f"The {name} cannot be a TeacherCache: it answers about inputs that are made during training "
                    "(attacked images, or what its features or gradients are needed for); give the network itself."
                )
        self._sources = dict(sources)
        self._built: dict[str, Teacher | TeacherCache] = {}
        self._recorded: dict[str, dict[str, str]] = {}  # what the checkpoint says about teachers not compared yet
        self._known: dict[str, dict[str, str]] = {}  # the same, as a state that can be saved again
        for name, source in self._sources.items():
            if not isinstance(source, str | Path):  # a network is copied now, before it goes on training
                if isinstance(source, TeacherSource) and isinstance(source.source, str | Path):
                    continue
                self._build(name, None, None)

    @property
    def needs_index(self) -> bool:
        """Whether a teacher is asked by the positions of samples in the training set."""
        return any(isinstance(source, TeacherCache) for source in self._sources.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def build(self, *, num_classes: int | None = None, in_chans: int | None = None) -> None:
        """Build the teachers that are not yet, and refuse others than the state names.

        Args:
            num_classes: Number of classes of the student, for timm models of which nothing else is said.
            in_chans: Number of input channels of the student.
        """
        for name in self._sources:
            self._get(name, num_classes, in_chans).manifest()  # a cache that is missing is missed here

    def ask(self, name: str, x: Tensor, *, index: Tensor | None = None, input_grad: bool = False) -> Tensor:
        """Return the logits of a teacher, ``[B, C]``.

        Args:
            name: Which teacher.
            x: Inputs.
            index: Positions of the samples in the training set, ``[B]``; what a cache is asked by.
            input_grad: Let gradients flow to ``x``.
        """
        answers = self._get(name)
        if isinstance(answers, Teacher):
            return answers(x, input_grad=input_grad)
        if index is None:
            raise ValueError(
                f"The {name} is a TeacherCache, which is asked by the positions of samples in the training set, but "
                "none were given; train with a callback of this package, or pass index=..."
            )
        return answers.logits(index).to(x.device)

    def teacher(self, name: str) -> Teacher:
        """Return a teacher that is a network."""
        answers = self._get(name)
        if not isinstance(answers, Teacher):
            raise ValueError(f"The {name} is a TeacherCache, which holds no network; give the network itself.")
        return answers

    def answers(self, name: str) -> Teacher | TeacherCache:
        """Return a teacher or what stands for it, built and compared with the state."""
        return self._get(name)

    def state_dict(self) -> dict[str, dict[str, str]]:
        """Return what a checkpoint says about the teachers, never weights; of those not built, what was loaded."""
        return self._known | {name: answers.manifest() for name, answers in self._built.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, str]]) -> None:
        """Remember what a checkpoint says; it is compared when a teacher is asked."""
        self._known = {name: dict(manifest) for name, manifest in state.items()}
        self._recorded = dict(self._known)

    def forget(self) -> None:
        """Forget what a checkpoint said."""
        self._known, self._recorded = {}, {}

    def to(self, device: object) -> None:
        """Move the networks that are built to a device."""
        for answers in self._built.values():
            if isinstance(answers, Teacher):
                answers.to(device)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return ", ".join(f"{name}: {_describe(source)}" for name, source in self._sources.items())

    def _get(self, name: str, num_classes: int | None = None, in_chans: int | None = None) -> Teacher | TeacherCache:
        if name not in self._built:
            self._build(name, num_classes, in_chans)
        answers = self._built[name]
        recorded = self._recorded.pop(name, None)
        if recorded is not None:
            try:
                _compare(name, recorded, answers.manifest())
            except ValueError:
                self._recorded[name] = recorded  # refused again if asked again
                raise
        return answers

    def _build(self, name: str, num_classes: int | None, in_chans: int | None) -> None:
        source = self._sources[name]
        if isinstance(source, TeacherCache):
            self._built[name] = source
            return
        wrapped = source if isinstance(source, TeacherSource) else TeacherSource(source)
        self._built[name] = wrapped.build(name, num_classes=num_classes, in_chans=in_chans)
        self._sources[name] = self._built[name]  # a given network was copied: nothing here keeps it alive


def _describe(source: Source) -> str:
    return repr(str(getattr(source, "source", source)))


def _compare(name: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    if recorded.get("fingerprint") != found["fingerprint"]:
        raise ValueError(
            f"The checkpoint was trained with the {name} {recorded.get('source')} (fingerprint "
            f"{recorded.get('fingerprint')}) but this run has {found['source']} ({found['fingerprint']}); resume with "
            "the same teacher, or start a new fit from the student's weights."
        )
    if recorded.get("options", "") != found.get("options", ""):
        raise ValueError(
            f"The checkpoint was trained with the {name} {recorded.get('source')} with "
            f"{recorded.get('options') or 'no options'} but this run has it with {found.get('options') or 'none'}; set "
            "its options as they were, or start a new fit from the student's weights."
        )
    if recorded.get("dtype", "run") != found.get("dtype", "run"):
        warnings.warn(
            f"The checkpoint was trained with the {name} computing in {recorded.get('dtype')} but this run has it in "
            f"{found.get('dtype')}; set `dtype` as it was to continue exactly.",
            stacklevel=2,
        )

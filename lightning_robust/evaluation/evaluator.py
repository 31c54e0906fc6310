# SPDX-License-Identifier: Apache-2.0
"""The engine: clean predictions, then stage after stage of attacks on full batches of what is still robust."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import Model, ordinary
from lightning_robust.attacks.losses import labels_of
from lightning_robust.attacks.problem import check_batch
from lightning_robust.checks import check_choice, check_integer, check_non_negative
from lightning_robust.evaluation.book import Book
from lightning_robust.evaluation.conditions import evaluation_conditions
from lightning_robust.evaluation.contract import InputContract
from lightning_robust.evaluation.counted import CountedModel
from lightning_robust.evaluation.kept import KeptSamples
from lightning_robust.evaluation.ledger import digest_of
from lightning_robust.evaluation.plan import (
    Attacks,
    Mode,
    check_attacks,
    described,
    make_chains,
    named_attacks,
    reseeded,
)
from lightning_robust.evaluation.queues import Samples, StageQueue
from lightning_robust.evaluation.shard import Settings, Shard
from lightning_robust.evaluation.stage_runner import CraftDtype, StageRunner
from lightning_robust.evaluation.state import StateFolder, weights_hash

__all__ = ["RobustnessEvaluator"]


class RobustnessEvaluator:
    """Attacks samples as a loader brings them, and counts what withstands.

    Each sample is predicted clean; those that are right wait for the first stage of each chain of attacks. A stage runs
    as soon as a full batch waits for it, so the survivors of many loader batches are attacked together; what it did not
    break waits for the next. At most one batch per stage waits.

    A point that an attack returned counts only when it is verified: within the budget, a possible image, and
    misclassified by the plain model in float32. All random draws of an attack depend on the sample's index, so the
    result depends neither on batch sizes nor on the order or the number of processes (up to the rounding of the
    forwards, which is not the same for every batch size).

    Modes and buffers of the model, gradients and global generators are left as they were.

    Cost: one forward per sample; per attacked sample that of the attack and one forward; one more for each
    adversarial point (8 bits), and for each point when `craft_dtype` is set.

    Args:
        model: A module, or a callable ``x -> logits`` that may name its module in the attribute ``module``.
        attacks: One attack, or several by name.
        mode: ``"exact"``: every attack on all correct samples, so that the accuracy under each is exact; ``"union"``:
            each on what those before it left, which is cheaper: only the union is exact.
        seed: Seed in place of those of the attacks; theirs when not given.
        batch_size: Samples per attacked batch; that of the first loader batch when not given.
        craft_dtype: Run the attacks under autocast in this type; points are verified in float32 in any case.
        eight_bit: Look at adversarial points after rounding to 8 bits as well.
        state_dir: Folder for flags and adversarial points from which a killed evaluation continues.
        save_every_s: Seconds from one save to the next.
        rank: Number of this process among those that share the work.
        keep: Number of samples to keep for `lightning_robust.evaluation.run_checks`, the first ones, with their points.
        total: Number of samples of this process, for the progress, if known.
        progress: Called with this evaluator after each batch.

    Raises:
        ValueError: An argument out of range, an attack that cannot be evaluated, a `state_dir` of another evaluation;
            later, images or classes that make no sense, or logits that are not finite.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> evaluator = RobustnessEvaluator(torch.nn.Linear(4, 3), PGD(eps=0.1, steps=3))
        >>> evaluator.feed(torch.rand(6, 4), torch.randint(3, (6,)), torch.arange(6))
        >>> len(evaluator.finish().columns["index"])
        6
    """

    def __init__(
        self,
        model: Model,
        attacks: Attacks,
        *,
        mode: Mode = "exact",
        seed: int | None = None,
        batch_size: int | None = None,
        craft_dtype: CraftDtype | None = None,
        eight_bit: bool = True,
        state_dir: str | Path | None = None,
        save_every_s: float = 30.0,
        rank: int = 0,
        keep: int = 0,
        total: int | None = None,
        progress: Callable[["RobustnessEvaluator"], None] | None = None,
    ) -> None:
        check_choice("craft_dtype", craft_dtype, (None, "bfloat16", "float16"))
        check_non_negative("save_every_s", save_every_s)
        for name, value, low in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("rank", rank, 0),
            ("keep", keep, 0),
        ):
            if value is not None:
                check_integer(name, value, low)
        named = named_attacks(attacks)
        check_attacks(named, mode)
        self.attacks = named if seed is None else {name: reseeded(each, seed) for name, each in named.items()}
        self.model = CountedModel(model)
        self.contract = InputContract.of(self.attacks.values())
        self.mode, self.seed, self.batch_size, self.rank, self.total = mode, seed, batch_size, rank, total
        self.book: Book | None = None  # from the first sample on, which tells the number of classes
        self.fed: set[int] = set()
        self.kept = KeptSamples(keep)
        self._runner = StageRunner(self.model, self.contract, craft_dtype=craft_dtype, eight_bit=eight_bit)
        self._name = type(model if self.model.module is None else self.model.module).__name__
        self._weights = weights_hash(self.model.module) if state_dir is not None else ""
        self._state = None if state_dir is None else StateFolder(state_dir, rank)
        self._save_every_s, self._progress = save_every_s, progress

    def feed(self, x: Tensor, y: Tensor, indices: Tensor) -> None:
        """Take samples of a loader; those that were fed before are left out.

        Args:
            x: Images ``[B, ...]`` on the device of the model.
            y: Classes ``[B]``, or probabilities ``[B, C]`` of which the largest is the class.
            indices: Index of each sample in the dataset, ``[B]``.

        Raises:
            ValueError: Images, classes or logits that make no sense.
        """
        check_batch(x, y)
        if indices.shape != y.shape[:1]:
            raise ValueError(f"Expected one of `indices` per image, [{len(x)}], but got {list(indices.shape)}.")
        if len(x) == 0:
            return
        with self._conditions(x.device):
            samples = self._new_samples(ordinary(x), labels_of(ordinary(y)), indices)
            if self.book is None:
                self.book = self._open(samples.x)
            if len(samples):
                self.contract.space.check(samples.x)
                self.kept.offer(samples)
                self._enter(self.book, samples)
                self._drain(self.book)
        self._tell()

    def save(self) -> None:
        """Append to the state what is new since the last time; does nothing without a `state_dir`."""
        if self.book is not None:
            self.book.save()

    def finish(self) -> Shard:
        """Attack what is still waiting; the part of this process."""
        if self.book is None:
            return Shard()
        with self._conditions(torch.device(self.book.settings.device)):
            self._drain(self.book, flush=True)
        self.save()
        self._tell()
        return self.book.shard(self.fed)

    def _new_samples(self, x: Tensor, y: Tensor, indices: Tensor) -> Samples:
        positions = {index: position for position, index in reversed(list(enumerate(indices.tolist())))}
        new = sorted(position for index, position in positions.items() if index not in self.fed)
        self.fed.update(positions)
        return Samples(x, y, indices.cpu().long()).select(torch.tensor(new, dtype=torch.long))

    def _open(self, x: Tensor) -> Book:
        """Learn the number of classes, and with it the stages and what is already known."""
        num_classes = self.model.plain(x[:1]).shape[1]
        if self.batch_size is None:
            self.batch_size = len(x)
        settings = Settings(
            model=self._name,
            mode=self.mode,
            seed=self.seed,
            batch_size=self.batch_size,
            craft_dtype=self._runner.craft_dtype,
            eight_bit=self._runner.eight_bit,
            contract=self.contract,
            dtype=str(x.dtype).removeprefix("torch."),
            shape=tuple(x.shape[1:]),
            device=str(x.device),
        )
        chains = make_chains(self.attacks, self.mode, num_classes)
        return Book(
            chains,
            settings,
            num_classes,
            state=self._state,
            fingerprint=settings.fingerprint(described(chains), num_classes, self._weights),
            save_every_s=self._save_every_s,
        )

    def _enter(self, book: Book, samples: Samples) -> None:
        """Predict what is new, and let what is right and not decided wait for its next stage."""
        digest, ledger = digest_of(samples.x), book.ledger
        known = torch.tensor([index in ledger.rows for index in samples.index.tolist()], dtype=torch.bool)
        again, new = samples.select(known), samples.select(~known)
        ledger.refuse_other(ledger.rows_of(again.index), again.y, digest[known])
        _refuse_labels(new.y, book.num_classes)
        if len(new):
            predictions, tally = self._runner.predict(new, book.settings.batch_size)
            book.clean.add(tally)
            ledger.add(new.index, new.y, digest[~known], predictions)
        columns = ledger.columns(ledger.rows_of(samples.index))
        right = columns["prediction"] == columns["label"]
        for number, chain in enumerate(book.chains):
            undecided = right & (columns["broken"][:, number] < 0)
            for position, queue in enumerate(chain):
                queue.push(samples.select(undecided & (columns["done"][:, number] == position)))

    def _drain(self, book: Book, *, flush: bool = False) -> None:
        for chain in book.chains:
            for position in range(len(chain)):
                self._advance(book, chain, position, flush)

    def _advance(self, book: Book, chain: list[StageQueue], position: int, flush: bool) -> None:
        if position == len(chain):
            return
        queue, size = chain[position], book.settings.batch_size
        while len(queue) >= size or (flush and len(queue)):
            samples = queue.pop(size)
            outcome, tally = self._runner.attack(queue.stage, queue.number, samples)
            book.record(queue, samples, outcome, tally)
            self.kept.note(queue.stage.info.attack, samples, outcome.x_adv)
            self._tell()
            if position + 1 < len(chain):
                chain[position + 1].push(samples.select(~outcome.fooled))
            # the deepest first, so that little waits
            self._advance(book, chain, position + 1, False)

    @contextmanager
    def _conditions(self, device: torch.device) -> Iterator[None]:
        try:
            with evaluation_conditions(self.model.module, device):
                yield
        except BaseException:
            self.save()  # the ledger holds whole batches only
            raise

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self)


def _refuse_labels(y: Tensor, classes: int) -> None:
    low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"Expected labels to be in [0, {classes - 1}] for logits of {classes} classes but got labels from {low} to "
            f"{high}; leave unlabelled samples out of the evaluation."
        )

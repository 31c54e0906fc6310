# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``eval``: its own, those of the attack, and those that go to data, model and Trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.options import integer, read_options

__all__ = ["ATTACK", "EvalArguments", "parse_eval"]

ATTACK = "--evaluation.attack"  # where a recipe has its attack
_VALUES = ("attack", "eps", "norm", "samples", "out", "resume", "checks", "seed", "split", "devices", "craft_dtype")
_FLAGS = ("plot",)
_PASSED_ON = ("attack", "data", "model", "trainer", "threads")


@dataclass(frozen=True)
class EvalArguments:
    """What the user asked of ``eval``.

    Args:
        target: Run folder, checkpoint or timm name; empty with `resume`.
        changes: Options for data, model, Trainer and the attack, as a recipe takes them.
        attack: Name of the attack.
        eps: Radius of the budget.
        norm: Norm of the budget.
        samples: Evaluate only the first so many.
        out: Folder of this evaluation.
        resume: Folder of the evaluation to continue.
        checks: Size of the sanity checks; ``None`` for none.
        seed: Seed in place of the attack's.
        split: ``"test"`` or ``"val"``.
        devices: Number of processes.
        craft_dtype: Low precision in which the attacks run.
        plot: Write a picture.
    """

    target: str
    changes: tuple[str, ...] = ()
    attack: str | None = None
    eps: float | None = None
    norm: str | None = None
    samples: int | None = None
    out: Path | None = None
    resume: Path | None = None
    checks: str | None = "quick"
    seed: int | None = None
    split: str = "test"
    devices: int | None = None
    craft_dtype: str | None = None
    plot: bool = False


def parse_eval(words: Sequence[str]) -> EvalArguments:
    """Understand the arguments of ``eval``.

    Args:
        words: What follows the name of the command.

    Raises:
        UsageError: If something is missing, unknown or no number.
    """
    shown = ["data", "model.", "trainer.", "attack.", "threads"]
    found = read_options(words, values=_VALUES, flags=_FLAGS, passed_on=_PASSED_ON, shown=shown)
    changes = [word for name, value in found.passed_on for word in _passed_on(name, value)]
    return _understood(found.plain, changes, found.values)


def _understood(targets: list[str], changes: list[str], values: dict[str, str]) -> EvalArguments:
    resume = values.get("resume")
    if len(targets) > 1:
        raise UsageError(f"`eval` takes one run folder, checkpoint or timm name, got {', '.join(targets)}.")
    if resume is not None and (
        targets or {"out", "attack", "eps", "norm", "samples", "seed", "split", "checks", "craft_dtype"} & values.keys()
    ):
        raise UsageError(
            "`--resume FOLDER` continues an evaluation as it was: only --devices, --plot, --trainer.* and "
            "--data.batch_size may go with it."
        )
    if not targets and resume is None:
        raise UsageError(
            "What is to be evaluated? For example: lightning-robust eval runs/digits-robust/1 --attack pgd"
        )
    return EvalArguments(
        target=targets[0] if targets else "",
        changes=tuple(changes),
        attack=values.get("attack"),
        eps=_number(values, "eps"),
        norm=values.get("norm"),
        samples=integer(values, "samples", 1),
        out=Path(values["out"]) if "out" in values else None,
        resume=None if resume is None else Path(resume),
        checks=_choice(values, "checks", ("quick", "full", "none"), "quick"),
        seed=integer(values, "seed", 0),
        split=_choice(values, "split", ("test", "val"), "test") or "test",
        devices=integer(values, "devices", 1),
        craft_dtype=_choice(values, "craft_dtype", ("bfloat16", "float16", "none"), "none"),
        plot="plot" in values,
    )


def _passed_on(name: str, value: str) -> list[str]:
    if not name.startswith("attack."):
        return [f"--{name}", value]
    # radii and step sizes are usually written as fractions, which YAML takes for words
    return [f"{ATTACK}.{name.removeprefix('attack.')}", str(_fraction(value)) if "/" in value else value]


def _fraction(text: str) -> float | str:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return text


def _number(values: dict[str, str], name: str) -> float | None:
    if name not in values:
        return None
    number = _fraction(values[name])
    if isinstance(number, str) or not 0 <= number < float("inf"):
        raise UsageError(f"Expected --{name} to be a number >= 0 such as 0.1 or 8/255 but got {values[name]}.")
    return number


def _choice(values: dict[str, str], name: str, choices: tuple[str, ...], default: str) -> str | None:
    chosen = values.get(name, default)
    if chosen not in choices:
        raise UsageError(f"Expected --{name} to be one of {', '.join(choices)} but got {chosen}.")
    return None if chosen == "none" else chosen

# SPDX-License-Identifier: Apache-2.0
"""What ``eval`` can evaluate: a run folder, a checkpoint, a model of timm; each as a recipe and weights."""

import difflib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch

from lightning_robust.cli.builder import LINKED
from lightning_robust.cli.earlier import earlier_of, words_of
from lightning_robust.cli.errors import UsageError, did_you_mean
from lightning_robust.cli.evaluations import EVALUATIONS
from lightning_robust.cli.folders import CHECKPOINTS, CONFIG, SUMMARY, read_summary
from lightning_robust.cli.recipes import load_recipe
from lightning_robust.cli.substitute import fill
from lightning_robust.cli.train import best_weights, latest_checkpoint
from lightning_robust.models.image_classifier import SHAPES_KEY

__all__ = ["UNREADABLE", "Target", "find_target", "no_checkpoint"]

#: What torch raises at a file that is no checkpoint.
UNREADABLE = (RuntimeError, UnpicklingError, OSError, EOFError, KeyError, ValueError)
_KEPT = ("seed_everything", "model", "data", "threads")


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Args:
        name: Name to show, and of the folder of its evaluations.
        config: Recipe of model and data, without data if the user has to bring them.
        parent: Folder that gets the numbered folders of its evaluations.
        weights: Checkpoint with the weights; ``None`` if the model comes with them.
        attack: Attack of its recipe, whose budget is that of the evaluation unless another is asked for.
        linked: What the model takes from the data.
    """

    name: str
    config: dict[str, Any]
    parent: Path
    weights: Path | None = None
    attack: dict[str, Any] | None = None
    linked: tuple[str, ...] = field(default=())


def find_target(text: str) -> Target:
    """Understand what the user named.

    Args:
        text: Run folder, checkpoint, or name of a timm model.

    Raises:
        UsageError: If it is none of them, or has no weights.
    """
    path = Path(text)
    if path.is_dir():
        if not (path / SUMMARY).is_file():
            raise UsageError(f"{path.resolve()} is not a run folder: it has no {SUMMARY}.", _existing_runs(text))
        return _run(path.resolve(), None)
    if path.is_file():
        path = path.resolve()
        run = path.parent.parent
        inside = path.parent.name == CHECKPOINTS and (run / CONFIG).is_file() and (run / SUMMARY).is_file()
        return _run(run, path) if inside else _checkpoint(path)
    if not timm.is_model(text) and (len(path.parts) > 1 or path.suffix == ".ckpt"):
        raise UsageError(f"There is no file or folder {text}.", _existing_runs(text))
    return _timm(text)


def _run(folder: Path, weights: Path | None) -> Target:
    summary = read_summary(folder)
    recipe = summary.get("recipe", folder.parent.name)
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} has no {CONFIG}, which says what model and data it is about; put it back, or train anew with: "
            f"lightning-robust run {recipe}"
        )
    config = fill(load_recipe(str(folder / CONFIG)).config(), words_of(folder, earlier_of(summary)))
    weights = weights or _weights(folder)
    accelerator = (config.get("trainer") or {}).get("accelerator", "auto")
    return Target(
        name=f"{recipe}/{folder.name}",
        config={**{key: config[key] for key in _KEPT if key in config}, "trainer": {"accelerator": accelerator}},
        parent=folder / EVALUATIONS,
        weights=weights,
        attack=(config.get("evaluation") or {}).get("attack"),
        linked=LINKED,
    )


def _weights(folder: Path) -> Path:
    best = best_weights(folder)
    try:
        weights = best if best.is_file() else latest_checkpoint(folder)
    except UNREADABLE as error:
        raise UsageError(
            f"A file in {folder / CHECKPOINTS} is no checkpoint; name the one to evaluate, or continue training."
        ) from error
    if weights is None:
        raise UsageError(f"{folder} has no checkpoint, so there is nothing to evaluate.")
    return weights


def no_checkpoint(path: Path, error: Exception) -> UsageError:
    """Say that a file is no checkpoint, and what was expected.

    Args:
        path: The file.
        error: What torch raised when it read the file.
    """
    expected = "expected one that training has written, such as runs/digits-robust/1/checkpoints/best.ckpt"
    if path.suffix in {".yaml", ".yml"}:
        return UsageError(f"{path} is a recipe, not a checkpoint; train it first: lightning-robust run {path}")
    if path.stat().st_size == 0:
        return UsageError(f"{path} is no checkpoint: it is empty; {expected}.")
    if not zipfile.is_zipfile(path):  # torch.save writes zip archives
        return UsageError(f"{path} is no checkpoint, or only a part of one; {expected}.")
    if isinstance(error, UnpicklingError):
        return UsageError(
            f"{path} holds Python objects besides tensors, which could run code and are not loaded; keep "
            "them out of save_hyperparameters and of the state of callbacks and module."
        )
    return UsageError(f"{path} is no checkpoint but another kind of archive, or it is damaged; {expected}.")


def _existing_runs(text: str) -> str:
    """Name run folders and checkpoints that the user may have meant, or how to make one."""
    path = Path(text)
    roots = [Path("runs"), path, *([path.parent.parent] if len(path.parts) > 2 else [])]
    patterns = (SUMMARY, f"*/{SUMMARY}", f"*/*/{SUMMARY}")
    found = {str(file.parent) for root in roots for pattern in patterns for file in root.glob(pattern)}
    found |= {str(parent) for parent in list(path.parents)[:2] if (parent / SUMMARY).is_file()}
    near = did_you_mean(text, sorted([*found, *map(str, path.parent.glob("*.ckpt"))]))
    if near or not found:
        return near or "Train a model first, for example with: lightning-robust run digits-robust"
    return f"There are run folders: {', '.join(sorted(found)[:3])}{', ...' if len(found) > 3 else '.'}"


def _checkpoint(path: Path) -> Target:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise no_checkpoint(path, error) from error
    if not isinstance(content, dict) or SHAPES_KEY not in content or "hyper_parameters" not in content:
        raise UsageError(
            f"{path} is no checkpoint of an ImageClassifier; evaluate the run folder that it belongs to, or add "
            "RobustEvaluation(attack) to the callbacks of your own Trainer and call trainer.test."
        )
    arguments = dict(content["hyper_parameters"])
    if str(arguments.get("backbone")).startswith("<"):
        raise UsageError(
            f"{path} was made from a backbone object {arguments['backbone']}, which it does not contain; add "
            "RobustEvaluation(attack) to the callbacks of your own Trainer and call trainer.test."
        )
    return Target(
        name=path.stem,
        config={"model": {"class_path": "ImageClassifier", "init_args": arguments}},
        parent=Path("evals") / path.stem,
        weights=path,
    )


def _timm(name: str) -> Target:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=2, cutoff=0.6)
        hint = f"Did you mean {' or '.join(near)}?" if near else _existing_runs(name)
        raise UsageError(f"{name} is no run folder, no checkpoint and no model of timm.", hint)
    facts = timm.get_pretrained_cfg(name)
    if facts is None or not facts.has_weights:
        raise UsageError(f"timm has no trained weights for {name}; evaluate a run folder or a checkpoint.")
    arguments = {
        "backbone": name,
        "num_classes": facts.num_classes,
        "in_chans": facts.input_size[0],
        "mean": list(facts.mean),
        "std": list(facts.std),
        "backbone_options": {"pretrained": True},
    }
    return Target(
        name=name,
        config={"model": {"class_path": "ImageClassifier", "init_args": arguments}},
        parent=Path("evals") / name,
    )

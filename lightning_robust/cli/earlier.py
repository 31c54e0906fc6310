# SPDX-License-Identifier: Apache-2.0
"""Earlier runs that a recipe stands on, by name: the baseline it is compared with, teachers it learns from."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from lightning_robust.cli.builder import COMPARE, TEACHERS
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.folders import CONFIG, SUMMARY, claim_run_folder, read_summary, run_folders, write_json
from lightning_robust.cli.jobs import Job
from lightning_robust.cli.launch import is_first_process
from lightning_robust.cli.measure import measure
from lightning_robust.cli.recipes import load_recipe
from lightning_robust.cli.substitute import BASELINE, RUN, shared_changes, teacher_changes, uses, word_of
from lightning_robust.cli.train import best_weights, latest_checkpoint, start_summary, train

__all__ = ["claim_earlier", "earlier_of", "earlier_runs", "finished_runs", "stood_in", "train_earlier", "words_of"]

_BASELINE = BASELINE.strip("{}")
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def earlier_runs(job: Job) -> dict[str, Job | Path]:
    """What a training stands on: trainings, with the options that they share with it, and files with weights.

    Args:
        job: The training.

    Raises:
        UsageError: If something named is no recipe, run folder or file, or stands on earlier runs itself.
    """
    found: dict[str, Job | Path] = {}
    if (baseline := job.config.get("baseline")) is not None:
        found[_BASELINE] = _job(str(baseline), shared_changes(job.changes), "a baseline")
    teachers = {name: str(value) for name, value in (job.config.get(TEACHERS) or {}).items()}
    _refuse_missing(teachers)
    for name, value in teachers.items():
        path = _existing(Path(value))
        found[name] = _job(value, teacher_changes(job.changes), "a teacher") if path is None else path
    return found


def _refuse_missing(teachers: Mapping[str, str]) -> None:
    """Refuse all files that do not exist at once."""
    missing = {}
    for name, value in teachers.items():
        path = Path(value)
        if path.is_dir() and not best_weights(path).is_file():
            missing[name] = f"`{TEACHERS}.{name}`: {path} is no run folder with a best checkpoint."
        elif path.suffix in _WEIGHTS and not path.is_file():
            missing[name] = f"`{TEACHERS}.{name}`: there is no file {path}."
    if missing:
        option = f"--{TEACHERS}.{next(iter(missing))}"
        hint = f"Name a checkpoint, a run folder or a recipe that trains it, for example {option} runs/mine/1"
        raise UsageError(*missing.values(), hint)


def _existing(path: Path) -> Path | None:
    """The weights of a teacher that is there already."""
    if path.is_dir():
        return best_weights(path).resolve()
    return path.resolve() if path.suffix in _WEIGHTS else None


def _job(name: str, changes: list[str], what: str) -> Job:
    recipe = load_recipe(name)
    config = {**recipe.config(), "baseline": None}
    if config.get(COMPARE) is not None:
        raise UsageError(f"{recipe.name} compares several trainings, so it cannot be {what}.")
    if config.get(TEACHERS) or uses(BASELINE, [config, changes]):
        raise UsageError(f"{recipe.name} learns from an earlier run itself, so it cannot be {what}.")
    return Job(recipe.name, config, changes)


def finished_runs(earlier: Mapping[str, Job | Path], root: Path, *, fresh: bool = False) -> dict[str, Path]:
    """Those that need no training: what the user has, and finished runs with the identical configuration.

    Args:
        earlier: What a training stands on.
        root: Folder that holds the run folders.
        fresh: Take no finished run.
    """
    found: dict[str, Path] = {}
    for name, run in earlier.items():
        if isinstance(run, Path):
            found[name] = run
        elif not fresh and (folder := _finished(root / run.name, run.parse().fingerprint())) is not None:
            found[name] = folder
    return found


def _finished(parent: Path, fingerprint: str) -> Path | None:
    for folder in reversed(run_folders(parent)):
        if (folder / SUMMARY).is_file() and best_weights(folder).is_file():
            summary = read_summary(folder)
            if summary.get("status") == "complete" and summary.get("fingerprint") == fingerprint:
                return folder
    return None


@contextmanager
def stood_in(earlier: Mapping[str, Job | Path], found: Mapping[str, Path], values: Any) -> Iterator[dict[str, str]]:
    """The words in braces while nothing is trained yet: a temporary folder, and untrained weights where there are none.

    Every training that is to come is built once, so that what it refuses is refused now.

    Args:
        earlier: What a training stands on.
        found: Those that need no training.
        values: Where words may be used; the others get no weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = words_of(folder, {name: str(path) for name, path in found.items()})
        for name, run in earlier.items():
            if isinstance(run, Path) or name in found:
                continue
            cli = run.parse({RUN: folder})
            cli.rehearse()
            if uses(word_of(name), values):
                path = Path(folder) / f"{name}.ckpt"
                torch.save({"state_dict": cli.model.state_dict(), "hyper_parameters": dict(cli.model.hparams)}, path)
                words[word_of(name)] = str(path)
        yield words


def claim_earlier(earlier: Mapping[str, Job | Path], found: Mapping[str, Path], root: Path) -> dict[str, str]:
    """Claim a folder for each training to come, one for those that are the same, and return all places.

    Args:
        earlier: What a training stands on.
        found: Those that need no training.
        root: Folder that holds the run folders.
    """
    places = {name: str(path) for name, path in found.items()}
    claimed: dict[str, str] = {}
    for name, run in earlier.items():
        if isinstance(run, Path):
            continue
        if name in found:
            role, place = _role(name).capitalize(), found[name]
            _say(f"{role} {run.name}: reusing {place}, a finished run with the identical configuration.")
            continue
        cli = run.parse()
        key = f"{run.name} {cli.fingerprint()}"
        if key not in claimed:
            folder = claim_run_folder(root, run.name)
            start_summary(run.name, cli, folder)
            claimed[key] = str(folder)
        places[name] = claimed[key]
    return {name: places[name] for name in earlier}


def earlier_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The places of what a run stands on, as its summary tells them.

    Args:
        summary: Summary of the run.
    """
    baseline = {_BASELINE: str(summary["baseline"])} if summary.get("baseline") else {}
    return {**baseline, **(summary.get(TEACHERS) or {})}


def words_of(folder: str | Path, earlier: Mapping[str, str]) -> dict[str, str]:
    """What the words in braces stand for in a run.

    Args:
        folder: Folder of the run.
        earlier: Places of what it stands on: run folders, or files with weights.
    """
    paths = {name: Path(place) for name, place in earlier.items()}
    words = {word_of(name): path if path.suffix in _WEIGHTS else best_weights(path) for name, path in paths.items()}
    return {RUN: str(folder), **{word: str(path) for word, path in words.items()}}


def train_earlier(earlier: Mapping[str, str], whole: Path) -> None:
    """Train what is not finished yet, each once; what was stopped goes on from its last checkpoint.

    Args:
        earlier: Places of what a run stands on.
        whole: The run, which a message tells to continue.

    Raises:
        CommandError: If a training stops with an error.
    """
    for name, place in earlier.items():
        folder = Path(place)
        if folder.is_dir() and (summary := read_summary(folder)).get("status") != "complete":
            _train(name, folder, summary, whole)


def _train(name: str, folder: Path, summary: dict[str, Any], whole: Path) -> None:
    recipe = str(summary["recipe"])
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    cli = Job(recipe, config, []).parse(words_of(folder, {}))
    if summary.get("status") == "trained":
        cli.rehearse()
    else:
        checkpoint = latest_checkpoint(folder)
        _say(f"{'Continuing' if checkpoint else 'Training'} the {_role(name)} {recipe} in {folder}")
        train(cli, folder, summary, checkpoint=checkpoint, whole=whole)
    if is_first_process():
        summary.update(status="complete", evaluation=measure(cli, folder))
        write_json(folder / SUMMARY, summary)


def _role(name: str) -> str:
    return name if name == _BASELINE else f"teacher {name},"


def _say(text: str) -> None:
    if is_first_process():
        Console().print(text, style="bold", soft_wrap=True, highlight=False, markup=False)

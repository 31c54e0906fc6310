# SPDX-License-Identifier: Apache-2.0
"""``run`` of a recipe with a `compare` part: every arm with every seed, then one table."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_robust import __version__
from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import COMPARE, TEACHERS, RecipeCLI
from lightning_robust.cli.comparison import Comparison
from lightning_robust.cli.comparison_report import (
    print_comparison,
    statistics,
    write_comparison_numbers,
    write_comparison_picture,
)
from lightning_robust.cli.earlier import (
    claim_earlier,
    earlier_of,
    earlier_runs,
    finished_runs,
    stood_in,
    train_earlier,
    words_of,
)
from lightning_robust.cli.errors import CommandError, UsageError
from lightning_robust.cli.folders import CONFIG, SUMMARY, claim_run_folder, read_summary, write_json, write_text
from lightning_robust.cli.jobs import Job
from lightning_robust.cli.launch import is_first_process, receive_plan, share_plan
from lightning_robust.cli.measured import measure_quantities, probe_task
from lightning_robust.cli.quantities import ATTACKED
from lightning_robust.cli.rehearsal import rehearse
from lightning_robust.cli.report import INSTALL_PLOT
from lightning_robust.cli.train import latest_checkpoint, start_summary, train

__all__ = ["NUMBERS", "PICTURE", "rehearse_arm", "resume_comparison", "start_comparison"]

NUMBERS, PICTURE = "comparison.csv", "comparison.png"
_TRAINED = ("trained", "complete")


def start_comparison(comparison: Comparison, arguments: Arguments) -> int:
    """Train and measure everything in a new folder; returns the exit code.

    Args:
        comparison: What is compared.
        arguments: What the user asked for.

    Raises:
        CommandError: If something is refused or fails.
    """
    earlier = earlier_runs(comparison.base())
    if arguments.fresh and not earlier:
        raise UsageError("This comparison has no teachers, and trains all its arms: leave out --fresh.")
    root = arguments.out.resolve()
    if not is_first_process():
        plan = receive_plan(arguments.out)
        return _train_all(comparison, Path(plan["folder"]), {}, plan["earlier"])
    found = finished_runs(earlier, root, fresh=arguments.fresh)
    with stood_in(earlier, found, comparison.values()) as words:
        settled, facts = _rehearsed(comparison, words)
    places = claim_earlier(earlier, found, root)
    folder = claim_run_folder(root, comparison.name)
    write_text(folder / CONFIG, yaml.safe_dump(settled, sort_keys=False))
    summary = {
        "recipe": comparison.name,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "lightning_robust": __version__,
        TEACHERS: places,
        "comparison": {"seeds": comparison.seeds, "quantities": comparison.quantities, **facts},
    }
    return _go_on(comparison, folder, summary, arguments.out)


def resume_comparison(folder: Path, arguments: Arguments) -> int:
    """Train and measure what is missing: a rest, further seeds, further arms; returns the exit code.

    Args:
        folder: Folder of the comparison.
        arguments: What the user asked for.

    Raises:
        CommandError: If something is refused or fails.
    """
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    summary = read_summary(folder)
    _refuse_changes(arguments.changes, config[COMPARE]["arms"])
    comparison = Comparison.of(Job(str(summary["recipe"]), config, list(arguments.changes)))
    assert comparison is not None
    earlier = earlier_of(summary)
    if not is_first_process():
        return _train_all(comparison, folder, {}, earlier)
    if summary.get("status") == "complete" and not arguments.changes:
        raise UsageError(f"{folder} is complete; train it anew with: lightning-robust run {folder / CONFIG}")
    train_earlier(earlier, folder)
    settled, facts = _rehearsed(comparison, words_of(folder, earlier))
    write_text(folder / CONFIG, yaml.safe_dump(settled, sort_keys=False))
    old = summary["comparison"]["values"]
    for arm, found in facts["values"].items():
        found.update({seed: each for seed, each in old.get(arm, {}).items() if int(seed) in comparison.seeds})
    block = {"seeds": comparison.seeds, "quantities": comparison.quantities, **facts}
    return _go_on(comparison, folder, {**summary, "status": "running", "comparison": block}, folder.parent.parent)


def _refuse_changes(changes: Sequence[str], arms: Collection[str]) -> None:
    for word in changes:
        path = word.partition("=")[0]
        ours = path in (f"--{COMPARE}.seeds", f"--{COMPARE}.quantities")
        added = path.startswith(f"--{COMPARE}.arms.") and path.split(".")[2] not in arms
        if word.startswith("--") and not ours and not added:
            raise UsageError(
                f"{path}: a comparison continues as it was, so that its arms stay comparable.",
                f"What can change: --{COMPARE}.seeds, --{COMPARE}.quantities, and arms that are new.",
            )


def _rehearsed(comparison: Comparison, words: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build every arm once, so that what can be refused is refused before anything is trained."""
    base = yaml.safe_load(comparison.base().parse().text())
    parsed, starts, probe = {}, {}, ""
    for arm in comparison.arms:
        cli = rehearse_arm(comparison, arm, words)
        parsed[arm] = yaml.safe_load(comparison.job(arm, comparison.seeds[0]).parse().text())
        starts[arm] = _digest(cli)
        probe = probe_task(cli)
    values: dict[str, Any] = {arm: {} for arm in parsed}
    return comparison.settled(base, parsed), {"probe": probe, "notes": _notes(starts), "values": values}


def rehearse_arm(comparison: Comparison, arm: str, words: Mapping[str, str]) -> RecipeCLI:
    """An arm with the first seed, built.

    Args:
        comparison: What is compared.
        arm: Name of the arm.
        words: Replacement of each word in braces.

    Raises:
        UsageError: If it is not accepted; says which arm it is.
    """
    try:
        cli = comparison.job(arm, comparison.seeds[0]).parse(words)
        rehearse(cli)
        wanting = [name for name in ATTACKED if name in comparison.quantities]
        if wanting and cli.config_init.evaluation.attack is None:
            raise UsageError(f"`{wanting[0]}` needs an attack; name one in `evaluation.attack`.")
    except UsageError as error:
        first, *rest = str(error).splitlines()
        raise UsageError(f"In the arm `{arm}`: {first}", *rest) from error
    return cli


def _digest(cli: RecipeCLI) -> str:
    """Of the parameters with which training starts."""
    digest = hashlib.sha256()
    for name, parameter in cli.model.named_parameters():
        if not name.startswith(("criterion.", "objective_parameters.")):
            digest.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _notes(starts: dict[str, str]) -> list[str]:
    first = next(iter(starts))
    others = [arm for arm, digest in starts.items() if digest != starts[first]]
    return [f"Not the initial weights of {first}: {', '.join(others)}."] if others else []


def _go_on(comparison: Comparison, folder: Path, summary: dict[str, Any], out: Path) -> int:
    earlier = earlier_of(summary)
    share_plan({"folder": str(folder), "earlier": earlier}, out)
    _say(f"Run folder: {folder}")
    for note in summary["comparison"]["notes"]:
        _say(note)
    _save(folder, summary)
    code = _train_all(comparison, folder, summary, earlier)
    summary["status"] = "complete"
    _save(folder, summary)
    console = Console()
    print_comparison(summary, console)
    numbers = write_comparison_numbers(summary, folder / NUMBERS)
    picture = write_comparison_picture(summary, folder / PICTURE) or f"needs matplotlib: {INSTALL_PLOT}"
    for what, path in (("Run", folder), ("Numbers", numbers), ("Picture", picture)):
        console.print(f"{what + ':':<10}{path}", soft_wrap=True, highlight=False, markup=False)
    return code


def _train_all(comparison: Comparison, folder: Path, summary: dict[str, Any], earlier: Mapping[str, str]) -> int:
    train_earlier(earlier, folder)
    cells = comparison.cells()
    for number, (arm, seed) in enumerate(cells, 1):
        found = _cell(comparison, arm, seed, folder, (number, len(cells)), earlier)
        if summary:
            values = summary["comparison"]["values"]
            values[arm][str(seed)] = found
            _save(folder, summary)
    return 0


def _cell(
    comparison: Comparison, arm: str, seed: int, whole: Path, number: tuple[int, int], earlier: Mapping[str, str]
) -> dict[str, float | None]:
    folder = whole / arm / str(seed)
    first = is_first_process()
    summary: dict[str, Any] = read_summary(folder) if (folder / SUMMARY).is_file() else {}
    known = dict(summary.get("quantities", {}))
    missing = [name for name in comparison.quantities if name not in known]
    if summary.get("status") == "complete" and not missing:
        return known
    job = comparison.job(arm, seed)
    cli = job.parse(words_of(folder, earlier))
    if summary.get("status") in _TRAINED:
        cli.rehearse()
    else:
        checkpoint = latest_checkpoint(folder) if summary else None
        if first:
            _say(f"{'Continuing' if checkpoint else 'Training'} {arm}, seed {seed} ({number[0]} of {number[1]})")
        if first and not summary:
            _make(folder)
            summary = start_summary(arm, job.parse(), folder, compared_in=str(whole))
        train(cli, folder, summary, checkpoint=checkpoint, whole=whole, brief=number[0] > 1)
    if not first:
        return {}
    known.update(measure_quantities(cli, folder, missing, summary.get("seconds")))
    write_json(folder / SUMMARY, {**summary, "status": "complete", "quantities": known})
    return known


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder} cannot be created: {error.strerror}.") from error


def _save(folder: Path, summary: dict[str, Any]) -> None:
    block = summary["comparison"]
    block["statistics"] = statistics(block["values"], block["quantities"])
    write_json(folder / SUMMARY, summary)


def _say(text: str) -> None:
    Console().print(text, style="bold", soft_wrap=True, highlight=False, markup=False)

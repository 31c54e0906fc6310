# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust``: understand the command, import what it needs, and turn refusals into a few lines."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from lightning_robust import __version__
from lightning_robust.cli.errors import FAILED, CommandError

__all__ = ["main"]

EPILOG = """\
start here:
  lightning-robust list                                      what there is
  lightning-robust run digits-robust                         train, attack, calibrate; ends with a table and a picture
  lightning-robust run digits-sam --methods.sharpness.method.rho 0.1 --trainer.max_epochs 5
  lightning-robust copy digits-sam mine.yaml                 then: lightning-robust run mine.yaml
  lightning-robust eval runs/digits-robust/1 --attack autoattack          attack what was trained
"""

CHECK_USAGE = "lightning-robust check RECIPE [--baseline RECIPE|none] [--any.option VALUE ...]"

RUN_USAGE = """lightning-robust run RECIPE [--out FOLDER] [--baseline RECIPE|none] [--fresh] [--any.option VALUE ...]
       lightning-robust run --resume RUN_FOLDER

  RECIPE                name of a recipe (lightning-robust list), or a YAML file
  --out FOLDER          where run folders go: FOLDER/<recipe>/<n>/ (default: runs)
  --baseline RECIPE     compare with this recipe instead of the one that the recipe names; `none` for no comparison
  --teachers.NAME WHAT  recipe, run folder or checkpoint to learn from instead of the one that the recipe names
  --fresh               train baseline and teachers again even when identical finished runs exist
  --resume RUN_FOLDER   continue a stopped run from its last checkpoint with its own configuration"""

EVAL_USAGE = """lightning-robust eval RUN|CHECKPOINT|TIMM-NAME [--attack NAME] [--eps 8/255] [--norm linf] ...
       lightning-robust eval --resume FOLDER

  RUN                   run folder: its own model, best weights and data
  CHECKPOINT            checkpoint of a run folder, or of an ImageClassifier (with --data)
  TIMM-NAME             trained model of timm (with --data)
  --attack NAME         autoattack, fast (its first two members), pgd, apgd, square, ...: any class of
                        lightning_robust.attacks in small letters; default: the attack of the run's recipe
  --attack.OPTION VALUE one option of the attack, for example --attack.steps 20
  --eps E, --norm N     the budget, in pixel units; default: that of the recipe's attack, else of the attack's class
  --data CLASS, --data.OPTION VALUE        other data, or other options of it
  --samples N           the first N samples only
  --split test|val      which samples (default: test)
  --checks quick|full|none                 sanity checks (default: quick)
  --seed N              seed of all random draws of the attack
  --devices N           processes that share the samples; the result does not depend on it
  --craft_dtype T       bfloat16 or float16: attack in low precision; points are verified in float32
  --out FOLDER          where everything goes (default: RUN/eval/<n>, evals/NAME/<n>)
  --plot                a picture, too
  --resume FOLDER       continue a killed evaluation"""

CACHE_USAGE = """lightning-robust cache RECIPE --teacher TEACHER --out FOLDER [--view seeded] [--data.option VALUE] ...

  RECIPE                recipe or run folder whose training set the teacher is asked about
  --teacher TEACHER     run folder, file with weights, or timm:NAME
  --teacher.OPTION VALUE                   one option of TeacherSource, for example --teacher.backbone resnet18
  --out FOLDER          folder of the cache
  --view fixed|seeded   images without augmentation, or the variants of --data.augment_variants N (default: fixed)
  --top_k K             keep the K most probable classes and the label (default: all classes)
  --dtype T             float16 or float32 (default: float16)
  --batch_size N, --num_workers N          how to load
  --devices N           processes that share the samples
  --overwrite           replace a cache that is there"""

CHANGES = """\
Every value of a recipe can be changed by its path:
  --trainer.max_epochs 5              --model.backbone resnet18           --data.batch_size 64
  --methods.sharpness.method.rho 0.1  one option of the method that the recipe calls `sharpness`
  --methods.sharpness null            leave a method out
  --methods.extra ClassName --methods.extra.option 3                      add one (see: lightning-robust methods)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 when it failed, 2 when it was not understood.

    Args:
        argv: The arguments after the program's name; the process's own by default.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    # argparse would claim the options of a recipe for itself, so it sees only the name of these commands.
    passes_on = bool(words) and words[0] in {"run", "check", "eval", "cache"} and not {"-h", "--help"} & set(words)
    options = parser.parse_args(words[:1] if passes_on else words)
    options.words = words[1:]
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.call(options) or 0)
    except CommandError as error:
        _complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone; closing stdout here keeps the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        _complain("Stopped.")
        return 130


def _complain(text: str) -> None:
    if os.environ.get("LIGHTNING_ROBUST_TRACEBACK"):
        traceback.print_exc()
    first, *rest = text.splitlines() or [""]
    console = Console(stderr=True, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(first, markup=False, highlight=False)
    for line in rest:
        console.print(f"  {line.strip()}" if line == line.lstrip() else line, markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-robust",
        description="Robust, flat and calibrated training on Lightning: recipes from the command line.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-robust {__version__}")
    _add_commands(parser.add_subparsers(dest="command", metavar="COMMAND"))
    return parser


def _add_commands(commands: Any) -> None:
    def command(name: str, call: Callable[[argparse.Namespace], Any], text: str, **more: Any) -> Any:
        # Sub-parsers do not inherit allow_abbrev: without it `--forc` would pass for `--force`.
        form = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=form, **more)
        sub.set_defaults(call=call)
        return sub

    command("list", _list, "Table of recipes: what each shows and what it costs.")
    sub = command("show", _show, "Print a recipe.")
    sub.add_argument("recipe", help="name of a recipe, or a YAML file")
    sub = command("copy", _copy, "Copy a recipe to a file of your own.")
    sub.add_argument("recipe", help="name of a recipe")
    sub.add_argument("target", nargs="?", type=Path, default=Path(), help="file or folder to write (default: here)")
    sub.add_argument("--force", action="store_true", help="overwrite an existing file")
    sub = command("methods", _methods, "Table of the callbacks, or the options of one of them.")
    sub.add_argument("name", nargs="?", help="name of a class, for example SharpnessAware or SAM")
    text = "Build everything, run one batch, print the order of the step and its cost."
    command("check", _check, text, epilog=CHANGES, usage=CHECK_USAGE)
    text = "Train a recipe (and the baseline and teachers that it names), evaluate, and compare."
    command("run", _run, text, epilog=CHANGES, usage=RUN_USAGE)
    command("eval", _eval, "Attack a trained model on its test set and report what withstood.", usage=EVAL_USAGE)
    text = "Ask a teacher about a training set once, and store what it says for later training."
    command("cache", _cache, text, usage=CACHE_USAGE)
    sub = command("report", _report, "Table, and optionally a picture, of several runs side by side.")
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="write a picture, and its numbers as CSV beside it")
    command("env", _env, "Versions and platform, for a bug report.")


# Each command imports what it needs: `list`, `show`, `copy` and `report` must not wait for torch.


def _list(options: argparse.Namespace) -> None:
    from lightning_robust.cli.tables import recipe_table

    console = Console()
    console.print(recipe_table())
    console.print("Run one:  lightning-robust run NAME\nRead one: lightning-robust show NAME", highlight=False)


def _show(options: argparse.Namespace) -> None:
    from rich.syntax import Syntax

    from lightning_robust.cli.recipes import load_recipe

    text = load_recipe(options.recipe).text
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text.rstrip(), "yaml", background_color="default"))
    else:
        sys.stdout.write(text)


def _copy(options: argparse.Namespace) -> None:
    from lightning_robust.cli.recipes import copy_recipe

    written = copy_recipe(options.recipe, options.target, force=options.force)
    Console().print(f"Wrote {written}. Run it with: lightning-robust run {written}", markup=False, highlight=False)


def _methods(options: argparse.Namespace) -> None:
    with _loading():
        from lightning_robust.cli.methods import method_help, method_table

    Console().print(method_table() if options.name is None else method_help(options.name))


def _check(options: argparse.Namespace) -> None:
    from lightning_robust.cli.arguments import parse_check
    from lightning_robust.cli.recipes import load_recipe

    arguments = parse_check(options.words)
    load_recipe(arguments.recipe).config()
    with _loading():
        from lightning_robust.cli.check import check

    check(arguments)


def _run(options: argparse.Namespace) -> int:
    from lightning_robust.cli.arguments import parse_run
    from lightning_robust.cli.recipes import load_recipe

    arguments = parse_run(options.words)
    if arguments.resume is None:
        load_recipe(arguments.recipe).config()
    with _loading():
        from lightning_robust.cli.runner import run

    return run(arguments)


def _eval(options: argparse.Namespace) -> int:
    from lightning_robust.cli.eval_arguments import parse_eval

    parse_eval(options.words)
    with _loading():
        from lightning_robust.cli.evaluation import evaluate_command

    return evaluate_command(options.words)


def _cache(options: argparse.Namespace) -> int:
    from lightning_robust.cli.cache_arguments import parse_cache

    parse_cache(options.words)
    with _loading():
        from lightning_robust.cli.cache import cache_command

    return cache_command(options.words)


def _loading() -> Status:
    return Console(stderr=True).status("Loading PyTorch and Lightning ...")


def _report(options: argparse.Namespace) -> None:
    from lightning_robust.cli.report import report

    report(options.runs, plot=options.plot)


def _env(options: argparse.Namespace) -> None:
    from lightning_robust.cli.tables import environment_table

    Console().print(environment_table())

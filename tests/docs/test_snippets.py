"""Every snippet of the README and of the documentation works.

Python blocks of a page run in order in one namespace, as a reader would paste them. They find the names that an
existing project has (`existing_project`). YAML blocks are parsed as recipes, commands by the command line.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_robust.cli import main
from lightning_robust.cli.arguments import parse_check, parse_run
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.recipes import load_recipe
from support.existing_project import names

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
# Read by Lightning's Trainer; what a snippet says itself wins.
TRAINER_DEFAULTS = {
    "accelerator": "cpu",
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_train_batches": 2,
    "logger": False,
}
TAKES_SECONDS = {"run", "check"}  # parsed here, with all their options; the command line's own tests run them


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The code blocks of a page in these languages, each with the number of its first line."""
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        if fence["language"] in languages:
            code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE)
            found.append((text[: fence.start()].count("\n") + 2, code))
    return found


def pages_with(*languages: str) -> list[Any]:
    pages = [page for page in PAGES if "_build" not in page.parts and blocks(page, *languages)]
    return [pytest.param(page, id=str(page.relative_to(REPOSITORY))) for page in pages]


def commands() -> list[str]:
    """Every distinct command line of ours in a shell block, without its comment."""
    found: dict[str, None] = {}
    for case in pages_with("bash", "console"):
        for _, code in blocks(case.values[0], "bash", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] == "lightning-robust":
                    found[shlex.join(words[1:])] = None
    return list(found)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the page's earlier fit
@pytest.mark.filterwarnings("ignore:The temperature was set to its")  # a few random samples
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, value in TRAINER_DEFAULTS.items():
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", str(value))
    namespace = names()
    for line, code in blocks(page, "python"):
        # empty lines in front, so that a traceback names the line of the page
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_blocks_are_recipes(page: Path) -> None:
    for _, code in blocks(page, "yaml"):
        RecipeCLI(yaml.safe_load(code))


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[0] in TAKES_SECONDS:
        arguments = (parse_run if words[0] == "run" else parse_check)(words[1:])
        if arguments.recipe and not arguments.recipe.endswith(".yaml"):
            RecipeCLI(load_recipe(arguments.recipe).config(), arguments.changes)
    elif not any("/" in word for word in words):  # reports of runs need the runs
        assert main(words) == 0


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for _, code in blocks(page, "bash", "console"):
            assert set(re.findall(r"^(?:\$ )?make ([a-z-]+)", code, re.MULTILINE)) <= targets, page


def test_every_block_says_its_language() -> None:
    for page in PAGES:
        opening = [line.strip() for line in page.read_text().splitlines() if line.strip().startswith("```")][::2]
        assert "```" not in opening, f"{page}: a block without a language is not tested"

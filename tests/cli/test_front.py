"""Commands that only read recipes: quick, and without torch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_robust.cli import main
from lightning_robust.cli.recipes import bundled_recipes


def test_list_names_every_recipe(lr):
    answer = lr("list")
    assert answer.code == 0
    for name, recipe in bundled_recipes().items():
        assert name in answer.out
        assert recipe.summary.split()[0] in answer.out


def test_show_prints_the_file(lr):
    assert lr("show", "digits-sam").out == bundled_recipes()["digits-sam"].text


def test_copy_writes_a_recipe_that_runs_under_its_new_name(lr, own_folder):
    answer = lr("copy", "digits-sam", "mine.yaml")
    assert answer.code == 0
    assert "lightning-robust run mine.yaml" in answer.out
    assert yaml.safe_load(Path("mine.yaml").read_text())["baseline"] == "digits-standard"


def test_copy_into_a_folder_takes_the_recipes_name(lr, own_folder):
    assert lr("copy", "digits-sam").code == 0
    assert (own_folder / "digits-sam.yaml").is_file()


def test_copy_does_not_overwrite(lr):
    Path("mine.yaml").write_text("precious")
    answer = lr("copy", "digits-sam", "mine.yaml")
    assert (answer.code, answer.err) == (2, "error: mine.yaml exists already; add --force to overwrite it.\n")
    assert Path("mine.yaml").read_text() == "precious"
    assert lr("copy", "digits-sam", "mine.yaml", "--force").code == 0


def test_copy_into_a_missing_folder_is_refused(lr):
    assert lr("copy", "digits-sam", "no/where.yaml").lines[0].startswith("error: no/where.yaml cannot be written")


def test_no_command_prints_help(lr):
    answer = lr()
    assert answer.code == 0
    assert "digits-robust" in answer.out


@pytest.mark.parametrize("words", [["lst"], ["list", "--forc"], ["copy", "digits-sam", "--forc"]])
def test_unknown_commands_and_abbreviations_are_refused(words):
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2


@pytest.mark.parametrize("command", ["run", "check"])
def test_help_of_the_long_commands(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "digits-sam", "--help"])
    assert exit_info.value.code == 0
    assert "--methods.sharpness.method.rho" in capsys.readouterr().out


def test_env_names_the_versions(lr):
    out = lr("env").out
    for word in ("python", "torch", "lightning-robust", "accelerator"):
        assert word in out


@pytest.mark.parametrize(
    "words", [["list"], ["show", "digits-sam"], ["copy", "digits-sam", "x.yaml"], ["--version"], ["run", "nothing"], []]
)
def test_light_commands_do_not_import_torch(words, own_folder):
    code = (
        "import sys; from lightning_robust.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=own_folder)


def test_light_commands_are_quick(own_folder):
    command = [sys.executable, "-c", "from lightning_robust.cli import main; main(['list'])"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=own_folder)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0

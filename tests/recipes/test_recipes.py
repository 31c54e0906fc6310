"""The recipes that come with the library."""

import os
import subprocess
import sys

import pytest
import torch

from lightning_robust.cli import main
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.comparison import Comparison
from lightning_robust.cli.jobs import Job
from lightning_robust.cli.recipes import bundled_recipes
from lightning_robust.cli.substitute import BASELINE, fill, word_of

RECIPES = bundled_recipes()
COMPARING = [name for name, recipe in RECIPES.items() if "compare" in recipe.config()]
ORDINARY = [name for name in RECIPES if name not in COMPARING]
DIGITS = [name for name in ORDINARY if name.startswith("digits-")]


@pytest.mark.parametrize("name", RECIPES)
def test_form(name):
    recipe = RECIPES[name]
    assert len(recipe.text.splitlines()) <= 40
    assert max(map(len, recipe.text.splitlines())) <= 120
    assert recipe.summary.endswith(".")
    assert recipe.cost.startswith("Cost ")
    assert recipe.config()["seed_everything"] == 0


CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}


@pytest.mark.parametrize("name", ORDINARY)
def test_configuration_is_accepted_and_everything_can_be_built(name, tmp_path):
    config = RECIPES[name].config()
    config = fill(config, dict.fromkeys((BASELINE, *map(word_of, config.get("teachers") or {})), "some.ckpt"))
    classes = CLASSES[name.partition("-")[0]]
    if name.startswith("imagenet"):
        for index in range(classes):
            (tmp_path / "train" / f"n{index:08}").mkdir(parents=True)
        config["data"]["init_args"]["root"] = str(tmp_path)
    cli = RecipeCLI({**config, "trainer": {**config["trainer"], "accelerator": "cpu"}})
    cli.rehearse()
    assert cli.model.num_classes == classes
    assert cli.evaluation_settings()["attack"].startswith("PGD(")


@pytest.mark.parametrize("name", DIGITS)
def test_digits_recipes_work(name, capsys, own_folder):
    assert main(["check", name, "--trainer.accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    passes = next(line for line in out.splitlines() if "forward + backward" in line).split()[4]
    assert RECIPES[name].cost.startswith(f"Cost {passes} pass")
    assert not os.listdir(own_folder)


@pytest.mark.parametrize("name", DIGITS)
def test_digits_recipes_differ_from_their_baseline_in_the_methods_only(name):
    config, standard = RECIPES[name].config(), RECIPES["digits-standard"].config()
    if name != "digits-standard":
        assert config["baseline"] == "digits-standard"
    for part in ("model", "data", "trainer", "evaluation", "seed_everything", "threads"):
        assert config[part] == standard[part]


def test_missing_teachers_are_named_with_what_to_do(capsys, own_folder):
    taught = [name for name in ORDINARY if name.startswith("cifar") and RECIPES[name].config().get("teachers")]
    assert taught == ["cifar10-mtard", "cifar10-rslad", "cifar100-kd", "cifar100-mtard"]
    for name in taught:
        teachers = RECIPES[name].config()["teachers"]
        assert main(["run", name]) == 2
        lines = capsys.readouterr().err.splitlines()
        for line, (word, path) in zip(lines, teachers.items(), strict=False):
            assert line.removeprefix("error:").strip() == f"`teachers.{word}`: there is no file {path}."
        assert f"--teachers.{next(iter(teachers))}" in lines[-1]
    assert not os.listdir(own_folder)


@pytest.mark.parametrize("name", COMPARING)
def test_every_arm_of_a_comparison_can_be_built_and_starts_from_the_same_weights(name):
    config = RECIPES[name].config()
    trainer = {**config["trainer"], "accelerator": "cpu"}
    comparison = Comparison.of(Job(name, {**config, "trainer": trainer}, []))
    assert len(comparison.seeds) >= 3
    first = None
    for arm in comparison.arms:
        cli = comparison.job(arm, comparison.seeds[0]).parse()
        cli.rehearse()
        weights = dict(cli.model.backbone.state_dict())
        first = weights if first is None else first
        assert all(torch.equal(weights[key], first[key]) for key in first), arm


def test_the_comparisons_have_the_arms_that_they_promise():
    arms = {name: list(RECIPES[name].config()["compare"]["arms"]) for name in COMPARING}
    robust = ["ce", "elr", "gce", "nce+rce", "aldr", "logitclip", "sam"]
    assert arms == {
        "cifar10-label-noise": robust,
        "cifar10-ls-vs-maxsup": ["ce", "ls", "maxsup"],
        "digits-label-noise": robust,
        "digits-ls-vs-maxsup": ["ce", "ls", "maxsup"],
        "digits-mtard-vs-at": ["standard", "at", "rslad", "mtard-eccv", "mtard"],
    }


def test_a_bundled_comparison_works(capsys, own_folder):
    assert main(["check", "digits-label-noise", "--trainer.accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(f"{arm} works" in out for arm in RECIPES["digits-label-noise"].config()["compare"]["arms"])
    assert not os.listdir(own_folder)


def test_they_are_found_from_any_folder(own_folder):
    code = "from lightning_robust.cli.recipes import bundled_recipes; print(*bundled_recipes())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=own_folder)
    assert out.stdout.split() == list(RECIPES)

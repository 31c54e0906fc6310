"""Recipes with a `compare` part: arms, seeds, resumption, table, CSV and picture."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
import torch
import yaml

from lightning_robust.cli.compare_part import Arm
from lightning_robust.cli.comparison import Comparison
from lightning_robust.cli.comparison_report import statistics
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.overrides import difference, merged
from lightning_robust.cli.quantities import QUANTITIES

MAXSUP = {"class_path": "LogitRegularization", "init_args": {"regularizer": {"class_path": "MaxSup"}}}
ARMS = {"plain": {}, "penalised": {"methods": {"maxsup": MAXSUP}}}
COMPARE = {"seeds": [0, 1], "arms": ARMS}
DATA = {"image_size": 8, "batch_size": 128, "label_noise": 0.4}


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


@pytest.fixture
def recipe(tiny):
    """Writes a tiny comparison with some keys of its `compare` part replaced."""

    def write(name="toy", **compare):
        trainer = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 4, "enable_model_summary": False}
        return tiny(name, compare={**COMPARE, **compare}, trainer=trainer)

    return write


def test_every_arm_is_trained_with_every_seed_and_summed_up(lr, recipe):
    answer = lr("run", recipe())
    assert answer.code == 0, answer.err
    run = Path("runs/toy/1")
    for text in ("Training plain, seed 0 (1 of 4)", "Training penalised, seed 1 (4 of 4)", "seeds 0, 1", "±", "R2"):
        assert text in answer.out
    found = summary(run)
    values = found["comparison"]["values"]
    assert found["status"] == "complete"
    assert found["comparison"]["notes"] == []
    assert list(values) == ["plain", "penalised"]
    names = ["accuracy", "ece", "nll", "aurc", "d_within", "r2", "probe"]
    assert list(values["plain"]["0"]) == names
    assert all(value is not None for seeds in values.values() for each in seeds.values() for value in each.values())
    means = found["comparison"]["statistics"]["plain"]["accuracy"]
    accuracies = [values["plain"][seed]["accuracy"] for seed in ("0", "1")]
    assert means["mean"] == pytest.approx(sum(accuracies) / 2)
    assert means["std"] == pytest.approx(stdev(accuracies))
    with (run / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows[:4]] == [
        ("plain", "0"),
        ("plain", "1"),
        ("penalised", "0"),
        ("penalised", "1"),
    ]
    assert {(row["arm"], row["seed"]) for row in rows[4:]} == {(arm, of) for arm in ARMS for of in ("mean", "std")}
    assert (run / "comparison.png").stat().st_size > 10_000
    assert (run / "penalised" / "1" / "checkpoints" / "last.ckpt").is_file()


def test_arms_of_a_seed_see_the_same_and_an_arm_equals_an_ordinary_run(lr, recipe, tiny):
    same = {"a": {}, "b": {}}
    lr("run", recipe(arms=same, quantities=["accuracy", "nll"]))
    values = summary("runs/toy/1")["comparison"]["values"]
    assert values["a"] == values["b"]
    assert values["a"]["0"] != values["a"]["1"]
    trainer = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 4, "enable_model_summary": False}
    lr("run", tiny("alone", trainer=trainer, seed_everything=1))
    alone = torch.load("runs/alone/1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    compared = torch.load("runs/toy/1/b/1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(alone[key], compared[key]) for key in alone)
    # one epoch, so the best epoch is the last one
    assert summary("runs/alone/1")["evaluation"]["accuracy"] == pytest.approx(values["b"]["1"]["accuracy"])
    assert summary("runs/alone/1")["evaluation"]["nll"] == pytest.approx(values["b"]["1"]["nll"])


def test_other_initial_weights_are_said(lr, recipe):
    answer = lr("run", recipe(arms={"a": {}, "wide": {"model": {"init_args": {"width": 20}}}}, quantities=["accuracy"]))
    assert "Not the initial weights of a: wide." in answer.out
    assert summary("runs/toy/1")["comparison"]["notes"] == ["Not the initial weights of a: wide."]


def test_what_is_finished_is_not_trained_again(lr, recipe):
    crash = {"methods": {"crash": {"class_path": "support.tiny.CrashAt", "init_args": {"step": 3}}}}
    answer = lr("run", recipe(arms={"good": {}, "bad": crash}, seeds=[0], quantities=["accuracy"]))
    assert answer.code == 1
    assert any("run --resume" in line and line.endswith("runs/toy/1") for line in answer.lines), answer.lines
    assert summary("runs/toy/1/bad/0")["status"] == "failed"
    done = summary("runs/toy/1/good/0")
    shown = lr("report", "runs/toy/1").out
    assert "1 of 2 trainings are missing" in shown
    config = Path("runs/toy/1/config.yaml")
    saved = yaml.safe_load(config.read_text())
    saved["compare"]["arms"]["bad"]["methods"]["crash"]["init_args"]["step"] = 1000
    config.write_text(yaml.safe_dump(saved, sort_keys=False))
    again = lr("run", "--resume", "runs/toy/1")
    assert again.code == 0, again.err
    assert "Training good" not in again.out
    assert "bad, seed 0 (2 of 2)" in again.out
    assert summary("runs/toy/1/good/0") == done
    assert summary("runs/toy/1")["status"] == "complete"


def test_seeds_quantities_and_arms_are_added_later(lr, recipe):
    lr("run", recipe(seeds=[0], quantities=["accuracy"]))
    first = summary("runs/toy/1")["comparison"]["values"]["plain"]["0"]
    refused = lr("run", "--resume", "runs/toy/1")
    assert refused.lines[0].endswith("runs/toy/1/config.yaml")
    refused = lr("run", "--resume", "runs/toy/1", "--trainer.max_epochs", "3")
    assert refused.code == 2
    assert "continues as it was" in refused.lines[0]
    more = ["--compare.seeds", "0,1", "--compare.quantities", "accuracy,nll", "--compare.arms.third", "{}"]
    answer = lr("run", "--resume", "runs/toy/1", *more)
    assert answer.code == 0, answer.err
    assert "Training plain, seed 0" not in answer.out
    assert "Training third, seed 0" in answer.out
    values = summary("runs/toy/1")["comparison"]["values"]
    assert list(values) == ["plain", "penalised", "third"]
    assert values["plain"]["0"]["accuracy"] == first["accuracy"]
    assert values["third"] == values["plain"]
    assert "complete" in lr("run", "--resume", "runs/toy/1").lines[0]


def test_the_saved_configuration_repeats_the_comparison(lr, recipe):
    changes = ["--compare.arms.plain", "null", "--compare.arms.wide", "{}", "--compare.arms.wide.model.width", "20"]
    changes += ["--compare.quantities", "accuracy", "--compare.seeds=3", "--model.width", "12"]
    assert lr("run", recipe(), *changes).code == 0
    saved = yaml.safe_load(Path("runs/toy/1/config.yaml").read_text())
    assert saved["model"]["init_args"]["width"] == 12
    assert saved["compare"]["seeds"] == [3]
    assert saved["compare"]["arms"]["wide"] == {"model": {"init_args": {"width": 20}}}
    assert lr("run", "runs/toy/1/config.yaml").code == 0
    first, second = summary("runs/toy/1")["comparison"], summary("runs/toy/2")["comparison"]
    assert first["values"] == second["values"]


def test_label_noise_is_counted(lr, recipe, tiny):
    data = {"class_path": "DigitsDataModule", "init_args": DATA}
    names = ["accuracy", "best_accuracy", "val_accuracy", "memorised", "recovered", "seconds"]
    lr("run", tiny("noisy", data=data, compare={"seeds": [0], "arms": {"ce": {}}, "quantities": names}))
    found = summary("runs/noisy/1")["comparison"]["values"]["ce"]["0"]
    assert set(found) == set(names)
    assert 0 <= found["memorised"] + found["recovered"] <= 1
    assert found["recovered"] > found["memorised"]  # two epochs are not enough to learn wrong labels by heart
    lr("run", recipe(seeds=[0], quantities=["memorised"], arms={"ce": {}}))
    assert summary("runs/toy/1")["comparison"]["values"]["ce"]["0"]["memorised"] is None


def test_the_probe_learns_another_data_set(lr, recipe):
    change = ["--evaluation.transfer", "DigitsDataModule", "--evaluation.transfer.image_size", "8"]
    answer = lr("run", recipe(seeds=[0], quantities=["probe"]), *change)
    assert answer.code == 0, answer.err
    assert "The probe learns the classes of DigitsDataModule." in answer.out
    assert summary("runs/toy/1")["comparison"]["values"]["plain"]["0"]["probe"] > 0.5


def test_features_of_a_named_layer(lr, recipe):
    answer = lr("run", recipe(seeds=[0], quantities=["r2"]), "--evaluation.features_from", "net.0")
    assert answer.code == 0, answer.err
    answer = lr("run", recipe(seeds=[0], quantities=["r2"]), "--evaluation.features_from", "net.9")
    assert answer.code == 1
    assert "`r2` cannot be measured" in answer.lines[0]


def test_transfer_belongs_to_comparisons(lr, tiny):
    answer = lr("run", tiny(), "--evaluation.transfer", "DigitsDataModule")
    assert answer.lines[0].startswith("error: `evaluation.transfer` is measured in a comparison only")


def test_check_shows_every_arm(lr, recipe, own_folder):
    answer = lr("check", recipe())
    assert answer.code == 0, answer.err
    for text in ("plain works", "penalised works", "LogitRegularization", "cost of a step of plain", "quarter turn"):
        assert text in answer.out
    assert not Path("runs").exists()


def test_report_draws(lr, recipe):
    lr("run", recipe(quantities=["accuracy"]))
    answer = lr("report", "runs/toy/1", "--plot", "out.png")
    assert answer.code == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out.csv").read_text() == Path("runs/toy/1/comparison.csv").read_text()
    assert "is a comparison; report it alone" in lr("report", "runs/toy/1", "runs/toy/1").lines[0]
    assert "cannot be written" in lr("report", "runs/toy/1", "--plot", "nowhere/out.png").lines[0]


def test_the_report_needs_no_torch(lr, recipe):
    lr("run", recipe(seeds=[0], quantities=["accuracy"]))
    code = (
        "import sys; from lightning_robust.cli import main; main(['report', 'runs/toy/1']); print(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "plain" in out
    assert "'torch'" not in out


def test_no_matplotlib(lr, recipe, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_robust.cli.comparison_picture", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    answer = lr("run", recipe(seeds=[0], quantities=["accuracy"], arms={"a": {}}))
    assert answer.code == 0, answer.err
    assert "needs matplotlib" in answer.out
    assert "needs matplotlib" in lr("report", "runs/toy/1", "--plot", "x.png").lines[0]


REFUSED_PARTS = [
    (["not a mapping"], "`compare` must be a mapping."),
    ({"arm": {}}, "`compare` has no key `arm`.\n  Did you mean `arms`?"),
    ({"seeds": [0]}, "`compare.arms` must map names of your choice to what differs from the recipe."),
    ({"arms": {}}, "`compare.arms` is empty, so there is nothing to compare."),
    ({"arms": {"a/b": {}}}, "`a/b` cannot be the name of an arm: use letters, digits and + - _ only."),
    ({"arms": {"a": 3}}, "`compare.arms.a` must be a mapping of what differs from the recipe ({}: nothing)."),
    ({"arms": {"a": {"seed_everything": 3}}}, "`compare.arms.a` cannot change `seed_everything`: it is common to all"),
    ({**COMPARE, "seeds": [0, 0]}, "Expected different `compare.seeds` but got [0, 0]."),
    ({**COMPARE, "seeds": [-1]}, "Expected `compare.seeds` to be integers >= 0, for example [0, 1, 2], but got [-1]."),
    ({**COMPARE, "seeds": []}, "Expected `compare.seeds` to be integers >= 0, for example [0, 1, 2], but got []."),
    (
        {**COMPARE, "quantities": ["acuracy"]},
        "`compare.quantities`: there is no quantity `acuracy`.\n  Did you mean `accur",
    ),
    ({**COMPARE, "quantities": 3}, "Expected `compare.quantities` to be a list of names but got 3."),
    (
        {"arms": {"a": {"model": {"init_args": {"widht": 3}}}}},
        "In the arm `a`: model.init_args.widht: TinyClassifier has",
    ),
    ({"arms": {"a": {"model": {"init_args": {"width": 0}}}}}, "In the arm `a`: Expected `width` to be an integer >= 1"),
]


@pytest.mark.parametrize(("part", "message"), REFUSED_PARTS, ids=range(len(REFUSED_PARTS)))
def test_refused_parts(lr, tiny, part, message):
    answer = lr("run", tiny("toy", compare=part))
    assert answer.code == 2
    assert f"error: {message}" in answer.err
    assert not Path("runs").exists()


REFUSED_OPTIONS = [
    (["--compare.seed", "1"], "There is no option `--compare.seed`.\n  Did you mean `--compare.seeds`?"),
    (["--compare.seeds.x", "1"], "There is no option `--compare.seeds.x`.\n  Did you mean `--compare.seeds`?"),
    (["--compare", "1"], "There is no option `--compare`."),
    (["--compare.seeds"], "--compare.seeds needs a value."),
    (["--compare.seeds", "[1"], "[1 cannot be understood."),
    (["--compare.arms", "{}"], "--compare.arms: change one arm at a time, --compare.arms.NAME.any.option VALUE."),
    (["--compare.arms.plane.model.width", "3"], "--compare.arms.plane.model.width: there is no arm called `plane`."),
    (
        ["--compare.arms.plain.seed_everything", "3"],
        "--compare.arms.plain.seed_everything: `seed_everything` is common",
    ),
    (["--fresh"], "This comparison has no teachers, and trains all its arms: leave out --fresh."),
    (["--seed_everything", "3"], "The seeds of a comparison are changed with: --compare.seeds [0,1,2]"),
    (["--baseline", "digits-standard"], "A recipe has a `baseline` or a `compare` part, not both"),
    (["--compares.seeds", "1"], "There is no option `compares.seeds`.\n  Did you mean `compare`?"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED_OPTIONS, ids=range(len(REFUSED_OPTIONS)))
def test_refused_options(lr, recipe, words, message):
    answer = lr("run", recipe(), *words)
    assert answer.code == 2
    assert f"error: {message}" in answer.err
    assert not Path("runs").exists()


def test_options_of_a_comparison_need_one(lr, tiny):
    answer = lr("run", tiny(), "--compare.seeds", "1")
    assert answer.lines[0] == "error: --compare.seeds: tiny compares nothing, it has no `compare` part."


def test_a_comparison_has_no_baseline_to_learn_from(lr, recipe):
    teacher = {"methods": {"teacher": {"class_path": "Distillation", "init_args": {"teacher": "{baseline}"}}}}
    assert "needs a baseline" in lr("run", recipe(arms={"a": teacher})).lines[0]


BASE = {
    "model": {"class_path": "a.b.Net", "init_args": {"width": 3, "loss": None}},
    "methods": {"one": {"class_path": "A", "init_args": {"x": 1}}},
    "trainer": {"max_epochs": 2},
}


def test_merged_mappings_keep_what_is_not_named():
    given = {"model": {"class_path": "Net", "init_args": {"width": 4}}, "methods": {"two": {"class_path": "B"}}}
    whole = merged(BASE, given)
    assert whole["model"] == {"class_path": "Net", "init_args": {"width": 4, "loss": None}}
    assert list(whole["methods"]) == ["one", "two"]
    assert BASE["model"]["init_args"]["width"] == 3


def test_another_class_takes_the_place_of_the_whole_mapping():
    assert merged(BASE, {"methods": {"one": {"class_path": "C"}}})["methods"]["one"] == {"class_path": "C"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"trainer": {"max_epochs": 5}},
        {"model": {"init_args": {"width": 9, "loss": {"class_path": "L", "init_args": {"s": 0.1}}}}},
        {"methods": {"one": {"class_path": "C", "init_args": {}}, "two": None}},
        {"methods": {"one": {"init_args": {"x": True}}}},
    ],
    ids=range(5),
)
def test_a_difference_is_what_has_to_be_merged(given):
    whole = merged(BASE, given)
    assert merged(BASE, difference(BASE, whole)) == whole


def test_what_a_recipe_cannot_say_is_refused():
    comparison = Comparison("toy", {}, [], [0], {"a": Arm({})}, ["accuracy"])
    with pytest.raises(UsageError, match="The arm `a` takes something away that the recipe sets"):
        comparison.settled({"options": {"x": {"y": 1}}}, {"a": {"options": {"x": {}}}})


def test_statistics_of_missing_values():
    values = {"a": {"0": {"accuracy": 0.5}, "1": {"accuracy": None}}, "b": {}}
    found = statistics(values, ["accuracy"])
    assert found["a"]["accuracy"] == {"mean": 0.5, "std": None}
    assert found["b"]["accuracy"] == {"mean": None, "std": None}


def test_quantities_are_all_measured():
    from lightning_robust.cli.measured import _HOW

    assert {*_HOW, "seconds"} == set(QUANTITIES)

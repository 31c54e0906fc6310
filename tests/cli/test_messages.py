"""Every refusal: two to six lines, a suggestion where there is one, exit code 2, no traceback."""

from pathlib import Path

import pytest
import yaml

SHARPNESS = {
    "sharpness": {
        "class_path": "SharpnessAware",
        "init_args": {"method": {"class_path": "SAM", "init_args": {"rho": 0.05}}},
    }
}
IMAGES = {"class_path": "ImageClassifier", "init_args": {"backbone": "resnet8_cifar"}}


def refused(answer, first, *hints):
    assert answer.code == 2
    assert answer.lines[0] == f"error: {first}"
    assert len(answer.lines) <= 6
    assert "Traceback" not in answer.err + answer.out
    for hint in hints:
        assert hint in answer.err


@pytest.mark.parametrize("command", ["run", "check", "show", "copy"])
def test_unknown_recipe(lr, command):
    refused(
        lr(command, "digits-rbust"),
        "There is no recipe and no file called 'digits-rbust'.",
        "Did you mean `digits-robust`",
        "lightning-robust list",
    )


def test_unknown_file_suggests_those_of_the_folder(lr, tiny):
    tiny("mine")
    refused(lr("run", "mne.yaml"), "There is no recipe and no file called 'mne.yaml'.", "Did you mean `mine.yaml`?")


def test_a_folder_is_no_recipe(lr, own_folder):
    Path("runs").mkdir()
    refused(lr("run", "runs"), "runs is a folder, expected a recipe.", "--resume runs")


def test_broken_yaml_names_the_line(lr):
    Path("x.yaml").write_text("model:\n  a: [1\nb: 2\n")
    refused(lr("run", "x.yaml"), "x.yaml, line 3 is not valid YAML: expected ',' or ']', but got ':'.")


def test_yaml_that_is_no_mapping(lr):
    Path("x.yaml").write_text("- 1\n")
    refused(lr("run", "x.yaml"), "x.yaml is not a recipe: expected a mapping with keys such as `model` and `data`.")


CHANGES = [
    (["--trainer.max_epoch", "2"], "There is no option `trainer.max_epoch`.", "Did you mean `trainer.max_epochs`"),
    (["--modle.width", "2"], "There is no option `modle.width`.", "Did you mean `model`?"),
    (["--nothing.at.all", "2"], "There is no option `nothing.at.all`.", "The parts of a recipe are:"),
    (
        ["--methods.sharpness.method.rhoo", "2"],
        "--methods.sharpness.method.rhoo: SAM has no option `rhoo`.",
        "Did you mean `rho`?",
    ),
    (
        ["--methods.sharpness.replya=false"],
        "--methods.sharpness.replya: SharpnessAware has no option `replya`.",
        "Did you mean `replay`?",
    ),
    (
        ["--methods.sharpnes.method.rho", "2"],
        "--methods.sharpnes.method.rho: there is no method called `sharpnes` in this recipe.",
        "Did you mean `sharpness`?",
    ),
    (
        ["--methods.shrpness", "null"],
        "--methods.shrpness: there is no method called `shrpness` in this recipe.",
        "Did you mean `sharpness`?",
    ),
    (
        ["--methods.sharpness", "SharpnesAware"],
        "There is no class called `SharpnesAware` (in `methods`).",
        "Did you mean `SharpnessAware`",
    ),
    (
        ["--methods.sharpness.method", "ASAMM"],
        "There is no class called `ASAMM` (in `methods.method`).",
        "Did you mean `ASAM`",
    ),
    (["--methods.sharpness.method.rho", "-1"], "Expected `rho` to be a finite number > 0 but got -1.0.", ""),
    (
        ["--methods.sharpness.method.rho", "abc"],
        "Expected `rho` of SAM to be a float or the name of a class but got abc.",
        "",
    ),
    (["--methods.x", "LogitRegularization"], "LogitRegularization needs a value for `regularizer` (in `methods`).", ""),
    (["--model.widht", "2"], "--model.widht: TinyClassifier has no option `widht`.", "Did you mean `width`?"),
    (["--model.width", "x"], "Expected `width` of TinyClassifier to be an integer but got x.", ""),
    (["--model.width", "0"], "Expected `width` to be an integer >= 1 but got 0.", ""),
    (["--model", "Tiny"], "There is no class called `Tiny` (in `model`).", "needs its full path"),
    (["--data.batch_sise", "2"], "--data.batch_sise: DigitsDataModule has no option `batch_sise`.", "`batch_size`?"),
    (["--data.batch_size", "0"], "Expected `batch_size` to be an integer >= 1 but got 0.", ""),
    (["--monitor_mode", "best"], "The configuration is not accepted:", "choose from"),
    (["--trainer.accelerator", "cuda"], "`CUDAAccelerator` can not run on your system", ""),
    (["--evaluation.attack.step", "2"], "--evaluation.attack.step: PGD has no option `step`.", "`steps`"),
    (
        ["--model.num_classes", "11"],
        "`model.num_classes` is 11 but DigitsDataModule has 10.",
        "it is taken from the data",
    ),
    (["--threads", "0"], "Expected `threads` to be an integer >= 1 but got 0.", ""),
    (["--config", "x.yaml"], "--config is not an option: give the file as the recipe.", ""),
    (["--otu=x"], "There is no option `otu`.", ""),
    (["second.yaml"], "`check` takes one recipe, got tiny.yaml, second.yaml.", ""),
]


@pytest.mark.parametrize(("changes", "first", "hint"), CHANGES, ids=[" ".join(case[0]) for case in CHANGES])
def test_options_of_the_command_line(lr, tiny, changes, first, hint):
    answer = lr("check", tiny(methods=SHARPNESS), *changes)
    assert answer.code == 2
    assert answer.lines[0].startswith(f"error: {first}")
    assert hint in answer.err
    assert len(answer.lines) <= 6
    assert "Traceback" not in answer.err


def test_run_says_the_same_and_makes_no_folder(lr, tiny, own_folder):
    refused(lr("run", tiny(), "--model.width", "0"), "Expected `width` to be an integer >= 1 but got 0.")
    assert not (own_folder / "runs").exists()


def test_a_wrong_key_in_the_file_is_located(lr, tiny):
    methods = {"sharpness": {"class_path": "SharpnessAware", "init_args": {"replya": True}}}
    refused(
        lr("check", tiny(methods=methods)),
        "methods.sharpness.init_args.replya: SharpnessAware has no option `replya`.",
        "Did you mean `replay`?",
    )


def test_a_wrong_top_level_key(lr, tiny):
    refused(lr("check", tiny(modle={"a": 1})), "There is no option `modle.a`.", "Did you mean `model`?")


def test_a_wrong_trainer_key(lr, tiny):
    refused(lr("check", tiny(trainer={"max_epoch": 1})), "There is no option `trainer.max_epoch`.", "max_epochs")


@pytest.mark.parametrize(
    ("methods", "first"),
    [
        (["SharpnessAware"], "`methods` must map names of your choice to callbacks."),
        ({"sam": {"SharpnessAware": {}}}, "`methods.sam` has no class_path, only `SharpnessAware`."),
    ],
)
def test_methods_of_another_shape(lr, tiny, methods, first):
    refused(lr("check", tiny(methods=methods)), first, "NAME: {class_path: CLASS")


def test_unknown_backbone_suggests_timm_names(lr, tiny):
    answer = lr("check", tiny(model=IMAGES), "--model.backbone", "resnet8_cifr")
    refused(answer, answer.lines[0].removeprefix("error: "), "resnet8_cifar")
    assert answer.lines[0].startswith("error: timm has no model 'resnet8_cifr'; did you mean resnet8_cifar")


def test_an_own_class_that_does_not_exist(lr, tiny):
    answer = lr("check", tiny(model={"class_path": "support.tiny.Nothing"}))
    assert answer.code == 2
    assert "support.tiny" in answer.err
    assert len(answer.lines) <= 6


def test_a_teacher_without_a_baseline(lr, tiny):
    methods = {"teacher": {"class_path": "Distillation", "init_args": {"teacher": "{baseline}"}}}
    for command in ("run", "check"):
        assert "needs a baseline" in lr(command, tiny(methods=methods)).lines[0]


def test_no_recipe_at_all(lr):
    refused(lr("run"), "Which recipe? For example: lightning-robust run digits-robust", "lightning-robust list")


def test_missing_value_of_an_own_option(lr):
    refused(lr("run", "digits-sam", "--out"), "--out needs a value.")


def test_a_failing_first_batch_is_one_message(lr, tiny):
    methods = {
        "adv": {"class_path": "AdversarialTraining", "init_args": {"attack": {"class_path": "PGD"}}},
    }
    methods["adv"]["init_args"]["attack"]["init_args"] = {"eps": 0.1, "bounds": [0.0, 0.5]}
    answer = lr("check", tiny(methods=methods))
    assert answer.code == 1
    assert answer.lines[0].startswith("error: tiny is built, but its first batch fails: Expected pixels in [0, 0.5]")


def test_unknown_texts_are_passed_on():
    from lightning_robust.cli.messages import parse_refusal

    refusal = parse_refusal(ValueError("Given value: 3\nSomething new.\n- Else"), ["model"], {}, [])
    assert str(refusal).splitlines() == ["The configuration is not accepted:", "Something new.", "Else"]


def test_yaml_round_trip_of_the_tiny_recipe(tiny):
    assert yaml.safe_load(Path(tiny()).read_text())["seed_everything"] == 0

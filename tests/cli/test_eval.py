"""`eval`: any trained model, any attack, one report; continues when killed; refuses in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
import yaml
from cli.conftest import TINY

from lightning_robust.attacks import PGD
from lightning_robust.cli import main
from lightning_robust.data import DigitsDataModule
from lightning_robust.models import ImageClassifier
from support.evaluated import CrashingPGD
from support.tiny import TinyClassifier

SCRIPT = Path(sys.executable).parent / "lightning-robust"
QUICK = ["--checks", "none", "--samples", "40"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; every test copies it."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("tiny.yaml").write_text("# Tiny.\n# Cost nothing.\n" + yaml.safe_dump(TINY))
        assert main(["run", "tiny.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder / "runs" / "tiny" / "1"


@pytest.fixture
def run(trained, own_folder):
    return Path(shutil.copytree(trained, own_folder / "runs" / "tiny" / "1"))


def report(folder):
    return json.loads(Path(folder, "report.json").read_text())


def digits(samples):
    data = DigitsDataModule(image_size=8, batch_size=samples)
    data.setup("test")
    return next(iter(data.test_dataloader()))


def test_a_run_is_evaluated_with_its_own_model_data_and_budget(lr, run):
    answer = lr("eval", run, "--attack", "pgd", "--attack.steps", "3", "--attack.step_size", "1/20", "--samples", "70")
    assert answer.code == 0, answer.err
    assert str(run / "eval" / "1") in answer.out.replace("\n", "")
    assert "PGD (linf 0.1)" in answer.out
    assert "sanity checks: " in answer.out
    found = report(run / "eval" / "1")
    assert (found["model"], found["samples"]) == ("tiny/1", 70)
    assert found["attacks"][0]["attack"] == "PGD(eps=0.1, steps=3, step_size=0.05)"
    assert found["attacks"][0]["norm"] == "linf"
    assert len(found["checks"]) == 19
    # the same by hand
    model = TinyClassifier()
    model.load_state_dict(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])
    x, y = digits(70)
    x_adv = PGD(eps=0.1, steps=3, step_size=0.05)(model.eval(), x, y, indices=torch.arange(70))
    robust = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert found["robust_accuracy"] == pytest.approx(float(robust.float().mean()))
    assert found["clean_accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert sorted(os.listdir(run / "eval" / "1")) == ["eval.json", "report.json", "state"]


def test_without_a_word_the_attack_of_the_recipe_is_used_and_evaluations_are_numbered(lr, run):
    assert lr("eval", run, *QUICK).code == 0
    assert report(run / "eval" / "1")["attacks"][0]["attack"] == "PGD(eps=0.1, steps=2, step_size=0.125)"
    assert lr("eval", run, "--eps", "8/255", *QUICK).code == 0
    assert report(run / "eval" / "2")["attacks"][0]["eps"] == [8 / 255]
    assert lr("eval", run, "--attack", "PGD", "--norm", "l2", "--eps", "0.5", *QUICK).code == 0
    assert report(run / "eval" / "3")["attacks"][0]["attack"].startswith("PGD(eps=0.5, norm='l2'")
    answer = lr("report", run)
    assert answer.out.count("tiny/1/eval/") == 3
    assert "PGD (linf 0.1)" in answer.out
    assert "PGD (l2 0.5)" in answer.out


def test_autoattack_and_its_fast_preset_report_their_members(lr, run):
    small = ["--attack.steps", "3", "--attack.queries", "5", *QUICK]
    assert lr("eval", run, "--attack", "autoattack", *small).code == 0
    found = report(run / "eval" / "1")["attacks"][0]
    assert [stage["name"] for stage in found["stages"]] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert found["attack"].startswith("AutoAttack(eps=0.1, steps=3, queries=5")
    assert lr("eval", run, "--attack", "fast", *small).code == 0
    assert [stage["name"] for stage in report(run / "eval" / "2")["attacks"][0]["stages"]] == ["apgd-ce", "apgd-t"]


def test_out_split_seed_picture_and_other_options(lr, run):
    words = ["--out", "mine", "--split", "val", "--seed", "3", "--plot", "--data.batch_size", "16", "--samples", "30"]
    answer = lr("eval", run, *words, "--checks", "none", "--craft_dtype", "bfloat16")
    assert answer.code == 0, answer.err
    assert sorted(os.listdir("mine")) == ["eval.json", "report.json", "report.png", "state"]
    found = report("mine")
    assert (found["seed"], found["samples"], found["batch_size"], found["checks"]) == (3, 30, 16, [])
    assert found["craft_dtype"] == "bfloat16"
    assert not (run / "eval").exists()


def test_methods_of_the_training_take_no_part(lr, tiny):
    methods = {"calibration": {"class_path": "CalibrationMonitor"}, "adv": {"class_path": "RobustnessMonitor"}}
    trainer = {
        **TINY["trainer"],
        "max_epochs": 1,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}},
    }
    lr("run", tiny(methods=methods, trainer=trainer))
    shutil.rmtree("x")
    assert lr("eval", "runs/tiny/1", *QUICK).code == 0
    assert sorted(os.listdir("runs/tiny/1/eval/1")) == ["eval.json", "report.json", "state"]
    assert sorted(os.listdir()) == ["runs", "tiny.yaml"]


def test_a_killed_evaluation_continues(lr, run):
    words = [
        "--attack",
        "support.evaluated.CrashingPGD",
        "--data.batch_size",
        "10",
        "--samples",
        "50",
        "--checks",
        "none",
    ]
    CrashingPGD.batches = 0
    assert lr("eval", run, *words).code == 0
    expected = report(run / "eval" / "1")
    Path("crash").write_text("")
    CrashingPGD.batches = 0
    answer = lr("eval", run, *words)
    assert answer.code == 1
    assert answer.lines[0] == "error: The evaluation failed: RuntimeError: crashed on purpose"
    folder = run / "eval" / "2"
    assert f"Continue with: lightning-robust eval --resume {folder}" in answer.err
    assert "Traceback" not in answer.err
    assert "Traceback" in (folder / "error.txt").read_text()
    Path("crash").unlink()
    CrashingPGD.batches = 0
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    answer = lr("eval", "--resume", folder, "--plot")
    assert answer.code == 0, answer.err
    assert CrashingPGD.batches == 3  # two of five batches were done
    found = report(folder)
    assert found["earlier_seconds"] > 0
    for key in ("samples", "clean_accuracy", "robust_accuracy", "worst_class", "classes", "seed"):
        assert found[key] == expected[key], key
    assert (folder / "report.png").is_file()
    answer = lr("eval", "--resume", folder)
    assert answer.code == 0
    assert f"{folder} is complete." in answer.out.replace("\n", "")
    assert CrashingPGD.batches == 3


def test_a_checkpoint_of_a_run_folder_brings_its_recipe(lr, run):
    assert lr("eval", run / "checkpoints" / "last.ckpt", *QUICK).code == 0
    assert report(run / "eval" / "1")["model"] == "tiny/1"


@pytest.fixture
def classifier(own_folder):
    """A checkpoint of an ImageClassifier with a criterion of its own, far from any run folder."""
    model = ImageClassifier(
        "resnet8_cifar", num_classes=10, in_chans=1, mean=[0.3], std=[0.4], backbone_options={"width": 4}
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", limit_train_batches=2, limit_val_batches=0, **quiet)
    trainer.fit(model, datamodule=DigitsDataModule(image_size=8))
    trainer.save_checkpoint("mine.ckpt")
    shutil.rmtree("checkpoints")
    return model.eval()


def test_a_checkpoint_with_data_of_the_user(lr, classifier):
    data = ["--data", "DigitsDataModule", "--data.image_size", "8"]
    answer = lr("eval", "mine.ckpt", *data, "--attack", "pgd", "--eps", "0.05", "--attack.steps", "2", *QUICK)
    assert answer.code == 0, answer.err
    found = report("evals/mine/1")
    assert found["model"] == "mine"
    x, y = digits(40)
    assert found["clean_accuracy"] == pytest.approx(float((classifier(x).argmax(1) == y).float().mean()))
    answer = lr("eval", "mine.ckpt", "--attack", "pgd")
    assert answer.lines == [
        "error: Which data? mine does not say; for example: --data ImageFolderDataModule --data.root FOLDER"
    ]
    answer = lr("eval", "mine.ckpt", "--attack", "pgd", "--data", "support.evaluated.ColourData")
    assert answer.lines == ["error: mine has 10 classes but ColourData has 1000."]


def test_a_model_of_timm(lr, own_folder, monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *args, **kwargs: None)  # no download
    words = ["--attack", "pgd", "--attack.steps", "1", "--checks", "none"]
    answer = lr("eval", "test_resnet.r160_in1k", "--data", "support.evaluated.ColourData", *words)
    assert answer.code == 0, answer.err
    found = report("evals/test_resnet.r160_in1k/1")
    assert (found["model"], found["samples"], found["num_classes"]) == ("test_resnet.r160_in1k", 12, 1000)
    answer = lr("eval", "test_resnet.r160_in1k", "--data", "DigitsDataModule", *words)
    assert answer.lines == ["error: test_resnet.r160_in1k has 1000 classes but DigitsDataModule has 10."]


def test_a_module_without_test_data(lr, tiny):
    assert lr("run", tiny(model={"class_path": "support.tiny.OwnData"}, data=None)).code == 0
    answer = lr("eval", "runs/tiny/1", "--attack", "pgd")
    assert answer.lines == [
        "error: OwnData has no test_dataloader, so there is nothing to attack; try --split or --data."
    ]
    assert lr("eval", "runs/tiny/1", "--split", "val", *QUICK).code == 0
    assert report("runs/tiny/1/eval/2")["samples"] == 32


REFUSALS = {
    "no target": ([], "What is to be evaluated?"),
    "two targets": (["RUN", "x"], "`eval` takes one run folder, checkpoint or timm name, got "),
    "unknown option": (["RUN", "--atack", "pgd"], "There is no option --atack."),
    "no value": (["RUN", "--attack"], "--attack needs a value."),
    "unknown attack": (["RUN", "--attack", "pdg"], "There is no attack called pdg."),
    "unknown attack option": (
        ["RUN", "--attack", "pgd", "--attack.stepz", "3"],
        "--attack.stepz: PGD has no option `stepz`.",
    ),
    "value refused by the attack": (
        ["RUN", "--attack", "pgd", "--attack.steps", "-1"],
        "Expected `steps` to be an integer >= ",
    ),
    "targeted": (["RUN", "--attack", "pgd", "--attack.targeted", "true"], "The attack 'PGD' is targeted"),
    "bad eps": (["RUN", "--eps", "8/0"], "Expected --eps to be a number >= 0 such as 0.1 or 8/255 but got 8/0."),
    "bad samples": (["RUN", "--samples", "0"], "Expected --samples to be an integer >= 1 but got 0."),
    "bad split": (["RUN", "--split", "train"], "Expected --split to be one of test, val but got train."),
    "norm without eps": (["RUN", "--norm", "l2"], "--norm l2 needs the budget in this norm: give --eps, too."),
    "no file": (["nothing/here.ckpt", "--attack", "pgd"], "There is no file or folder nothing/here.ckpt."),
    "no model": (["resnet81", "--attack", "pgd"], "resnet81 is no run folder, no checkpoint and no model of timm."),
    "no weights": (["resnet8_cifar", "--attack", "pgd"], "timm has no trained weights for resnet8_cifar"),
    "no run folder": ([".", "--attack", "pgd"], "is not a run folder: it has no summary.json."),
    "not a checkpoint": (
        ["text.ckpt", "--attack", "pgd"],
        "text.ckpt is no checkpoint, or only a part of one; expected ",
    ),
    "empty checkpoint": (
        ["empty.ckpt", "--attack", "pgd"],
        "empty.ckpt is no checkpoint: it is empty; expected one that ",
    ),
    "another archive": (["archive.npz", "--attack", "pgd"], "archive.npz is no checkpoint but another kind of archive"),
    "checkpoint with objects": (
        ["objects.ckpt", "--attack", "pgd"],
        "objects.ckpt holds Python objects besides tensors",
    ),
    "recipe as checkpoint": (["a.yaml", "--attack", "pgd"], "a.yaml is a recipe, not a checkpoint; train it first: "),
    "unknown norm": (["RUN", "--norm", "l3"], "There is no norm called l3; there are: linf, l2, l1."),
    "unknown norm of the attack": (
        ["RUN", "--attack.norm", "l3"],
        "Expected `norm` of PGD to be one of 'linf', 'l2', 'l1' but got l3.",
    ),
    "no integer": (
        ["RUN", "--attack", "pgd", "--attack.steps", "x"],
        "Expected `steps` of PGD to be an integer but got x.",
    ),
    "unknown attack class": (["RUN", "--attack", "foo.Bar"], "There is no attack class foo.Bar."),
    "no attack class": (
        ["RUN", "--attack", "torch.nn.Linear"],
        "Expected --attack to be a concrete subclass of lightning_robust.attacks.Attack, got torch.nn.Linear.",
    ),
    "foreign checkpoint": (["foreign.ckpt", "--attack", "pgd"], "is no checkpoint of an ImageClassifier; "),
    "other shape": (["RUN", "--model.width", "7"], "does not fit the configuration: `net.1.weight` was "),
    "resume with more": (["--resume", "x", "--eps", "1"], "`--resume FOLDER` continues an evaluation as it was"),
    "resume nothing": (["--resume", "."], "is no folder of an evaluation: it has no eval.json."),
    "full folder": (["RUN", "--out", "."], "is not empty; choose another folder with --out."),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence_and_leave_nothing(lr, run, name):
    words, message = REFUSALS[name]
    Path("text.ckpt").write_text("text")
    Path("empty.ckpt").touch()
    Path("a.yaml").write_text("model: x")
    np.savez("archive.npz", a=1)
    torch.save({"a": Path("x")}, "objects.ckpt")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    answer = lr("eval", *(run if word == "RUN" else word for word in words))
    assert answer.code in {1, 2}
    assert answer.lines[0].startswith("error: ")
    assert message in answer.lines[0]
    assert len(answer.lines) <= 4
    assert "Traceback" not in answer.err
    assert not (run / "eval").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["runs/tini/1"], "Did you mean `runs/tiny/1`?"),
        (["runs/tiny/1/checkpoints/bst.ckpt"], "Did you mean `runs/tiny/1/checkpoints/best.ckpt` or "),
        (["runs/tiny"], "Did you mean `runs/tiny/1`?"),
        (["runs/tiny/1/checkpoints"], "Did you mean `runs/tiny/1`?"),
        (["."], "There are run folders: runs/tiny/1."),
        (["nothing/here"], "There are run folders: runs/tiny/1."),
        (["tiny"], "There are run folders: runs/tiny/1."),
        (["runs/tiny/1", "--attack", "lightning_robust.attacks.FBA"], "Did you mean `lightning_robust.attacks.FAB`"),
        (["runs/tiny/1", "--attack", "support.evaluated.CrashPGD"], "Did you mean `support.evaluated.CrashingPGD`"),
        (["runs/tiny/1", "--attack", "lightning_robust.atacks.Sqare"], "Did you mean `Square`?"),
        (["runs/tiny/1", "--attack", "foo.Bar"], "A class of your own needs its full path, for example "),
    ],
    ids=str,
)
def test_what_does_not_exist_is_answered_with_what_does(lr, run, words, hint):
    answer = lr("eval", *words)
    assert (answer.code, len(answer.lines)) == (2, 2)
    assert answer.lines[1].strip().startswith(hint)


@pytest.mark.parametrize("target", [".", "a/b", "zzz"])
def test_without_any_run_a_first_one_is_proposed(lr, own_folder, target):
    answer = lr("eval", target)
    assert answer.code == 2
    assert answer.lines[1].strip() == "Train a model first, for example with: lightning-robust run digits-robust"


def test_an_attack_whose_module_fails_says_why(lr, run, monkeypatch):
    Path("failing_attack.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(Path.cwd())
    assert lr("eval", run, "--attack", "failing_attack.Mine").lines == [
        "error: The attack failing_attack.Mine cannot be imported: ModuleNotFoundError: No module named "
        "'no_such_package'."
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, " has no config.yaml, which says what model and data it is about; put it back, or train anew with: "),
        ("a: [", "config.yaml, line 1 is not valid YAML: "),
        ("", "config.yaml is not a recipe: expected a mapping "),
    ],
    ids=["missing", "no YAML", "empty"],
)
def test_a_run_folder_whose_configuration_is_missing_or_broken(lr, run, text, message):
    (run / "config.yaml").unlink() if text is None else (run / "config.yaml").write_text(text)
    answer = lr("eval", run)
    assert answer.code == 2
    assert message in answer.lines[0]
    assert text is not None or answer.lines[0].endswith("lightning-robust run tiny")


def test_a_run_folder_whose_checkpoints_are_broken(lr, run):
    (run / "checkpoints" / "best.ckpt").write_bytes(b"")
    answer = lr("eval", run)
    assert answer.code == 2
    assert "best.ckpt is no checkpoint: it is empty; expected " in answer.lines[-1]
    (run / "checkpoints" / "best.ckpt").unlink()
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    answer = lr("eval", run)
    assert (answer.code, len(answer.lines)) == (2, 1)
    assert "checkpoints is no checkpoint; name the one to evaluate, or continue training." in answer.lines[0]


def test_a_run_that_cannot_be_attacked_says_so_in_one_sentence(lr, run):
    answer = lr("eval", run, "--attack", "pgd", "--attack.bounds", "[0,0.5]", *QUICK)
    assert answer.code == 1
    assert answer.lines[0].startswith("error: Expected pixels in [0, 0.5] but got ")


def test_help(lr, capsys):
    with pytest.raises(SystemExit):
        lr("eval", "--help")
    out = capsys.readouterr().out
    for option in ("--attack.OPTION VALUE", "--resume FOLDER", "--craft_dtype", "--devices N", "TIMM-NAME"):
        assert option in out


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for devices in ("1", "2"):
        words = [
            SCRIPT,
            "eval",
            run,
            "--attack",
            "fast",
            "--attack.steps",
            "5",
            "--samples",
            "101",
            "--devices",
            devices,
        ]
        done = subprocess.run(
            [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Evaluation folder") == 1
    one, two = report(run / "eval" / "1"), report(run / "eval" / "2")
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("samples", "clean_accuracy", "robust_accuracy", "classes"):
        assert one[key] == two[key], key

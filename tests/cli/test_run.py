"""A run from one end to the other: its folder, its baseline, its comparison."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_robust.cli import launch

SHARPNESS = {"class_path": "SharpnessAware", "init_args": {"method": {"class_path": "SAM"}}}
ATTACK = {
    "class_path": "AdversarialTraining",
    "init_args": {"attack": {"class_path": "PGD", "init_args": {"eps": 0.1, "steps": 3}}},
}
METHODS = {"sharpness": SHARPNESS, "attack": ATTACK, "calibration": {"class_path": "CalibrationMonitor"}}


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def test_a_run_leaves_everything_in_its_folder(lr, tiny, own_folder):
    answer = lr("run", tiny())
    assert answer.code == 0
    assert "tiny" in answer.out
    assert str(own_folder / "runs" / "tiny" / "1") in answer.out.replace("\n", "")
    run = Path("runs/tiny/1")
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "comparison.png",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
        "summary.json",
    ]
    assert sorted(os.listdir()) == ["runs", "tiny.yaml"]
    found = summary(run)
    assert found["status"] == "complete"
    assert (found["epochs"], found["passes"], found["processes"]) == (2, 1.0, 1)
    assert found["evaluation"]["samples"] == 359
    assert found["evaluation"]["attack"] == "PGD(eps=0.1, steps=2, step_size=0.125)"
    assert found["seconds"] > 0
    with Path(run, "metrics.csv").open() as file:
        assert {"val/acc", "train/loss", "step"} <= set(csv.DictReader(file).fieldnames)


def test_the_saved_configuration_is_full_and_runs_again_with_the_same_result(lr, tiny):
    lr("run", tiny(), "--model.width", "12")
    config = yaml.safe_load(Path("runs/tiny/1/config.yaml").read_text())
    assert config["model"]["init_args"]["width"] == 12
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert lr("run", "runs/tiny/1/config.yaml").code == 0
    again = summary("runs/tiny/2")["evaluation"]
    assert again == summary("runs/tiny/1")["evaluation"]


def test_runs_are_numbered_and_out_moves_them(lr, tiny):
    lr("run", tiny(), "--out", "elsewhere")
    lr("run", tiny(), "--out=elsewhere")
    assert sorted(os.listdir("elsewhere/tiny")) == ["1", "2"]
    assert not Path("runs").exists()


def test_methods_are_changed_added_and_removed_by_name(lr, tiny):
    changes = ["--methods.sharpness.method.rho", "0.2", "--methods.attack", "null"]
    changes += ["--methods.maxsup", "LogitRegularization", "--methods.maxsup.regularizer", "MaxSup"]
    changes += ["--methods.maxsup.regularizer.alpha", "0.3"]
    assert lr("run", tiny(methods=METHODS), *changes).code == 0
    saved = yaml.safe_load(Path("runs/tiny/1/config.yaml").read_text())["methods"]
    assert saved["sharpness"]["init_args"]["method"]["init_args"]["rho"] == 0.2
    assert saved["attack"] is None
    assert saved["maxsup"]["init_args"]["regularizer"]["init_args"]["alpha"] == 0.3
    assert summary("runs/tiny/1")["passes"] == 2.0


def test_baseline_is_trained_compared_and_reused(lr, tiny):
    tiny("plain")
    recipe = tiny("robust", baseline="./plain.yaml", methods=METHODS)
    answer = lr("run", recipe)
    assert answer.code == 0
    assert "Training the baseline plain" in answer.out
    table = answer.out[answer.out.index("Test split") :]
    assert table.index("plain") < table.index("robust")
    assert Path("runs/robust/1/comparison.png").stat().st_size > 10_000
    assert Path("runs/robust/1/calibration").is_dir()
    found = summary("runs/robust/1")
    assert found["compared_with"]["evaluation"] == summary("runs/plain/1")["evaluation"]
    assert (found["passes"], found["compared_with"]["passes"]) == (5.0, 1.0)

    answer = lr("run", recipe, "--methods.sharpness", "null")
    assert "reusing" in answer.out
    assert sorted(os.listdir("runs/plain")) == ["1"]

    # Data, model and trainer are shared with the baseline, so another baseline is needed.
    answer = lr("run", recipe, "--model.width=8")
    assert "reusing" not in answer.out
    assert yaml.safe_load(Path("runs/plain/2/config.yaml").read_text())["model"]["init_args"]["width"] == 8

    assert "reusing" not in lr("run", recipe, "--fresh").out
    assert sorted(os.listdir("runs/plain")) == ["1", "2", "3"]


def test_a_reused_baseline_is_measured_again_for_another_attack(lr, tiny):
    tiny("plain")
    recipe = tiny("robust", baseline="./plain.yaml", methods={"attack": ATTACK})
    lr("run", recipe)
    lr("run", recipe, "--evaluation.attack.eps", "0.05")
    weak, strong = summary("runs/robust/2")["compared_with"], summary("runs/robust/1")["compared_with"]
    assert weak["folder"] == strong["folder"]
    assert weak["evaluation"]["robust_accuracy"] > strong["evaluation"]["robust_accuracy"]
    assert "eps=0.05" in weak["evaluation"]["attack"]


def test_baseline_of_the_command_line(lr, tiny):
    tiny("plain")
    recipe = tiny("robust", baseline="./plain.yaml")
    lr("run", recipe, "--baseline", "none")
    assert os.listdir("runs") == ["robust"]
    assert lr("run", tiny("alone"), "--baseline", "plain.yaml").code == 0
    assert summary("runs/alone/1")["compared_with"]["recipe"] == "plain"


def test_an_incomplete_or_unknown_baseline_is_refused_before_anything_is_written(lr, tiny):
    assert lr("run", tiny(baseline="nowhere")).code == 2
    assert lr("run", tiny(baseline="digits-distill")).lines[0] == (
        "error: digits-distill learns from an earlier run itself, so it cannot be a baseline."
    )
    assert not Path("runs").exists()


def test_the_best_checkpoint_of_the_baseline_can_teach(lr, tiny):
    images = {
        "class_path": "ImageClassifier",
        "init_args": {"backbone": "resnet8_cifar", "backbone_options": {"width": 4}},
    }
    data = {"class_path": "DigitsDataModule", "init_args": {"image_size": 8, "batch_size": 128}}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "limit_train_batches": 4, "enable_model_summary": False}
    trainer["log_every_n_steps"] = 2
    tiny("plain", model=images, data=data, trainer=trainer)
    methods = {"teacher": {"class_path": "Distillation", "init_args": {"teacher": "{baseline}"}}}
    answer = lr("run", tiny("student", baseline="./plain.yaml", model=images, trainer=trainer, methods=methods))
    assert answer.code == 0, answer.err
    teacher = torch.load("runs/plain/1/checkpoints/best.ckpt", weights_only=True)
    assert teacher["hyper_parameters"]["num_classes"] == 10
    saved = yaml.safe_load(Path("runs/student/1/config.yaml").read_text())
    assert saved["methods"]["teacher"]["init_args"]["teacher"] == "{baseline}"
    assert "reusing" in lr("run", "runs/student/1/config.yaml").out
    assert summary("runs/student/2")["evaluation"] == summary("runs/student/1")["evaluation"]


def test_no_attack_and_no_matplotlib(lr, tiny, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_robust.cli.picture", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    answer = lr("run", tiny(evaluation={"attack": None}))
    assert answer.code == 0, answer.err
    assert 'needs matplotlib: pip install "lightning-robust[plot]"' in answer.out
    assert not Path("runs/tiny/1/comparison.png").exists()
    assert summary("runs/tiny/1")["evaluation"]["robust_accuracy"] is None


def test_only_some_samples_are_attacked_and_the_table_says_so(lr, tiny):
    answer = lr("run", tiny(), "--evaluation.max_attacked", "50")
    assert "attacked the first 50 samples only" in answer.out
    assert summary("runs/tiny/1")["evaluation"]["attacked"] == 50


def test_unwritable_run_folder_is_one_sentence(lr, tiny):
    Path("file").write_text("")
    answer = lr("run", tiny(), "--out", "file")
    assert answer.code == 1
    assert len(answer.lines) == 1
    assert answer.lines[0].startswith("error: The run folder cannot be created in ")
    assert answer.lines[0].endswith("choose another place with --out.")


def test_a_failure_in_training_is_one_message_with_a_traceback_in_the_folder(lr, tiny):
    answer = lr("run", tiny(monitor="val/nothing"))
    assert answer.code == 1
    assert answer.lines[0].startswith("error: Training failed: MisconfigurationException: `ModelCheckpoint(monitor=")
    assert "Traceback" not in answer.err
    assert "Traceback" in Path("runs/tiny/1/error.txt").read_text()
    assert summary("runs/tiny/1")["status"] == "failed"


def test_own_loggers_are_added_and_find_the_run_folder(lr, tiny):
    changes = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "{run}/mine"]
    assert lr("run", tiny(), *changes).code == 0
    assert Path("runs/tiny/1/metrics.csv").is_file()
    assert list(Path("runs/tiny/1/mine").rglob("metrics.csv"))


def test_fast_dev_run_works(lr, tiny):
    assert lr("run", tiny(), "--trainer.fast_dev_run", "true").code == 0


def test_the_plan_does_not_stay_in_the_environment(lr, tiny):
    lr("run", tiny())
    assert launch.PLAN not in os.environ


def test_two_commands_never_get_the_same_folder(own_folder, monkeypatch):
    from lightning_robust.cli import folders

    monkeypatch.setattr(folders, "run_folders", lambda parent: [])  # what a racing command sees: nothing yet
    claimed = {folders.claim_run_folder(own_folder, "x").name for _ in range(3)}
    assert claimed == {"1", "2", "3"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_summaries_are_valid_json(own_folder, value):
    from lightning_robust.cli.folders import write_json

    write_json(Path("x.json"), {"a": [value, 1.5]})
    assert json.loads(Path("x.json").read_text()) == {"a": [None, 1.5]}

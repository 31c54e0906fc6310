"""``check``: the order of the step, its cost, the sizes; nothing is written."""

import os
from pathlib import Path

import pytest

ATTACK = {"class_path": "PGD", "init_args": {"eps": 0.1, "steps": 3}}
METHODS = {
    "maxsup": {"class_path": "LogitRegularization", "init_args": {"regularizer": {"class_path": "MaxSup"}}},
    "sharpness": {"class_path": "SharpnessAware", "init_args": {"method": {"class_path": "SAM"}}},
    "calibration": {"class_path": "CalibrationMonitor"},
    "attack": {"class_path": "AdversarialTraining", "init_args": {"attack": ATTACK}},
}


def test_order_cost_and_sizes(lr, tiny, own_folder):
    answer = lr("check", tiny(methods=METHODS))
    assert answer.code == 0, answer.err
    order = [answer.out.index(name) for name in ("AdversarialTraining", "SharpnessAware", "LogitRegularization")]
    assert order == sorted(order)
    for text in (
        "5 forward + backward passes",
        "calibration",
        "1,210",
        "SGD",
        "train 1,295, validation 143, test 359",
        "PGD(eps=0.1, steps=2, step_size=0.125)",
        "max val/acc",
    ):
        assert text in answer.out
    assert os.listdir(own_folder) == ["tiny.yaml"]


@pytest.mark.parametrize("name", ["digits-distill", "digits-robust"])
def test_a_teacher_is_stood_in_for(lr, name, own_folder):
    answer = lr("check", name, "--model.backbone_options", "{width: 4}", "--trainer.accelerator", "cpu")
    assert answer.code == 0, answer.err
    assert "Distillation" in answer.out
    assert "digits-standard" in answer.out
    assert not list(Path(own_folder).iterdir())


def test_check_takes_a_baseline(lr, tiny):
    tiny("plain")
    assert "plain.yaml" in lr("check", tiny("robust"), "--baseline", "plain.yaml").out


def test_a_module_with_its_own_data(lr, own_folder):
    Path("own.yaml").write_text("model: {class_path: support.tiny.OwnData}\ntrainer: {accelerator: cpu}\n")
    answer = lr("check", "own.yaml")
    assert answer.code == 0, answer.err
    assert "train 32, validation 32" in answer.out
    assert lr("run", "own.yaml", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1").code == 0

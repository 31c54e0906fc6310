"""``cache``: a teacher's answers about the training set of a recipe."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_robust.cli.cache_arguments import parse_cache
from lightning_robust.cli.errors import UsageError
from lightning_robust.data import DigitsDataModule
from lightning_robust.distillation import TeacherCache, build_teacher
from lightning_robust.models import ImageClassifier

MODEL = {"class_path": "ImageClassifier", "init_args": {"backbone": "resnet8_cifar", "backbone_options": {"width": 4}}}


@pytest.fixture
def teacher(own_folder):
    """The file of a network for our digits."""
    torch.manual_seed(0)
    model = ImageClassifier(backbone="resnet8_cifar", num_classes=10, in_chans=1, backbone_options={"width": 4})
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint("teacher.ckpt", weights_only=True)
    return "teacher.ckpt"


def digits(**options):
    data = DigitsDataModule(image_size=8, seed=0, **options)
    data.setup("fit")
    return data


def test_the_data_of_a_recipe(lr, tiny, teacher):
    answer = lr("cache", tiny(), "--teacher", teacher, "--out", "caches/t", "--batch_size", "512", "--dtype=float32")
    assert answer.code == 0, answer.err
    told = answer.out.replace("\n", "")
    assert "1,295 samples, 10 classes, float32" in told
    assert f"{{class_path: TeacherCache, init_args: {{path: {Path('caches/t').resolve()}}}}}" in told
    images = digits().train_set
    wanted = build_teacher(teacher)(torch.stack([images[index][0] for index in range(1295)]))
    cache = TeacherCache("caches/t")
    torch.testing.assert_close(cache.logits(torch.arange(1295)), wanted, rtol=1e-4, atol=1e-5)
    assert cache.manifest()["source"] == teacher
    again = lr("cache", tiny(), "--teacher", teacher, "--out", "caches/t")
    assert again.code == 1
    assert "There is a teacher cache at caches/t already" in again.err
    small = ("--overwrite", "--top_k", "3", "--data.train_fraction", "0.5", "--teacher.temperature", "2")
    answer = lr("cache", tiny(), "--teacher", teacher, "--out", "caches/t", *small)
    assert answer.code == 0, answer.err
    assert "samples, 3 of 10 classes, float16" in answer.out.replace("\n", "")
    assert TeacherCache("caches/t").described.teacher["temperature"] == 2


def test_a_run_that_learns_from_seeded_views(lr, tiny, teacher):
    data = {"class_path": "DigitsDataModule", "init_args": {"image_size": 8, "augment": "shift", "augment_variants": 2}}
    cached = {"class_path": "TeacherCache", "init_args": {"path": str(Path("t").resolve())}}
    distil = {"class_path": "Distillation", "init_args": {"teacher": cached}}
    recipe = tiny("taught", data=data, methods={"teacher": distil})
    missing = lr("check", recipe)
    assert missing.code == 1
    assert "There is no teacher cache at" in missing.err
    answer = lr("cache", recipe, "--teacher", teacher, "--out", "t", "--view", "seeded")
    assert answer.code == 0, answer.err
    assert "2,590 seeded views" in answer.out
    answer = lr("run", recipe, "--baseline", "none", "--trainer.max_epochs", "3")
    assert answer.code == 0, answer.err
    other = lr("check", recipe, "--data.augment_variants", "3")
    assert "written for 2590 samples but the training set has 3885" in other.err.replace("\n", " ")


def test_a_run_folder_is_a_teacher_and_has_data(lr, tiny, own_folder):
    recipe = tiny("standard", model=MODEL)
    assert lr("run", recipe, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1").code == 0
    answer = lr("cache", "runs/standard/1", "--teacher", "runs/standard/1", "--out", "t")
    assert answer.code == 0, answer.err
    assert TeacherCache("t").manifest()["source"].endswith("best.ckpt")


@pytest.mark.slow
def test_two_processes(tiny, teacher):
    words = ["cache", tiny(), "--teacher", teacher, "--out", "t", "--devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "lightning_robust.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("In recipes:") == 1
    assert TeacherCache("t").num_samples == 1295


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Which recipe's data?"),
        (("a", "b"), "takes one recipe, got a, b"),
        (("a",), "--teacher is missing"),
        (("a", "--teacher", "t.ckpt"), "--out is missing"),
        (("a", "--teacher"), "--teacher needs a value"),
        (("a", "--teacher", "--out", "x"), "--teacher needs a value"),
        (("a", "--teecher", "x"), "There is no option --teecher.\nDid you mean `teacher`"),
        (("a", "--teacher", "t", "--out", "x", "--top_k", "0"), "Expected --top_k to be an integer >= 1 but got 0"),
        (("a", "--teacher", "t", "--out", "x", "--devices", "two"), "Expected --devices to be an integer >= 1"),
        (("a", "--teacher.mean", "[1"), "The value of --teacher.mean cannot be read"),
    ],
)
def test_what_is_not_understood(words, message):
    with pytest.raises(UsageError) as refused:
        parse_cache(words)
    assert message in str(refused.value)


def test_what_is_understood():
    words = "r --teacher=t.pt --out=x --num_workers 0 --view seeded --teacher.mean [0.5] --data.seed=3 --overwrite"
    found = parse_cache(words.split())
    assert found.options == {"num_workers": 0, "view": "seeded", "overwrite": True}
    assert found.teacher_options == {"mean": [0.5]}
    assert found.changes == ("--data.seed", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher", "nowhere.ckpt"), "nowhere.ckpt"),
        (("--teacher", "."), "is not a run folder"),
        (("--teacher", "x.pt", "--teacher.backbon", "resnet18"), "no option `backbon`"),
        (("--teacher", "timm:no_such"), "There is no timm model 'no_such'"),
        (("--teacher", "teacher.ckpt", "--view", "crops"), "Expected `view`"),
        (("--teacher", "teacher.ckpt", "--view", "seeded"), "augment_variants"),
        (("--teacher", "teacher.ckpt", "--dtype", "int8"), "Expected `dtype`"),
        (("--teacher", "teacher.ckpt", "--data.image_size", "3"), "image_size"),
    ],
)
def test_what_is_refused(lr, tiny, teacher, words, message):
    answer = lr("cache", tiny(), "--out", "t", *words)
    assert answer.code in (1, 2)
    assert message in answer.err.replace("\n", " ")
    assert not Path("t").exists()
    assert "Traceback" not in answer.err


def test_a_recipe_without_data(lr, own_folder):
    Path("own.yaml").write_text(yaml.safe_dump({"model": {"class_path": "support.tiny.OwnData"}}))
    assert "has no `data`" in lr("cache", "own.yaml", "--teacher", "t", "--out", "x").err


def test_help(lr, capsys):
    with pytest.raises(SystemExit, match="0"):
        lr("cache", "--help")
    assert "--view fixed|seeded" in capsys.readouterr().out

"""A run that continues from a checkpoint, in mid-epoch too, ends with the weights of an uninterrupted one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_robust.training import StepCallback
from support.modules import PlainModule
from support.reference import METHODS
from support.resumable import BATCHES, EPOCHS, run

TESTS = Path(__file__).parents[1]


def same(first, second):
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def equal(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_the_uninterrupted_run(method, tmp_path, cell):
    cell(method, "resume")
    whole, finished = run(method, tmp_path)
    assert not same(whole, PlainModule())
    for step in (2, BATCHES, 7):  # in the first epoch, at its end, in the second
        checkpoint = tmp_path / f"step={step}.ckpt"
        torch.load(checkpoint, weights_only=True)
        resumed, trainer = run(method, tmp_path, ckpt_path=checkpoint)
        assert trainer.global_step == EPOCHS * BATCHES
        assert same(resumed, whole), step
        for ours, theirs in zip(trainer.callbacks, finished.callbacks, strict=True):
            if isinstance(ours, StepCallback):  # balances, averages and tables went on as well
                assert equal(ours.state_dict(), theirs.state_dict()), (step, type(ours).__name__)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_process_is_continued(tmp_path):
    whole, _ = run("all", tmp_path / "whole")
    command = [sys.executable, "-m", "support.resumable", "all", str(tmp_path / "killed"), "6"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    resumed, _ = run("all", tmp_path / "killed", ckpt_path=tmp_path / "killed" / "step=6.ckpt")
    assert same(resumed, whole)

"""Several processes: one run folder, one voice, the same result for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_robust.cli import launch

SCRIPT = Path(sys.executable).parent / "lightning-robust"
TORCHRUN = Path(sys.executable).parent / "torchrun"
METHODS = {
    "sharpness": {"class_path": "SharpnessAware", "init_args": {"method": {"class_path": "SAM"}}},
    "calibration": {"class_path": "CalibrationMonitor"},
}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def finish(*command, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_folders(out):
    assert out.count("Test split") == 1
    assert sorted(os.listdir("runs")) == ["plain", "robust"]
    for name in ("plain", "robust"):
        assert os.listdir(f"runs/{name}") == ["1"]
        assert Path(f"runs/{name}/1/checkpoints/best.ckpt").is_file()
        found = json.loads(Path(f"runs/{name}/1/summary.json").read_text())
        assert (found["status"], found["processes"]) == ("complete", 2)
        assert found["evaluation"]["samples"] == 359  # every sample once, although two processes trained
        # 1,295 images in two processes and batches of 128 each
        assert found["steps"] == 2 * 6


@pytest.mark.slow
def test_two_processes_that_lightning_starts(tiny):
    tiny("plain")
    recipe = tiny("robust", baseline="./plain.yaml", methods=METHODS)
    check_folders(finish(SCRIPT, "run", recipe, *TWO))
    out = finish(SCRIPT, "run", recipe, *TWO)
    assert "reusing" in out
    first, second = (torch.load(f"runs/robust/{number}/checkpoints/last.ckpt") for number in (1, 2))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


@pytest.mark.slow
def test_two_processes_that_torchrun_starts(tiny):
    tiny("plain")
    recipe = tiny("robust", baseline="./plain.yaml", methods=METHODS)
    check_folders(finish(TORCHRUN, "--nproc-per-node=2", "--standalone", SCRIPT, "run", recipe, *TWO))


@pytest.mark.slow
def test_a_comparison_in_two_processes(tiny):
    recipe = tiny("toy", compare={"seeds": [0, 1], "arms": {"plain": {}, "sam": {"methods": METHODS}}})
    out = finish(SCRIPT, "run", recipe, *TWO)
    assert out.count("Training plain, seed 0 (1 of 4)") == out.count("Run folder") == 1
    found = json.loads(Path("runs/toy/1/summary.json").read_text())
    assert found["status"] == "complete"
    for arm in ("plain", "sam"):
        for seed in ("0", "1"):
            cell = json.loads(Path(f"runs/toy/1/{arm}/{seed}/summary.json").read_text())
            assert (cell["status"], cell["processes"], cell["steps"]) == ("complete", 2, 2 * 6)
            assert cell["quantities"] == found["comparison"]["values"][arm][seed]
    out = finish(SCRIPT, "run", "--resume", "runs/toy/1", "--compare.seeds", "1,2")
    assert "seed 1" not in out.replace("seeds 1, 2", "")
    assert out.count("Training plain, seed 2 (3 of 4)") == 1


def test_ranks(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launch.is_first_process()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.is_first_process()
    monkeypatch.setenv("NODE_RANK", "1")
    assert not launch.is_first_process()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("NODE_RANK", "0")
    assert launch.is_first_process()
    monkeypatch.setenv("RANK", "3")
    assert not launch.is_first_process()


def test_the_plan_of_a_slurm_step_goes_through_a_file(own_folder, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    plan = {"folder": "runs/x/1"}
    launch.share_plan(plan, own_folder)
    launch.forget_plan()
    assert launch.receive_plan(own_folder) == plan
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    monkeypatch.setattr(launch, "_PATIENCE", 0.2)
    with pytest.raises(launch.CommandError, match="did not write"):
        launch.receive_plan(own_folder)


def test_a_stranger_is_told_to_use_torchrun(own_folder):
    with pytest.raises(launch.UsageError, match="torchrun"):
        launch.receive_plan(own_folder)

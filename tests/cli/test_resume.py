"""Runs that were stopped go on where they were, and end as if they had not been stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml

LONG = {"max_epochs": 4, "accelerator": "cpu", "log_every_n_steps": 4, "enable_model_summary": False}
METHODS = {
    "sharpness": {"class_path": "SharpnessAware", "init_args": {"method": {"class_path": "SAM"}}},
    "attack": {
        "class_path": "AdversarialTraining",
        "init_args": {"attack": {"class_path": "PGD", "init_args": {"eps": 0.1, "steps": 2}}},
    },
    "crash": {"class_path": "support.tiny.CrashAt", "init_args": {"step": 27}},
}


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def metrics(folder):
    with Path(folder, "metrics.csv").open() as file:
        return sorted(
            (int(row["step"]), key, value)
            for row in csv.DictReader(file)
            for key, value in row.items()
            if value and key not in ("step", "epoch")
        )


def weights(folder):
    return torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)["state_dict"]


def test_a_crashed_run_resumes_to_the_result_of_the_uninterrupted_one(lr, tiny):
    recipe = tiny(trainer=LONG, methods=METHODS)
    lr("run", recipe, "--methods.crash", "null", "--out", "whole")
    answer = lr("run", recipe, "--out", "broken")
    assert answer.code == 1
    assert answer.lines[0] == "error: Training failed: RuntimeError: crashed on purpose at step 27"
    assert answer.lines[-1].strip().startswith("Continue with: lightning-robust run --resume")
    assert summary("broken/tiny/1")["status"] == "failed"

    answer = lr("run", "--resume", "broken/tiny/1", "--methods.crash", "null")
    assert answer.code == 0, answer.err
    assert "Continuing" in answer.out
    for name, value in weights("whole/tiny/1").items():
        assert torch.equal(value, weights("broken/tiny/1")[name]), name
    assert metrics("broken/tiny/1") == metrics("whole/tiny/1")
    done, expected = summary("broken/tiny/1"), summary("whole/tiny/1")
    assert done["status"] == "complete"
    assert done["evaluation"] == expected["evaluation"]
    assert (done["steps"], done["epochs"]) == (expected["steps"], expected["epochs"])


@pytest.mark.slow
def test_a_killed_run_resumes_in_mid_epoch(lr, tiny, own_folder, monkeypatch):
    from lightning_robust.cli import records

    monkeypatch.setattr(records, "_INTERVAL", timedelta(0))
    recipe = tiny(trainer={**LONG, "max_epochs": 2}, methods={"slow": {"class_path": "support.tiny.SlowSteps"}})
    code = (
        "import sys; from datetime import timedelta; from lightning_robust.cli import records, main\n"
        "records._INTERVAL = timedelta(0)\n"
        f"sys.exit(main(['run', {recipe!r}, '--out', 'killed', '--methods.slow.seconds', '0.5']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    recent = own_folder / "killed" / "tiny" / "1" / "checkpoints" / "recent.ckpt"
    while not (recent.is_file() and torch.load(recent, weights_only=True)["global_step"] >= 3):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert records.BEST not in os.listdir(recent.parent)  # killed before the first epoch was over
    assert summary("killed/tiny/1")["status"] == "running"

    assert lr("run", "--resume", "killed/tiny/1", "--methods.slow.seconds", "0").code == 0
    lr("run", recipe, "--out", "whole")
    for name, value in weights("whole/tiny/1").items():
        assert torch.equal(value, weights("killed/tiny/1")[name]), name
    assert metrics("killed/tiny/1") == metrics("whole/tiny/1")


def test_the_comparison_is_made_after_a_resumption_too(lr, tiny):
    tiny("plain", trainer=LONG)
    recipe = tiny("robust", trainer=LONG, methods=METHODS, baseline="./plain.yaml")
    assert lr("run", recipe).code == 1
    answer = lr("run", "--resume", "runs/robust/1", "--methods.crash=null")
    assert answer.code == 0
    assert summary("runs/robust/1")["compared_with"]["recipe"] == "plain"


@pytest.fixture
def broken(lr, tiny):
    """A run that failed after its first epoch."""
    lr("run", tiny(trainer=LONG, methods={"crash": {**METHODS["crash"], "init_args": {"step": 12}}}))
    return "runs/tiny/1"


def test_a_complete_run_is_not_resumed(lr, tiny):
    lr("run", tiny())
    answer = lr("run", "--resume", "runs/tiny/1")
    assert answer.code == 2
    assert len(answer.lines) == 1
    assert "is complete; train it anew with: lightning-robust run" in answer.err


def test_nothing_to_resume(lr, tiny, broken):
    for state in Path(broken, "checkpoints").iterdir():
        state.unlink()
    answer = lr("run", "--resume", broken)
    assert (answer.code, len(answer.lines)) == (2, 1)
    assert "has no checkpoint to continue from" in answer.err


def test_a_folder_that_is_no_run(lr, own_folder):
    answer = lr("run", "--resume", own_folder)
    assert (answer.code, answer.err) == (2, f"error: {own_folder} is not a run folder: it has no summary.json.\n")


def test_a_checkpoint_that_could_run_code_is_refused(lr, broken):
    checkpoint = Path(broken, "checkpoints", "last.ckpt")
    torch.save({**torch.load(checkpoint, weights_only=True), "thing": Path("x")}, checkpoint)
    answer = lr("run", "--resume", broken)
    assert answer.code == 1
    assert f"{checkpoint.name} holds objects beside tensors and plain values" in answer.err


def test_another_number_of_classes_is_refused(lr, broken):
    config = yaml.safe_load(Path(broken, "config.yaml").read_text())
    config["data"] = {"class_path": "support.tiny.SevenClasses"}
    Path(broken, "config.yaml").write_text(yaml.safe_dump(config))
    answer = lr("run", "--resume", broken, "--methods.crash=null")
    assert (answer.code, len(answer.lines)) == (1, 1)
    assert answer.lines[0].endswith("was trained for 10 classes but the configuration says 7.")


def test_another_network_is_refused(lr, broken):
    answer = lr("run", "--resume", broken, "--model.width", "20", "--methods.crash=null")
    assert (answer.code, len(answer.lines)) == (1, 1)
    assert "does not fit the configuration: `net.1.weight` was [16, 64] and is now [20, 64]" in answer.err


def test_a_recipe_beside_resume_is_refused(lr, tiny):
    answer = lr("run", tiny(), "--resume", "runs/tiny/1")
    assert (answer.code, len(answer.lines)) == (2, 1)

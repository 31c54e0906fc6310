"""A tiny recipe and a way to type commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch  # noqa: F401  its log handler keeps the stderr of whoever imports it first: not a captured one
import pytest
import yaml

from lightning_robust.cli import main

TINY = {
    "seed_everything": 0,
    "model": {"class_path": "support.tiny.TinyClassifier", "init_args": {}},
    "data": {"class_path": "DigitsDataModule", "init_args": {"image_size": 8, "batch_size": 128}},
    "evaluation": {"attack": {"class_path": "PGD", "init_args": {"eps": 0.1, "steps": 2}}},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 4, "enable_model_summary": False},
}


@dataclass
class Answer:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.strip().splitlines()


@pytest.fixture
def tiny(own_folder: Path) -> Callable[..., str]:
    """Writes tiny.yaml (or another name) with some keys replaced, and returns its path."""

    def write(name: str = "tiny", **parts: object) -> str:
        Path(f"{name}.yaml").write_text(
            "# Tiny.\n# Cost nothing.\n" + yaml.safe_dump({**TINY, **parts}, sort_keys=False)
        )
        return f"{name}.yaml"

    return write


@pytest.fixture
def lr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Runs one command in this process."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> Answer:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run

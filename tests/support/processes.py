"""Other programs in tests."""

import subprocess
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program; its standard output, or a test failure that shows all of it."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout

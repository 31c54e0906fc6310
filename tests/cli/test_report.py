"""``report``: several runs from their files alone."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

EVALUATION = {
    "samples": 100,
    "accuracy": 0.9,
    "nll": 0.3,
    "brier": 0.1,
    "ece": 0.05,
    "bin_counts": [0, 40, 60],
    "bin_accuracy": [None, 0.8, 0.95],
    "bin_confidence": [None, 0.6, 0.99],
    "attack": "PGD(eps=0.1, steps=20)",
    "attacked": 100,
    "robust_accuracy": 0.4,
    "temperature": 1.5,
    "ece_scaled": 0.02,
    "nll_scaled": 0.28,
}


@pytest.fixture
def runs(own_folder):
    """Two finished runs and one that still runs."""
    for number, evaluation in (("1", EVALUATION), ("2", {**EVALUATION, "accuracy": 0.8}), ("3", None)):
        folder = Path("runs", "toy", number)
        folder.mkdir(parents=True)
        found = {"recipe": "toy", "status": "complete", "monitor": "val/acc", "seconds": 3.25, "passes": 2.0}
        (folder / "summary.json").write_text(json.dumps({**found, "evaluation": evaluation}))
        (folder / "metrics.csv").write_text("step,val/acc\n1,0.5\n2,\n3,0.7\n")
    return ["runs/toy/1", "runs/toy/2", "runs/toy/3"]


def test_table(lr, runs):
    out = lr("report", *runs).out
    for text in ("toy/1", "toy/2", "90.0%", "80.0%", "40.0%", "0.050", "0.020", "3.2", "PGD(eps=0.1, steps=20)"):
        assert text in out
    assert "Not evaluated yet: toy/3." in out


def test_picture_and_numbers(lr, runs):
    answer = lr("report", *runs, "--plot", "out.png")
    assert answer.code == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    with Path("out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["toy/1", "toy/2", "toy/3"]
    assert float(rows[1]["accuracy"]) == 0.8
    assert rows[2]["accuracy"] == ""


def test_torch_is_not_imported(runs):
    code = (
        "import sys; from lightning_robust.cli import main\n"
        f"assert main(['report', *{runs!r}, '--plot', 'x.png']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_different_attacks_are_named(lr, runs):
    path = Path("runs/toy/2/summary.json")
    path.write_text(path.read_text().replace("eps=0.1", "eps=0.2"))
    assert "2 different attacks" in lr("report", *runs).out


def test_what_is_no_run(lr, own_folder):
    assert lr("report", "nowhere").lines == ["error: nowhere is not a run folder: it has no summary.json."]


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "is not the summary of a run")])
def test_a_broken_summary(lr, runs, text, message):
    Path("runs/toy/1/summary.json").write_text(text)
    answer = lr("report", *runs)
    assert answer.code == 2
    assert message in answer.lines[0]


def test_a_picture_that_cannot_be_written(lr, runs):
    answer = lr("report", *runs, "--plot", "no/where.png")
    assert answer.code == 2
    assert answer.lines[0].startswith("error: no/where.csv cannot be written")


def test_without_matplotlib(lr, runs, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_robust.cli.picture", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    answer = lr("report", *runs, "--plot", "out.png")
    assert answer.code == 2
    assert 'pip install "lightning-robust[plot]"' in answer.err
    assert Path("out.csv").is_file()

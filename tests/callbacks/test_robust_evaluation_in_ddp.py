"""A robustness evaluation in two processes counts what one counts."""

import pytest
import torch

from lightning_robust.evaluation import RobustnessReport
from support.ddp_robustness import KilledError, Kills, evaluated
from support.ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    Kills.left = 3
    with pytest.raises(KilledError):
        evaluated(folder / "state", size=16)
    Kills.left = 0
    outputs = launch("-m", "support.ddp_robustness", str(folder))
    assert not any("self.log('test/" in output for output in outputs)  # Lightning's warning about unreduced values
    return folder


def accuracies(report):
    """Everything that padding does not change: a repeated sample is attacked twice and counted once."""
    return {
        "samples": report.samples,
        "clean": report.clean_accuracy,
        "union": (report.robust_accuracy, report.standard_error, report.robust_accuracy_8bit),
        "classes": report.classes,
        "stages": [[stage.robust_accuracy for stage in attack.stages] for attack in report.attacks],
        "rounded": [(each.robust_accuracy_8bit, each.robust_accuracy_8bit_inside) for each in report.attacks],
    }


@pytest.mark.parametrize("name", ["exact", "union", "continued"])
def test_two_processes_count_what_one_counts(folder, name):
    alone, logged = evaluated(mode="union" if name == "union" else "exact", size=5)
    reports = [RobustnessReport.load(folder / f"{name}-{rank}.json") for rank in range(2)]
    for report in reports:
        assert accuracies(report) == accuracies(alone)
        assert report.samples == 61
        assert report.processes == 2
    if name == "continued":
        assert reports[0].earlier_seconds > 0
        return
    (attacked,) = {report.attacks[0].stages[0].entered for report in reports}
    # the padding repeats the first sample, which is wrong without attack
    assert attacked == alone.attacks[0].stages[0].entered == 52
    for rank in range(2):
        assert torch.load(folder / f"{name}-{rank}.pt", weights_only=True) == pytest.approx(logged)

"""What a report says, and how it is shown and kept."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lightning_robust.attacks import PGD
from lightning_robust.evaluation import (
    Check,
    RobustnessProgress,
    RobustnessReport,
    build_report,
    evaluate_robustness,
    print_report,
    robustness_figure,
)
from lightning_robust.evaluation.evaluator import RobustnessEvaluator
from lightning_robust.evaluation.progress import progress_view
from support.robustness import CLASSES, Chain, Labelled, Lying, batches, loader, model, strong, weak


class Deviates(Chain):
    def deviations(self, num_classes):
        return [f"9 targets became {num_classes - 1}"]


@pytest.fixture(scope="module")
def data():
    return Labelled()


@pytest.fixture(scope="module")
def report(data):
    attacks = {"chain": Deviates(eps=8 / 255), "l2": PGD(norm="l2", eps=0.3, steps=4)}
    return evaluate_robustness(model(), loader(data), attacks, checks=None, seed=1)


def test_numbers_against_flags_by_hand(data, report):
    net = model().eval()
    right = net(data.x).argmax(1) == data.y
    left = {}
    for name, attack in {
        "weak": weak(eps=8 / 255),
        "strong": strong(eps=8 / 255),
        "l2": PGD(norm="l2", eps=0.3, steps=4, seed=1),
    }.items():
        x_adv = attack(net, data.x, data.y, indices=torch.arange(len(data)))
        left[name] = right & (net(x_adv).argmax(1) == data.y)
    chain, union = left["weak"] & left["strong"], left["weak"] & left["strong"] & left["l2"]
    share = [float(flags.double().mean()) for flags in (right, left["weak"], chain, left["l2"], union)]
    assert report.samples == 61
    assert report.num_classes == CLASSES
    assert report.clean_accuracy == share[0]
    assert [stage.robust_accuracy for stage in report.attacks[0].stages] == share[1:3]
    assert [attack.robust_accuracy for attack in report.attacks] == share[2:4]
    assert report.robust_accuracy == share[4]
    assert report.standard_error == pytest.approx((share[4] * (1 - share[4]) / 61) ** 0.5)
    for each in report.classes:
        of_class = data.y == each.label
        assert each.samples == of_class.sum()
        assert each.clean_accuracy == pytest.approx(float(right[of_class].double().mean()))
        assert each.robust_accuracy == pytest.approx(float(union[of_class].double().mean()))
    assert report.worst_class_accuracy == min(each.robust_accuracy for each in report.classes)
    assert report.attacks[0].deviations == ["9 targets became 3"]
    assert (report.attacks[1].norm, report.attacks[1].eps) == ("l2", [0.3])
    assert report.seed == 1
    assert report.inputs == {"bounds": [0.0, 1.0], "mean": None, "std": None, "dtype": "float64", "shape": [2, 6, 6]}
    assert {"lightning-robust", "torch", "python", "device"} == set(report.versions)


def test_plain_values_and_back(report, tmp_path):
    checked = replace(report, checks=[Check("transfer", "warn", "Something.", {"share": 0.5, "count": None})])
    path = checked.save(tmp_path / "deep" / "report.json")
    assert RobustnessReport.load(path) == checked
    values = json.loads(path.read_text())
    assert RobustnessReport.from_dict({**values, "of a later version": 1}) == checked
    assert [check.name for check in checked.warnings] == ["transfer"]
    assert [each.name for each in path.parent.iterdir()] == ["report.json"]


def printed(report, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_report(report, console)
    return console.file.getvalue()


def test_the_table(report):
    checks = [Check("determinism", "ok", "Fine."), Check("transfer", "warn", "Look here.", {"share": 0.5})]
    text = printed(replace(report, checks=checks, craft_dtype="bfloat16"))
    for part in (
        "Sequential: 61 samples, 4 classes",
        "chain (linf 8/255)",
        "l2 (l2 0.3)",
        f"{report.robust_accuracy:.2%}",
        f"±{100 * report.standard_error:.2f}",
        f"worst class {report.worst_class}",
        "9 targets became 3",
        "1 ok, 1 warn",
        "warn transfer: Look here.",
        "crafted in bfloat16 and verified in float32",
        "seed 1",
    ):
        assert part in text
    assert max(map(len, printed(report, width=80).splitlines())) <= 80


def test_violations_are_told(data):
    report = evaluate_robustness(model(), loader(data), Lying(eps=0.05, steps=2), checks=None)
    stage = report.attacks[0].stages[0]
    assert report.robust_accuracy == report.clean_accuracy
    assert stage.rejected > 0
    assert f"{stage.rejected} misclassified points were outside the budget or the bounds" in printed(report)


def test_the_figure(report):
    pytest.importorskip("matplotlib")
    figure = robustness_figure(report)
    assert len(figure.axes) == 2
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["clean", "chain/weak", "chain/strong", "l2/PGD"]
    figure.savefig(io.BytesIO(), format="png")


def test_checks_come_with_the_report(data):
    one = evaluate_robustness(model(), loader(data), strong(), checks="quick")
    assert {"determinism", "finite"} <= {check.name for check in one.checks}
    two = evaluate_robustness(model(), loader(data), {"a": weak(), "b": strong()}, checks="quick")
    assert {"a/determinism", "b/determinism"} <= {check.name for check in two.checks}
    with pytest.raises(ValueError, match="Expected `checks` to be one of None, 'quick', 'full'"):
        evaluate_robustness(model(), loader(data), weak(), checks="all")


def test_part_of_the_data_other_batches_and_devices(data):
    pairs = [{"image": x, "label": y} for x, y, _ in batches(data, 16)]
    read = evaluate_robustness(
        model(),
        pairs,
        weak(),
        checks=None,
        max_samples=20,
        device="cpu",
        unpack=lambda batch: (batch["image"], batch["label"]),
    )
    plain = evaluate_robustness(model(), loader(data), weak(), checks=None, max_samples=20)
    assert (read.samples, read.robust_accuracy) == (20, plain.robust_accuracy)
    with pytest.raises(ValueError, match="Expected `max_samples`"):
        evaluate_robustness(model(), pairs, weak(), max_samples=0)
    with pytest.raises(ValueError, match="Expected at least one sample to evaluate"):
        evaluate_robustness(model(), [], weak(), checks=None)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_plain_lines_where_there_is_no_terminal(data):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with RobustnessProgress(console, every_s=3.0, clock=Clock()) as progress:
        evaluator = RobustnessEvaluator(model(), Chain(eps=0.03), batch_size=8, total=61, progress=progress)
        for x, y, indices in batches(data, 8):
            evaluator.feed(x, y, indices)
        evaluator.finish()
    lines = console.file.getvalue().splitlines()
    assert len(lines) > 2
    assert all("/61 samples, robust so far" in line for line in lines)
    assert any("remaining" in line and "chain" not in line and "Chain/weak: " in line for line in lines)


def test_a_live_panel_in_a_terminal(data):
    console = Console(file=io.StringIO(), force_terminal=True, width=90)
    with RobustnessProgress(console, clock=Clock()) as progress:
        evaluator = RobustnessEvaluator(model(), Chain(eps=0.03), batch_size=8, total=61, progress=progress)
        for x, y, indices in batches(data, 8):
            evaluator.feed(x, y, indices)
    assert "Chain/strong" in console.file.getvalue()


def test_what_the_progress_says(data):
    evaluator = RobustnessEvaluator(model(), Chain(eps=0.03), batch_size=8, total=61)
    assert progress_view(evaluator) is None
    foreseen = []
    for x, y, indices in batches(data, 8, torch.randperm(61, generator=torch.Generator().manual_seed(0))):
        evaluator.feed(x, y, indices)
        view = progress_view(evaluator)
        foreseen.append(view.stages[0].attacked + view.stages[0].left)
        assert view.remaining is None or view.remaining >= 0
    assert foreseen[-1] == 52
    assert all(abs(each - 52) < 20 for each in foreseen[1:])
    shard = evaluator.finish()
    view = progress_view(evaluator)
    assert view.remaining == 0
    assert view.robust == build_report([shard]).robust_accuracy
    assert [(stage.attacked, stage.broken, stage.left) for stage in view.stages] == [
        (tally.entered, tally.broken, 0) for tally in shard.tallies
    ]
    assert view.panel(width=30) is None
    assert "robust so far" in view.line(unicode=False)

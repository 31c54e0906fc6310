"""A killed evaluation continues, and refuses to continue what is another one."""

import os

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.evaluation import RobustnessEvaluator, build_report, evaluate_robustness, load_points
from lightning_robust.evaluation.ledger import Ledger
from lightning_robust.evaluation.state import StateFolder, weights_hash
from support.robustness import Chain, Labelled, batches, loader, model, strong, weak


class KilledError(Exception):
    pass


class Kills(PGD):
    """Raises in its n-th call; one for all runs of a test."""

    left = 0

    def solve(self, problem, start=None):
        type(self).left -= 1
        if type(self).left == 0:
            raise KilledError
        return super().solve(problem, start)


class Two(Chain):
    """Two stages that may be killed."""

    def stages(self, num_classes):
        return {"first": Kills(eps=self.eps, steps=2), "second": Kills(eps=self.eps, steps=8)}


@pytest.fixture(scope="module")
def data():
    return Labelled()


def attacks():
    return {"two": Two(eps=0.03), "l2": Kills(norm="l2", eps=0.2, steps=3)}


def run(data, folder, ranks=1, size=8, **options):
    """Feed a process after the other; what a distributed sampler would do, padding included."""
    parts = [torch.arange(len(data))[rank::ranks] for rank in range(ranks)]
    longest = max(map(len, parts))
    parts = [torch.cat([part, torch.arange(longest - len(part))]) for part in parts]
    evaluators = [
        RobustnessEvaluator(model(), attacks(), state_dir=folder, rank=rank, **options) for rank in range(ranks)
    ]
    for evaluator, part in zip(evaluators, parts, strict=True):
        for x, y, indices in batches(data, size, part):
            evaluator.feed(x, y, indices)
    return build_report([evaluator.finish() for evaluator in evaluators])


def numbers(report):
    """Everything but time and the number of processes."""
    values = report.to_dict()
    for attack in values["attacks"]:
        for stage in attack["stages"]:
            del stage["seconds"]
    return {name: value for name, value in values.items() if "seconds" not in name and name != "processes"}


@pytest.mark.parametrize("save_every_s", [0.0, 1000.0])
@pytest.mark.parametrize("killed_in", [1, 2, 7, 15])
def test_a_killed_evaluation_continues(data, tmp_path, killed_in, save_every_s):
    Kills.left = 0
    whole = run(data, None)
    assert whole.samples == 61
    Kills.left = killed_in
    with pytest.raises(KilledError):
        run(data, tmp_path, save_every_s=save_every_s)
    Kills.left = 0
    again = run(data, tmp_path)
    assert numbers(again) == numbers(whole)
    assert again.earlier_seconds > 0 == whole.earlier_seconds


def test_nothing_is_done_twice(data, tmp_path):
    Kills.left = 0
    first = run(data, tmp_path)
    Kills.left = 1
    again = run(data, tmp_path)  # would be killed by the first attack
    assert numbers(again) == numbers(first)
    assert again.earlier_seconds == pytest.approx(first.seconds, abs=0.2)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_processes_continues(data, tmp_path, before, after):
    Kills.left = 0
    whole = run(data, None)
    Kills.left = 9
    with pytest.raises(KilledError):
        run(data, tmp_path, ranks=before)
    Kills.left = 0
    again = run(data, tmp_path, ranks=after)
    ours, theirs = numbers(again), numbers(whole)
    # padding is attacked in two processes and counted in one
    for each in (ours, theirs):
        each.pop("forwards"), each.pop("backwards")
        for attack in each["attacks"]:
            attack["stages"] = [stage["robust_accuracy"] for stage in attack["stages"]]
    assert ours == theirs


def test_three_processes_count_like_one(data):
    Kills.left = 0
    one, three = run(data, None), run(data, None, ranks=3)
    assert three.samples == one.samples == 61
    assert three.robust_accuracy == one.robust_accuracy
    assert three.classes == one.classes
    assert (one.processes, three.processes) == (1, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attacks": weak(eps=0.04)}, "attacks was .*eps=0.05.* and is .*eps=0.04"),
        ({"seed": 5}, "seed was 'None' and is '5'"),
        ({"model": model(seed=1)}, "weights was"),
        ({"craft_dtype": "bfloat16"}, "craft_dtype was 'None' and is 'bfloat16'"),
        ({"eight_bit": False}, "eight_bit was"),
        ({"mode": "union"}, "mode was 'exact' and is 'union'"),
        ({"attacks": weak(bounds=(-0.5, 1.0))}, "images was"),
    ],
)
def test_the_state_of_another_evaluation_is_refused(data, tmp_path, change, named):
    options = {"model": model(), "attacks": weak(), "state_dir": tmp_path, "checks": None}

    def evaluated(**given):
        chosen = {**options, **given}
        return evaluate_robustness(chosen.pop("model"), loader(data), chosen.pop("attacks"), **chosen)

    evaluated()
    files = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=f"holds the state of another evaluation .*{named}"):
        evaluated(**change)
    assert sorted(os.listdir(tmp_path)) == files
    assert evaluated(batch_size=3).samples == 61


def test_other_data_are_refused(data, tmp_path):
    evaluate_robustness(model(), loader(data), weak(), state_dir=tmp_path, checks=None)
    for change in ("image", "label"):
        other = Labelled()
        if change == "image":
            other.x[17] = other.x[17].flip(2)
        else:
            other.y[17] = (other.y[17] + 1) % 4
        with pytest.raises(ValueError, match="Sample 17 was another image, or of another class"):
            evaluate_robustness(model(), loader(other), weak(), state_dir=tmp_path, checks=None)


def test_a_smaller_part_of_the_data_is_reported_alone(data, tmp_path):
    evaluate_robustness(model(), loader(data), weak(), state_dir=tmp_path, checks=None)
    part = evaluate_robustness(model(), loader(data), weak(), state_dir=tmp_path, checks=None, max_samples=20)
    fresh = evaluate_robustness(model(), loader(data), weak(), checks=None, max_samples=20)
    assert (part.samples, part.robust_accuracy) == (20, fresh.robust_accuracy)


def test_saved_points_are_the_adversarial_ones(data, tmp_path):
    report = evaluate_robustness(
        model(), loader(data), {"a": weak(), "b": strong()}, state_dir=tmp_path, checks=None, batch_size=5
    )
    points = load_points(tmp_path)
    net = model().eval()
    for name, attack in {"a": weak(), "b": strong()}.items():
        indices, images = points[name]
        assert len(indices) == sum(stage.broken for stage in report.attacks["ab".index(name)].stages) > 0
        assert (images - data.x[indices]).abs().max() <= 0.05 * (1 + 1e-6)
        assert (net(images).argmax(1) != data.y[indices]).all()
        expected = attack(net, data.x[indices], data.y[indices], indices=indices)
        torch.testing.assert_close(images, expected)


def test_files_are_whole_or_not_there(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    folder = StateFolder(tmp_path, rank=0)
    folder.write({}, {"seconds": 1.0})
    monkeypatch.setattr("lightning_robust.evaluation.state.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        folder.write({}, {"seconds": 2.0})
    assert os.listdir(tmp_path) == ["part-0000-000000.pt"]
    assert StateFolder(tmp_path, rank=3).read({}) == [{"rank": 0, "seconds": 1.0}]


def test_the_fingerprint_of_weights_sees_every_tensor():
    first = weights_hash(model())
    assert first == weights_hash(model()) != weights_hash(model(seed=1))
    net = model()
    net[1].running_mean[0] += 1e-9
    assert weights_hash(net) != first
    assert weights_hash(model(dtype=torch.bfloat16)) != first
    assert weights_hash(None) == "unknown"


def columns(index, done, broken):
    count = len(index)
    flags = torch.zeros(count, 1, dtype=torch.bool)
    return {
        "index": torch.tensor(index),
        "label": torch.zeros(count, dtype=torch.long),
        "digest": torch.zeros(count, dtype=torch.float64),
        "prediction": torch.zeros(count, dtype=torch.long),
        "done": torch.tensor(done, dtype=torch.int32)[:, None],
        "broken": torch.tensor(broken, dtype=torch.int32)[:, None],
        "rounded": flags,
        "rounded_inside": flags.clone(),
    }


def test_ledgers_keep_the_worst_that_is_known():
    ledger = Ledger(1)
    ledger.merge(columns([4, 2, 9, 4], [0, 1, 2, 2], [-1, -1, -1, -1]))
    ledger.merge(columns([2, 9, 4, 7], [1, 1, 1, 0], [1, -1, -1, 0]))
    ledger.merge(columns([2, 7], [0, 2], [0, -1]))
    found = {
        int(row[0]): (int(row[1]), int(row[2]))
        for row in zip(*(ledger.columns()[name] for name in ("index", "done", "broken")), strict=True)
    }
    assert found == {4: (2, -1), 2: (0, 0), 9: (2, -1), 7: (0, 0)}


def test_ledgers_grow():
    ledger = Ledger(2)
    for start in range(0, 1000, 100):
        index = torch.arange(start, start + 100)
        ledger.add(index, index, index.double(), index)
    assert torch.equal(ledger.columns()["index"], torch.arange(1000))
    assert (ledger.columns()["broken"] == -1).all()
    assert len(ledger.take_changes()["index"]) == 1000
    assert len(ledger.take_changes()["index"]) == 0

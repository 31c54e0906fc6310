"""MislabelMonitor against a dictionary of margins, and on labels that are known to be wrong."""

import csv
from collections import defaultdict

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.callbacks import MislabelMonitor, SharpnessAware
from lightning_robust.metrics import assign_threshold_samples
from lightning_robust.sharpness import SAM
from support.modules import CLASSES, DictModule, Images, ManualModule, PlainModule, loader
from support.shuffled import fit, shuffled

EPOCHS = 4


def plain_loop(module, window=range(1, 99)):
    data, sampler = shuffled().dataset, shuffled().sampler
    optimizer, margins, suggested = module.train().configure_optimizers(), defaultdict(list), {}
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for rows in torch.tensor(list(sampler)).split(6):
            logits = module(data.x[rows])
            optimizer.zero_grad()
            F.cross_entropy(logits, data.y[rows]).backward()
            optimizer.step()
            for index, row, label in zip(rows.tolist(), logits.detach(), data.y[rows].tolist(), strict=True):
                if epoch in window:
                    others = [(float(row[k]), k) for k in range(CLASSES) if k != label]
                    margins[index].append(float(row[label]) - max(others)[0])
                    suggested[index] = max(others)[1]
    return margins, suggested


def check(monitor, margins, suggested, tolerance=1e-4):
    rows = monitor.suspects()
    assert sorted(row["index"] for row in rows) == sorted(margins)
    assert [row["aum"] for row in rows] == sorted(row["aum"] for row in rows)
    for row in rows:
        index = row["index"]
        assert row["aum"] == pytest.approx(sum(margins[index]) / len(margins[index]), rel=tolerance, abs=tolerance)
        assert row["visits"] == len(margins[index])
        assert row["label"] == Images(22).y[index]
        assert row["suggested"] == suggested[index]


@pytest.mark.parametrize(("options", "window"), [({}, range(1, 99)), ({"start_epoch": 0, "end_epoch": 2}, range(2))])
def test_equals_the_plain_loop(options, window):
    monitor, module, reference = MislabelMonitor(**options), PlainModule(), PlainModule()
    fit(module, monitor, max_epochs=EPOCHS)
    check(monitor, *plain_loop(reference, window))
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_sam_the_counted_pass_is_recorded():
    monitor = MislabelMonitor(start_epoch=0)
    fit(PlainModule(), SharpnessAware(SAM(rho=0.1)), monitor, max_epochs=EPOCHS)
    assert monitor.table.visits.tolist() == [EPOCHS] * 22


@pytest.mark.parametrize("kind", [DictModule, ManualModule])
def test_other_modules(kind):
    monitor = MislabelMonitor(start_epoch=0)
    fit(kind(), monitor, loader=loader(form="dict" if kind is DictModule else "pair", shuffle=True), max_epochs=2)
    assert monitor.table.visits.tolist() == [2] * 24
    assert torch.equal(monitor.table.labels, Images(24).y)


def test_the_indices_of_the_dataset_may_be_used():
    monitor, followed = MislabelMonitor(start_epoch=0, index_key="id"), MislabelMonitor(start_epoch=0)
    for callback in (monitor, followed):
        fit(DictModule(), callback, loader=shuffled("dict"), max_epochs=2)
    assert torch.equal(monitor.table.aum, followed.table.aum)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the second run goes on in it
@pytest.mark.parametrize("step", [3, 4, 9, 15])
def test_resume_is_exact(tmp_path, step):
    whole, rest = MislabelMonitor(), MislabelMonitor()
    start, options = tmp_path / f"step={step}.ckpt", {"enable_checkpointing": True, "max_epochs": EPOCHS}
    for callback, ckpt_path in ((whole, None), (rest, start)):
        saving = ModelCheckpoint(
            tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}", enable_version_counter=False
        )
        fit(PlainModule(), callback, saving, ckpt_path=ckpt_path, **options)
    for name, value in whole.table.state_dict().items():
        assert torch.equal(rest.table.state_dict()[name], value)
    assert rest.suspects() == whole.suspects()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(ValueError, match="remembers 22 samples but the training set has 24"):
        fit(PlainModule(), MislabelMonitor(), saving, loader=shuffled(length=24), ckpt_path=start, **options)


def noisy(count=120, wrong=12):
    """Blobs of three classes; some labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = 4 * F.one_hot(y, 3).float() + torch.randn(count, 3, generator=generator)
    bad = torch.randperm(count, generator=generator)[:wrong]
    given = y.clone()
    given[bad] = (y[bad] + 1) % 3
    return x, y, given, bad


class Blobs(PlainModule):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, classes))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_wrong_labels_come_first_and_the_right_ones_are_suggested():
    x, y, given, bad = noisy()
    monitor = MislabelMonitor(max_rows=12)
    fit(Blobs(3), monitor, loader=DataLoader(TensorDataset(x, given), 12, shuffle=True), max_epochs=15)
    rows = monitor.suspects()
    assert len({row["index"] for row in rows} & set(bad.tolist())) >= 10
    right = [row["suggested"] == y[row["index"]] for row in rows if row["index"] in bad]
    assert sum(right) >= 0.8 * len(right)
    assert "flagged" not in rows[0]


@pytest.mark.parametrize("how", ["argument", "dataset"])
def test_threshold_samples_flag_wrong_labels(how, tmp_path):
    x, _, given, bad = noisy(400, 40)
    chosen = assign_threshold_samples(given)
    data = TensorDataset(x, chosen.labels)
    options = {"threshold_samples": chosen.indices.tolist()} if how == "argument" else {}
    if how == "dataset":
        data.threshold_samples = chosen.indices
    monitor = MislabelMonitor(dirpath=tmp_path / "here", name="first", **options)
    fit(Blobs(4), monitor, loader=DataLoader(data, 12, shuffle=True), max_epochs=10)
    with (tmp_path / "here" / "suspicious_samples_first.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "aum", "visits", "suggested", "flagged"]
    assert [
        {name: type(value)(row[name]) for name, value in ours.items()}
        for row, ours in zip(rows, monitor.suspects(), strict=True)
    ] == monitor.suspects()
    judged = {int(row["index"]) for row in rows}
    assert judged == set(range(400)) - set(chosen.indices.tolist())
    flagged = {int(row["index"]) for row in rows if row["flagged"] == "1"}
    assert flagged >= judged & set(bad.tolist())
    assert len(flagged) < 60
    assert not list(tmp_path.glob("**/*.tmp"))


def test_the_file_goes_into_the_log_folder(tmp_path):
    fit(PlainModule(), MislabelMonitor(start_epoch=0), default_root_dir=tmp_path / "runs")
    with (tmp_path / "runs" / "mislabels" / "suspicious_samples.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 23
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(UserWarning, match="could not be written"):
        fit(PlainModule(), MislabelMonitor(start_epoch=0, dirpath=tmp_path / "taken"))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(PlainModule(), MislabelMonitor(start_epoch=0))
    assert not list(tmp_path.iterdir())


def test_half_precision():
    monitor = MislabelMonitor(start_epoch=0)
    fit(PlainModule(), monitor, precision="bf16-mixed")
    assert monitor.table.aum.isfinite().all()


class Mixes(Callback):
    mixes_samples = True


class Soft(Images):
    def __getitem__(self, index):
        return self.x[index], F.one_hot(self.y[index], CLASSES).float()


def test_refusals():
    with pytest.raises(ValueError, match="`start_epoch` to be an integer >= 0"):
        MislabelMonitor(start_epoch=-1)
    with pytest.raises(ValueError, match="`end_epoch` to be an integer >= 3"):
        MislabelMonitor(start_epoch=2, end_epoch=2)
    with pytest.raises(ValueError, match=r"`percentile` to be in \[0, 100\]"):
        MislabelMonitor(percentile=-1)
    with pytest.raises(ValueError, match="`max_rows` to be an integer >= 1"):
        MislabelMonitor(max_rows=0)
    with pytest.raises(ValueError, match="needs the margin of each sample but Mixes mixes them"):
        fit(PlainModule(), MislabelMonitor(), Mixes())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `MislabelMonitor`"):
        fit(PlainModule(), MislabelMonitor(), MislabelMonitor(start_epoch=0))
    fit(PlainModule(), MislabelMonitor(start_epoch=0), MislabelMonitor(start_epoch=0, name="second"))
    with pytest.raises(
        ValueError, match=r"`threshold_samples` to be indices from 0 to 21, at least one, but got \[22\]"
    ):
        fit(PlainModule(), MislabelMonitor(start_epoch=0, threshold_samples=[22]))
    with pytest.raises(ValueError, match=r"torch.float32 targets \[6, 4\]"):
        fit(PlainModule(), MislabelMonitor(start_epoch=0), loader=DataLoader(Soft(), 6))
    with pytest.raises(RuntimeError, match=r"has no samples yet; call trainer.fit first"):
        MislabelMonitor().suspects()
    with pytest.warns(UserWarning, match="counts from epoch 1 on and this run has 1; lower start_epoch"):
        fit(PlainModule(), MislabelMonitor())

# SPDX-License-Identifier: Apache-2.0
"""The monitor on modules that know nothing of it, against metrics computed offline on the same logits."""

import csv
import io
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_robust.callbacks import CalibrationMonitor
from lightning_robust.metrics import TopLabelReliability
from lightning_robust.training import BatchAdapter, LogitsNotCaptured
from support.modules import CollectionModule, DictModule, PlainModule, loader, trainer

NAMES = ("ece", "mce", "confidence_gap", "nll", "brier")


class ReturnsLogits(PlainModule):
    def validation_step(self, batch, batch_idx):
        logits = torch.nn.Sequential.forward(self.net, batch[0])  # no hook sees this
        return {"logits": logits}


class TestStep(PlainModule):
    __test__ = False

    def test_step(self, batch, batch_idx):
        self.net(batch[0])


class TwoLoaders(PlainModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net(batch[0])


class Changed(torch.utils.data.Dataset):
    """The usual images, each pair passed through a function."""

    def __init__(self, function):
        self.pairs = [function(x, y) for x, y in loader().dataset]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def changed(function):
    return torch.utils.data.DataLoader(Changed(function), batch_size=6)


def silent(**options):
    return CalibrationMonitor(display="off", **options)


def expected(module, **data):
    """The scores of the module on the loader, from one forward over all samples."""
    samples = loader(**{**data, "form": "pair"})
    x, y = (torch.cat(parts) for parts in zip(*samples, strict=True))
    metric = TopLabelReliability()
    with torch.no_grad():
        metric.update(module.eval().net(x), y)
    table = metric.compute()
    values = (table.error("l1"), table.error("max"), table.confidence_gap, table.nll, table.brier)
    return dict(zip(NAMES, (value.item() for value in values), strict=True))


def check(metrics, values, stage="val", suffix="", rel=1e-5):
    for name in NAMES:
        assert metrics[f"{stage}/{name}{suffix}"].item() == pytest.approx(values[name], rel=rel, abs=1e-6), name


@pytest.mark.parametrize(
    ("module", "form"),
    [(PlainModule, "pair"), (DictModule, "dict"), (CollectionModule, "triple"), (ReturnsLogits, "pair")],
)
def test_equals_an_offline_computation_on_any_module(module, form):
    module = module()
    run = trainer(silent(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct")
        run.fit(module, loader(form=form), loader(30, 8, form=form, seed=1))
    check(run.callback_metrics, expected(module, length=30, seed=1))
    assert "validation_step" not in vars(module)  # the module has its own step back
    assert not module.net._forward_hooks


def test_validate_and_test():
    module = TestStep()
    values = expected(module, length=30, seed=1)
    run = trainer(silent())
    (logged,) = run.validate(module, loader(30, seed=1), verbose=False)
    assert logged["val/ece"] == pytest.approx(values["ece"], rel=1e-5)
    (logged,) = run.test(module, loader(30, seed=1), verbose=False)
    assert logged["test/nll"] == pytest.approx(values["nll"], rel=1e-5)
    assert set(logged) == {f"test/{name}" for name in NAMES}


def test_stages():
    module = TestStep()
    run = trainer(silent(stages=["test"]))
    (logged,) = run.validate(module, loader(), verbose=False)
    assert not any("ece" in name for name in logged)
    (logged,) = run.test(module, loader(), verbose=False)
    assert "test/ece" in logged


def test_logits_from_and_batch():
    class TwoNetworks(PlainModule):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(72, 3)

        def validation_step(self, batch, batch_idx):
            self.other(batch[1].flatten(1)), self.net(batch[1])

    module = TwoNetworks()
    run = trainer(silent(logits_from="net", batch=BatchAdapter(input_key=1, target_key=0)))
    run.validate(module, changed(lambda x, y: (y, x)), verbose=False)
    check(run.callback_metrics, expected(module))


def test_missing_logits_are_reported_at_the_first_batch_of_the_sanity_check():
    class Hidden(PlainModule):
        def validation_step(self, batch, batch_idx):
            torch.nn.Sequential.forward(self.net, batch[0])

    module = Hidden()
    with pytest.raises(LogitsNotCaptured, match="logits_from"):
        trainer(silent(), num_sanity_val_steps=1).fit(module, loader(), loader())
    assert "validation_step" not in vars(module)
    with pytest.raises(ValueError, match="names no sub-module of Hidden"):
        trainer(silent(logits_from="nett")).validate(module, loader(), verbose=False)


def test_another_callback_that_runs_the_network_does_not_matter():
    class Disturbs(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            pl_module(torch.rand(3, 2, 6, 6))

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            pl_module(torch.rand_like(batch[0]))

    module = PlainModule()
    run = trainer(Disturbs(), silent())
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, expected(module))


def test_the_sanity_check_is_not_counted(tmp_path):
    monitor = silent()
    run = trainer(monitor, num_sanity_val_steps=2, max_epochs=2, default_root_dir=tmp_path / "runs")
    run.fit(PlainModule(), loader(), loader(30))
    assert len(monitor.state_dict()["history"]["val"]) == 2
    assert sorted(path.name for path in (tmp_path / "runs" / "calibration").iterdir()) == [
        f"reliability_val_000{epoch}.{kind}" for epoch in (0, 1) for kind in ("csv", "png")
    ]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files(tmp_path):
    run = trainer(silent(n_bins=5), logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(PlainModule(), loader(), loader(30, 8))
    folder = Path(run.log_dir) / "calibration"
    rows = read(folder / "reliability_val_0000.csv")
    assert sum(int(row["count"]) for row in rows) == 30
    ece = sum(int(row["count"]) * abs(float(row["gap"])) for row in rows if int(row["count"])) / 30
    assert ece == pytest.approx(run.callback_metrics["val/ece"].item(), rel=1e-5)
    assert (folder / "reliability_val_0000.png").read_bytes()[:4] == b"\x89PNG"
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def test_every_n_epochs_and_dirpath(tmp_path):
    run = trainer(silent(every_n_epochs=2, dirpath=tmp_path / "here"), max_epochs=4)
    run.fit(PlainModule(), loader(), loader())
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert [name for name in names if name.endswith("png")] == [f"reliability_val_000{e}.png" for e in (0, 2)]
    assert [name for name in names if name.endswith("csv")] == [f"reliability_val_000{e}.csv" for e in range(4)]


@pytest.mark.parametrize(
    "options", [{}, {"logger": False, "default_root_dir": "."}, {"fast_dev_run": True, "default_root_dir": "runs"}]
)
def test_nothing_is_written_where_nobody_would_look(options):
    module = PlainModule()
    run = trainer(silent(), **options)
    run.fit(module, loader(), loader())
    assert "val/ece" in run.callback_metrics
    assert list(Path.cwd().rglob("reliability*")) == []


def test_without_matplotlib_only_the_table_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = trainer(silent(), default_root_dir=tmp_path / "runs")
    run.fit(PlainModule(), loader(), loader())
    assert [path.name for path in (tmp_path / "runs" / "calibration").iterdir()] == ["reliability_val_0000.csv"]


def test_save_figures_off(tmp_path):
    run = trainer(silent(save_figures=False), default_root_dir=tmp_path / "runs")
    run.fit(PlainModule(), loader(), loader())
    assert [path.name for path in (tmp_path / "runs" / "calibration").iterdir()] == ["reliability_val_0000.csv"]


def test_a_folder_that_cannot_be_written_is_warned_about(tmp_path):
    (tmp_path / "file").touch()
    run = trainer(silent(dirpath=tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="could not be written"):
        run.fit(PlainModule(), loader(), loader())


def test_several_loaders_are_kept_apart():
    module = TwoLoaders()
    run = trainer(silent())
    run.validate(module, [loader(30, seed=1), loader(12, seed=2)], verbose=False)
    check(run.callback_metrics, expected(module, length=30, seed=1), suffix="/dataloader_idx_0")
    check(run.callback_metrics, expected(module, length=12, seed=2), suffix="/dataloader_idx_1")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision):
    module = PlainModule(norm=False)
    values = expected(module)
    run = trainer(silent(), precision=precision)
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, values, rel=0.05)


def test_nan_logits_are_warned_about_and_do_not_stop_the_training():
    class Diverged(PlainModule):
        def forward(self, x):
            return self.net(x) * torch.nan

    module = Diverged()
    run = trainer(silent(), max_epochs=1)
    with pytest.warns(UserWarning, match="24 rows of the logits of val contain NaN"):
        run.fit(module, loader(), loader())
    assert run.callback_metrics["val/ece"].isnan()


def test_wrong_labels_stop_it():
    module = TwoLoaders()
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 3\]"):
        trainer(silent(), num_sanity_val_steps=1).fit(module, loader(), changed(lambda x, y: (x, y + 3)))


class Recording(Logger):
    """What remote loggers look like from the outside."""

    def __init__(self):
        super().__init__()
        self.figures = []

    name = version = "fake"

    @property
    def save_dir(self):
        return None

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None): ...


class LikeWandb(Recording):
    def log_image(self, key, images, step=None):
        self.figures.append((key, images[0], step))


class LikeMlflow(Recording):
    run_id = "run"

    @property
    def experiment(self):
        return self

    def log_figure(self, run_id, figure, artifact_file):
        self.figures.append((artifact_file, figure, run_id))


class Broken(Recording):
    @property
    def experiment(self):
        return self

    def add_figure(self, name, figure, global_step):
        raise ConnectionError("no network")


def test_tensorboard_gets_the_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(silent(), logger=TensorBoardLogger(tmp_path), max_epochs=2)
    run.fit(PlainModule(), loader(), loader())
    events = EventAccumulator(run.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("val/reliability")] == [4, 8]
    assert len(events.Scalars("val/ece")) == 2


def test_loggers_are_told_apart_by_what_they_offer():
    wandb, mlflow, other = LikeWandb(), LikeMlflow(), Recording()
    other_csv = CSVLogger("csv")
    trainer(silent(), logger=[wandb, mlflow, other_csv]).fit(PlainModule(), loader(), loader())
    assert [(key, step) for key, _, step in wandb.figures] == [("val/reliability", 4)]
    assert [(name, run_id) for name, _, run_id in mlflow.figures] == [("val/reliability_00000004.png", "run")]
    assert other.figures == []


def test_a_logger_that_fails_does_not_stop_the_training():
    with pytest.warns(UserWarning, match=r"Broken did not take the figure 'val/reliability': .*no network"):
        trainer(silent(), logger=[Broken()]).fit(PlainModule(), loader(), loader())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_checkpoints_can_follow_the_ece_and_the_history_resumes(tmp_path):
    def run(epochs, monitor):
        best = ModelCheckpoint(tmp_path / "best", monitor="val/ece", filename="{epoch}", save_top_k=-1)
        result = trainer(monitor, best, enable_checkpointing=True, max_epochs=epochs)
        ckpt = tmp_path / "best" / "epoch=1.ckpt"
        result.fit(PlainModule(), loader(), loader(), ckpt_path=ckpt if ckpt.exists() else None)
        return best

    first = silent()
    best = run(2, first)
    assert best.best_model_score.item() == pytest.approx(min(first.state_dict()["history"]["val"]), rel=1e-5)
    second = silent()
    run(3, second)
    assert second.state_dict()["history"]["val"][:2] == first.state_dict()["history"]["val"]
    assert len(second.state_dict()["history"]["val"]) == 3


@pytest.mark.parametrize("order", [1, -1])
def test_two_monitors_do_not_disturb_each_other(order, tmp_path):
    module = PlainModule()
    monitors = [silent(dirpath=tmp_path), silent(dirpath=tmp_path, n_bins=5, name="coarse")][::order]
    run = trainer(*monitors, max_epochs=3, num_sanity_val_steps=1)
    run.fit(module, loader(), loader())
    run.validate(module, loader(), verbose=False)
    assert run.callback_metrics["val/nll"] == run.callback_metrics["val/coarse/nll"]
    assert "validation_step" not in vars(module)
    assert not module.net._forward_hooks
    names = {path.name for path in tmp_path.iterdir()}
    assert {"reliability_val_0000.csv", "reliability_val_coarse_0000.csv"} <= names
    assert len({monitor.state_key for monitor in monitors}) == 2
    assert all("val/coarse" in monitor.state_dict()["history"] for monitor in monitors if monitor.name)


def test_the_wrapper_of_another_callback_stays():
    class Wraps(L.Callback):
        def on_validation_epoch_start(self, run, pl_module):
            inner = pl_module.validation_step
            vars(pl_module)["validation_step"] = lambda batch, batch_idx: inner(batch, batch_idx)

    module = PlainModule()
    run = trainer(silent(), Wraps())
    run.validate(module, loader(), verbose=False)
    theirs = vars(module)["validation_step"]
    values = expected(module)
    run = trainer(silent())
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, values)
    assert vars(module)["validation_step"] is theirs


def test_two_monitors_of_one_name_are_refused():
    message = "Two CalibrationMonitor callbacks of this Trainer have the name None"
    with pytest.raises(ValueError, match=message):
        trainer(silent(), silent(n_bins=5)).validate(PlainModule(), loader(), verbose=False)
    apart = [silent(stages=["validate"]), silent(stages=["test"])]
    trainer(*apart).validate(PlainModule(), loader(), verbose=False)


def test_a_name_keeps_the_values_of_the_module():
    class LogsNll(PlainModule):
        def validation_step(self, batch, batch_idx):
            self.net(batch[0])
            self.log("val/nll", 7.0)

    module = LogsNll()
    run = trainer(silent(name="calibration"))
    run.validate(module, loader(), verbose=False)
    assert run.callback_metrics["val/nll"] == 7
    assert run.callback_metrics["val/calibration/nll"].item() == pytest.approx(expected(module)["nll"], rel=1e-5)


def test_line(capsys):
    run = trainer(CalibrationMonitor(), max_epochs=2)
    run.fit(PlainModule(), loader(), loader())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["val · epoch 0", "val · epoch 1"]
    assert f"ece {run.callback_metrics['val/ece'].item():.4f}" in lines[1]


def test_off_and_print_and_tqdm(capsys):
    trainer(silent()).validate(PlainModule(), loader(), verbose=False)
    assert capsys.readouterr().out == ""
    trainer(CalibrationMonitor(display="print")).validate(PlainModule(), loader(), verbose=False)
    assert "calibration" in capsys.readouterr().out
    run = trainer(CalibrationMonitor(display="print"), TQDMProgressBar(), enable_progress_bar=True)
    run.validate(PlainModule(), loader(), verbose=False)
    assert "calibration" in capsys.readouterr().out


@pytest.fixture
def screen():
    """A terminal in memory, seen by Lightning's bar through the global console."""
    before = dict(vars(rich.get_console()))
    file = io.StringIO()
    yield lambda **size: {"file": file, "force_terminal": True, "_environ": {}, **size}, file
    vars(rich.get_console()).update(before)


def test_panel_below_the_rich_bar(screen):
    console, file = screen
    monitor = CalibrationMonitor()
    bar = RichProgressBar(console_kwargs=console(width=100, height=40))
    run = trainer(monitor, bar, enable_progress_bar=True, max_epochs=2)
    run.fit(PlainModule(), loader(), loader())
    final = file.getvalue().rpartition("Epoch 1/1")[2]
    assert "calibration · val · epoch 1" in final
    assert f"{run.callback_metrics['val/ece'].item():.4f}" in final
    # a second run starts without the old panel and draws its own
    file.truncate(0)
    run.validate(PlainModule(), loader(), verbose=False)
    assert "epoch 1" not in file.getvalue()
    assert "calibration · val · n 24" in file.getvalue()


def test_panel_survives_a_bar_that_is_created_per_epoch(screen):
    console, file = screen
    bar = RichProgressBar(leave=True, console_kwargs=console(width=100, height=40))
    trainer(CalibrationMonitor(), bar, enable_progress_bar=True, max_epochs=2).fit(PlainModule(), loader(), loader())
    assert "calibration · val · epoch 1" in file.getvalue().rpartition("Epoch 1/1")[2]


@pytest.mark.parametrize("size", [{"width": 100, "height": 12}, {"width": 40, "height": 40}])
def test_small_terminals(screen, size):
    console, file = screen
    bar = RichProgressBar(console_kwargs=console(**size))
    trainer(CalibrationMonitor(), bar, enable_progress_bar=True).fit(PlainModule(), loader(), loader())
    assert "val · epoch 0" in file.getvalue()


def test_several_loaders_share_the_panel(screen):
    console, file = screen
    bar = RichProgressBar(console_kwargs=console(width=100, height=40))
    run = trainer(CalibrationMonitor(), bar, enable_progress_bar=True)
    run.validate(TwoLoaders(), [loader(), loader(12)], verbose=False)
    assert "calibration · val/dataloader_idx_0 · n 24" in file.getvalue()
    assert "val/dataloader_idx_1  ece" in file.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 0}, "`n_bins` to be an integer >= 1"),
        ({"closed": "both"}, "`closed` to be one of"),
        ({"display": "loud"}, "`display` to be one of"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer >= 1"),
        ({"stages": ["fit"]}, "`stages` to be one of 'validate', 'test'"),
    ],
)
def test_refuses_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationMonitor(**options)


def distributed_main(folder):
    module = PlainModule()
    run = trainer(CalibrationMonitor(), devices=2, strategy="ddp", default_root_dir=Path(folder) / "runs")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        run.fit(module, loader(), loader(30, 4, seed=1))
    values = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    torch.save((values, module.state_dict()), Path(folder) / f"rank{run.global_rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert results[0][0] == results[1][0]
    module = PlainModule()
    module.load_state_dict(results[0][1])
    values = expected(module, length=30, seed=1)  # 30 samples: the sampler has nothing to pad
    for name in NAMES:
        assert results[0][0][f"val/{name}"] == pytest.approx(values[name], rel=1e-5, abs=1e-6)
    assert outputs[0].count("val · epoch 0") == 1
    assert "val · epoch 0" not in outputs[1]
    assert len(list((tmp_path / "runs" / "calibration").iterdir())) == 2


if __name__ == "__main__":
    distributed_main(sys.argv[1])

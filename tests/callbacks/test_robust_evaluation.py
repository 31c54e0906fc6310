"""Robustness through `trainer.test` and `trainer.validate`, against the engine on the same samples."""

import io

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import CalibrationMonitor, RobustEvaluation, RobustnessMonitor
from lightning_robust.evaluation import RobustnessReport, evaluate_robustness
from support.attacked import differences, snapshot
from support.modules import trainer
from support.robustness import Chain, Labelled, loader, model, strong, weak


class Evaluated(L.LightningModule):
    """Written the way people write them."""

    def __init__(self):
        super().__init__()
        self.net = model()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4, average="micro")

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("acc", self.accuracy)

    test_step = validation_step


@pytest.fixture(scope="module")
def data():
    return Labelled()


@pytest.fixture(scope="module")
def expected(data):
    return evaluate_robustness(model(), loader(data), attacks(), checks=None)


def attacks():
    return {"chain": Chain(eps=0.03), "l2": PGD(norm="l2", eps=0.2, steps=3)}


def evaluation(given=None, **options):
    options = {"checks": None, "display": "off", **options}
    return RobustEvaluation(attacks() if given is None else given, **options)


def numbers(report):
    values = report.to_dict()
    for attack in values["attacks"]:
        for stage in attack["stages"]:
            del stage["seconds"]
    free = ("seconds", "earlier_seconds", "model", "batch_size")
    return {name: value for name, value in values.items() if name not in free}


@pytest.mark.parametrize("stage", ["test", "validate"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_report_is_that_of_the_plain_function(data, expected, stage, inference_mode):
    getattr(trainer(), stage)(Evaluated(), loader(data), verbose=False)
    state = torch.get_rng_state()  # a loader draws, too
    callback, module = evaluation(), Evaluated()
    before = snapshot(module.net)
    run = trainer(callback, inference_mode=inference_mode)
    (logged,) = getattr(run, stage)(module, loader(data), verbose=False)
    assert torch.equal(state, torch.get_rng_state())
    assert differences(module.net, before) == []
    assert numbers(callback.report) == numbers(expected)
    prefix = {"test": "test", "validate": "val"}[stage]
    assert logged == {
        "acc": pytest.approx(52 / 61),
        f"{prefix}/robust_acc": pytest.approx(expected.robust_accuracy),
        f"{prefix}/robust_clean_acc": pytest.approx(52 / 61),
        f"{prefix}/robust_acc_chain": pytest.approx(expected.attacks[0].robust_accuracy),
        f"{prefix}/robust_acc_l2": pytest.approx(expected.attacks[1].robust_accuracy),
    }
    assert not {"log", "log_dict", "test_step", "validation_step"} & set(vars(module))
    assert not {"setup_data", "process_dataloader", "batch_to_device"} & (
        set(vars(run.strategy)) | set(vars(run.test_loop)) | set(vars(run.validate_loop))
    )


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"size": 61},
        {"size": 7, "num_workers": 2},
        {"size": 9, "sampler": torch.utils.data.SubsetRandomSampler(range(61))},
    ],
    ids=["shuffled", "one batch", "workers", "sampler"],
)
@pytest.mark.filterwarnings("ignore:Your .test_dataloader.'s sampler has shuffling enabled")
def test_the_loader_changes_nothing(data, expected, options):
    callback = evaluation(batch_size=11)
    trainer(callback).test(Evaluated(), loader(data, **options), verbose=False)
    assert numbers(callback.report) == numbers(expected)


def test_indices_in_the_batch(expected):
    data = Labelled()
    with_index = TensorDataset(data.x, data.y, torch.arange(len(data)))
    callback = evaluation(index_key=2)
    trainer(callback).test(Evaluated(), DataLoader(with_index, batch_size=10), verbose=False)
    assert numbers(callback.report) == numbers(expected)


def test_the_second_of_two_loaders(data, expected):
    class Two(Evaluated):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    callback = evaluation(dataloader_idx=1)
    trainer(callback).test(Two(), [loader(Labelled(length=20)), loader(data)], verbose=False)
    assert numbers(callback.report) == numbers(expected)


def test_samples_below_an_index(data):
    callback = evaluation(weak(), max_samples=20)
    trainer(callback).test(Evaluated(), loader(data, size=7), verbose=False)
    plain = evaluate_robustness(model(), loader(data), weak(), checks=None, max_samples=20)
    assert numbers(callback.report) == numbers(plain)


def test_what_is_written_and_shown(data, tmp_path, capsys):
    callback = evaluation(strong(), out=tmp_path, display="auto", checks="quick", name="pgd")
    trainer(callback).test(Evaluated(), loader(data), verbose=False)
    assert RobustnessReport.load(tmp_path / "pgd_test.json") == callback.report
    assert callback.report.checks
    shown = capsys.readouterr().out
    assert "Evaluated: 61 samples, 4 classes" in shown
    assert "sanity checks" in shown
    pytest.importorskip("matplotlib")
    assert (tmp_path / "pgd_test.png").stat().st_size > 0
    line = evaluation(strong(), display="line")
    trainer(line).test(Evaluated(), loader(data), verbose=False)
    assert capsys.readouterr().out.startswith(f"Evaluated: clean 85.25%, robust {line.report.robust_accuracy:.2%}")


@pytest.mark.parametrize("height", [10, 40])
def test_a_panel_below_the_rich_bar(data, height, monkeypatch):
    monkeypatch.setattr("lightning_robust.callbacks._robust_display._PANEL_EVERY_S", 0.0)
    file = io.StringIO()
    console = {"file": file, "force_terminal": True, "_environ": {}, "width": 100, "height": height}
    bar = RichProgressBar(console_kwargs=console)
    callback = evaluation(display="auto")
    trainer(callback, bar, enable_progress_bar=True).test(Evaluated(), loader(data), verbose=False)
    shown = file.getvalue()
    # a small terminal has room for lines only, and the first comes after some seconds
    assert ("61/61 samples, robust so far" in shown) == (height == 40)
    assert "Evaluated: 61 samples, 4 classes" in shown


def test_lines_where_there_is_no_terminal(data, monkeypatch, capsys):
    monkeypatch.setattr("lightning_robust.callbacks._robust_display._LINE_EVERY_S", 0.0)
    trainer(evaluation(display="line")).test(Evaluated(), loader(data), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16/61 samples, robust so far")
    assert "remaining" in lines[1]


def test_nothing_is_written_into_the_working_directory(data, tmp_path):
    trainer(evaluation(weak())).test(Evaluated(), loader(data), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_is_left_alone(data):
    class Trains(Evaluated):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = evaluation(weak())
    run = trainer(callback)
    run.fit(Trains(), loader(data), loader(data))
    assert callback.report is None
    assert not any("robust" in name for name in run.callback_metrics)


def test_beside_other_monitors(data, expected):
    callback = evaluation()
    others = [RobustnessMonitor(weak()), CalibrationMonitor(display="off", save_figures=False)]
    module = Evaluated()
    (logged,) = trainer(others[0], callback, others[1]).test(module, loader(data), verbose=False)
    assert numbers(callback.report) == numbers(expected)
    assert {"test/adv_acc", "test/ece", "test/robust_acc"} <= set(logged)
    assert logged["acc"] == pytest.approx(52 / 61)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "bf16-true"])
def test_precisions(precision):
    data = Labelled(dtype=torch.float32)

    class Single(Evaluated):
        def __init__(self):
            super().__init__()
            self.net = model(dtype=torch.float32)

    callback = evaluation(strong(), craft_dtype="bfloat16" if precision == "bf16-mixed" else None)
    trainer(callback, precision=precision).test(Single(), loader(data), verbose=False)
    report = callback.report
    if precision != "bf16-true":
        assert report.clean_accuracy == pytest.approx(52 / 61)  # float32, whatever the Trainer computes in
    assert report.inputs["dtype"] == ("bfloat16" if precision == "bf16-true" else "float32")
    assert report.attacks[0].stages[0].rejected == 0


class Fails(PGD):
    """Raises in its n-th call; one for all runs of a test."""

    left = 0

    def solve(self, problem, start=None):
        type(self).left -= 1
        if type(self).left == 0:
            raise KeyError("on purpose")
        return super().solve(problem, start)


def test_an_exception_leaves_nothing_behind_and_the_rest_continues(data, tmp_path):
    Fails.left = 0
    whole = evaluation(Fails(eps=0.03))
    trainer(whole).test(Evaluated(), loader(data, size=8), verbose=False)
    Fails.left = 4
    module, callback = Evaluated(), evaluation(Fails(eps=0.03), state_dir=tmp_path / "state")
    run = trainer(callback)
    before = snapshot(module.net)
    with pytest.raises(KeyError, match="on purpose"):
        run.test(module, loader(data, size=8), verbose=False)
    assert differences(module.net, before, ignore=["mode"]) == []  # Lightning leaves it in evaluation mode
    assert not {"log", "log_dict", "test_step"} & set(vars(module))
    assert not {"setup_data", "process_dataloader", "batch_to_device"} & (
        set(vars(run.strategy)) | set(vars(run.test_loop))
    )
    Fails.left = 0
    again = evaluation(Fails(eps=0.03), state_dir=tmp_path / "state")
    trainer(again).test(Evaluated(), loader(data, size=8), verbose=False)
    assert numbers(again.report) == numbers(whole.report)
    assert again.report.earlier_seconds > 0


def test_one_callback_many_runs(data, expected):
    callback = evaluation()
    run = trainer(callback)
    for stage in ("test", "validate", "test"):
        getattr(run, stage)(Evaluated(), loader(data), verbose=False)
        assert numbers(callback.report) == numbers(expected)


def test_a_step_that_evaluates_another_function_is_refused(data):
    class Scales(Evaluated):
        def test_step(self, batch, batch_idx):
            return {"logits": self(batch[0]) * 1.1}

    with pytest.raises(ValueError, match="Scales computes other logits than its forward"):
        trainer(evaluation()).test(Scales(), loader(data), verbose=False)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(2, 6, 6).double(), 0)])


def test_loaders_without_indices_are_refused(data):
    with pytest.raises(TypeError, match=r"The test dataset Stream is an IterableDataset.*index_key"):
        trainer(evaluation()).test(Evaluated(), DataLoader(Stream()), verbose=False)


def test_batches_that_lost_samples_are_refused(data):
    def drops(samples):
        return torch.utils.data.default_collate(samples[1:])

    with pytest.raises(ValueError, match="The loader put 16 samples into this batch, which has 15 now"):
        trainer(evaluation()).test(Evaluated(), loader(data, collate_fn=drops), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": {"a": weak(targeted=True)}}, "'a' is targeted"),
        ({"given": {}}, "Expected at least one attack"),
        ({"mode": "both"}, "Expected `mode`"),
        ({"batch_size": 0}, "Expected `batch_size`"),
        ({"max_samples": 0}, "Expected `max_samples`"),
        ({"checks": "all"}, "Expected `checks`"),
        ({"display": "loud"}, "Expected `display`"),
        ({"craft_dtype": "int8"}, "Expected `craft_dtype`"),
        ({"dataloader_idx": -1}, "Expected `dataloader_idx`"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**options)


def test_two_of_one_name_are_refused(data):
    with pytest.raises(ValueError, match="Two RobustEvaluation callbacks of this Trainer have the name 'robust'"):
        trainer(evaluation(), evaluation()).test(Evaluated(), loader(data), verbose=False)
    both = [evaluation(weak(), name="a"), evaluation(strong(), name="b")]
    (logged,) = trainer(*both).test(Evaluated(), loader(data), verbose=False)
    assert logged["test/a_acc"] > logged["test/b_acc"]

"""The reusable module, under a real Trainer."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_robust.callbacks import ObjectiveTraining
from lightning_robust.data import DigitsDataModule
from lightning_robust.losses import Criterion, CrossEntropy
from lightning_robust.models import ImageClassifier
from lightning_robust.objectives import Objective, ObjectiveOutput, Prepared

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def small(**kwargs):
    options = {"num_classes": 4, "in_chans": 1, "backbone_options": {"width": 4}}
    return ImageClassifier(kwargs.pop("backbone", "resnet8_cifar"), **{**options, **kwargs})


def trainer(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, **kwargs})


def samples(count=12, classes=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(1, 8, 8, generator=generator), index % classes) for index in range(count)]


def loader(count=12, form=None, batch_size=5, classes=4):
    return DataLoader(samples(count, classes), batch_size, collate_fn=form)


class Quadratic(Objective):
    """A loss that is not the module's own, with a part of its own that is trained."""

    def __init__(self, trainable=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=trainable)

    def prepare(self, model, x, y, *, generator=None):
        return Prepared(x, y)

    def forward(self, model, prepared):
        logits = model(prepared.x)
        return ObjectiveOutput(loss=self.scale * logits.square().mean(), logits=logits, logs={})


def test_trains_on_real_digits():
    torch.manual_seed(0)
    data = DigitsDataModule(image_size=8, batch_size=64)
    model = small(num_classes=10, mean=data.mean, std=data.std, lr_scheduler="cosine", scheduler_interval="step",
                  backbone_options={"width": 8})  # fmt: skip
    run = trainer(max_epochs=3)
    run.fit(model, data)
    assert set(run.callback_metrics) == {"train/loss", "train/acc", "val/loss", "val/acc"}
    [result] = run.test(model, data, verbose=False)
    assert result["test/acc"] > 0.93
    assert run.optimizers[0].param_groups[0]["lr"] < 1e-6
    # the logged values against a plain loop
    model.eval()
    images = torch.stack([data.test_set[index][0] for index in range(len(data.test_set))])
    with torch.no_grad():
        logits, labels = model(images), data.test_set.dataset.labels
    assert result["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_steps_return_loss_and_logits():
    model = small()
    x, y = next(iter(loader()))
    for step in (model.training_step, model.validation_step, model.test_step):
        with pytest.warns(UserWarning, match="reference is not registered"):
            output = step((x, y), 0)
        assert set(output) == {"loss", "logits"}
        torch.testing.assert_close(output["loss"], nn.functional.cross_entropy(output["logits"], y))
    torch.testing.assert_close(model.eval().predict_step((x, y), 0), model(x))
    torch.testing.assert_close(model.predict_step(x, 0), model(x))


def test_normalises_inside():
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model = small(backbone=inner, mean=[0.5], std=[0.1], backbone_options=None)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model(x), inner((x - 0.5) / 0.1))
    assert small(backbone=inner, backbone_options=None)(x).equal(inner(x))


@pytest.mark.parametrize("form", ["pair", "dict", "soft"])
def test_batch_forms(form):
    def collate(batch):
        x, y = torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])
        if form == "dict":
            return {"image": x, "label": y}
        return (x, nn.functional.one_hot(y, 4).float()) if form == "soft" else (x, y, torch.arange(len(y)))

    run = trainer(max_epochs=1)
    run.fit(small(), loader(form=collate), loader(form=collate))
    assert 0 <= run.callback_metrics["val/acc"] <= 1


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_bad_first_batches_are_refused(stage):
    def bad(**change):
        def collate(batch):
            x, y = torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])
            return change.get("x", lambda x: x)(x), change.get("y", lambda y: y)(y)

        return loader(form=collate)

    cases = [
        (bad(x=lambda x: (255 * x).byte()), TypeError, "divide integer images by 255"),
        (bad(x=lambda x: 3 * x - 1), ValueError, r"Expected images in \[0, 1\]"),
        (bad(x=lambda x: x * float("nan")), ValueError, "without NaN"),
        (bad(x=lambda x: x.expand(-1, 3, -1, -1)), ValueError, r"images of shape \[B, 1, H, W\]"),
        (bad(y=lambda y: y + 1), ValueError, "Expected labels from 0 to 3 but got values from 1 to 4"),
    ]
    for data, error, message in cases:
        run = trainer(num_sanity_val_steps=0)
        start = {"train": run.fit, "val": run.validate, "test": run.test}[stage]
        with pytest.raises(error, match=message):
            start(small(), data)


def test_forward_looks_at_values_once():
    model = small()
    with pytest.raises(ValueError, match=r"Expected images in \[0, 1\]"):
        model(torch.full((2, 1, 8, 8), 2.0))
    model(torch.rand(2, 1, 8, 8))
    model(torch.full((2, 1, 8, 8), 2.0))
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        model(torch.rand(2, 3, 8, 8))


def test_wrong_number_of_logits_is_refused():
    model = small(backbone=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), backbone_options=None)
    with pytest.raises(ValueError, match=r"Expected logits \[B, 4\] of the backbone but got \[2, 3\]"):
        model(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "`num_classes` to be an integer >= 2"),
        ({"mean": [0.5]}, "`mean` and `std` together"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "to have 1 or 1 values but got 3"),
        ({"lr_scheduler": "linear"}, "`lr_scheduler` to be one of 'cosine'"),
        ({"scheduler_interval": "batch"}, "`scheduler_interval` to be one of"),
        ({"backbone": "resnet8_cifer"}, "did you mean resnet8_cifar"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_default_optimizer_and_schedulers():
    settings = small().configure_optimizers().param_groups[0]
    assert (settings["lr"], settings["momentum"], settings["weight_decay"], settings["nesterov"]) == (
        0.1,
        0.9,
        5e-4,
        False,
    )
    assert len(settings["params"]) == len(list(small().parameters()))
    model = small(
        optimizer=torch.optim.Adam, lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss")
    )
    configured = model.configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.Adam)
    assert configured["lr_scheduler"]["monitor"] == "val/loss"
    assert configured["lr_scheduler"]["interval"] == "epoch"


@pytest.mark.parametrize(("interval", "horizon"), [("epoch", 4), ("step", 12)])
def test_cosine_spans_the_run(interval, horizon):
    model, run = small(lr_scheduler="cosine", scheduler_interval=interval), trainer(max_epochs=4)
    run.fit(model, loader())
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert scheduler.T_max == horizon
    assert scheduler.last_epoch == horizon
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_cosine_needs_an_end():
    with pytest.raises(ValueError, match="Expected a Trainer with max_epochs"):
        trainer(max_epochs=-1, max_steps=3).fit(small(lr_scheduler="cosine"), loader())


def test_frozen_parameters_are_left_out():
    model = small()
    model.backbone.conv1.requires_grad_(False)
    assert len(model.configure_optimizers().param_groups[0]["params"]) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("trainable", [False, True])
def test_objective_is_trained_through_its_callback(trainable, tmp_path):
    objective = Quadratic(trainable)
    model = small(objective=objective)
    assert [type(callback) for callback in model.configure_callbacks()] == [ObjectiveTraining]
    assert model.configure_callbacks() == model.configure_callbacks()
    run = trainer()
    run.fit(model, loader(), loader())
    assert "train/acc" not in run.callback_metrics
    assert run.callback_metrics["train/loss"] < 1
    assert "val/acc" in run.callback_metrics
    assert (objective.scale != 2.0) == trainable
    assert ("objective_parameters.0" in model.state_dict()) == trainable
    # prediction from the checkpoint needs no objective
    run.save_checkpoint(tmp_path / "a.ckpt")
    if trainable:
        with pytest.warns(UserWarning, match=r"Left out of the checkpoint.*objective_parameters.0"):
            loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    else:
        loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.configure_callbacks() == []


def test_checkpoint_rebuilds_the_model(tmp_path):
    model = small(mean=(0.5,), std=(0.25,), criterion=CrossEntropy(label_smoothing=0.1), channels_last=True)
    run = trainer(max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert loaded.hparams["mean"] == [0.5]
    assert loaded.channels_last


def test_checkpoint_does_not_download_again():
    model = small(backbone_options={"width": 4, "pretrained": False})
    assert model.hparams["backbone_options"] == {"width": 4}


def test_checkpoint_of_a_backbone_object(tmp_path):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    model = small(backbone=network(), backbone_options=None)
    run = trainer(max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match="made from a backbone object <Sequential>, which it does not contain; pass it"
    ):
        ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", backbone=network())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_other_numbers_in_the_checkpoint_are_refused(tmp_path):
    run = trainer(max_epochs=1)
    run.fit(small(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="The checkpoint has num_classes=4 but this model has num_classes=3"):
        ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", num_classes=3)
    with pytest.raises(ValueError, match="The checkpoint has num_classes=4 but this model has num_classes=5"):
        trainer().fit(small(num_classes=5), loader(), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="The checkpoint has in_chans=1 but this model has in_chans=3"):
        ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", in_chans=3)


def test_state_of_a_criterion_is_not_needed_for_prediction(tmp_path):
    class Weighted(Criterion):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits, target):
            return self.scale * nn.functional.cross_entropy(logits, target)

    run = trainer(max_epochs=1)
    run.fit(small(criterion=Weighted()), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"Left out of the checkpoint.*criterion.scale"):
        ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", criterion=Weighted())


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_changes_nothing_but_the_layout(channels_last):
    torch.manual_seed(0)
    model = small(channels_last=channels_last).eval()
    torch.manual_seed(0)
    reference = small().eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(x), reference(x))
    assert model.backbone.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_no_look_at_values_after_the_first_batch(monkeypatch):
    calls = []
    monkeypatch.setattr("lightning_robust.models.image_classifier.check_image_values", lambda x: calls.append(len(x)))
    trainer(max_epochs=1).fit(small(), loader())
    assert calls == [5]


def test_compiled_module_has_one_graph():
    model = small().eval()
    model(torch.rand(2, 1, 8, 8))
    explained = torch._dynamo.explain(model)(torch.rand(2, 1, 8, 8))
    assert explained.graph_break_count == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # one of Lightning itself
def test_command_line_and_config(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run"])
    arguments = {
        "model": {
            "class_path": "lightning_robust.models.ImageClassifier",
            "init_args": {
                "backbone": "resnet8_cifar",
                "num_classes": 10,
                "in_chans": 1,
                "mean": [0.3],
                "std": [0.3],
                "criterion": {
                    "class_path": "lightning_robust.losses.CrossEntropy",
                    "init_args": {"label_smoothing": 0.1},
                },
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
                "lr_scheduler": "cosine",
                "backbone_options": {"width": 4},
            },
        },
        "data": {
            "class_path": "lightning_robust.data.DigitsDataModule",
            "init_args": {"image_size": 8, "batch_size": 32, "augment": "shift"},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
                    "enable_model_summary": False, "limit_train_batches": 2, "limit_val_batches": 1,
                    "default_root_dir": str(tmp_path)},
    }  # fmt: skip
    cli = LightningCLI(
        L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=arguments,
        run=False, seed_everything_default=0, save_config_callback=None, auto_configure_optimizers=False,
    )  # fmt: skip
    assert cli.model.criterion.label_smoothing == 0.1
    cli.trainer.fit(cli.model, cli.datamodule)
    optimizer = cli.trainer.optimizers[0]
    # the same class as the default: what is not named keeps the default of ImageClassifier
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.05, 0.9)
    path = cli.trainer.checkpoint_callback.best_model_path
    assert ImageClassifier.load_from_checkpoint(path, weights_only=True).hparams["num_classes"] == 10


def test_no_step_waits_for_the_device():
    """Reading a value of a tensor is what makes an accelerator wait; after the first batch no step does."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = small(mean=[0.5], std=[0.5])
    x, y = next(iter(loader()))
    model.on_train_batch_start((x, y), 0)
    with Reads() as reads, warnings.catch_warnings(action="ignore"):
        torch.ones(()).item()
        assert reads.count == 1  # this is how they are seen
        model.on_train_batch_start((x, y), 1)
        model.training_step((x, y), 1)["loss"].backward()
    assert reads.count == 1


def test_barebones_trainer():
    run = L.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    with pytest.warns(UserWarning, match="barebones"):  # Lightning says what it leaves out
        run.fit(small(), loader())

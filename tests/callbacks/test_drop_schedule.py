import warnings

import lightning as L
import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from lightning_robust.callbacks import DropSchedule, SharpnessAware
from lightning_robust.regularization import drop_schedule
from support.modules import ManualModule, PlainModule, loader, trainer
from support.resumable import shuffled_loader


class Dropping(PlainModule):
    """One dropout layer and two drop paths; no metrics, which would be compiled anew in every step."""

    def __init__(self, **kwargs):
        super().__init__(dropout=0.2, norm=False, **kwargs)
        self.path = nn.Sequential(DropPath(0.1), DropPath(0.2))
        del self.train_acc

    def forward(self, x):
        return self.net(self.path(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Watch(Callback):
    """The rates in every step, as the layers have them after it."""

    def __init__(self):
        self.dropout, self.paths, self.logged = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.dropout += [module.p for module in pl_module.modules() if isinstance(module, nn.Dropout)]
        self.paths.append([module.drop_prob for module in pl_module.modules() if isinstance(module, DropPath)])
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fit(*callbacks, module=None, data=None, ckpt_path=None, **kwargs):
    watch = Watch()
    run = trainer(*callbacks, watch, **{"max_epochs": 3, **kwargs})
    run.fit(module or Dropping(), data if data is not None else loader(), ckpt_path=ckpt_path)
    return watch


@pytest.mark.parametrize("kind", ["linear", "constant"])
@pytest.mark.parametrize("mode", ["early", "late"])
def test_every_step_has_its_rate(mode, kind):
    module = Dropping()
    watch = fit(DropSchedule(0.6, mode=mode, kind=kind, cutoff_epochs=2, what="dropout"), module=module)
    expected = drop_schedule(0.6, epochs=3, steps_per_epoch=4, cutoff_epochs=2, mode=mode, kind=kind)
    assert watch.dropout == expected
    assert [each["train/dropout"] for each in watch.logged] == pytest.approx(expected)
    assert watch.paths == [[0.1, 0.2]] * 12
    assert module.net[-2].p == 0.2  # as it came


def test_drop_paths_keep_their_proportions():
    module = Dropping()
    watch = fit(DropSchedule(0.6, mode="late", cutoff_epochs=1), module=module)
    assert watch.paths == [[0.0, 0.0]] * 4 + [[pytest.approx(0.3), pytest.approx(0.6)]] * 8
    assert watch.logged[-1]["train/drop_path"] == pytest.approx(0.6)
    assert watch.dropout == [0.2] * 12
    assert [path.drop_prob for path in module.path] == [0.1, 0.2]


def test_both_kinds_side_by_side():
    watch = fit(DropSchedule(0.5, cutoff_epochs=1, what="dropout"), DropSchedule(0.4, mode="late", cutoff_epochs=1))
    assert watch.dropout[4:] == [0.0] * 8
    assert watch.paths[0] == [0.0, 0.0]


def test_accumulated_batches_share_a_step():
    watch = fit(DropSchedule(0.5, cutoff_epochs=2, what="dropout"), accumulate_grad_batches=3)
    # 4 batches are 2 steps, the second of one batch
    expected = drop_schedule(0.5, epochs=3, steps_per_epoch=2, cutoff_epochs=2)
    assert watch.dropout == [expected[step] for step in (0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5)]


def test_accumulation_that_changes():
    changing = GradientAccumulationScheduler({0: 2, 1: 1})
    watch = fit(DropSchedule(0.5, cutoff_epochs=2, what="dropout"), changing)
    expected = drop_schedule(0.5, epochs=1, steps_per_epoch=6, cutoff_epochs=1)  # 2 steps, then 4
    assert watch.dropout == [*(expected[step] for step in (0, 0, 1, 1, 2, 3, 4, 5)), 0, 0, 0, 0]


def test_several_passes_and_steps_by_hand_count_once():
    schedule = {"rate": 0.5, "cutoff_epochs": 2, "what": "dropout"}
    expected = drop_schedule(0.5, epochs=3, steps_per_epoch=4, cutoff_epochs=2)
    assert fit(DropSchedule(**schedule), SharpnessAware()).dropout == expected

    class TwoSteps(ManualModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    assert fit(DropSchedule(**schedule), module=TwoSteps(dropout=0.1)).dropout == expected


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 6])
def test_continues_where_it_was(tmp_path, step):
    def schedule():
        return DropSchedule(0.5, cutoff_epochs=2, what="dropout")

    saved = SaveAt(step, tmp_path / "a.ckpt")
    whole = fit(schedule(), saved, data=shuffled_loader())
    continued = fit(schedule(), data=shuffled_loader(), ckpt_path=saved.path)
    assert continued.dropout == whole.dropout[step:]
    state = torch.load(saved.path, weights_only=True)["state_dict"]
    assert state.keys() == Dropping().state_dict().keys()


def test_an_exception_puts_the_rates_back():
    module = Dropping()
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(DropSchedule(0.5, cutoff_epochs=1, what="dropout"), module=module)
    assert module.net[-2].p == 0.2


def test_a_model_of_timm():
    module = Dropping()
    module.net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=6,
        patch_size=3,
        in_chans=2,
        num_classes=4,
        depth=3,
        embed_dim=12,
        num_heads=2,
        drop_path_rate=0.1,
    )
    module.path = nn.Identity()
    watch = fit(DropSchedule(0.5, cutoff_epochs=1), module=module)
    assert watch.paths[0] == pytest.approx([0.25, 0.25, 0.5, 0.5])
    assert watch.paths[3] == watch.paths[-1] == [0.0] * 4


@pytest.mark.parametrize("kind", ["linear", "constant"])
def test_a_compiled_module_sees_every_rate(kind):
    def run(compiled):
        L.seed_everything(0, verbose=False)
        module = Dropping()
        if compiled:
            torch._dynamo.reset()
            module.net.compile(backend="eager")
        L.seed_everything(0, verbose=False)
        watch = fit(DropSchedule(0.9, kind=kind, cutoff_epochs=1, what="dropout"), module=module)
        return torch.cat([p.detach().flatten() for p in module.parameters()]), watch.dropout

    plain = run(False)
    if kind == "linear":
        with pytest.warns(
            UserWarning, match=r"Dropping is compiled, and a linear DropSchedule .* use kind=\"constant\""
        ):
            compiled = run(True)
    else:
        compiled = run(True)
    assert torch.equal(compiled[0], plain[0])
    assert compiled[1] == plain[1]


def test_a_barebones_trainer_logs_nothing():
    bare = L.Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[watch := Watch()])
    bare.callbacks.insert(0, DropSchedule(0.5, cutoff_epochs=1, kind="constant", what="dropout"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare.fit(Dropping(), loader())
    assert watch.dropout == [0.5] * 4 + [0.0] * 4


class Endless(IterableDataset):
    def __iter__(self):
        yield from loader().dataset


def test_a_loader_without_length_needs_the_number_of_batches():
    def data():
        return torch.utils.data.DataLoader(Endless(), batch_size=6)

    with pytest.raises(ValueError, match=r"known number of training batches per epoch .* set `limit_train_batches`"):
        fit(DropSchedule(0.5, cutoff_epochs=1, what="dropout"), data=data())
    watch = fit(DropSchedule(0.5, cutoff_epochs=1, what="dropout"), data=data(), limit_train_batches=3)
    assert watch.dropout == drop_schedule(0.5, epochs=3, steps_per_epoch=3, cutoff_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": -0.1}, r"Expected `rate` to be in \[0.0, 1.0\] but got -0.1"),
        ({"rate": 0.1, "mode": "standard"}, "Expected `mode` to be one of 'early', 'late' but got 'standard'"),
        ({"rate": 0.1, "kind": "cosine"}, "Expected `kind` to be one of 'linear', 'constant' but got 'cosine'"),
        ({"rate": 0.1, "cutoff_epochs": -1}, "Expected `cutoff_epochs` to be an integer >= 0 but got -1"),
        ({"rate": 0.1, "what": "block"}, "Expected `what` to be one of 'drop_path', 'dropout' but got 'block'"),
    ],
    ids=["rate", "mode", "kind", "cutoff", "what"],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DropSchedule(**arguments)


def test_refuses_runs():
    with pytest.raises(ValueError, match="Expected `cutoff_epochs` to be at most the 3 epochs of the run but got 50"):
        fit(DropSchedule(0.1))
    with pytest.raises(ValueError, match="Expected drop_path layers in PlainModule but it has none, only 0 dropout"):
        fit(DropSchedule(0.1, cutoff_epochs=1), module=PlainModule())
    with pytest.raises(ValueError, match="Two DropSchedule callbacks of this Trainer set the rates of drop_path"):
        fit(DropSchedule(0.1, cutoff_epochs=1), DropSchedule(0.1, cutoff_epochs=2))


def test_a_trial_run_is_not_too_short():
    callback, module = DropSchedule(0.5, kind="constant", what="dropout"), Dropping()
    seen = []
    module.net[-2].register_forward_hook(lambda layer, *_: seen.append(layer.p))
    trainer(callback, fast_dev_run=True).fit(module, loader())
    assert seen == [0.5]


def test_can_be_built_from_a_configuration():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    # The newer name of one method; older versions of jsonargparse know only the second.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(parser.parse_args(["--methods.m", "DropSchedule", "--methods.m.rate", "0.5"])).methods["m"]
    assert (built.rate, built.mode, built.kind, built.cutoff_epochs, built.what) == (
        0.5,
        "early",
        "linear",
        50,
        "drop_path",
    )

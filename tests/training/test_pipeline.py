import copy
import inspect
import io

import lightning as L
import pytest
import torch
import torchmetrics

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.training import QuietGate, Stage, StepCallback, StepPipeline, loss_of, replace_loss
from support.modules import (
    CollectionModule,
    DictModule,
    ManualModule,
    PlainModule,
    loader,
    trainer,
    weights_of,
)


class Recorder(StepCallback):
    """Notes when it runs; its stage is set per instance for the test."""

    def __init__(self, stage, notes):
        super().__init__()
        self.stage = stage
        self.notes = notes

    def around_step(self, context, batch, run):
        self.notes.append(f"{self.stage} in")
        output = run(batch)
        self.notes.append(f"{self.stage} out")
        return output


def test_stages_decide_the_order_not_the_list():
    notes = []
    stages = [Stage.LOSS, Stage.WEIGHTS, Stage.BATCH, Stage.OBJECTIVE]
    run = trainer(*(Recorder(stage, notes) for stage in stages), fast_dev_run=True)
    run.fit(PlainModule(), loader())
    assert notes == [f"{s} in" for s in Stage] + [f"{s} out" for s in reversed(Stage)]


def test_nothing_is_left_on_the_module():
    module = CollectionModule()
    before = set(vars(module))
    update = module.metrics["acc"].update
    run = trainer(SharpnessAware(), fast_dev_run=True)
    run.fit(module, loader(form="triple"))
    assert set(vars(module)) - before <= {"updates", "_hparams"}
    assert module.metrics["acc"].update is update
    assert "forward" not in vars(module.metrics["acc"])
    assert not module.net._forward_hooks


def test_pipeline_without_a_stage_changes_nothing():
    module, plain = PlainModule(dropout=0.3), PlainModule(dropout=0.3)
    L.seed_everything(0)
    trainer(max_epochs=2).fit(plain, loader())
    L.seed_everything(0)
    trainer(Recorder(Stage.LOSS, []), max_epochs=2).fit(module, loader())
    assert torch.equal(weights_of(module), weights_of(plain))


def test_signature_stays_visible():
    seen = []

    class Probe(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(inspect.signature(pl_module.training_step))

    module = DictModule()  # training_step(self, batch) without batch_idx
    run = trainer(Recorder(Stage.LOSS, []), Probe(), fast_dev_run=True)
    run.fit(module, loader(form="dict"))
    assert list(seen[0].parameters) == ["batch"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["first pass", "second pass", "backward"])
def test_an_exception_leaves_everything_as_found(error, where):
    module = PlainModule()
    calls = []
    step = module.training_step

    class Failing(StepCallback):
        stage = Stage.LOSS

        def around_step(self, context, batch, run):
            output = run(batch)
            calls.append(context.counted)
            if (where, context.counted) in (("first pass", True), ("second pass", False)) and len(calls) > 2:
                raise error
            return output

        def on_before_backward(self, trainer, pl_module, loss):
            if where == "backward":
                raise error

    class Probe(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights = weights_of(pl_module).clone()

    probe = Probe()
    modes = [m.training for m in module.modules()]
    run = trainer(SharpnessAware(), Failing(), probe)
    with pytest.raises((error, SystemExit)):
        run.fit(module, loader())
    assert torch.equal(weights_of(module), probe.weights)
    assert module.training_step == step
    assert "log" not in vars(module)
    assert [m.training for m in module.modules()] == modes


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_skipped_steps_stay_skipped():
    class Skipping(PlainModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    seen = []

    class Loss(StepCallback):
        stage = Stage.LOSS

        def around_step(self, context, batch, run):
            output = run(batch)
            seen.append(loss_of(output))
            return output

    trainer(SharpnessAware(), Loss(), max_epochs=1).fit(Skipping(), loader())
    assert [loss is None for loss in seen] == [False, False, True, False, False, True]


def test_replace_core_takes_the_place_of_the_step():
    class Constant(StepCallback):
        stage = Stage.OBJECTIVE

        def around_step(self, context, batch, run):
            x, _ = self.batch.unpack(batch)
            context.replace_core(lambda inner: {"loss": context.model(self)(x).square().mean(), "mark": 1})
            return run(batch)

    outputs = []

    class Probe(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, output, batch, batch_idx):
            outputs.append(output)

    module = PlainModule()
    trainer(Constant(), SharpnessAware(), Probe(), fast_dev_run=True).fit(module, loader())
    assert outputs[0]["mark"] == 1


def test_the_generator_depends_on_seed_rank_epoch_batch_and_salt():
    drawn = []

    class Draw(StepCallback):
        stage = Stage.BATCH

        def around_step(self, context, batch, run):
            for salt in ("a", "b"):
                drawn.append(torch.rand(1, generator=context.generator(torch.device("cpu"), salt)).item())
            return run(batch)

    for _ in range(2):
        L.seed_everything(5)
        before = torch.get_rng_state()
        trainer(Draw(), max_epochs=2, limit_train_batches=2).fit(PlainModule(), loader())
    assert len(set(drawn)) == 8
    assert drawn[:8] == drawn[8:]
    assert before is not None


def test_current_batch_and_loaded_batch():
    class Brighter(StepCallback):
        stage = Stage.BATCH

        def around_step(self, context, batch, run):
            x, _ = self.batch.unpack(batch)
            return run(self.batch.repack(batch, x=x + 1))

    class Look(StepCallback):
        stage = Stage.LOSS
        needs_logits = True

        def around_step(self, context, batch, run):
            output = run(batch)
            assert context.current_batch is batch
            assert torch.equal(context.batch_as_loaded[0] + 1, batch[0])
            return replace_loss(output, loss_of(output) + self_check(context.logits(self)))

    def self_check(logits):
        assert logits.requires_grad
        return 0 * logits.mean()

    trainer(Look(), Brighter(), fast_dev_run=True).fit(PlainModule(), loader())


def test_refusals():
    with pytest.raises(ValueError, match=r"SharpnessAware and SharpnessAware cannot work in one Trainer.*'weights'"):
        trainer(SharpnessAware(), SharpnessAware(), fast_dev_run=True).fit(PlainModule(), loader())
    with pytest.raises(ValueError, match="needs automatic optimization, but ManualModule"):
        trainer(SharpnessAware(), fast_dev_run=True).fit(ManualModule(), loader())

    class Iterating(PlainModule):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(ValueError, match="takes `dataloader_iter`"), pytest.warns(UserWarning, match="dragons"):
        trainer(SharpnessAware(), fast_dev_run=True).fit(Iterating(), loader())


def test_validation_through_training_step_stays_plain():
    class Shared(PlainModule):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    class Double(StepCallback):
        stage = Stage.LOSS

        def around_step(self, context, batch, run):
            return 2 * run(batch)

    values = []
    for callbacks in ([], [Double(), SharpnessAware()]):
        module = Shared(lr=0.0)
        run = trainer(*callbacks, max_epochs=1)
        run.fit(module, loader(), loader(seed=1))
        values.append(run.callback_metrics["val_loss"])
    assert torch.equal(*values)


def test_what_an_earlier_fit_left_is_taken_off():
    class Broken(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            raise RuntimeError("first")

        def on_exception(self, trainer, pl_module, exception):
            raise RuntimeError("second")

    calls = []

    class Counted(PlainModule):
        def training_step(self, batch, batch_idx):
            calls.append(1)
            return super().training_step(batch, batch_idx)

    module = Counted()
    with pytest.raises(RuntimeError):
        trainer(Broken(), SharpnessAware(), max_steps=1).fit(module, loader())
    calls.clear()
    trainer(SharpnessAware(), max_steps=1).fit(module, loader())
    assert len(calls) == 2
    assert "training_step" not in vars(module)


def test_copies_made_during_a_fit_belong_to_themselves():
    class Copying(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.twin = copy.deepcopy(pl_module)
            self.metric = pl_module.train_acc.clone()
            torch.save(pl_module.net, io.BytesIO())

    module, copying = PlainModule(), Copying()
    count = copying.metric = None
    trainer(SharpnessAware(), copying, max_steps=1).fit(module, loader())
    twin = copying.twin
    assert inspect.ismethod(twin.training_step)
    assert twin.training_step.__self__ is twin
    assert not any(type(hook).__module__.startswith("lightning_robust") for hook in twin.net._forward_hooks.values())
    count = module.train_acc.update_count
    copying.metric(torch.randn(4, 4), torch.tensor([0, 1, 2, 3]))
    twin.train_acc(torch.randn(4, 4), torch.tensor([0, 1, 2, 3]))
    assert module.train_acc.update_count == count


def test_manual_optimization_chosen_in_setup_is_refused():
    class Late(PlainModule):
        def setup(self, stage):
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="needs automatic optimization, but Late"):
        trainer(SharpnessAware(), fast_dev_run=True).fit(Late(), loader())


@pytest.mark.parametrize("place", ["dict of dicts", "helper", "made in the step"])
def test_metrics_are_counted_once_wherever_they_are(place):
    class Helper:
        def __init__(self):
            self.metric = torchmetrics.MeanMetric()

    class Holding(PlainModule):
        def __init__(self):
            super().__init__()
            self.held = {"train": {"mean": torchmetrics.MeanMetric()}} if place == "dict of dicts" else Helper()

        @property
        def metric(self):
            return self.held["train"]["mean"] if place == "dict of dicts" else self.held.metric

        def training_step(self, batch, batch_idx):
            if place == "made in the step" and batch_idx == 0 and self.metric.update_count == 0:
                self.held = Helper()
            loss = super().training_step(batch, batch_idx)
            self.metric.update(loss.detach())
            return loss

    module = Holding()
    trainer(SharpnessAware(), max_epochs=1).fit(module, loader())
    assert module.metric.update_count == 4


def test_a_metric_that_is_reset_in_the_step_keeps_the_value_of_the_clean_pass():
    seen = []

    class Resetting(PlainModule):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.train_acc.update(logits, batch[1])
            seen.append(self.train_acc.compute())
            self.train_acc.reset()
            return torch.nn.functional.cross_entropy(logits, batch[1])

    trainer(SharpnessAware(), max_epochs=1).fit(Resetting(), loader())
    assert all(torch.equal(clean, repeated) for clean, repeated in zip(seen[0::2], seen[1::2], strict=True))


def test_gates_may_be_removed_in_any_order():
    module = PlainModule()
    gates = [QuietGate(module), QuietGate(module)]
    for gate in gates:
        gate.install()
    for gate in gates:  # the first installed is hidden by the second
        gate.remove()
    assert not {"log", "log_dict"} & set(vars(module))
    assert "forward" not in vars(module.train_acc)


def test_description_and_passes():
    notes = []
    callbacks = [Recorder(Stage.LOSS, notes), SharpnessAware()]
    run = trainer(*callbacks)
    pipeline = StepPipeline(run, PlainModule())
    assert pipeline.describe().splitlines() == [
        "weights   SharpnessAware",
        "loss      Recorder",
        "step      PlainModule.training_step",
    ]
    assert pipeline.passes() == 2
    assert list(pipeline.reasons()) == [Stage.WEIGHTS, Stage.LOSS]

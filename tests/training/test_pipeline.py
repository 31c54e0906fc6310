import inspect

import lightning as L
import pytest
import torch

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.training import Stage, StepCallback, StepPipeline, loss_of, replace_loss
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
            calls.append(context.passes)
            if (where, context.passes) in (("first pass", 0), ("second pass", 1)) and len(calls) > 2:
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

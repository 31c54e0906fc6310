"""Objectives in place of a module's own loss."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import AdversarialTraining, LogitRegularization, ObjectiveTraining, SharpnessAware
from lightning_robust.losses import MaxSup
from lightning_robust.objectives import TRADES, Objective, ObjectiveOutput, Prepared
from lightning_robust.sharpness import SAM
from support.modules import CollectionModule, DictModule, ManualModule, PlainModule, loader, trainer, weights_of

EPS = 0.1


def attack(**kwargs):
    return PGD(eps=EPS, steps=2, loss="kl", **kwargs)


def fit(module, *callbacks, batches=2, form="pair", **kwargs):
    run = trainer(*callbacks, limit_train_batches=batches, limit_val_batches=0, **kwargs)
    run.fit(module, loader(form=form))
    return run


class Remember(TRADES):
    """Keeps what it was asked and answered."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.prepared, self.outputs, self.modes = [], [], []

    def prepare(self, model, x, y, *, generator=None):
        self.prepared.append(super().prepare(model, x, y, generator=generator))
        return self.prepared[-1]

    def forward(self, model, prepared):
        self.modes.append(model.module.training)
        self.outputs.append(super().forward(model, prepared))
        return self.outputs[-1]


class Plain(Objective):
    """Cross entropy, with a counter in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def prepare(self, model, x, y, *, generator=None):
        self.seen += len(x)
        return Prepared(x, y)

    def forward(self, model, prepared):
        logits = model(prepared.x)
        return ObjectiveOutput(F.cross_entropy(logits, prepared.y), logits, {})


def test_same_weights_as_the_loop_written_out():
    module, objective = PlainModule(), Remember(attack=attack())
    twin = copy.deepcopy(module)
    fit(module, ObjectiveTraining(objective), batches=3)
    optimizer = twin.configure_optimizers()
    for prepared in objective.prepared:
        optimizer.zero_grad()
        clean, adv = twin(prepared.x), twin(prepared.x_adv)
        loss = F.cross_entropy(clean, prepared.y) + 6 * F.kl_div(
            adv.log_softmax(1), clean.softmax(1), reduction="batchmean"
        )
        loss.backward()
        optimizer.step()
    assert objective.modes == [True] * 3
    torch.testing.assert_close(weights_of(module), weights_of(twin))
    torch.testing.assert_close(module.net[1].running_var, twin.net[1].running_var)


def test_a_plain_objective_is_the_plain_training():
    ours, theirs = PlainModule(), PlainModule()
    fit(ours, ObjectiveTraining(Plain()), batches=4)
    fit(theirs, batches=4)
    assert torch.equal(weights_of(ours), weights_of(theirs))


@pytest.mark.parametrize(
    ("form", "module"), [("pair", PlainModule), ("dict", DictModule), ("triple", CollectionModule)]
)
def test_any_module(form, module):
    module = module()
    before = weights_of(module)
    callback = ObjectiveTraining(TRADES(attack=attack()))
    if isinstance(module, CollectionModule):
        module.on_train_epoch_end = lambda: None  # its metrics are not fed
    fit(module, callback, form=form)
    assert not torch.equal(weights_of(module), before)


def test_logs():
    objective = Remember(attack=attack())
    run = fit(PlainModule(lr=0.0), ObjectiveTraining(objective))
    logged = run.callback_metrics
    assert set(logged) == {"train/loss", "train/natural", "train/robust"}
    losses = torch.stack([output.loss.detach() for output in objective.outputs])
    torch.testing.assert_close(logged["train/loss"], losses.mean())


def test_barebones():
    unset = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    callback = ObjectiveTraining(TRADES(attack=attack()))
    run = fit(PlainModule(), callback, barebones=True, **dict.fromkeys(unset))
    assert run.callback_metrics == {}


def test_sharpness_sees_the_objective_and_one_attack():
    objective = Remember(attack=attack())
    fit(PlainModule(), SharpnessAware(SAM(rho=0.1)), ObjectiveTraining(objective))
    assert len(objective.prepared) == 2
    assert len(objective.outputs) == 4
    assert not torch.equal(objective.outputs[0].loss, objective.outputs[1].loss)


def test_further_terms_get_the_logits_of_the_objective():
    losses = []

    class Watch(LogitRegularization):
        def around_step(self, context, batch, run):
            output = super().around_step(context, batch, run)
            losses.append((output["loss"].detach(), output["logits"].detach()))
            assert context.logits(self) is output["logits"]
            return output

    objective = Remember(attack=attack())
    fit(PlainModule(), ObjectiveTraining(objective), Watch(MaxSup(alpha=0.5)))
    for (loss, logits), output in zip(losses, objective.outputs, strict=True):
        penalty = 0.5 * (logits.amax(1) - logits.mean(1)).mean()
        torch.testing.assert_close(loss, output.loss.detach() + penalty)


def test_state_is_saved_and_resumed(tmp_path):
    first = ObjectiveTraining(Plain())
    run = fit(PlainModule(), first)
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = ObjectiveTraining(Plain())
    again = trainer(second, limit_train_batches=2, limit_val_batches=0, max_epochs=2)
    again.fit(PlainModule(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert int(first.objective.seen) == 12
    assert int(second.objective.seen) == 24


def test_a_second_fit_begins_with_the_objective_as_it_was_given():
    class Learned(Plain):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.seen += 5

    module = PlainModule()
    module.objective = Learned()
    callback = ObjectiveTraining(module.objective)
    fit(module, callback)
    nn.init.constant_(module.objective.weight, 3.0)  # as if trained: parameters go on with the module
    fit(module, callback)
    assert (int(module.objective.seen), module.objective.weight.item()) == (17, 3.0)


def test_a_checkpoint_that_was_evaluated_is_forgotten_by_the_next_fit(tmp_path):
    fit(PlainModule(), ObjectiveTraining(Plain())).save_checkpoint(tmp_path / "end.ckpt")
    fresh = ObjectiveTraining(Plain())
    trainer(fresh, limit_val_batches=1).validate(
        PlainModule(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True, verbose=False
    )
    assert int(fresh.objective.seen) == 12
    fit(PlainModule(), fresh)
    assert int(fresh.objective.seen) == 12


@pytest.mark.parametrize("fails", [False, True])
def test_an_objective_lets_go_of_the_model_when_a_fit_ends(fails):
    class Watching(TRADES):
        watches = False

        def prepare(self, model, x, y, *, generator=None):
            self.watches = True
            return super().prepare(model, x, y, generator=generator)

        def forward(self, model, prepared):
            if fails:
                raise RuntimeError("a step that fails")
            return super().forward(model, prepared)

        def fit_ends(self):
            self.watches = False

    objective = Watching(attack=attack(random_start="normal"))
    with pytest.raises(RuntimeError, match="a step that fails") if fails else nullcontext():
        fit(PlainModule(), ObjectiveTraining(objective))
    assert not objective.watches


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"`objective`.*got MaxSup.*give one of lightning_robust\.objectives"):
        ObjectiveTraining(MaxSup())


def test_attacking_objectives_want_clean_images():
    with pytest.raises(ValueError, match=r"TRADES attacks the images itself .* remove AdversarialTraining"):
        fit(PlainModule(), AdversarialTraining(), ObjectiveTraining(TRADES()))
    fit(PlainModule(), AdversarialTraining(PGD(eps=EPS, steps=1)), ObjectiveTraining(Plain()))


def test_parameters_nobody_updates_are_refused():
    class Learned(Plain):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="Learned has trainable parameters that no optimizer would update"):
        fit(PlainModule(), ObjectiveTraining(Learned()))
    module = PlainModule()
    module.objective = Learned()
    fit(module, ObjectiveTraining(module.objective))


def test_two_objectives_and_manual_optimization_are_refused():
    with pytest.raises(ValueError, match="ObjectiveTraining and ObjectiveTraining cannot work in one Trainer"):
        trainer(ObjectiveTraining(Plain()), ObjectiveTraining(TRADES())).fit(PlainModule(), loader())
    with pytest.raises(ValueError, match="ObjectiveTraining needs automatic optimization"):
        fit(ManualModule(), ObjectiveTraining(Plain()))

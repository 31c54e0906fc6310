"""The callback Criterion: another loss in modules that know nothing of it."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.callbacks import Criterion, LogitRegularization, ObjectiveTraining, SharpnessAware
from lightning_robust.losses import CrossEntropy, MaxSup
from lightning_robust.models import ImageClassifier
from lightning_robust.objectives import TRADES
from lightning_robust.sharpness import SAM, sharp_backward
from support.criteria import Memory, Watching
from support.modules import (
    CHANNELS,
    CLASSES,
    CollectionModule,
    DictModule,
    ManualModule,
    PlainModule,
    loader,
    network,
    trainer,
    weights_of,
)
from support.shuffled import close, shuffled
from support.shuffled import fit as shuffled_fit

SMOOTH = {"label_smoothing": 0.4}


class WithCriterion(PlainModule):
    """Its loss has a term beside its criterion, and its criterion is a sub-module."""

    logs = True

    def __init__(self, **options):
        super().__init__(**options)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        own = self.criterion(logits, batch[1])
        if self.logs:
            self.log("own", own, on_step=False, on_epoch=True)
        return own + 0.1 * logits.square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]))


def fit(module, *callbacks, data=None, validation=None, **kwargs):
    run = trainer(*callbacks, **{"max_steps": 1, **kwargs})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct")
        run.fit(module, loader() if data is None else data, validation)
    return run


def one_step(module, loss):
    reference = copy.deepcopy(module).train()
    optimizer = reference.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    batch = next(iter(loader()))
    loss(reference.net(batch[0]), batch[1]).backward()
    optimizer.step()
    return weights_of(reference)


@pytest.mark.parametrize(
    ("module", "form"), [(PlainModule, "pair"), (DictModule, "dict"), (CollectionModule, "triple")]
)
def test_the_loss_is_replaced(module, form):
    module = module(norm=False)
    expected = one_step(module, lambda z, y: F.cross_entropy(z, y, **SMOOTH))
    fit(module, Criterion(CrossEntropy(**SMOOTH)), data=loader(form=form))
    torch.testing.assert_close(weights_of(module), expected)


def test_a_criterion_of_the_module_is_replaced_alone_and_in_training_only():
    module = WithCriterion(lr=0.0, norm=False)
    own, data = module.criterion, loader(batch_size=24)
    run = fit(module, Criterion(CrossEntropy(**SMOOTH)), data=data, validation=data)
    x, y = next(iter(data))
    with torch.no_grad():
        torch.testing.assert_close(run.callback_metrics["own"], F.cross_entropy(module(x), y, **SMOOTH))
        torch.testing.assert_close(run.callback_metrics["val_loss"], F.cross_entropy(module(x), y))
    assert module.criterion is own
    module = WithCriterion()
    expected = one_step(module, lambda z, y: F.cross_entropy(z, y, **SMOOTH) + 0.1 * z.square().mean())
    fit(module, Criterion(CrossEntropy(**SMOOTH)))
    torch.testing.assert_close(weights_of(module), expected)


def test_the_whole_loss_is_replaced_on_demand_and_what_is_lost_is_told():
    module = WithCriterion()
    expected = one_step(module, lambda z, y: F.cross_entropy(z, y, **SMOOTH))
    with pytest.warns(UserWarning, match="is not the cross-entropy of its logits"):
        run = fit(module, Criterion(CrossEntropy(**SMOOTH), replaces="loss"))
    torch.testing.assert_close(weights_of(module), expected)
    assert "train/criterion" in run.callback_metrics


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize("module", [PlainModule, WithCriterion])
def test_other_terms_are_added_wherever_they_are_listed(module, first):
    module = module(norm=False)
    extra = 0.1 if isinstance(module, WithCriterion) else 0.0
    penalty, replacing = MaxSup(alpha=0.3), CrossEntropy(label_smoothing=-0.4)
    expected = one_step(module, lambda z, y: replacing(z, y) + extra * z.square().mean() + penalty(z))
    callbacks = [Criterion(replacing), LogitRegularization(penalty)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Labels are already smoothed")
        fit(module, *(callbacks if first else reversed(callbacks)))
    torch.testing.assert_close(weights_of(module), expected)


def test_smoothing_and_a_penalty_together_are_warned_about_once():
    callbacks = [Criterion(CrossEntropy(**SMOOTH)), LogitRegularization(MaxSup())]
    with pytest.warns(UserWarning, match="CrossEntropy of the callback Criterion") as caught:
        fit(PlainModule(), *callbacks)
    assert sum("already smoothed" in str(each.message) for each in caught) == 1


class Several(WithCriterion):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.CrossEntropyLoss()


class Uncalled(PlainModule):
    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()


class Skipping(WithCriterion):
    def training_step(self, batch, batch_idx):
        return None if batch_idx else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Several, {}, "several criteria: criterion, auxiliary"),
        (WithCriterion, {"replaces": "criterium"}, "names no sub-module of WithCriterion; it has criterion"),
        (Uncalled, {}, "did not call its criterion"),
        (ManualModule, {}, "needs automatic optimization"),
        (WithCriterion, {"logits_from": "net"}, "logits_from='net' would be ignored"),
    ],
)
def test_what_cannot_be_replaced_is_refused(module, options, message):
    with pytest.raises(ValueError, match=message):
        fit(module(), Criterion(CrossEntropy(), **options))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_leaves_a_batch_out_is_fine():
    fit(Skipping(), Criterion(CrossEntropy()), max_steps=-1, max_epochs=1)


class Mixer(L.Callback):
    mixes_samples = True


class Grouped(CrossEntropy):
    needs = ("group",)

    def sample_losses(self, logits, target, *, group):
        return super().sample_losses(logits, target) * (1 + group)


class Weighed(CrossEntropy):
    needs = ("weather",)


@pytest.mark.parametrize(
    ("criterion", "others", "message"),
    [
        (CrossEntropy(reduction="none"), [], "reduction='none'"),
        (Grouped(), [], "needs the group of each sample"),
        (Weighed(), [], "needs 'weather' of each sample, but"),
        (Memory(), [Mixer()], "needs the label of each sample as it is, but Mixer"),
        (CrossEntropy(), [ObjectiveTraining(TRADES())], "objective computes a loss of its own"),
        (CrossEntropy(), [Criterion(Memory())], "Criterion and Criterion cannot work in one Trainer"),
    ],
)
def test_what_cannot_work_is_refused_at_setup(criterion, others, message):
    with pytest.raises(ValueError, match=message):
        fit(PlainModule(), Criterion(criterion), *others)


@pytest.mark.parametrize(
    ("criterion", "remedy"),
    [
        (nn.CrossEntropyLoss(), r"a Criterion but got CrossEntropyLoss; use one of lightning_robust.losses"),
        (F.cross_entropy, "a Criterion but got function; use one of lightning_robust.losses"),
        (CrossEntropy, "a Criterion but got CrossEntropy; use one of"),
        (MaxSup(), r"a Criterion but got MaxSup; add a penalty on the logits with LogitRegularization\(MaxSup"),
    ],
    ids=["torch", "function", "class", "penalty"],
)
def test_what_is_no_criterion_is_refused_at_once(criterion, remedy):
    with pytest.raises(TypeError, match=remedy):
        Criterion(criterion)


@pytest.mark.parametrize(
    "option", [{"group_key": 2}, {"features_from": "net"}, {"index_key": 2}, {"num_samples": 24}], ids=str
)
def test_an_option_that_the_criterion_has_no_use_for_is_refused(option):
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"CrossEntropy needs no .*, so {name}='?{value}'? would be ignored"):
        fit(CollectionModule(), Criterion(CrossEntropy(), **option), data=loader(form="triple"))


def test_a_group_that_the_batch_does_not_hold_is_named_as_the_user_names_it():
    with pytest.raises(KeyError, match="group_key=7 names no entry of the batch"):
        fit(PlainModule(), Criterion(Grouped(), group_key=7))


def test_groups_are_read_from_the_batch():
    module = PlainModule()
    batch = next(iter(loader(form="triple")))
    expected = one_step(module, lambda z, y: (F.cross_entropy(z, y, reduction="none") * (1 + batch[2])).mean())
    fit(module, Criterion(Grouped(), group_key=2), data=loader(form="triple"))
    torch.testing.assert_close(weights_of(module), expected)


def plain_loop(module, *, epochs=2, sharp=False):
    """What a criterion with a memory must amount to; it remembers in the first pass of a step."""
    data = shuffled()
    optimizer = module.train().configure_optimizers()
    table = torch.zeros(len(data.dataset), CLASSES)
    for epoch in range(epochs):
        data.sampler.set_epoch(epoch)
        for index in torch.tensor(list(data.sampler)).split(6):
            x, y = data.dataset.x[index], data.dataset.y[index]

            def loss(remember, index=index, x=x, y=y):
                z = module(x)
                if remember:
                    table[index] = 0.5 * table[index] + 0.5 * z.detach().softmax(1)
                return F.cross_entropy(z, y) - (table[index] * z.log_softmax(1)).sum(1).mean()

            optimizer.zero_grad()
            loss(True).backward()
            if sharp:
                gradients = [p.grad.clone() for p in module.parameters()]
                norm = torch.stack([g.norm() for g in gradients]).norm()
                moves = [0.1 * g / (norm + 1e-12) for g in gradients]
                with torch.no_grad():
                    for p, move in zip(module.parameters(), moves, strict=True):
                        p += move
                optimizer.zero_grad()
                loss(False).backward()
                with torch.no_grad():
                    for p, move in zip(module.parameters(), moves, strict=True):
                        p -= move
            optimizer.step()
    return module, table


@pytest.mark.parametrize("sharp", [False, True], ids=["alone", "with SAM"])
@pytest.mark.parametrize("kind", [PlainModule, WithCriterion])
def test_a_memory_is_that_of_a_plain_loop(kind, sharp):
    module = kind(norm=False)
    if kind is WithCriterion:
        module.training_step = lambda batch, batch_idx: module.criterion(module(batch[0]), batch[1])
    reference, table = plain_loop(PlainModule(norm=False), sharp=sharp)
    callback = Criterion(Memory())
    shuffled_fit(module, callback, *([SharpnessAware(SAM(rho=0.1))] if sharp else []), max_epochs=2)
    close(module, reference)
    torch.testing.assert_close(callback.criterion.table.rows, table, rtol=1e-5, atol=1e-6)


class Interrupt(L.Callback):
    """Writes a checkpoint at one of Lightning's hooks."""

    def __init__(self, path, hook, step):
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, run, *_):
        if run.global_step == self.step and not run.sanity_checking:
            run.save_checkpoint(self.path)


@pytest.mark.parametrize("earlier", [True, False], ids=["saved before", "saved after"])
@pytest.mark.parametrize("make", [Memory, Watching])
@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 6), ("on_validation_end", 4), ("on_train_epoch_end", 4)]
)
def test_a_run_that_continues_equals_one_that_was_not_interrupted(make, hook, step, earlier, tmp_path):
    path = tmp_path / "run.ckpt"

    def run(ckpt_path=None, *others):
        L.seed_everything(0)
        module, callback = PlainModule(norm=False), Criterion(make())
        order = [*others, callback] if earlier else [callback, *others]
        trainer(*order, max_epochs=3).fit(module, shuffled(), loader(), ckpt_path=ckpt_path)
        return module, callback.criterion.state_dict()

    module, state = run(None, Interrupt(path, hook, step))
    torch.load(path, weights_only=True)
    continued, other = run(path)
    close(continued, module, rtol=0, atol=0)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_another_data_set_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    shuffled_fit(PlainModule(), Criterion(Memory()), Interrupt(path, "on_train_epoch_end", 4), max_epochs=1)
    with pytest.raises(ValueError, match="belongs to 22 training samples, but there are 20 now"):
        shuffled_fit(
            PlainModule(),
            Criterion(Memory()),
            loader=shuffled(length=20),
            ckpt_path=path,
            max_epochs=2,
        )


def test_a_second_fit_begins_anew():
    callback, again = Criterion(Memory()), PlainModule()
    shuffled_fit(PlainModule(seed=1), callback, max_epochs=1)
    shuffled_fit(again, callback, max_epochs=1)
    other, first = Criterion(Memory()), PlainModule()
    shuffled_fit(first, other, max_epochs=1)
    close(again, first, rtol=0, atol=0)
    assert torch.equal(callback.criterion.table.rows, other.criterion.table.rows)


def test_epochs_and_validation_are_told():
    callback = Criterion(Watching())
    run = trainer(callback, max_epochs=2, num_sanity_val_steps=1)
    run.fit(PlainModule(), loader(), loader(batch_size=16))
    epoch = [("observe", 16), ("observe", 8), ("validation",)]
    assert callback.criterion.calls == [
        *[("starts", 0, 2), *epoch, ("ends", 0)],
        *[("starts", 1, 2), *epoch, ("ends", 1)],
    ]


def test_learning_from_validation_needs_validation():
    with pytest.raises(ValueError, match="Watching adapts itself on validation data, but this run has none"):
        fit(PlainModule(), Criterion(Watching()))


class Silent(WithCriterion):
    logs = False  # compiled code would have to look into the Trainer


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of graph breaks
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_module_calls_it_too(precision):
    torch._dynamo.reset()
    module, plain = Silent(norm=False), Silent(norm=False)
    fit(torch.compile(module, backend="eager"), Criterion(CrossEntropy(**SMOOTH)), precision=precision, max_steps=3)
    fit(plain, Criterion(CrossEntropy(**SMOOTH)), precision=precision, max_steps=3)
    torch.testing.assert_close(weights_of(module), weights_of(plain))
    torch._dynamo.reset()


def test_an_image_classifier_takes_a_criterion_with_a_memory():
    def model(criterion=None):
        torch.manual_seed(0)
        return ImageClassifier(network(norm=False), num_classes=CLASSES, in_chans=CHANNELS, criterion=criterion)

    short, long = model(Memory()), model()
    shuffled_fit(short, max_epochs=2)
    shuffled_fit(long, Criterion(Memory()), max_epochs=2)
    close(short, long, rtol=0, atol=0)
    assert isinstance(short.criterion, CrossEntropy)


def test_a_copy_of_the_callback_holds_no_module():
    callback = Criterion(CrossEntropy())
    fit(WithCriterion(), callback)
    callback._swap = object()
    assert copy.deepcopy(callback)._swap is None


class Centred(CrossEntropy):
    needs = ("features",)

    def sample_losses(self, logits, target, *, features):
        return super().sample_losses(logits, target) + features.square().mean(1)


@pytest.mark.parametrize("sharp", [False, True], ids=["alone", "with SAM"])
@pytest.mark.parametrize("kind", [PlainModule, WithCriterion])
def test_features_are_those_before_the_classifier(kind, sharp):
    module = kind(norm=False, lr=0.01)
    batch = next(iter(loader()))

    def loss(z, y):
        extra = 0.1 * z.square().mean() if kind is WithCriterion else 0.0
        reference = inputs[-1]
        return F.cross_entropy(z, y) + reference.square().mean() + extra

    inputs = []
    handle = module.net[-1].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    if sharp:
        copied = copy.deepcopy(module)
        sharp_backward(lambda: loss(copied.net(batch[0]), batch[1]), SAM(rho=0.1), copied.configure_optimizers())
        expected = torch.cat([(p - 0.01 * (p.grad + 5e-4 * p)).detach().flatten() for p in copied.parameters()])
    else:
        expected = one_step(module, loss)
    handle.remove()
    fit(module, Criterion(Centred()), *([SharpnessAware(SAM(rho=0.1))] if sharp else []))
    torch.testing.assert_close(weights_of(module), expected)

"""Adversarial training of modules that know nothing about it."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import AdversarialTraining, SharpnessAware
from lightning_robust.sharpness import SAM
from lightning_robust.training import BatchAdapter, Stage, StepCallback
from support.modules import CLASSES, DictModule, ManualModule, PlainModule, loader, trainer, weights_of

EPS = 0.1


class Watch(StepCallback):
    """Keeps the batches and losses that reach the innermost stage."""

    stage = Stage.LOSS
    manual_optimization = True

    def __init__(self):
        super().__init__()
        self.loaded, self.seen, self.losses, self.passes_counted = [], [], [], []

    def around_step(self, context, batch, run):
        output = run(batch)
        self.loaded.append(context.batch_as_loaded)
        self.seen.append(batch)
        self.passes_counted.append(context.counted)
        self.losses.append(output)
        return output


class CountingNet(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return self.inner(x)


def counted(**kwargs):
    module = PlainModule(**kwargs)
    module.net = CountingNet(module.net)
    return module


def fit(module, *callbacks, batches=2, form="pair", **kwargs):
    run = trainer(*callbacks, limit_train_batches=batches, limit_val_batches=0, **kwargs)
    run.fit(module, loader(form=form))
    return run


@pytest.mark.parametrize("attack", [PGD(eps=EPS, steps=3), PGD(eps=1.0, norm="l2", steps=3), FGSM(eps=EPS)], ids=repr)
def test_the_module_trains_on_attacked_images(attack):
    watch = Watch()
    module = PlainModule()
    fit(module, watch, AdversarialTraining(attack))
    for (x, y), (x_adv, y_adv) in zip(watch.loaded, watch.seen, strict=True):
        assert y_adv is y
        delta = (x_adv - x).flatten(1)
        size = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
        assert float(size.min()) > 0
        assert float(size.max()) <= attack.eps + 1e-6
        with torch.no_grad():
            assert float(F.cross_entropy(module(x_adv), y)) > float(F.cross_entropy(module(x), y))


def test_same_weights_as_the_loop_written_out():
    module = PlainModule(norm=True)
    twin = copy.deepcopy(module)
    attack = PGD(eps=EPS, steps=3, random_start=False)
    fit(module, AdversarialTraining(attack), batches=4)
    optimizer = twin.configure_optimizers()
    for index, (x, y) in enumerate(loader()):
        if index == 4:
            break
        twin.eval()
        x_adv = attack(twin.net, x, y)
        twin.train()
        optimizer.zero_grad()
        F.cross_entropy(twin.net(x_adv), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(module), weights_of(twin))
    torch.testing.assert_close(module.net[1].running_mean, twin.net[1].running_mean)


def test_passes_and_modes():
    module = counted()
    callback = AdversarialTraining(PGD(eps=EPS, steps=5))
    fit(module, callback, batches=3)
    assert module.net.modes == ([False] * 5 + [True]) * 3
    assert callback.passes(1) == 6


def test_training_mode_updates_the_statistics_in_every_step():
    counts = {}
    for mode in ("eval", "train", "train-frozen-stats"):
        module = PlainModule()
        fit(module, AdversarialTraining(PGD(eps=EPS, steps=5, mode=mode)), batches=2)
        counts[mode] = int(module.net[1].num_batches_tracked)
    assert counts == {"eval": 2, "train": 12, "train-frozen-stats": 2}


def test_gradient_accumulation_does_not_see_the_attack():
    module = PlainModule(norm=False)
    twin = copy.deepcopy(module)
    attack = PGD(eps=EPS, steps=2, random_start=False)
    fit(module, AdversarialTraining(attack), batches=2, accumulate_grad_batches=2)
    optimizer = twin.configure_optimizers()
    for index, (x, y) in enumerate(loader()):
        if index == 2:
            break
        (F.cross_entropy(twin(attack(twin.net, x, y)), y) / 2).backward()
    optimizer.step()
    torch.testing.assert_close(weights_of(module), weights_of(twin))


def test_sharpness_aware_passes_share_one_attack():
    module, watch = counted(), Watch()
    fit(module, SharpnessAware(SAM(rho=0.05)), watch, AdversarialTraining(PGD(eps=EPS, steps=4)), batches=2)
    assert module.net.modes == ([False] * 4 + [True] * 2) * 2
    assert watch.passes_counted == [True, False] * 2
    assert torch.equal(watch.seen[0][0], watch.seen[1][0])


@pytest.mark.parametrize(("form", "module"), [("dict", DictModule), ("pair", ManualModule)])
def test_other_batches_and_manual_optimization(form, module):
    module, watch = module(), Watch()
    before = weights_of(module)
    fit(module, AdversarialTraining(PGD(eps=EPS, steps=2)), watch, form=form)
    adapter = BatchAdapter()
    for loaded, seen in zip(watch.loaded, watch.seen, strict=True):
        assert type(loaded) is type(seen)
        assert not torch.equal(adapter.unpack(loaded)[0], adapter.unpack(seen)[0])
        if form == "dict":
            assert loaded["id"] is seen["id"]
    assert not torch.equal(weights_of(module), before)


def test_soft_targets():
    class SoftModule(PlainModule):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y)

    class Mixed(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            x, y = loader().dataset[index]
            return x, 0.9 * F.one_hot(y, CLASSES).float() + 0.1 / CLASSES

    watch = Watch()
    run = trainer(AdversarialTraining(PGD(eps=EPS, steps=2)), watch, limit_val_batches=0)
    run.fit(SoftModule(), torch.utils.data.DataLoader(Mixed(), batch_size=6))
    assert len(watch.seen) == 2
    assert not torch.equal(watch.seen[0][0], watch.loaded[0][0])


@pytest.mark.parametrize(("fraction", "clean"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_clean_fraction(fraction, clean):
    watch = Watch()
    callback = AdversarialTraining(PGD(eps=EPS, steps=2), clean_fraction=fraction)
    fit(PlainModule(), callback, watch)
    for (x, _), (x_adv, _) in zip(watch.loaded, watch.seen, strict=True):
        unchanged = (x == x_adv).flatten(1).all(1)
        assert unchanged.tolist() == [True] * clean + [False] * (6 - clean)
    assert callback.passes(1) == 1 + 2 * (1 - fraction)


def test_same_starts_in_a_second_run_and_new_ones_per_batch():
    runs = []
    for _ in range(2):
        watch = Watch()
        torch.rand(3)
        fit(PlainModule(lr=0.0), AdversarialTraining(PGD(eps=EPS, steps=1)), watch, max_epochs=2)
        runs.append([seen[0] - loaded[0] for seen, loaded in zip(watch.seen, watch.loaded, strict=True)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert len({float(delta.sum()) for delta in runs[0]}) == 4


def test_attack_generator_stays_out_of_the_global_one():
    plain, attacked = PlainModule(dropout=0.5), PlainModule(dropout=0.5)
    states = []
    for module, callbacks in ((plain, []), (attacked, [AdversarialTraining(PGD(eps=EPS, steps=2))])):
        torch.manual_seed(7)
        fit(module, *callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(precision):
    watch = Watch()
    module = PlainModule()
    before = weights_of(module)
    run = trainer(
        AdversarialTraining(PGD(eps=EPS, steps=2)),
        watch,
        precision=precision,
        limit_train_batches=2,
        limit_val_batches=0,
    )
    run.fit(module, loader())
    assert float((watch.seen[0][0] - watch.loaded[0][0]).abs().max()) > 0
    assert watch.seen[0][0].dtype == watch.loaded[0][0].dtype
    assert not torch.equal(weights_of(module).float(), before)


def test_images_that_are_not_pixels_are_refused_at_the_first_batch():
    class Normalised(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            x, y = loader().dataset[index]
            return (x - 0.5) / 0.25, y

    data = torch.utils.data.DataLoader(Normalised(), batch_size=6)
    with pytest.raises(ValueError, match="give the attack the `mean` and `std`"):
        trainer(AdversarialTraining()).fit(PlainModule(), data)
    attack = PGD(mean=[0.5] * 2, std=[0.25] * 2, steps=1)
    trainer(AdversarialTraining(attack), limit_val_batches=0).fit(PlainModule(), data)


def test_two_attacks_are_refused():
    with pytest.raises(ValueError, match="AdversarialTraining and AdversarialTraining cannot work in one Trainer"):
        trainer(AdversarialTraining(), AdversarialTraining()).fit(PlainModule(), loader())


def test_defaults_and_refusals():
    attack = AdversarialTraining().attack
    assert (attack.eps, attack.step_size, attack.steps, attack.mode) == (8 / 255, 2 / 255, 10, "eval")
    with pytest.raises(ValueError, match="Expected `clean_fraction` to be in"):
        AdversarialTraining(clean_fraction=1.5)


def normalise(x):
    return (x - 0.5) / 0.25


class NormalisesInTheStep(PlainModule):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(normalise(batch[0])), batch[1])


class NormalisesBeforeTheNetwork(NormalisesInTheStep):
    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(normalise(batch[0])), batch[1])


class AugmentsInTheStep(PlainModule):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(x=batch[0] + 0.01 * torch.rand_like(batch[0])), batch[1])


@pytest.mark.parametrize("module", [NormalisesInTheStep, NormalisesBeforeTheNetwork, AugmentsInTheStep])
@pytest.mark.parametrize("others", [[], [SharpnessAware()]], ids=["alone", "sharpness"])
def test_a_step_that_changes_the_attacked_images_is_warned_about_once(module, others):
    module = module()
    with pytest.warns(UserWarning, match=f"training_step of {type(module).__name__} changes its images") as record:
        fit(module, AdversarialTraining(PGD(eps=EPS, steps=1)), *others)
    assert sum("changes its images" in str(each.message) for each in record) == 1
    assert not any(child._forward_pre_hooks for child in module.modules())


class NormalisesInForward(PlainModule):
    def forward(self, x):
        return self.net(normalise(x))


class SameByHand(NormalisesInForward):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(normalise(batch[0])), batch[1])


class Keyword(PlainModule):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(x=batch[0].clone()), batch[1])


class Parts(PlainModule):
    def forward(self, x):
        return self.net[-1](self.net[:-1](x))

    def training_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.net:
            x = layer(x)
        return F.cross_entropy(x, batch[1])


class Joint(PlainModule):
    def training_step(self, batch, batch_idx):
        logits = self(torch.cat([batch[0], batch[0].flip(-1)]))
        return F.cross_entropy(logits, batch[1].repeat(2))


class Hidden(PlainModule):
    def training_step(self, batch, batch_idx):
        weight = self.net[-1].weight
        return F.cross_entropy(F.linear(batch[0].flatten(1)[:, : weight.shape[1]], weight), batch[1])


@pytest.mark.parametrize("module", [NormalisesInForward, SameByHand, Keyword, Parts, Joint, Hidden, ManualModule])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_shows_the_attacked_images_to_its_network_is_not(module, precision):
    module = module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*changes its images.*")
        fit(module, AdversarialTraining(PGD(eps=EPS, steps=1)), precision=precision)
    assert not any(child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("what", ["network", "module"])
def test_watching_the_first_batch_leaves_compiled_code_alone(what):
    torch._dynamo.reset()
    plain, compiled = PlainModule(norm=False), PlainModule(norm=False)
    if what == "network":
        compiled.net = torch.compile(compiled.net, backend="eager")
        fitted = compiled
    else:
        compiled.train_acc = None
        compiled.training_step = torch.compile(
            lambda batch, batch_idx: F.cross_entropy(compiled(batch[0]), batch[1]), backend="eager", fullgraph=True
        )
        fitted = compiled
    attack = PGD(eps=EPS, steps=2, random_start=False)
    fit(plain, AdversarialTraining(attack))
    fit(fitted, AdversarialTraining(attack))
    torch.testing.assert_close(weights_of(compiled), weights_of(plain))

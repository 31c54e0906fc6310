"""Mixing against a plain loop over the mixers, in every setting of the Trainer that could disturb it."""

import contextlib

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import (
    SAF,
    AdversarialTraining,
    Criterion,
    Distillation,
    LogitRegularization,
    Mixing,
    ObjectiveTraining,
    SharpnessAware,
)
from lightning_robust.losses import CrossEntropy, DecoupledMixup, Focal, LogitPenalty, MaxSup
from lightning_robust.mixing import CutMix, Mixture, Mixup, RegMixup, TimmMixup
from lightning_robust.models import ImageClassifier
from lightning_robust.objectives import TRADES
from lightning_robust.sharpness import SAM, sharp_backward
from lightning_robust.training import derive_seed
from support.modules import CLASSES, CollectionModule, DictModule, Images, PlainModule, loader, network, trainer
from support.shuffled import close, differ, fit, shuffled

EPOCHS, BATCHES = 2, 4


class Soft(PlainModule):
    """Takes labels in any form."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


def mixing(mixer=None, **options):
    options = {"num_classes": CLASSES, **options} if options.get("targets") != "hard" else options
    return Mixing(mixer or Mixup(alpha=1.0), **options)


def run(module, *callbacks, **options):
    return fit(module, *callbacks, **{"max_epochs": EPOCHS, **options})


def drawn(mixer, x, epoch, index, probability=1.0, rank=0):
    generator = torch.Generator().manual_seed(derive_seed(0, rank, epoch, index, "mixing"))
    mixes = float(torch.rand((), generator=generator)) < probability
    return mixer.mix(x, generator) if mixes else Mixture.unmixed(x)


def plain_loop(module, mixer, *, probability=1.0, off_epoch=99, sharp=None, accumulate=1, loss_of=None, context=None):
    """What Mixing must amount to."""
    data, sampler = shuffled().dataset, shuffled().sampler
    optimizer = module.train().configure_optimizers()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, indices in enumerate(torch.tensor(list(sampler)).split(6)):
            x, y = data.x[indices], data.y[indices]
            mixture = drawn(mixer, x, epoch, index, probability if epoch < off_epoch else 0.0)
            criterion = loss_of or (
                lambda z, m, y: F.cross_entropy(z, m.probabilities(y, CLASSES, label_smoothing=mixer.label_smoothing))
            )

            def loss(mixture=mixture, y=y, criterion=criterion):
                with context or contextlib.nullcontext():
                    return criterion(module(mixture.x), mixture, y)

            if index % accumulate == 0:
                optimizer.zero_grad()
            if sharp is None:
                (loss() / accumulate).backward()
            else:
                sharp_backward(loss, sharp, optimizer, module=module)
            if (index + 1) % accumulate == 0 or index + 1 == BATCHES:
                optimizer.step()


CASES = {
    "mixup": (Mixup(alpha=1.0), {}, {}, {}),
    "cutmix": (CutMix(alpha=1.0), {}, {}, {}),
    "regmixup": (RegMixup(alpha=20.0), {}, {}, {}),
    "timm": (TimmMixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem", label_smoothing=0.1), {}, {}, {}),
    "probability": (Mixup(alpha=1.0), {"probability": 0.5}, {"probability": 0.5}, {}),
    "off": (Mixup(alpha=1.0), {"off_epoch": 1}, {"off_epoch": 1}, {}),
    "accumulate": (Mixup(alpha=1.0), {}, {"accumulate": 3}, {"accumulate_grad_batches": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop(case):
    mixer, options, loop, settings = CASES[case]
    ours, reference = Soft(), Soft()
    run(ours, mixing(mixer, **options), **settings)
    plain_loop(reference, mixer, **loop)
    close(ours, reference)
    untouched = Soft()
    run(untouched, **settings)
    assert differ(ours, untouched)


def test_bf16_mixed():
    ours, reference = Soft(), Soft()
    run(ours, mixing(), precision="bf16-mixed")
    plain_loop(reference, Mixup(alpha=1.0), context=torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    close(ours, reference, rtol=1e-3, atol=1e-4)


def test_fp16_with_a_scaler():
    ours, reference = Soft(), Soft()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # the Trainer itself would take bf16
    run(ours, mixing(), precision=None, plugins=[plugin])
    plain_loop(reference, Mixup(alpha=1.0), context=torch.autocast("cpu", torch.float16, cache_enabled=False))
    close(ours, reference, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("where", ["before", "behind"])
def test_every_pass_of_a_sharpness_aware_step_sees_the_same_mixture(where):
    ours, reference = Soft(), Soft()
    callbacks = [mixing(), SharpnessAware(SAM(rho=0.2))]
    run(ours, *(callbacks if where == "before" else callbacks[::-1]))
    plain_loop(reference, Mixup(alpha=1.0), sharp=SAM(rho=0.2))
    close(ours, reference)


@pytest.mark.parametrize("targets", ["soft", "hard"])
@pytest.mark.parametrize("mixer", [Mixup(alpha=1.0), RegMixup(alpha=20.0)], ids=["mixup", "regmixup"])
def test_the_callback_criterion_gets_both_labels(mixer, targets):
    ours, reference = PlainModule() if targets == "hard" else Soft(), Soft()
    run(ours, mixing(mixer, targets=targets), Criterion(DecoupledMixup(eta=0.5)))
    plain_loop(reference, mixer, loss_of=lambda z, mixture, y: DecoupledMixup(eta=0.5)(z, mixture.target(y)))
    close(ours, reference)


def test_metrics_go_on_working_with_hard_targets_and_see_the_dominant_label():
    class Keeps(PlainModule):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[1].clone()]
            return super().training_step(batch, batch_idx)

    module = Keeps()
    metrics = run(module, mixing(targets="hard"), Criterion(CrossEntropy()), max_epochs=1).callback_metrics
    assert 0 <= float(metrics["train_acc"]) <= 1
    sampler, data = shuffled().sampler, shuffled().dataset
    sampler.set_epoch(0)
    for index, indices in enumerate(torch.tensor(list(sampler)).split(6)):
        mixture = drawn(Mixup(alpha=1.0), data.x[indices], 0, index)
        assert torch.equal(module.seen[index], mixture.dominant(data.y[indices]))


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_an_ascent_on_part_of_the_batch(targets):
    module = PlainModule() if targets == "hard" else Soft()
    sharp = SharpnessAware(SAM(rho=0.2), ascent_fraction=0.5)
    run(module, mixing(targets=targets), sharp, Criterion(Focal(gamma=2.0)))
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module", "method"])
def test_compiled(what):
    eager, compiled = Soft(), Soft()
    run(eager, mixing())
    torch._dynamo.reset()
    target = compiled
    if what == "network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
    elif what == "method":
        compiled.compile(backend="aot_eager")
    else:
        target = torch.compile(compiled, backend="aot_eager")
    run(target, mixing())
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("mixer", [Mixup(), TimmMixup(cutmix_alpha=1.0)], ids=["mixup", "timm"])
def test_resume_equals_the_uninterrupted_run(tmp_path, mixer):
    def train(ckpt_path=None):
        module = Soft()
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        run(module, mixing(mixer, probability=0.7), saving, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module

    whole = train()
    for step in (2, BATCHES, 6):
        assert not differ(whole, train(tmp_path / f"step={step}.ckpt")), step


def test_leaves_the_batch_validation_and_the_generators_alone():
    class Watches(Soft):
        def on_train_batch_start(self, batch, batch_idx):
            self.kept = [tensor.clone() for tensor in batch]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert all(torch.equal(kept, tensor) for kept, tensor in zip(self.kept, batch, strict=True))

    class Draws(Watches):
        def training_step(self, batch, batch_idx):
            self.draws = [*getattr(self, "draws", []), torch.rand(())]
            return super().training_step(batch, batch_idx)

    mixed, plain = Draws(), Draws()
    run(mixed, mixing(TimmMixup()))
    run(plain)
    assert torch.equal(torch.stack(mixed.draws), torch.stack(plain.draws))
    frozen = Soft(lr=0.0)
    fitting = trainer(mixing())
    fitting.fit(frozen, loader(), loader())
    again = trainer().validate(frozen, loader(), verbose=False)[0]
    torch.testing.assert_close(float(fitting.callback_metrics["val_loss"]), again["val_loss"])


def test_what_the_batch_holds_of_each_sample_goes_along_with_its_first_row():
    class Ids(DictModule):
        def training_step(self, batch):
            self.seen = batch
            return super().training_step(batch)

    module = Ids()
    fit(module, mixing(RegMixup(alpha=20.0)), loader=shuffled("dict", length=6), max_epochs=1)
    ids, images = module.seen["id"], module.seen["image"]
    assert torch.equal(ids[:6], ids[6:])
    assert torch.equal(images[:6], Images(6).x[ids[:6]])


@pytest.mark.parametrize("module", [DictModule, CollectionModule])
def test_batches_of_other_forms(module):
    form = {DictModule: "dict", CollectionModule: "triple"}[module]
    if module is DictModule:
        run(module(), mixing(), loader=shuffled(form))
    else:
        net = module()
        run(net, mixing(targets="hard"), Criterion(CrossEntropy(label_smoothing=0.1)), loader=shuffled(form))
        assert net.updates == BATCHES


def test_soft_labels_are_mixed_too():
    data = Images()
    soft = F.one_hot(data.y, CLASSES).float()
    modules = Soft(), Soft()
    for module, y in zip(modules, (soft, data.y), strict=True):
        fit(module, mixing(), loader=DataLoader(TensorDataset(data.x, y), batch_size=6), max_epochs=1)
    close(*modules)


def test_one_sample_stays_as_it_is():
    for mixer in (Mixup(), CutMix(), TimmMixup()):
        mixed, plain = Soft(norm=False), Soft(norm=False)
        fit(mixed, mixing(mixer), loader=DataLoader(Images(3), batch_size=1))
        fit(plain, loader=DataLoader(Images(3), batch_size=1))
        close(mixed, plain)


def test_the_number_of_classes_comes_from_module_hyperparameters_or_data():
    class Told(Soft):
        num_classes = CLASSES

    class Hyper(Soft):
        def __init__(self, num_classes=CLASSES):
            super().__init__()
            self.save_hyperparameters()

    for module in (Told(), Hyper()):
        run(module, Mixing(Mixup()), max_epochs=1)
    classifier = ImageClassifier(network(), num_classes=CLASSES, in_chans=2)
    metrics = run(classifier, Mixing(CutMix()), max_epochs=1).callback_metrics
    assert 0 <= float(metrics["train/acc"]) <= 1
    with pytest.raises(ValueError, match=r"neither Soft nor its hyper-parameters or data say .*num_classes=\.\.\."):
        run(Soft(), Mixing(Mixup()))


def test_attacks_and_teachers_see_mixed_samples():
    attack = AdversarialTraining(PGD(eps=0.1, steps=2, step_size=0.05))
    for callbacks in ([mixing(), attack], [attack, mixing()]):
        module = Soft()
        run(module, *callbacks, Distillation(network(), name="guide"), LogitRegularization(LogitPenalty()))
        assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_an_objective_sees_mixed_samples():
    class Told(Soft):
        num_classes = CLASSES

    module = Told()
    metrics = run(
        module, Mixing(CutMix()), ObjectiveTraining(TRADES(attack=FGSM(eps=0.1, loss="kl", random_start=True)))
    ).callback_metrics
    assert bool(metrics["train/loss"].isfinite())


def test_a_module_that_steps_its_optimizers_itself():
    class Manual(Soft):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    ours, reference = Manual(), Soft()
    run(ours, mixing())
    run(reference, mixing())
    close(ours, reference)


def test_passes():
    assert mixing().passes(2.0) == 2.0
    assert mixing(RegMixup()).passes(2.0) == 4.0


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(label_smoothing=0.1), CrossEntropy(label_smoothing=0.1)], ids=["torch", "ours"]
)
@pytest.mark.parametrize("as_callback", [False, True])
def test_warns_of_labels_that_are_smoothed_twice(criterion, as_callback):
    module, callbacks = Soft(), [mixing(TimmMixup(label_smoothing=0.1))]
    if as_callback:
        if not isinstance(criterion, CrossEntropy):
            pytest.skip("the callback takes criteria of this library")
        callbacks.append(Criterion(criterion))
    else:
        module.criterion = criterion
    with pytest.warns(UserWarning, match="Labels are smoothed twice") as caught:
        run(module, *callbacks, max_epochs=1)
    told = [str(each.message) for each in caught if "smoothed" in str(each.message)]
    assert len(told) == 1
    assert "the targets of Mixing (0.1)" in told[0]
    assert f"{'CrossEntropy of the callback' if as_callback else 'the criterion of Soft'}" in told[0]


def test_warns_of_timms_smoothing_loss():
    timm = pytest.importorskip("timm.loss")
    module = Soft()
    module.criterion = timm.LabelSmoothingCrossEntropy(smoothing=0.2)
    with pytest.warns(UserWarning, match=r"twice, by the criterion of Soft \(0.2\) and the targets of Mixing \(0.1\)"):
        run(module, mixing(TimmMixup(label_smoothing=0.1)), max_epochs=1)
    run(module, mixing(TimmMixup()), max_epochs=1)  # one smoothing is fine


def test_warns_of_smoothing_with_maxsup():
    callbacks = [mixing(TimmMixup(label_smoothing=0.1)), LogitRegularization(MaxSup())]
    for order in (callbacks, callbacks[::-1]):
        with pytest.warns(UserWarning, match=r"by the targets of Mixing \(0.1\), and MaxSup penalises") as caught:
            run(Soft(), *order, max_epochs=1)
        assert sum("smooth" in str(each.message) for each in caught) == 1
    run(Soft(), mixing(TimmMixup()), LogitRegularization(MaxSup()), max_epochs=1)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([mixing(targets="hard")], r"add the callback Criterion, for example Criterion\(CrossEntropy\(\)\)"),
        (
            [mixing(TimmMixup(label_smoothing=0.1), targets="hard"), Criterion(CrossEntropy())],
            "which hard targets cannot show",
        ),
        ([mixing(), mixing(CutMix())], "Mixing and Mixing would both mix the samples"),
        ([mixing(), SAF()], "SAF remembers what the network says about each sample, but Mixing shows it mixtures"),
        (
            [mixing(TimmMixup(label_smoothing=0.1)), Criterion(DecoupledMixup())],
            "DecoupledMixup needs to know which two labels were mixed",
        ),
    ],
    ids=["no criterion", "smoothing", "two", "saf", "decoupled"],
)
def test_refused_partners(callbacks, message):
    with pytest.raises(ValueError, match=message):
        run(Soft(), *callbacks)


def labelled(y):
    return DataLoader(TensorDataset(Images(len(y)).x, y), batch_size=6)


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (torch.full((6,), CLASSES), {}, r"Expected labels in \[0, 3\] but got 4"),
        (torch.tensor([0, 1, -100, 2, 1, 0]), {}, r"but got -100: Mixing makes class probabilities"),
        (torch.zeros(6, 6, 6, dtype=torch.long), {}, r"one class index per sample, \[6\], but got .* \(6, 6, 6\)"),
        (torch.zeros(6), {}, r"class probabilities \[6, 4\] but got floating-point targets of shape \(6,\)"),
        (torch.zeros(6, 5), {}, r"class probabilities \[6, 4\] but got floating-point targets of shape \(6, 5\)"),
        (torch.zeros(6, 4), {"targets": "hard"}, "of which targets='hard' cannot keep a label"),
    ],
    ids=["class", "ignored", "dense", "numbers", "classes", "hard"],
)
def test_refused_labels(y, options, message):
    with pytest.raises(ValueError, match=message):
        fit(Soft(), mixing(**options), Criterion(CrossEntropy()), loader=labelled(y))


def test_bytes_are_refused():
    data = TensorDataset(torch.zeros(6, 2, 6, 6, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
    with pytest.raises(TypeError, match=r"Mixup mixes floating-point inputs but got torch\.uint8"):
        fit(Soft(), mixing(), loader=DataLoader(data, batch_size=6))


def test_ignored_labels_work_with_hard_targets():
    y = torch.tensor([0, 1, -100, 2, 1, 0])
    module = Soft()
    fit(module, mixing(targets="hard"), Criterion(CrossEntropy()), loader=labelled(y))
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_metrics_that_get_probabilities_are_warned_about():
    with pytest.warns(UserWarning, match=r"MulticlassAccuracy may be wrong in training: .* targets='hard'"):
        run(PlainModule(), mixing(), max_epochs=1)  # torchmetrics itself does not notice


def test_a_step_that_cannot_take_probabilities_gets_an_explanation():
    class Looks(PlainModule):
        def training_step(self, batch, batch_idx):
            return -self(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    with pytest.raises(RuntimeError) as caught:
        run(Looks(), mixing())
    assert "Metrics that want class indices work with targets='hard'" in "".join(caught.value.__notes__)


def test_can_be_built_from_a_configuration():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    # The newer name of one method; older versions of jsonargparse know only the second.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    line = ["--methods.m", "Mixing", "--methods.m.mixer", "TimmMixup", "--methods.m.mixer.cutmix_alpha", "0.7"]
    built = instantiate(parser.parse_args([*line, "--methods.m.targets", "hard"])).methods["m"]
    assert isinstance(built.mixer, TimmMixup)
    assert (built.mixer.cutmix_alpha, built.targets) == (0.7, "hard")
    layers = ["--methods.m", "ManifoldMixup", "--methods.m.layers", '["net", "net.2"]']
    assert instantiate(parser.parse_args(layers)).methods["m"].layers == ["net", "net.2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "both"}, "'soft', 'hard'"),
        ({"num_classes": 1}, "`num_classes` to be an integer >= 2"),
        ({"probability": 1.5}, "probability"),
        ({"off_epoch": -1}, "`off_epoch` to be an integer >= 0"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mixing(Mixup(), **options)


@pytest.mark.parametrize("mixer", ["mixup", Mixup], ids=["name", "class"])
def test_what_is_no_mixer_is_refused_at_once(mixer):
    with pytest.raises(TypeError, match=r"a Mixer but got (str|Mixup); use one of lightning_robust.mixing"):
        Mixing(mixer)

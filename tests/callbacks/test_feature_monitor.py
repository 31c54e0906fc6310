"""FeatureMonitor against the metrics of features that a plain loop collects."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import AdversarialTraining, FeatureMonitor, MislabelMonitor, SharpnessAware
from lightning_robust.callbacks._feature_statistics import KeptFeatures
from lightning_robust.metrics import class_separation, feature_sums
from lightning_robust.sharpness import SAM
from lightning_robust.training import FeaturesNotCaptured
from support.feature_numbers import expected
from support.modules import (
    CHANNELS,
    CLASSES,
    CollectionModule,
    DictModule,
    Images,
    ManualModule,
    PlainModule,
    loader,
    trainer,
)

VAL = {"length": 45, "batch_size": 7, "seed": 1}
NAMES = {"d_within", "r2", "nc1", "nc1_trace", "nc2", "nc2_norms", "nc2_angles", "nc3", "nc4", "cdnv"}
NAMES |= {"effective_rank", "stable_rank"}


def evaluated(module, data):
    """A second forward pass in evaluation mode."""
    net = copy.deepcopy(module.net).eval()
    with torch.no_grad():
        features = net[:-1](data.x)
        return expected(features, net[-1](features), data.y, net[-1].weight)


def check(run, prefix, values, rtol=1e-4, loader=""):
    for name, value in values.items():
        found = run.callback_metrics[f"{prefix}/{name}{loader}"].double()
        torch.testing.assert_close(found, value.double(), rtol=rtol, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", [PlainModule, DictModule, CollectionModule, ManualModule])
def test_validation_features(kind):
    torch.manual_seed(0)
    module = kind()
    form = {DictModule: "dict", CollectionModule: "triple"}.get(kind, "pair")
    run = trainer(FeatureMonitor(), max_epochs=2)
    run.fit(module, loader(form=form), loader(form=form, **VAL))
    check(run, "val", evaluated(module, Images(45, seed=1)))
    assert {name[4:] for name in run.callback_metrics if name.startswith("val/")} >= NAMES


class Collecting(Callback):
    """What the counted training steps computed, by hooks of its own."""

    def __init__(self):
        self.rows, self.seen = [], []

    def on_train_epoch_start(self, trainer, module):
        self.rows.clear()

    def setup(self, trainer, module, stage):
        module.net[-1].register_forward_hook(lambda layer, inputs, output: self.seen.append((inputs[0], output)))

    def on_train_batch_start(self, *_):
        self.seen.clear()

    def values(self, module, which=-1):
        features, logits = (torch.cat(parts).detach() for parts in zip(*[row[:2] for row in self.rows], strict=True))
        return expected(features, logits, torch.cat([row[2] for row in self.rows]), module.net[-1].weight.detach())


class First(Collecting):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append((*self.seen[0], batch[1]))


class Last(Collecting):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append((*self.seen[-1], batch[1]))


@pytest.mark.parametrize("case", ["plain", "manual", "accumulate", "sam", "adversarial"])
def test_training_features(case):
    """SAM counts its first pass; an adversarial step trains on its last forward."""
    module = ManualModule() if case == "manual" else PlainModule()
    reference = First() if case == "sam" else Last()
    others = {"sam": [SharpnessAware(SAM(rho=0.1))], "adversarial": [AdversarialTraining(PGD(steps=2, eps=0.1))]}
    options = {"accumulate_grad_batches": 2} if case == "accumulate" else {}
    run = trainer(*others.get(case, []), FeatureMonitor(data="train"), reference, max_epochs=2, **options)
    run.fit(module, loader(shuffle=True))
    check(run, "train", reference.values(module))


def test_training_is_not_changed():
    plain, watched = PlainModule(dropout=0.3), PlainModule(dropout=0.3)
    for module, callbacks in ((plain, []), (watched, [FeatureMonitor(data="both")])):
        torch.manual_seed(1)
        trainer(*callbacks, max_epochs=2, num_sanity_val_steps=2).fit(module, loader(), loader(**VAL))
    for ours, theirs in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert not watched.net[-1]._forward_hooks
    assert "validation_step" not in vars(watched)
    assert "training_step" not in vars(watched)


def test_several_loaders_names_and_test():
    class Several(PlainModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    module = Several()
    run = trainer(FeatureMonitor(), FeatureMonitor(name="body", features_from="net.0", covariance=False, keep=0))
    run.validate(module, [loader(**VAL), loader(30, seed=2)], verbose=False)
    check(run, "val", evaluated(module, Images(45, seed=1)), loader="/dataloader_idx_0")
    check(run, "val", evaluated(module, Images(30, seed=2)), loader="/dataloader_idx_1")
    maps = feature_sums(module.net[0](Images(30, seed=2).x).mean((2, 3)).detach(), Images(30, seed=2).y, CLASSES)
    check(run, "val/body", {"d_within": class_separation(maps).d_within}, loader="/dataloader_idx_1")
    named = {name.split("/")[2] for name in run.callback_metrics if name.startswith("val/body")}
    assert named == NAMES - {"nc1", "nc3", "nc4", "effective_rank", "stable_rank"}

    class Tested(PlainModule):
        def test_step(self, batch, batch_idx):
            self(batch[0])

    run.test(Tested(), loader(**VAL), verbose=False)
    check(run, "test", evaluated(Tested(), Images(45, seed=1)))


def test_every_n_epochs():
    seen = []

    class Epochs(Callback):
        def on_validation_end(self, trainer, module):
            seen.append(float(trainer.logged_metrics["val/nc1"]))  # the last value that was logged

    trainer(FeatureMonitor(every_n_epochs=2), Epochs(), max_epochs=4).fit(PlainModule(), loader(), loader(**VAL))
    assert seen[0] == seen[1] != seen[2] == seen[3]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision):
    run = trainer(FeatureMonitor(data="both"), precision=precision)
    run.fit(PlainModule(), loader(), loader(**VAL))
    assert all(run.callback_metrics[f"{split}/{name}"].isfinite() for split in ("val", "train") for name in NAMES)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module"])
def test_compiled(what):
    torch._dynamo.reset()
    eager, module = PlainModule(), PlainModule()
    target = module
    if what == "network":
        module.net = torch.compile(module.net, backend="aot_eager")
    else:
        target = torch.compile(module, backend="aot_eager")
    found = [trainer(FeatureMonitor(data="both"), max_epochs=2, num_sanity_val_steps=1) for _ in range(2)]
    found[0].fit(eager, loader(), loader(**VAL))
    found[1].fit(target, loader(), loader(**VAL))
    for name in found[0].callback_metrics:
        torch.testing.assert_close(
            found[1].callback_metrics[name], found[0].callback_metrics[name], rtol=1e-3, atol=1e-4
        )


def test_nan_features_do_not_stop_a_training():
    module = PlainModule()
    with torch.no_grad():
        module.net[0].weight.fill_(torch.nan)
    run = trainer(FeatureMonitor())
    with pytest.warns(UserWarning, match="Features of val are NaN or infinite"):
        run.validate(module, loader(**VAL), verbose=False)
    assert run.callback_metrics["val/nc1"].isnan()


def test_kept_features_are_a_uniform_sample():
    counts, runs = torch.zeros(30), 400
    for seed in range(runs):
        kept = KeptFeatures(10, seed)
        for part in torch.arange(30.0).split(7):
            kept.add(part[:, None], part.long())
        features, predicted = (torch.cat(part) for part in zip(*kept._parts, strict=True))
        assert torch.equal(features[:, 0].long(), predicted)
        assert len(predicted.unique()) == 10
        counts[predicted] += 1
    share = counts / runs
    assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / runs) ** 0.5


def test_a_sample_is_enough_for_nc4():
    h, y = torch.randn(300, 8) + 3 * F.one_hot(torch.arange(300) % 8).float(), torch.arange(300) % 8
    sums = feature_sums(h, y, 9)
    predicted = torch.where(torch.rand(300) < 0.3, 8, y)  # class 8 has no mean: it agrees with none
    kept = KeptFeatures(1000)
    for rows in torch.arange(300).split(32):
        kept.add(h[rows], torch.where(rows < 20, -1, predicted[rows]))
    wrong, counted = kept.disagreement(sums)
    nearest = torch.cdist(h.double(), sums.means).argmin(1)
    assert counted == 280
    assert wrong == (nearest != predicted)[20:].sum()


class Mixes(Callback):
    mixes_samples = True


def test_refusals():
    with pytest.raises(ValueError, match="`data` to be one of 'val', 'train', 'both' but got 'test'"):
        FeatureMonitor(data="test")
    with pytest.raises(ValueError, match="`every_n_epochs` to be an integer >= 1"):
        FeatureMonitor(every_n_epochs=0)
    with pytest.raises(ValueError, match="`keep` to be an integer >= 0"):
        FeatureMonitor(keep=-1)
    with pytest.raises(ValueError, match="Two FeatureMonitor callbacks of this Trainer have the name None"):
        trainer(FeatureMonitor(), FeatureMonitor()).validate(PlainModule(), loader(), verbose=False)
    with pytest.raises(ValueError, match=r"features_from='net.7' names no sub-module"):
        trainer(FeatureMonitor(features_from="net.7")).fit(PlainModule(), loader())
    with pytest.raises(ValueError, match=r"FeatureMonitor\(data='both'\) needs .* but Mixes mixes them"):
        trainer(FeatureMonitor(data="both"), Mixes()).fit(PlainModule(), loader())
    run = trainer(FeatureMonitor(), Mixes())
    run.fit(PlainModule(), loader(), loader(**VAL))
    assert "val/nc1" in run.callback_metrics

    class Convolution(PlainModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(CHANNELS, CLASSES, 6), nn.Flatten())

    module = Convolution()
    with pytest.raises(FeaturesNotCaptured, match="No linear layer of Convolution"):
        trainer(FeatureMonitor()).validate(module, loader(), verbose=False)
    assert "validation_step" not in vars(module)

    class Soft(Images):
        def __getitem__(self, index):
            return self.x[index], F.one_hot(self.y[index], CLASSES).float()

    with pytest.raises(ValueError, match="name no class"):
        trainer(FeatureMonitor(data="train")).fit(PlainModule(), DataLoader(Soft(), 6))


def test_beside_other_monitors():
    run = trainer(FeatureMonitor(data="both"), MislabelMonitor(start_epoch=0))
    module = PlainModule()
    run.fit(module, loader(), loader(**VAL))
    check(run, "val", evaluated(module, Images(45, seed=1)))

"""Losses on features and losses with parts of their own, through the callback."""

import copy
import warnings

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_robust.callbacks import Criterion, Distillation, Mixing, SharpnessAware
from lightning_robust.distillation import (
    DHKD,
    KD,
    RKD,
    USKD,
    AttentionTransfer,
    FeatureAngle,
    FeatureCosine,
    FeatureDistillationLoss,
    FeatureMSE,
    Teacher,
    TeacherCache,
    align_gradients,
    binary_kl_norm,
    uskd_loss,
)
from lightning_robust.losses import CrossEntropy
from lightning_robust.mixing import Mixup
from lightning_robust.models import ImageClassifier
from support.modules import CHANNELS, CLASSES, DictModule, PlainModule, loader, network, trainer, weights_of
from support.resumable import shuffled_loader
from support.teachers import teacher_network


def fit(module, *callbacks, data=None, ckpt_path=None, **options):
    L.seed_everything(0)
    run = trainer(*callbacks, **options)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


def bias_free():
    """No norm layer: it would hide the biases before it, and AdamW turns rounding into whole steps."""
    return PlainModule(norm=False)


def hint(**options):
    return FeatureMSE("net.0", "0", **options)


def dhkd(**options):
    return Distillation(teacher_network(), DHKD(**options), weight=1.0, base_weight=1.0)


def uskd(**options):
    return Distillation(None, USKD("net.0", mu=0.5, **options), weight=1.0, base_weight=1.0)


def parts_of(callback):
    return torch.cat([parameter.detach().flatten() for parameter in callback.loss.parameters()])


def features(net, layers, x):
    """What a plain loop would do: run the network up to each layer."""
    found = []
    for layer in net:
        x = layer(x)
        found.append(x)
    return [found[layer] for layer in layers], x


PAIRED = {
    "mse": (FeatureMSE("net.2", "2", projector=False), lambda s, t: (s - t).square().mean()),
    "cosine": (FeatureCosine("net.2", "2"), lambda s, t: (1 - F.cosine_similarity(s.flatten(1), t.flatten(1))).mean()),
    "angle": (
        FeatureAngle("net.2", "2"),
        lambda s, t: F.cosine_similarity(s.flatten(1), t.flatten(1)).acos().mean() / torch.pi,
    ),
    "attention": (
        AttentionTransfer("net.2", "2"),
        lambda s, t: (
            (F.normalize(s.square().mean(1).flatten(1)) - F.normalize(t.square().mean(1).flatten(1))).square().mean()
        ),
    ),
}


@pytest.mark.parametrize("loss", PAIRED)
def test_one_step_of_a_feature_loss(loss):
    module, teacher = bias_free(), teacher_network()
    term, formula = PAIRED[loss]
    reference = copy.deepcopy(module).train()
    optimizer = reference.configure_optimizers()
    x, y = next(iter(loader()))
    (mine,), logits = features(reference.net, [1], x)
    with torch.no_grad():
        (others,), _ = features(teacher.eval(), [2], x)
    value = formula(mine, others)
    (0.5 * F.cross_entropy(logits, y) + 3.0 * value).backward()
    optimizer.step()
    term = copy.deepcopy(term)
    term.student_layers = ["net.1"]  # the student without a norm
    run = fit(module, Distillation(teacher, term, weight=3.0, base_weight=0.5), max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))
    torch.testing.assert_close(run.callback_metrics[f"train/{term.name}"], value.detach())


@pytest.mark.parametrize(("student", "teacher"), [(None, None), ("net.4", None), ("net.4", "5")])
def test_features_before_the_classifier(student, teacher):
    """Layer 4 flattens: what it puts out is what the classifier gets."""
    layers = FeatureMSE(student, teacher, projector=False)
    layers.teacher_layers = [teacher]
    given = PlainModule()
    with torch.no_grad():
        (mine,), _ = features(copy.deepcopy(given).train().net, [4], next(iter(loader()))[0])
        net = teacher_network().eval()
        (others,), _ = features(net, [4], next(iter(loader()))[0])
    run = fit(given, Distillation(net, layers), max_steps=1)
    torch.testing.assert_close(run.callback_metrics["train/feature_mse"], (mine - others).square().mean())


def test_relations_need_no_common_width():
    run = fit(PlainModule(), Distillation(teacher_network(width=7), RKD()))
    assert run.callback_metrics["train/rkd"] > 0


def test_several_layers_are_summed():
    both = Distillation(teacher_network(), FeatureMSE(["net.0", "net.1"], ["0", "1"], projector=False))
    ones = [Distillation(teacher_network(), FeatureMSE(f"net.{n}", f"{n}", projector=False)) for n in (0, 1)]
    values = [fit(PlainModule(), each, max_steps=1).callback_metrics["train/feature_mse"] for each in (both, *ones)]
    torch.testing.assert_close(values[0], values[1] + values[2])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = teacher_network(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


@pytest.mark.parametrize("callbacks", [[], [SharpnessAware()]], ids=["plain", "sharp"])
def test_features_cost_no_second_pass_of_the_teacher(callbacks):
    callback = Distillation(Counting(), FeatureMSE("net.0", "net.0"))
    fit(PlainModule(), callback, *callbacks)
    assert callback.teachers.teacher("teacher").network.calls == len(loader())
    assert not callback.teachers.teacher("teacher").network.net[0]._forward_hooks


def test_the_student_keeps_no_hook():
    module = PlainModule()
    fit(module, Distillation(teacher_network(), FeatureMSE("net.0", "0")))
    assert not any(child._forward_hooks for child in module.modules())


def test_a_step_with_a_second_head():
    module, teacher = bias_free(), teacher_network()
    callback = Distillation(teacher, DHKD(width=20, num_classes=CLASSES), weight=0.7, base_weight=1.0)
    reference, head = copy.deepcopy(module).train(), copy.deepcopy(callback.loss.head)
    optimizer = torch.optim.SGD([*reference.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = next(iter(loader()))
    (mine,), logits = features(reference.net, [3], x)
    with torch.no_grad():
        taught = teacher.eval()(x)
    (F.cross_entropy(logits, y) + 0.7 * binary_kl_norm(head(mine), taught)).backward()
    optimizer.step()
    fit(module, callback, max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))
    torch.testing.assert_close(parts_of(callback), weights_of(head))


def test_a_step_without_a_teacher():
    module, callback = bias_free(), uskd(width=5, num_classes=CLASSES)
    reference, head = copy.deepcopy(module).train(), copy.deepcopy(callback.loss.head)
    optimizer = torch.optim.SGD([*reference.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = next(iter(loader()))
    (mine,), logits = features(reference.net, [0], x)
    value = uskd_loss(logits, head(mine.mean((2, 3))), y, mu=0.5)
    (F.cross_entropy(logits, y) + value).backward()
    optimizer.step()
    run = fit(module, callback, max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))
    torch.testing.assert_close(parts_of(callback), weights_of(head))
    torch.testing.assert_close(run.callback_metrics["train/uskd"], value.detach())
    assert callback.state_key == "Distillation[uskd]"


class Contradicts(nn.Module):
    """Is sure that no label of the first batch is right."""

    def forward(self, x):
        return -20.0 * F.one_hot(next(iter(loader()))[1], CLASSES).float()


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_aligned_gradients(weight):
    """The step along the gradient of the labels plus what remains of the teacher's."""
    module = bias_free()
    reference = copy.deepcopy(module).train()
    x, y = next(iter(loader()))
    parameters = list(reference.parameters())
    optimizer = reference.configure_optimizers()
    logits = reference.net(x)
    losses = (0.4 * F.cross_entropy(logits, y), weight * KD(temperature=2.0)(logits, Contradicts()(x)))
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in losses
    ]
    assert gradients[0] @ gradients[1] < 0
    merged = gradients[0] + align_gradients(gradients[1], gradients[0])
    for parameter, part in zip(parameters, merged.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer.step()
    callback = Distillation(Contradicts(), KD(temperature=2.0), weight=weight, base_weight=0.4, align_gradients=True)
    fit(module, callback, max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))


def test_gradients_that_agree_are_left_alone():
    modules = [bias_free(), bias_free()]
    for module, align in zip(modules, (True, False), strict=True):
        callback = Distillation(copy.deepcopy(module.net), KD(), align_gradients=align)  # at its own teacher: zero
        fit(module, callback, max_steps=1)
    assert torch.equal(*map(weights_of, modules))


LEARNING = {
    "hint": lambda: Distillation(teacher_network(width=7), hint()),
    "penultimate": lambda: Distillation(teacher_network(width=7), FeatureMSE()),
    "dhkd": dhkd,
    "dhkd nonlinear": lambda: dhkd(head="nonlinear"),
    "uskd": uskd,
}


@pytest.mark.parametrize("learning", LEARNING)
def test_parts_are_trained_and_nobody_sees_them(learning, tmp_path):
    module, callback = PlainModule(), LEARNING[learning]()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="a", save_weights_only=False)
    run = fit(module, callback, checkpoint, enable_checkpointing=True)
    assert module.state_dict().keys() == PlainModule().state_dict().keys()
    assert dict(module.named_parameters()).keys() == dict(PlainModule().named_parameters()).keys()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == PlainModule().state_dict().keys()
    assert saved["callbacks"][callback.state_key]["loss"].keys() == callback.loss.state_dict().keys()
    assert len(run.optimizers[0].param_groups[0]["params"]) == len(weights(module)) + len(weights(callback.loss))
    assert all(run.optimizers[0].state[parameter] for parameter in callback.loss.parameters())  # each one moved
    PlainModule.load_from_checkpoint(tmp_path / "a.ckpt")  # strict


def weights(module):
    return list(module.parameters())


def run(learning, folder, ckpt_path=None):
    """Train with a checkpoint after every step."""
    module, callback = PlainModule(), LEARNING[learning]()
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module, callback, saving, data=shuffled_loader(), ckpt_path=ckpt_path, max_epochs=2, enable_checkpointing=True)
    return weights_of(module), parts_of(callback)


@pytest.mark.parametrize("learning", [name for name in LEARNING if name != "dhkd nonlinear"])  # dropout draws numbers
@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(learning, step, tmp_path, monkeypatch):
    whole = run(learning, tmp_path)
    monkeypatch.setattr(L, "seed_everything", lambda seed: torch.manual_seed(99))  # parts that start elsewhere
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Cc]heckpoint directory .* exists.*")
        resumed = run(learning, tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt")
    for before, after in zip(whole, resumed, strict=True):
        assert torch.equal(before, after)


def test_a_new_part_draws_no_numbers_of_the_run():
    modules = [PlainModule(dropout=0.4), PlainModule(dropout=0.4)]
    losses = [DHKD(width=20, num_classes=CLASSES), DHKD()]  # built here, or in setup
    for module, loss in zip(modules, losses, strict=True):
        fit(module, Distillation(teacher_network(), loss, weight=0.0, base_weight=1.0), max_steps=2)
    assert torch.equal(*map(weights_of, modules))


def test_a_second_fit_begins_with_fresh_parts():
    callback = dhkd()
    fit(PlainModule(), callback)
    first = parts_of(callback)
    fit(PlainModule(), callback)
    assert torch.equal(first, parts_of(callback))


def test_evaluating_a_checkpoint_with_parts(tmp_path):
    callback = dhkd()
    run = fit(PlainModule(), callback)
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = dhkd()
    run = trainer(other)
    run.validate(PlainModule(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert other.state_dict()["loss"].keys() == callback.loss.state_dict().keys()


def test_resuming_with_another_loss_is_refused(tmp_path):
    fit(PlainModule(), dhkd()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"was trained with another loss than KD under .*'teacher'; resume with the same"
    ):
        fit(PlainModule(), Distillation(teacher_network()), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")


class Fails(L.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *_, **__):
        raise RuntimeError("stop")


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end", "setup"])
def test_an_exception_takes_the_parts_off(hook):
    module = PlainModule()
    callback = dhkd()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, callback, Fails(hook))
    assert dict(module.named_modules()).keys() == dict(PlainModule().named_modules()).keys()
    fit(module, callback)
    assert dict(module.named_modules()).keys() == dict(PlainModule().named_modules()).keys()


def test_an_optimizer_without_the_parts_is_refused():
    class Chooses(PlainModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    message = r"The parameter 'head.weight' of DHKD is in no optimizer.*configure_optimizers of Chooses use self.param"
    with pytest.raises(ValueError, match=message):
        fit(Chooses(), dhkd())


def test_several_parameter_groups_take_the_parts_up():
    module, callback = DictModule(), dhkd()
    run = fit(module, callback, data=loader(form="dict"))
    found = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert {id(parameter) for parameter in callback.loss.parameters()} <= found


def test_accumulation_equals_the_large_batch():
    small, large = bias_free(), bias_free()
    callbacks = [Distillation(teacher_network(), DHKD(width=20, num_classes=CLASSES)) for _ in range(2)]
    callbacks[1].loss.load_state_dict(callbacks[0].loss.state_dict())
    fit(small, callbacks[0], data=loader(batch_size=6), accumulate_grad_batches=2)
    fit(large, callbacks[1], data=loader(batch_size=12))
    torch.testing.assert_close(weights_of(small), weights_of(large))
    torch.testing.assert_close(parts_of(callbacks[0]), parts_of(callbacks[1]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "64-true"])
@pytest.mark.parametrize("learning", LEARNING)
def test_precisions(learning, precision):
    callback = LEARNING[learning]()
    callback.align_gradients = precision in ("bf16-mixed", "16-mixed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is not supported for CPU.*")
        warnings.filterwarnings("ignore", ".*GradScaler.*|.*amp.*")
        run = fit(PlainModule(), callback, precision=precision)
    assert run.callback_metrics[f"train/{callback.loss.name}"].isfinite()
    assert parts_of(callback).isfinite().all()


def test_an_average_of_the_weights_holds_no_part(tmp_path):
    module = PlainModule()
    run = fit(module, dhkd(), EMAWeightAveraging(decay=0.5), max_epochs=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == PlainModule().state_dict().keys()


def test_two_teachers_one_of_them_with_a_head():
    callbacks = [
        Distillation(teacher_network(1), DHKD(), weight=1.0, base_weight=1.0, name="robust"),
        Distillation(teacher_network(2), FeatureMSE(), name="clean"),
        Distillation(None, USKD("net.0"), base_weight=1.0),
    ]
    run = fit(PlainModule(), *callbacks)
    names = {name for name in run.callback_metrics if name.startswith("train/")}
    assert names == {"train/dhkd_robust", "train/feature_mse_clean", "train/uskd"}


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_mixed_samples(targets):
    class Both(PlainModule):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    callbacks = [Mixing(Mixup(), targets=targets, num_classes=CLASSES), uskd()]
    if targets == "hard":
        callbacks.append(Criterion(CrossEntropy()))
    run = fit(Both(), *callbacks)
    assert run.callback_metrics["train/uskd"].isfinite()


def test_an_image_classifier_says_its_sizes():
    module = ImageClassifier("resnet8_cifar", num_classes=CLASSES, in_chans=CHANNELS)
    callbacks = [
        Distillation(None, USKD("backbone.layer2"), base_weight=1.0),
        Distillation(copy.deepcopy(module), DHKD(), weight=1.0, base_weight=1.0),
        Distillation(copy.deepcopy(module), FeatureMSE("backbone.layer1"), name="hint"),
    ]
    run = fit(module, *callbacks, max_steps=2)
    assert {"train/uskd", "train/dhkd", "train/feature_mse_hint"} <= run.callback_metrics.keys()
    assert [callback.loss.head.in_features for callback in callbacks[:2]] == [32, 64]
    assert callbacks[2].loss.projectors[0].in_features == 16


def test_the_epoch_is_told_also_in_its_middle(tmp_path):
    class Warming(FeatureDistillationLoss):
        name = "warming"

        def __init__(self):
            super().__init__()
            self.told = []

        def epoch_starts(self, epoch, max_epochs):
            self.told.append((epoch, max_epochs))

        def forward(self, student_logits, teacher_logits, target=None, **features):
            return (student_logits - teacher_logits).square().mean()

    callback = Distillation(teacher_network(), Warming())
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    fit(PlainModule(), callback, saving, data=shuffled_loader(), max_epochs=3, enable_checkpointing=True)
    assert callback.loss.told == [(0, 3), (1, 3), (2, 3)]
    resumed = Distillation(teacher_network(), Warming())
    options = {"data": shuffled_loader(), "max_epochs": 3, "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Cc]heckpoint directory .* exists.*")
        fit(PlainModule(), resumed, saving, ckpt_path=tmp_path / "step=6.ckpt", **options)
    assert resumed.loss.told == [(1, 3), (2, 3)]


REFUSED = [
    (FeatureMSE("net.O", "0"), r"The student PlainModule has no layer 'net.O'; it has 'net.5', 'net.4'"),
    (FeatureMSE("0", "0"), r"The student PlainModule has no layer '0'; it has 'net.0' \.\.\."),
    (FeatureMSE("net.0", "layer3"), r"The teacher Sequential has no layer 'layer3'; it has '0', '1'"),
    (FeatureMSE("net.0"), r"The teacher Sequential has no layer 'net.0'; it has "),
    (FeatureMSE("net.1", "0", projector=True, student_width=9), r"expected input.*to have 9 channels|channels"),
    (FeatureMSE("net.3", "0"), r"FeatureMSE cannot read off how many channels the features of the layer 'net.3' have;"),
    (FeatureMSE("net.0", "3"), r"of the layer '3' have; set `teacher_width`"),
    (DHKD(layer="net.3"), r"DHKD cannot read off how many channels.*'net.3' have; set `width`"),
    (
        FeatureCosine("net.0", "1", teacher_width=5),
        r"The student's features have 5 channels but the teacher's 7; set `projector`",
    ),
    (
        FeatureMSE("net.3", "2", projector=False),
        r"The student's features have 5 channels but the teacher's 7; set `projector` to learn",
    ),
    (AttentionTransfer("net.5", "6"), r"Attention needs maps .* the features have shape \(6, 4\); name an earlier"),
]


@pytest.mark.parametrize(("loss", "message"), REFUSED)
def test_layers_that_do_not_fit_are_refused(loss, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(PlainModule(), Distillation(teacher_network(width=7), copy.deepcopy(loss)))


def test_another_resolution_is_refused():
    message = r"features have shape \(6, 5, 2, 2\) but the teacher's \(6, 5, 6, 6\); name layers of the same resol"
    with pytest.raises(ValueError, match=message):
        fit(PlainModule(), Distillation(teacher_network(), FeatureMSE("net.3", "2", projector=False)))


class Skips(PlainModule):
    """A layer that never runs, one that runs on pieces, one that gives no tensor."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.pieces = nn.Identity()
        self.pair = Pair()

    def forward(self, x):
        self.pieces(x[:2] * self.net[0].weight.sum())
        self.pair(x)
        with torch.no_grad():
            self.net[2](x)
        return self.net(x)


class Pair(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("idle", r"The layer 'idle' of the student did not run, so there are no features to compare; name a layer"),
        ("pieces", r"The layer 'pieces' of the student ran with 2 samples instead of 6"),
        ("pair", r"The layer 'pair' of the student gave a dict"),
    ],
)
def test_layers_that_did_not_run_as_needed_are_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        fit(Skips(), Distillation(teacher_network(), FeatureMSE(layer, "0", projector=False)))


def test_a_network_that_is_made_late_is_named():
    class Late(PlainModule):
        def __init__(self):
            super().__init__()
            del self.net

        def setup(self, stage):
            self.net = network()

    with pytest.raises(ValueError, match=r"no layer 'net.0'.* A network that is made in `setup` is made too late"):
        fit(Late(), Distillation(teacher_network(), FeatureMSE("net.0", "0")))


def test_features_before_a_classifier_that_is_not_found():
    class Scaled(PlainModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 4), nn.Linear(4, 4))

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0]) * 2
            return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}

    message = r"The features before the classifier of the student were not found \(Several layers .*\); name their la"
    with pytest.raises(ValueError, match=message):
        fit(Scaled(), Distillation(teacher_network(), FeatureMSE(projector=False)))


def test_refused_arguments(tmp_path):
    with pytest.raises(ValueError, match="USKD asks no teacher, so Sequential would be ignored; give `teacher` = None"):
        Distillation(network(), USKD("net.0"))
    with pytest.raises(ValueError, match="KD compares the student with a teacher but `teacher` is None; give one"):
        Distillation(None)
    with pytest.raises(ValueError, match="FeatureMSE compares features, which a TeacherCache does not hold"):
        Distillation(TeacherCache(tmp_path), FeatureMSE())
    for weights in ({"weight": 0.0}, {"base_weight": 0.0}):
        with pytest.raises(ValueError, match="Aligned gradients need both losses; set `weight` and `base_weight`"):
            Distillation(network(), align_gradients=True, **weights)


def test_an_attribute_in_the_way_is_refused():
    module = PlainModule()
    module.distillation_teacher = 3
    with pytest.raises(ValueError, match="PlainModule has an attribute distillation_teacher of its own; give the"):
        fit(module, dhkd())


def test_strategies_that_shard_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_robust.callbacks._distillation_parts.keeps_whole_weights", lambda trainer: False)
    with pytest.raises(ValueError, match="DHKD trains parts of its own, which SingleDeviceStrategy would shard"):
        fit(PlainModule(), dhkd())


def test_a_copy_of_the_callback_is_free_of_the_module():
    callback = dhkd()
    copied = []

    class Copies(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            copied.append(copy.deepcopy(callback))

    fit(PlainModule(), callback, Copies(), max_steps=1)
    fit(PlainModule(), copied[0])
    assert copied[0].loss is not callback.loss


def test_a_teacher_with_other_classes_and_a_mapping():
    teacher = Teacher(teacher_network(classes=9), classes=[8, 1, 2, 3])
    run = fit(PlainModule(), Distillation(teacher, FeatureMSE()))
    assert run.callback_metrics["train/feature_mse"].isfinite()


def test_can_be_built_from_a_configuration():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    written = """
    hint:
      class_path: Distillation
      init_args:
        teacher: {class_path: TeacherSource, init_args: {source: a.ckpt, backbone: resnet18, mean: [0.5]}}
        loss: {class_path: FeatureMSE, init_args: {student_layer: [backbone.layer1, backbone.layer2]}}
    self:
      class_path: Distillation
      init_args: {loss: {class_path: USKD, init_args: {layer: backbone.layer2}}}
    stored:
      class_path: Distillation
      init_args: {teacher: {class_path: TeacherCache, init_args: {path: here}}, name: stored}
    """
    methods = instantiate(parser.parse_object({"methods": yaml.safe_load(written)})).methods
    assert [type(each.loss).__name__ for each in methods.values()] == ["FeatureMSE", "USKD", "KD"]
    assert methods["hint"].loss.teacher_layers == ["backbone.layer1", "backbone.layer2"]
    assert [each.follows_samples for each in methods.values()] == [False, False, True]

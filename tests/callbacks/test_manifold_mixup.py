"""Manifold mixup against a network that is written out."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_robust.attacks import FGSM
from lightning_robust.callbacks import (
    MESA,
    AdversarialTraining,
    Criterion,
    Distillation,
    ManifoldMixup,
    Mixing,
    ObjectiveTraining,
    SharpnessAware,
)
from lightning_robust.losses import CrossEntropy, DecoupledMixup
from lightning_robust.mixing import Mixup, mix_rows
from lightning_robust.objectives import TRADES
from lightning_robust.sharpness import SAM, sharp_backward
from lightning_robust.training import derive_seed
from support.modules import CLASSES, PlainModule, loader, network, trainer
from support.shuffled import close, differ, fit, shuffled

EPOCHS, BATCHES = 2, 4
LAYERS = ["net", "net.2", "net.5"]


class Soft(PlainModule):
    """Takes labels in any form."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def manifold(layers=None, **options):
    options = {"num_classes": CLASSES, **options} if options.get("targets") != "hard" else options
    return ManifoldMixup(layers or LAYERS, **options)


def run(module, *callbacks, **options):
    return fit(module, *callbacks, **{"max_epochs": EPOCHS, **options})


def plain_loop(module, *, alpha=2.0, sharp=None, criterion=None):
    """What ManifoldMixup must amount to."""
    data, sampler = shuffled().dataset, shuffled().sampler
    optimizer = module.train().configure_optimizers()
    layers = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, indices in enumerate(torch.tensor(list(sampler)).split(6)):
            x, y = data.x[indices], data.y[indices]
            generator = torch.Generator().manual_seed(derive_seed(0, 0, epoch, index, "mixing"))
            torch.rand((), generator=generator)
            mixture = Mixup(alpha=alpha).mix(torch.zeros(len(x)), generator)
            layer = int(torch.randint(3, (), generator=generator))
            layers.append(layer)

            def loss(x=x, y=y, mixture=mixture, layer=layer):
                h = mix_rows(x, mixture.second, mixture.lam) if layer == 0 else x
                for number, part in enumerate(module.net):
                    if (layer, number) in ((1, 2), (2, 5)):
                        h = mix_rows(h, mixture.second, mixture.lam)
                    h = part(h)
                if criterion is not None:
                    return criterion(h, mixture.target(y))
                return F.cross_entropy(h, mixture.probabilities(y, CLASSES))

            optimizer.zero_grad()
            if sharp is None:
                loss().backward()
            else:
                sharp_backward(loss, sharp, optimizer, module=module)
            optimizer.step()
    assert set(layers) == {0, 1, 2}


def test_equals_the_plain_loop():
    ours, reference = Soft(), Soft()
    run(ours, manifold())
    plain_loop(reference)
    close(ours, reference)
    assert not any(module._forward_pre_hooks for module in ours.modules())


def test_every_pass_of_a_sharpness_aware_step_sees_the_same_mixture():
    ours, reference = Soft(), Soft()
    run(ours, SharpnessAware(SAM(rho=0.2)), manifold())
    plain_loop(reference, sharp=SAM(rho=0.2))
    close(ours, reference)


def test_the_callback_criterion_gets_both_labels():
    ours, reference = PlainModule(), Soft()
    run(ours, manifold(targets="hard", alpha=1.0), Criterion(DecoupledMixup(eta=0.5)))
    plain_loop(reference, alpha=1.0, criterion=DecoupledMixup(eta=0.5))
    close(ours, reference)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_activation_checkpointing_repeats_the_mixture(reentrant):
    class Checkpointed(Soft):
        def forward(self, x):
            hidden = self.net[0](x)
            hidden = checkpoint(self.net[1:4], hidden, use_reentrant=reentrant)
            return self.net[4:](hidden)

    ours, reference = Checkpointed(norm=False), Soft(norm=False)
    for module in (ours, reference):
        run(module, manifold(["net.1", "net.3"]))
    close(ours, reference)
    assert differ(ours, Soft(norm=False))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module", "method"])
def test_compiled_in_two_fits(what):
    eager, compiled = Soft(), Soft()
    torch._dynamo.reset()
    target, prefix = compiled, "net"
    if what == "network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
        prefix = "net._orig_mod"
    elif what == "method":
        compiled.compile(backend="aot_eager")
    else:
        target = torch.compile(compiled, backend="aot_eager")
    for _ in range(2):
        run(eager, manifold(["net.0", "net.2", "net.5"]))
        run(target, manifold([f"{prefix}.0", f"{prefix}.2", f"{prefix}.5"]))
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_equals_the_uninterrupted_run(tmp_path):
    def train(ckpt_path=None):
        module = Soft()
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        run(module, manifold(probability=0.7), saving, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module

    whole = train()
    for step in (2, BATCHES, 6):
        assert not differ(whole, train(tmp_path / f"step={step}.ckpt")), step


def test_validation_and_copies_do_not_mix():
    class Copies(Soft):
        def training_step(self, batch, batch_idx):
            twin = copy.deepcopy(self.net).train()
            plain = twin(batch[0])
            torch.testing.assert_close(plain, copy.deepcopy(twin)(batch[0]))
            assert not torch.equal(self.net(batch[0]), plain)
            return super().training_step(batch, batch_idx)

    module = Copies(lr=0.0, norm=False)
    fitting = trainer(manifold(["net", "net.1", "net.4"]))
    fitting.fit(module, loader(), loader())
    again = trainer().validate(module, loader(), verbose=False)[0]
    torch.testing.assert_close(float(fitting.callback_metrics["val_loss"]), again["val_loss"])


def test_inputs_may_be_words():
    class Words(Soft):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 72)

        def forward(self, x):
            return self.net(self.embedding(x).view(-1, 2, 6, 6))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0][:, 0, 0, 0].gt(0.5).long()), batch[1])

    run(Words(), manifold(), max_epochs=1)


def test_attacked_images_are_mixed_inside():
    attack = AdversarialTraining(FGSM(eps=0.1))
    seen = []

    class Watches(Soft):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    mixed, plain = Watches(lr=0.0), Watches(lr=0.0)
    run(mixed, attack, manifold())
    run(plain, attack)
    half = len(seen) // 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([manifold(), Mixing(Mixup(), num_classes=CLASSES)], "would both mix the samples"),
        ([manifold(), ObjectiveTraining(TRADES())], "an objective runs the network several times per batch"),
        ([manifold(), AdversarialTraining()], "its attack would run through the mixed layer"),
        ([manifold(), Distillation(network())], "sees the images without the mixing inside"),
        ([MESA(start_epoch=0), manifold()], "sees the images without the mixing inside"),
        ([manifold(), SharpnessAware(ascent_fraction=0.5)], "its ascent sees part of the batch"),
        ([manifold(targets="hard")], "add the callback Criterion"),
        ([manifold(["net.head"])], r"The layer 'net.head' is no sub-module of Soft; it has"),
    ],
    ids=["two", "objective", "attack", "distillation", "mesa", "ascent", "hard", "layer"],
)
def test_refused_at_setup(callbacks, message):
    module = Soft()
    with pytest.raises(ValueError, match=message):
        run(module, *callbacks)
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_a_layer_that_is_not_called_is_refused():
    class Unused(Soft):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    with pytest.raises(RuntimeError, match="Unused did not call the layer 'extra' in training mode"):
        run(Unused(), manifold(["extra"]))


def test_refused_arguments():
    with pytest.raises(ValueError, match="alpha"):
        manifold(alpha=0.0)
    with pytest.raises(ValueError, match="at least one layer"):
        run(Soft(), ManifoldMixup([], num_classes=CLASSES))


def test_cross_entropy_of_the_callback_equals_that_of_the_module():
    ours, reference = Soft(), Soft()
    run(ours, manifold(), Criterion(CrossEntropy()))
    run(reference, manifold())
    close(ours, reference)

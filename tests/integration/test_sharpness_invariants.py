"""What every sharpness-aware method leaves alone: weights in hooks, gradients, counts, generators, graphs."""

import copy
import functools
import os
import random

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_robust.callbacks import AdversarialTraining, SharpnessAware
from lightning_robust.sharpness import sharp_backward
from support.modules import (
    CHANNELS,
    CLASSES,
    SIZE,
    CollectionModule,
    Images,
    PlainModule,
    loader,
    network,
    trainer,
    weights_of,
)
from support.ranks import WORLD, as_rank, launch
from support.reference import METHODS, SEED, attack, train

OTHER_LOSSES = {"all", "saf-sam", "mesa-sam", "elr-sam-adversarial", "mtard-awp"}
SHARP = [name for name, method in METHODS.items() if method.sharp is not None and name not in OTHER_LOSSES]
ALONE = [name for name in SHARP if not METHODS[name].shared]  # LAP makes its own images
LATE = [name for name in SHARP if METHODS[name].sharp.counted == "perturbed"]


def alone(name):
    """The method without its attack."""
    return SharpnessAware(copy.deepcopy(METHODS[name].sharp))


def counted(name, count):
    """Of the passes of one step, the one that counts."""
    return count - 1 if name in LATE else 0


def fit(module, *callbacks, data=None, **kwargs):
    L.seed_everything(SEED)
    run = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    run.fit(module, loader() if data is None else data)
    return run


def same(first, second, rtol=0.0, atol=0.0):
    state = second.state_dict()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class Passes(PlainModule):
    """Notes the loss of every pass."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append((self.trainer.global_step, loss.detach().clone()))
        return loss

    def by_step(self):
        steps = {}
        for step, loss in self.seen:
            steps.setdefault(step, []).append(loss)
        return list(steps.values())


class Watch(L.Callback):
    """Looks at weights and gradients wherever a hook lets it, and averages weights in `on_before_zero_grad`."""

    def __init__(self):
        self.calls, self.starts, self.ends, self.outputs = [], [], [], []
        self.average, self.gradients = None, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.starts.append(weights_of(pl_module).clone())

    def look(self, name, pl_module):
        self.calls.append(name)
        assert torch.equal(weights_of(pl_module), self.starts[-1]), name

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.look("zero", pl_module)
        now = weights_of(pl_module)
        self.average = now.clone() if self.average is None else 0.5 * self.average + 0.5 * now
        if self.gradients is not None:  # of the step before, which nothing but zero_grad takes away
            for parameter, (tensor, value) in zip(pl_module.parameters(), self.gradients, strict=True):
                assert parameter.grad is tensor
                assert torch.equal(tensor, value)

    def on_before_backward(self, trainer, pl_module, loss):
        self.look("before", pl_module)
        assert all(parameter.grad is None for parameter in pl_module.parameters())

    def on_after_backward(self, trainer, pl_module):
        self.look("after", pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.look("optimizer", pl_module)
        self.gradients = [(p.grad, p.grad.clone()) for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append(weights_of(pl_module).clone())
        self.outputs.append(outputs["loss"].clone())


@pytest.mark.parametrize("name", SHARP)
def test_hooks_averages_and_checkpoints_see_unperturbed_weights(name, tmp_path):
    module, watch = Passes(), Watch()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = fit(
        module,
        *METHODS[name].callbacks(),
        watch,
        EMAWeightAveraging(decay=0.5),
        saving,
        enable_checkpointing=True,
        max_epochs=1,
    )
    assert watch.calls == ["zero", "before", "after", "optimizer"] * 4
    own = watch.starts[0]
    for weights in watch.starts[1:]:
        own = 0.5 * own + 0.5 * weights
    assert torch.equal(watch.average, own)
    for end, start in zip(watch.ends, watch.starts[1:], strict=False):
        assert torch.equal(end, start)
    names = [key for key, _ in module.named_parameters()]
    average = None
    for step, weights in enumerate(watch.ends, start=1):
        average = weights if average is None else torch.lerp(average, weights, 0.5)
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        current = torch.cat([saved["current_model_state"][key].flatten() for key in names])
        assert torch.equal(current, weights), step
        averaged = torch.cat([saved["state_dict"][key].flatten() for key in names])
        torch.testing.assert_close(averaged, average, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights_of(module), average, rtol=1e-6, atol=1e-7)
    # the loss that hooks and logs get is that of the pass that counts
    expected = torch.stack([losses[counted(name, len(losses))] for losses in module.by_step()])
    assert torch.equal(torch.stack(watch.outputs), expected)
    torch.testing.assert_close(run.callback_metrics["train_loss"], expected.mean(), rtol=1e-6, atol=0)
    assert all(len(losses) == 1 + METHODS[name].sharp.extra_passes for losses in module.by_step()) or name == "looksam"


class LogitSum(torchmetrics.Metric):
    """Sees a perturbed pass in its value, not in its count only."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits, y):
        self.total += logits.detach().abs().sum()
        self.count += len(y)

    def compute(self):
        return self.total


class LogitMean(LogitSum):
    """The same states, so the collection updates only one of the two."""

    def compute(self):
        return self.total / self.count


class Grouped(CollectionModule):
    def __init__(self):
        super().__init__()
        self.metrics = torchmetrics.MetricCollection({"sum": LogitSum(), "mean": LogitMean()}, prefix="train_")
        self.seen, self.epochs = [], []

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        logits = self.net(x)
        self.seen.append((self.trainer.global_step, logits.detach()))
        self.metrics.update(logits, y)
        return self.criterion(logits, y)

    by_step = Passes.by_step

    def on_train_epoch_end(self):
        assert len(self.metrics.compute_groups) == 1
        self.epochs.append({key: value.clone() for key, value in self.metrics.compute().items()})
        self.metrics.reset()


@pytest.mark.parametrize("name", SHARP)
def test_grouped_metrics_count_one_pass(name):
    module = Grouped()
    fit(module, *METHODS[name].callbacks(), data=loader(form="triple"))
    logits = [passes[counted(name, len(passes))] for passes in module.by_step()]
    for epoch, values in enumerate(module.epochs):
        total = sum(each.abs().sum() for each in logits[4 * epoch : 4 * epoch + 4])
        torch.testing.assert_close(values["train_sum"], total, rtol=1e-6, atol=0)
        torch.testing.assert_close(values["train_mean"], total / 24, rtol=1e-6, atol=0)
    assert len(module.epochs) == 2


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ALONE)
def test_batchnorm_follows_one_pass(name, momentum):
    module = Passes().double()
    norm = module.net[1]
    norm.momentum = momentum
    means = []
    norm.register_forward_pre_hook(
        lambda _, inputs: means.append((module.trainer.global_step, inputs[0].detach().mean((0, 2, 3))))
    )
    expected, weight = norm.running_mean.clone(), momentum
    fit(module, alone(name), data=doubles(), precision="64-true")
    steps = {}
    for step, mean in means:
        steps.setdefault(step, []).append(mean)
    for position, passes in enumerate(steps.values(), start=1):
        weight = momentum if momentum else 1 / position
        expected = (1 - weight) * expected + weight * passes[counted(name, len(passes))]
    assert norm.num_batches_tracked == len(steps) == 8
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-12, atol=1e-14)


class Drawing(PlainModule):
    """Draws from every generator inside the step."""

    def training_step(self, batch, batch_idx):
        factor = 1 + 0.1 * torch.rand(()) * float(np.random.rand()) * random.random()
        return super().training_step(batch, batch_idx) * factor


@pytest.mark.parametrize("name", SHARP)
def test_generators_stand_where_a_plain_run_leaves_them(name):
    def states(*callbacks):
        fit(Drawing(dropout=0.4), *callbacks)
        return torch.get_rng_state(), np.random.get_state()[1], random.getstate()

    plain, ours = states(), states(*METHODS[name].callbacks())
    assert torch.equal(plain[0], ours[0])
    assert np.array_equal(plain[1], ours[1])
    assert plain[2] == ours[2]


NO_RADIUS = {"rho": 0.0, "gamma": 0.0, "grad_rho": 0.0, "grad_norm_rho": 0.0}
NEARLY = {"gsam", "gam"}  # they add up parts of a gradient, which rounds


class WithoutRadius(PlainModule):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group.update(NO_RADIUS)
        return optimizer


@pytest.mark.parametrize("name", [name for name in ALONE if name != "looksam"])  # it scales a rounding error up
def test_no_radius_is_plain_training_with_dropout(name):
    plain, ours = PlainModule(dropout=0.4), WithoutRadius(dropout=0.4)
    first, second = fit(plain), fit(ours, alone(name))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name in NEARLY else {}
    same(ours, plain, **tolerance)
    torch.testing.assert_close(
        second.callback_metrics["train_loss"],
        first.callback_metrics["train_loss"],
        **(tolerance or {"rtol": 0, "atol": 0}),
    )


@pytest.mark.parametrize("name", SHARP)
def test_a_scale_that_is_far_too_large_backs_off_as_in_plain_training(name):
    def run(*callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        skipped = []

        class Count(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *args):
                skipped.append(scaler.get_scale())

        module = PlainModule()
        start = weights_of(module).clone()
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit(module, *callbacks, Count(), max_epochs=8, plugins=[plugin])
        assert not torch.equal(weights_of(module), start)
        assert all(value.isfinite().all() for value in module.state_dict().values())
        return skipped

    callbacks = METHODS[name].callbacks()
    attacks = [AdversarialTraining(attack())] if METHODS[name].adversarial else []
    plain, ours = run(*attacks), run(*callbacks)
    assert ours[:23] == plain[:23] == [2.0**power for power in range(39, 16, -1)]
    # from there on gradients fit or nearly do, and those of a perturbed pass are others
    assert plain[-1] / 2 <= ours[-1] <= plain[-1]
    for value in callbacks[0].method.state_dict().values():
        assert not value.is_floating_point() or value.isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module"])
@pytest.mark.parametrize("name", ["sam", "gam", "wsam"])
def test_no_graph_is_compiled_for_the_extra_passes(name, what):
    class Bare(PlainModule):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    def graphs(*callbacks):
        torch._dynamo.reset()
        made = []

        def backend(graph, inputs):
            made.append(graph)
            return graph.forward

        module = target = Bare()
        if what == "network":
            module.net = torch.compile(module.net, backend=backend)
        else:
            target = torch.compile(module, backend=backend)
        fit(target, *callbacks)
        return len(made)

    assert graphs(alone(name)) == graphs() > 0


class Recurrent(PlainModule):
    """An LSTM over the rows of an image, between two layers that share their weight."""

    def __init__(self):
        super().__init__()
        size = CHANNELS * SIZE
        self.net = nn.Identity()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.second.weight = self.first.weight
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.last = nn.Linear(size, CLASSES)

    def forward(self, x):
        rows = x.transpose(1, 2).flatten(2)
        hidden, _ = self.lstm(torch.tanh(self.first(rows)))
        return self.last(self.second(hidden[:, -1]))


def doubles(**options):
    """A loader of float64 images."""
    data = loader(**options)
    data.dataset.x = data.dataset.x.double()
    return data


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", SHARP)
def test_shared_and_recurrent_weights(name):
    ours = Recurrent()
    expected = copy.deepcopy(ours)
    fit(ours, *METHODS[name].callbacks(), data=doubles(), precision="64-true")
    train(expected, METHODS[name], batches=[[list(doubles())]] * 2)
    assert ours.second.weight is ours.first.weight
    same(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", SHARP)
def test_batches_of_one_sample(name):
    ours = PlainModule()
    expected = copy.deepcopy(ours)
    data = doubles(length=5, batch_size=1)
    fit(ours, *METHODS[name].callbacks(), data=data, precision="64-true")
    train(expected, METHODS[name], batches=[[list(data)]] * 2)
    assert torch.isfinite(weights_of(ours)).all()
    same(ours, expected, rtol=1e-10, atol=1e-12)


class Words(PlainModule):
    """A sparse or dense embedding of pixel values, a frozen layer and one that takes no part."""

    def __init__(self, sparse=False):
        super().__init__()
        self.net = nn.Sequential(nn.EmbeddingBag(8, 5, mode="mean", sparse=sparse), nn.Linear(5, 5), nn.Tanh())
        self.last, self.unused = nn.Linear(5, CLASSES), nn.Linear(2, 2)
        self.net[1].requires_grad_(False)

    def forward(self, x):
        return self.last(self.net((x * 7).long().flatten(1)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", [name for name in ALONE if name != "msam"])  # needs momentum, so dense gradients
def test_sparse_gradients_give_the_weights_of_dense_ones_or_are_refused(name):
    dense, sparse = Words(), Words(sparse=True)
    frozen, unused = dense.net[1].weight.clone(), dense.unused.weight.clone()
    data = doubles()
    fit(dense, alone(name), data=data, precision="64-true")
    assert torch.equal(dense.net[1].weight, frozen)
    assert torch.equal(dense.unused.weight, unused)
    assert dense.unused.weight.grad is None
    start = weights_of(sparse).clone()
    if name in {"fisher", "friendly", "looksam", "gsam", "gam", "wsam"}:
        with pytest.raises(ValueError, match=r"needs dense gradients, but that of 'net.0.weight' is sparse"):
            fit(sparse, alone(name), data=data, precision="64-true")
        assert torch.equal(weights_of(sparse), start)
    else:
        fit(sparse, alone(name), data=data, precision="64-true")
        same(sparse, dense, rtol=1e-10, atol=1e-12)


class Unfreeze(L.pytorch.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05, initial_denom_lr=1.0)


class Trainable(PlainModule):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ALONE)
def test_layers_that_are_unfrozen_later_are_perturbed_and_trained(name):
    ours = Trainable()
    expected = copy.deepcopy(ours).train()
    data = doubles()
    fit(ours, alone(name), Unfreeze(), data=data, precision="64-true", max_epochs=3)
    expected.net[0].requires_grad_(False)
    optimizer, method = expected.configure_optimizers(), copy.deepcopy(METHODS[name].sharp)
    for epoch in range(3):
        if epoch == 1:
            expected.net[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(expected.net[0].parameters()), "lr": 0.05})
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            sharp_backward(
                lambda x=x, y=y: F.cross_entropy(expected.net(x), y, reduction="none"),
                method,
                optimizer,
                module=expected,
                step=4 * epoch + index,
            )
            optimizer.step()
    assert not torch.equal(ours.net[0].weight, Trainable().net[0].weight)
    # the callback reads losses of samples in float32
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-8} if METHODS[name].sharp.needs_sample_losses else {"rtol": 1e-10, "atol": 1e-12}
    )
    same(ours, expected, **tolerance)


class Failing(PlainModule):
    """Raises in the n-th backward."""

    def __init__(self, failing=-1):
        super().__init__()
        self.failing, self.backwards = failing, 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(self.count)
        return loss

    def count(self, gradient):
        self.backwards += 1
        if self.backwards == self.failing:
            raise KeyboardInterrupt


class Before(L.Callback):
    """Keeps the weights of the last batch's start, and the optimizer."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights, self.optimizer = weights_of(pl_module).clone(), trainer.optimizers[0]


@pytest.mark.parametrize("name", SHARP)
def test_a_keyboard_interrupt_in_any_backward(name):
    whole, callbacks = Failing(), METHODS[name].callbacks()
    fit(whole, *callbacks, max_epochs=1)
    for failing in range(1, whole.backwards + 1):
        module, before = Failing(failing), Before()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(module, *callbacks, before, max_epochs=1)
        assert module.backwards == failing
        assert torch.equal(weights_of(module), before.weights), failing
        assert not {"training_step", "log", "log_dict"} & set(vars(module))
        assert not before.optimizer._optimizer_step_post_hooks
    again = Failing()
    fit(again, *callbacks, max_epochs=1)  # nothing of the broken fits is left in the callback
    same(again, whole)


class StopBeforeStep(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights, self.optimizer = weights_of(pl_module).clone(), optimizer
        if trainer.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", SHARP)
def test_an_interrupt_between_the_passes_and_the_step_moves_nothing(name):
    module, stop, callbacks = PlainModule(), StopBeforeStep(), METHODS[name].callbacks()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, *callbacks, stop)
    stop.optimizer.zero_grad()
    stop.optimizer.step()  # without gradients: it does nothing but call hooks
    assert torch.equal(weights_of(module), stop.weights)
    fresh, used = PlainModule(), PlainModule()
    fit(used, *callbacks)
    fit(fresh, *METHODS[name].callbacks())
    same(used, fresh)


class Short(PlainModule):
    """training_step(self, batch)."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


class Wrapper(L.Callback):
    """Somebody else who stands in for the step, and takes himself out again."""

    calls = 0

    def on_fit_start(self, trainer, pl_module):
        inner = pl_module.training_step

        @functools.wraps(inner)
        def step(*args, **kwargs):
            self.calls += 1
            return inner(*args, **kwargs)

        pl_module.training_step = step

    def on_fit_end(self, trainer, pl_module):
        vars(pl_module).pop("training_step", None)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("name", SHARP)
def test_another_wrapper_around_or_inside(name, position):
    kind = Short if position == "before" else PlainModule
    plain, wrapped, wrapper = kind(), kind(), Wrapper()
    fit(plain, *METHODS[name].callbacks())
    callbacks = [wrapper, *METHODS[name].callbacks()]
    fit(wrapped, *(callbacks if position == "before" else [*callbacks[1:], wrapper]))
    same(wrapped, plain)
    assert wrapper.calls >= 8
    assert "training_step" not in vars(wrapped)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("name", [name for name in ALONE if METHODS[name].sharp.needs_ascent or name == "msam"])
def test_skipped_steps(name):
    class Skipping(PlainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    module, expected = Skipping(norm=False), PlainModule(norm=False).train()
    fit(module, alone(name))
    optimizer, method = expected.configure_optimizers(), copy.deepcopy(METHODS[name].sharp)
    for step, (x, y) in enumerate([*loader(), *loader()]):
        optimizer.zero_grad()
        if step % 2 == 0:
            sharp_backward(
                lambda x=x, y=y: F.cross_entropy(expected.net(x), y, reduction="none"),
                method,
                optimizer,
                module=expected,
                step=step,
            )
        optimizer.step()
    same(module.net, expected.net, rtol=1e-5, atol=1e-6)


class Branched(nn.Module):
    """Skips a branch at random."""

    def __init__(self):
        super().__init__()
        self.trunk, self.branch, self.never = network(norm=False), nn.Linear(CLASSES, CLASSES), nn.Linear(2, 2)
        self.taken = []

    def forward(self, x):
        logits = self.trunk(x)
        self.taken.append(bool(torch.rand(()) < 0.5))
        if self.taken[-1]:
            logits = logits + self.branch(logits)
        return logits


class Stochastic(PlainModule):
    """The ranks draw differently: needs find_unused_parameters."""

    def __init__(self):
        super().__init__()
        self.net = Branched()

    def on_train_start(self):
        torch.manual_seed(SEED + self.global_rank)  # only now: the strategy seeds all ranks alike


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(__file__, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("name", SHARP)
def test_stochastic_depth_under_ddp(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert first["taken"] != second["taken"]  # the ranks went different ways
    for part in ("weights", "memory"):
        assert first[part].keys() == second[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), (part, key)
            assert not value.is_floating_point() or value.isfinite().all()
    start = Stochastic().state_dict()
    assert not torch.equal(first["weights"]["net.branch.weight"], start["net.branch.weight"])
    assert torch.equal(first["weights"]["net.never.weight"], start["net.never.weight"])
    assert bool(first["memory"]) or name not in {"looksam", "friendly", "fisher"}


def main(folder):
    rank = int(os.environ["RANK"])
    found = {}
    for name in SHARP:
        L.seed_everything(SEED)
        module, callbacks = Stochastic(), METHODS[name].callbacks()
        torch.manual_seed(SEED + rank)
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
        run = trainer(*callbacks, max_epochs=2, devices=WORLD, strategy=strategy)
        sampler = DistributedSampler(Images(), WORLD, rank, shuffle=False)
        run.fit(module, DataLoader(Images(), batch_size=3, sampler=sampler))
        weights = {key: value for key, value in module.state_dict().items() if not key.startswith("train_acc")}
        found[name] = {"weights": weights, "memory": callbacks[0].method.state_dict(), "taken": module.net.taken}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)

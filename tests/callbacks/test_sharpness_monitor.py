"""Flatness, watched from the outside."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.callbacks import SharpnessAware, SharpnessMonitor
from lightning_robust.callbacks._fixed_samples import FixedSamples
from lightning_robust.data import DigitsDataModule
from lightning_robust.losses import Criterion
from lightning_robust.models import ImageClassifier
from lightning_robust.sharpness import LossSurface, epsilon_sharpness, gradient_norm, hutchinson_trace, lanczos
from support.attacked import differences, snapshot
from support.modules import CollectionModule, DictModule, PlainModule, loader, trainer, weights_of

TOP = "val/sharpness/top_eigenvalue"


def validate(module, monitor, loaders=None, **options):
    run = trainer(monitor, **options)
    run.validate(module, loaders if loaders is not None else loader(), verbose=False)
    return {key: value.item() for key, value in run.callback_metrics.items()}


def surface_of(module, x, y, **options):
    """The plain function, outside Lightning."""
    module.eval()
    return LossSurface(lambda: F.cross_entropy(module.net(x), y), module, **options)


def everything(form="pair"):
    data = loader(form=form).dataset
    return data.x, data.y


@pytest.mark.parametrize("method", ["double-backward", "finite-difference"])
@pytest.mark.parametrize("batch_size", [256, 7])
def test_values_are_those_of_the_functions(method, batch_size):
    module = PlainModule()
    before = snapshot(module)
    monitor = SharpnessMonitor(max_samples=None, trace_products=3, method=method, batch_size=batch_size, radius=0.1)
    logged = validate(module, monitor)
    assert differences(module, before) == []
    # the samples are those of the loader, in its order
    surface = surface_of(module, *everything(), method=method)
    top, trace, rise = (
        lanczos(surface, max_products=50),
        hutchinson_trace(surface, max_products=3, tolerance=0.0),
        epsilon_sharpness(surface, radius=0.1, steps=5),
    )
    expected = {
        "loss": surface.value().item(),
        "gradient_norm": gradient_norm(surface),
        "top_eigenvalue": top.values.item(),
        "converged": 1.0,
        "epsilon_sharpness": rise.absolute,
        "keskar_sharpness": rise.relative,
        "trace": trace.value,
        "trace_error": trace.standard_error,
        "products": top.products + 3,
    }
    found = {key.removeprefix("val/sharpness/"): value for key, value in logged.items() if "sharpness" in key}
    # finite differences of a network of ReLUs magnify rounding
    assert found == pytest.approx(expected, rel=1e-4 if method == "double-backward" else 1e-2)


class Quadratic(Criterion):
    """Half a square of the logits, each with a factor of its own."""

    def forward(self, logits, target):
        return 0.5 * (torch.arange(-5.0, 3.0) * logits**2).sum(1).mean()


class Weights(L.LightningModule):
    """The logits are the weights."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x):
        return self.w + 0.0 * x.mean((1, 2, 3)).unsqueeze(1)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_a_known_hessian():
    module = Weights()
    logged = validate(module, SharpnessMonitor(criterion=Quadratic(), tolerance=1e-6))
    assert logged[TOP] == pytest.approx(2.0, rel=1e-5)
    gradient = torch.arange(-5.0, 3.0) * module.w.detach()
    assert logged["val/sharpness/gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    logged = validate(module, SharpnessMonitor(criterion=Quadratic(), solver="power", tolerance=1e-6, max_products=500))
    assert logged[TOP] == pytest.approx(-5.0, rel=1e-4)


def test_a_real_network_on_real_images():
    data = DigitsDataModule(image_size=8, batch_size=64)
    torch.manual_seed(0)
    module = ImageClassifier("resnet8_cifar", num_classes=10, in_chans=1)
    run = trainer(SharpnessMonitor(max_samples=None, every_n_epochs=2), max_epochs=2, limit_train_batches=8)
    run.fit(module, datamodule=data)
    x, y = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    module.eval()
    found = lanczos(LossSurface(lambda: F.cross_entropy(module(x), y), module, method="double-backward"))
    # the monitor sums two batches
    assert run.callback_metrics[TOP].item() == pytest.approx(found.values.item(), rel=1e-3)


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("method", ["double-backward", "finite-difference"])
def test_training_is_what_it_would_be_without(data, method):
    weights, states, metrics = [], [], []
    for callbacks in ([], [SharpnessMonitor(data=data, method=method, every_n_steps=3, trace_products=1)]):
        module = PlainModule(dropout=0.5)
        torch.manual_seed(3)
        run = trainer(*callbacks, max_epochs=2)
        run.fit(module, loader(shuffle=True), loader())
        weights.append(weights_of(module))
        states.append(torch.get_rng_state())
        metrics.append({key: value for key, value in run.callback_metrics.items() if "sharpness" not in key})
    assert torch.equal(*weights)
    assert torch.equal(*states)
    assert metrics[0] == metrics[1]
    assert f"{data}/sharpness/top_eigenvalue" in run.callback_metrics


def test_beside_a_sharpness_aware_method():
    weights = []
    for callbacks in ([], [SharpnessMonitor(every_n_steps=1)]):
        module = PlainModule(dropout=0.5)
        torch.manual_seed(3)
        trainer(SharpnessAware(), *callbacks, max_epochs=2).fit(module, loader(shuffle=True), loader())
        weights.append(weights_of(module))
    assert torch.equal(*weights)


@pytest.mark.parametrize(("module", "form"), [(DictModule, "dict"), (CollectionModule, "triple")])
def test_other_modules_and_batches(module, form):
    module = module()
    logged = validate(module, SharpnessMonitor(max_samples=None), loader(form=form))
    expected = lanczos(surface_of(module, *everything(form))).values.item()
    assert logged[TOP] == pytest.approx(expected, rel=1e-4)


def test_soft_targets():
    x, y = everything()
    soft = DataLoader(TensorDataset(x, 0.9 * F.one_hot(y, 4).float() + 0.025), batch_size=12)

    class Soft(PlainModule):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    logged = validate(Soft(), SharpnessMonitor(max_samples=None, per_class=[1]), soft)
    assert logged["val/sharpness/top_eigenvalue_class_1"] > 0


class Several(PlainModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])


def test_one_of_several_loaders():
    module = Several()
    monitor = SharpnessMonitor(dataloader_idx=1, max_samples=None)
    logged = validate(module, monitor, [loader(), loader(length=12, seed=5)])
    data = loader(length=12, seed=5).dataset
    assert logged[TOP] == pytest.approx(lanczos(surface_of(module, data.x, data.y)).values.item(), rel=1e-4)


def test_classes_one_at_a_time():
    module = PlainModule()
    x, y = everything()
    logged = validate(module, SharpnessMonitor(max_samples=None, per_class=True, ascent_steps=0))
    products = lanczos(surface_of(module, x, y), max_products=50).products
    for label in range(4):
        found = lanczos(surface_of(module, x[y == label], y[y == label]), max_products=50)
        products += found.products
        key = f"val/sharpness/top_eigenvalue_class_{label}"
        assert logged[key] == pytest.approx(found.values.item(), rel=1e-4)
    assert logged["val/sharpness/products"] == products
    assert "val/sharpness/epsilon_sharpness" not in logged
    some = validate(module, SharpnessMonitor(max_samples=None, per_class=[2]))
    assert [key for key in some if "class" in key] == ["val/sharpness/top_eigenvalue_class_2"]
    with pytest.raises(ValueError, match=r"`per_class` lists \[4\], of which none of the 24 samples .* \[0, 1, 2, 3\]"):
        validate(module, SharpnessMonitor(max_samples=None, per_class=[0, 4]))


# when


class Looks(SharpnessMonitor):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.looks = []

    def _measure(self, trainer, pl_module):
        values = super()._measure(trainer, pl_module)
        if values:
            self.looks.append((trainer.current_epoch, trainer.global_step))
        return values


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({}, [(0, 4), (1, 8), (2, 12)]),
        ({"data": "train", "max_samples": 12}, [(0, 4), (1, 8), (2, 12)]),
        ({"every_n_epochs": 2}, [(1, 8)]),
        ({"data": "train", "every_n_epochs": 3}, [(2, 12)]),
        # the validation samples are complete after the first validation
        ({"every_n_epochs": None, "every_n_steps": 3}, [(1, 6), (2, 9), (2, 12)]),
        ({"data": "train", "max_samples": 12, "every_n_epochs": None, "every_n_steps": 1}, [(0, 2), (0, 3), (0, 4)]),
        ({"data": "train", "max_samples": None, "every_n_epochs": 2, "every_n_steps": 5}, [(1, 5), (1, 8), (2, 10)]),
    ],
)
def test_when_it_looks(options, looks):
    monitor = Looks(**options)
    run = trainer(monitor, max_epochs=3, num_sanity_val_steps=1)
    run.fit(PlainModule(), loader(), loader())
    assert monitor.looks[: len(looks)] == looks
    if options.get("every_n_steps") != 1:
        assert len(monitor.looks) == len(looks)


def test_steps_under_accumulation():
    monitor = Looks(data="train", max_samples=6, every_n_epochs=None, every_n_steps=1)
    trainer(monitor, max_epochs=2, accumulate_grad_batches=2).fit(PlainModule(), loader(), loader())
    assert monitor.looks == [(0, 1), (0, 2), (1, 3), (1, 4)]


def test_what_a_logger_gets_at_every_step(tmp_path):
    run = trainer(
        SharpnessMonitor(every_n_steps=2),
        max_epochs=2,
        logger=L.pytorch.loggers.CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
    )
    run.fit(PlainModule(), loader(), loader())
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index(TOP)
    # at the end of both epochs, and after steps 6 and 8
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == 4


def test_values_for_a_checkpoint(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor=TOP, mode="min")
    run = trainer(SharpnessMonitor(), keep, enable_checkpointing=True, max_epochs=2)
    run.fit(PlainModule(), loader(), loader())
    assert keep.best_model_score <= run.callback_metrics[TOP]


def test_a_trainer_that_logs_nothing():
    monitor = Looks()
    run = L.Trainer(barebones=True, callbacks=[monitor], accelerator="cpu")
    run.validate(Weights(), loader(), verbose=False)
    assert monitor.looks == []


def test_edge_of_stability():
    class TwoRates(PlainModule):
        def configure_optimizers(self):
            weights = [p for p in self.parameters() if p.ndim > 1]
            rest = [p for p in self.parameters() if p.ndim <= 1]
            return torch.optim.SGD([{"params": weights, "lr": 0.02}, {"params": rest, "lr": 0.04}])

    run = trainer(SharpnessMonitor())
    run.fit(TwoRates(), loader(), loader())
    values = run.callback_metrics
    assert values["val/sharpness/edge_of_stability"].item() == pytest.approx(0.04 / 2 * values[TOP].item(), rel=1e-5)
    assert "val/sharpness/edge_of_stability" not in validate(PlainModule(), SharpnessMonitor())


@pytest.mark.parametrize("every_n_steps", [None, 3])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_logs_the_same_values(tmp_path, every_n_steps):
    def fit(epochs, checkpoint=None):
        module = PlainModule()
        monitor = SharpnessMonitor(max_samples=10, every_n_steps=every_n_steps, ascent_steps=2)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(monitor, saving, max_epochs=epochs, enable_checkpointing=True)
        run.fit(module, loader(), loader(), ckpt_path=checkpoint)
        return {key: value.item() for key, value in run.callback_metrics.items()}

    whole = fit(3)
    assert fit(3, tmp_path / "epoch=0.ckpt") == whole


# samples


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize(("limit", "shuffled"), [(10, False), (10, True), (None, False)])
def test_samples_are_the_same_every_time(limit, shuffled):
    module = PlainModule(lr=0.0, norm=False)
    values = []

    class Collect(L.Callback):
        def on_validation_end(self, run, _):
            values.append(run.callback_metrics[TOP].item())

    run = trainer(SharpnessMonitor(max_samples=limit), Collect(), max_epochs=3)
    run.fit(module, loader(), loader(shuffle=shuffled))
    assert values == [values[0]] * 3
    others = [validate(module, SharpnessMonitor(max_samples=limit, seed=seed))[TOP] for seed in (0, 1)]
    assert (abs(others[0] / others[1] - 1) < 1e-2) == (limit is None)


def test_samples_of_sorted_data():
    samples = FixedSamples(40, seed=0, first=False)
    labels = torch.arange(10).repeat_interleave(100)
    for part in labels.split(30):
        samples.offer(part.float(), part)
    assert not samples.ready
    x, y = samples.take()
    assert samples.ready
    assert torch.equal(x, y.float())
    assert len(y) == 40
    assert len(y.unique()) == 10
    samples.offer(x, y)
    assert samples.take()[0] is x


def test_every_sample_has_the_same_chance():
    counts = torch.zeros(20)
    for seed in range(600):
        samples = FixedSamples(5, seed=seed, first=False)
        for part in torch.arange(20).split(6):
            samples.offer(part, part)
        counts[samples.take()[1]] += 1
    # 150 each, with a standard deviation of 10.6
    assert (counts - 150).abs().max() < 45


def test_first_samples():
    samples = FixedSamples(4, seed=0, first=True)
    for part in torch.arange(9).split(3):
        samples.offer(part, part)
    assert samples.ready
    assert samples.take()[1].tolist() == [0, 1, 2, 3]
    assert FixedSamples(0, seed=0, first=False).take() is None


def test_samples_of_inference_are_ordinary():
    samples = FixedSamples(2, seed=0, first=True)
    with torch.inference_mode():
        samples.offer(torch.ones(2, 3) * 2, torch.arange(2))
        x, _ = samples.take()
    assert not x.is_inference()


def test_samples_that_do_not_fit():
    samples = FixedSamples(4, seed=0, first=True)
    with pytest.raises(ValueError, match="as many targets as inputs but got 3 for 2"):
        samples.offer(torch.ones(2, 1), torch.ones(3))
    samples.offer(torch.ones(1, 3), torch.ones(1))
    samples.offer(torch.ones(1, 4), torch.ones(1))
    with pytest.raises(ValueError, match=r"different shapes \(\(3,\), \(4,\)\)"):
        samples.take()


# precision, modes, compilation


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_precision(precision, inference_mode):
    module = PlainModule()
    monitor = SharpnessMonitor(max_samples=None, ascent_steps=1)
    # weights and images are rounded in half precision, and only once
    rounded = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)

    class Computes(L.Callback):
        def on_validation_end(self, run, pl_module):
            net = network_of(pl_module)
            x, y = everything()
            surface = LossSurface(lambda: F.cross_entropy(net(x.to(rounded).to(width)), y), net)
            expected.append(lanczos(surface).values.item())

    width = torch.float64 if precision == "64-true" else torch.float32
    expected = []
    run = trainer(monitor, Computes(), precision=precision, inference_mode=inference_mode)
    run.fit(module, loader(), loader())
    assert run.callback_metrics[TOP].item() == pytest.approx(expected[0], rel=1e-4)


def network_of(module):
    """A copy of the network in evaluation mode, in float32 at least."""
    with torch.inference_mode(False):
        net = PlainModule().net
        wide = module.net[0].weight.dtype == torch.float64
        net = net.double() if wide else net
        net.load_state_dict({name: value.to(net[0].weight.dtype) for name, value in module.net.state_dict().items()})
        return net.eval()


def test_autocast_does_not_reach_it():
    exact, mixed = (
        validate(PlainModule(), SharpnessMonitor(), precision=precision)[TOP] for precision in ("32-true", "bf16-mixed")
    )
    assert exact == mixed


def test_modes_and_hooks_come_back():
    class Frozen(PlainModule):
        def on_train_start(self):
            self.net[1].eval()

        def on_train_batch_start(self, batch, batch_idx):
            modes.append((self.net[1].training, self.net[5].training))

    modes = []
    module = Frozen(dropout=0.5)
    run = trainer(SharpnessMonitor(every_n_steps=1, data="train", max_samples=6), max_epochs=2)
    run.fit(module, loader(), loader())
    assert modes == [(False, True)] * 8
    assert not {"validation_step", "log", "log_dict"} & set(vars(module))
    assert not any(child._forward_hooks for child in module.modules())


class Remembers(PlainModule):
    """Changes a buffer in every forward, and draws."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(3))

    def forward(self, x):
        self.queue += 1
        return super().forward(x + 1e-4 * torch.rand_like(x))


def test_a_forward_that_changes_buffers_and_draws():
    ends = []
    for monitors in ([], [SharpnessMonitor(trace_products=2)]):
        module = Remembers()
        torch.manual_seed(3)
        trainer(*monitors).validate(module, loader(), verbose=False)
        ends.append((module.queue, torch.get_rng_state()))
    assert ends[0][0].tolist() == [4.0] * 3
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


class CountsInForward(PlainModule):
    def forward(self, x):
        self.train_acc.update(torch.zeros(len(x), 4), torch.zeros(len(x), dtype=torch.long))
        self.log("images", float(len(x)), reduce_fx="sum", batch_size=1)
        return super().forward(x)

    def on_validation_epoch_start(self):
        self.train_acc.reset()

    def on_validation_end(self):
        self.counted = self.train_acc.tp.item()


def test_metrics_and_logs_inside_forward_count_once():
    module = CountsInForward()
    logged = validate(module, SharpnessMonitor())
    assert module.counted == logged["images"] == 24


@pytest.mark.parametrize("compiled", ["net", "module"])
def test_compiled_modules(compiled):
    values, graphs = [], []
    for monitors in ([], [SharpnessMonitor(max_samples=None)]):
        torch._dynamo.reset()
        counted = []

        def backend(graph, inputs, counted=counted):
            counted.append(graph)
            return graph.forward

        module = PlainModule(norm=False)
        if compiled == "net":
            module.net = torch.compile(module.net, backend=backend)
        run = trainer(*monitors)
        target = module if compiled == "net" else torch.compile(module, backend=backend)
        run.validate(target, loader(), verbose=False)
        graphs.append(len(counted))
        values.append(run.callback_metrics.get(TOP))
    # the step that is compared with forward is watched by hooks, which a compiled step is compiled for
    assert graphs[1] == graphs[0] + (compiled == "module") > 0
    plain = validate(PlainModule(norm=False), SharpnessMonitor(max_samples=None))[TOP]
    assert values[1].item() == pytest.approx(plain, rel=1e-4)


def test_the_comparison_and_the_products_are_all_it_costs():
    class Counts(PlainModule):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    module = Counts(lr=0.0)
    monitor = SharpnessMonitor(every_n_epochs=2, ascent_steps=3, trace_products=4)
    trainer(monitor, max_epochs=4).fit(module, loader(length=6), loader())
    # 4 training and 16 validation steps; 1 comparison; twice: loss, eigenvalue, ascent of 1 + 3, trace
    assert module.calls == 4 + 16 + 1 + 2 * (1 + 1 + 4 + 1)


# refusals


class NormalisesInTheStep(PlainModule):
    def validation_step(self, batch, batch_idx):
        self.net((batch[0] - 0.5) / 0.25)


def test_a_step_that_validates_another_function_is_refused():
    module = NormalisesInTheStep()
    with pytest.raises(ValueError, match="NormalisesInTheStep computes other logits than its forward"):
        validate(module, SharpnessMonitor())
    assert not {"validation_step", "log", "log_dict"} & set(vars(module))
    assert not module.net._forward_hooks


class Hoards(PlainModule):
    """Uses its parameters by references of its own."""

    def __init__(self):
        super().__init__()
        self.hoard = [self.net[-1].weight, self.net[-1].bias]

    def forward(self, x):
        return F.linear(self.net[:-1](x), *self.hoard)


def test_a_forward_with_references_to_parameters_is_refused():
    with pytest.raises(ValueError, match=r"Hoards\.forward keeps references to its parameters"):
        validate(Hoards(), SharpnessMonitor())


def test_diverged_weights_are_an_error():
    module = PlainModule()
    with torch.no_grad():
        module.net[-1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="The loss at the weights is nan, so it has no curvature"):
        validate(module, SharpnessMonitor())
    assert not {"validation_step", "log", "log_dict"} & set(vars(module))


def test_nothing_to_train():
    module = PlainModule()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="No trainable parameter was given"):
        validate(module, SharpnessMonitor())


def test_frozen_parameters_are_left_out():
    module = PlainModule()
    module.net[0].weight.requires_grad_(False)
    logged = validate(module, SharpnessMonitor(max_samples=None, tolerance=1e-6))
    expected = lanczos(surface_of(module, *everything()), tolerance=1e-6).values.item()
    assert logged[TOP] == pytest.approx(expected, rel=1e-4)
    assert module.net[0].weight.requires_grad is False


def test_no_samples():
    with pytest.raises(ValueError, match="found no samples in validation loader 1"):
        validate(PlainModule(), SharpnessMonitor(dataloader_idx=1))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return upstream


class OnceOnly(PlainModule):
    def forward(self, x):
        return Once.apply(super().forward(x))


def test_operations_without_a_second_derivative():
    with pytest.raises(RuntimeError, match='use method="finite-difference"'):
        validate(OnceOnly(), SharpnessMonitor())
    logged = validate(OnceOnly(), SharpnessMonitor(method="finite-difference"))
    assert math.isfinite(logged[TOP])


def test_two_monitors():
    logged = trainer(SharpnessMonitor(name="a"), SharpnessMonitor(name="b", solver="power"))
    logged.validate(PlainModule(), loader(), verbose=False)
    assert {"val/a/top_eigenvalue", "val/b/top_eigenvalue"} <= set(logged.callback_metrics)
    with pytest.raises(ValueError, match="Two SharpnessMonitor callbacks of this Trainer have the name 'sharpness'"):
        trainer(SharpnessMonitor(), SharpnessMonitor()).validate(PlainModule(), loader(), verbose=False)
    both = trainer(SharpnessMonitor(), SharpnessMonitor(data="train", max_samples=6))
    both.fit(PlainModule(), loader(), loader())
    assert {TOP, "train/sharpness/top_eigenvalue"} <= set(both.callback_metrics)


def test_sharded_weights_are_refused():
    monitor = SharpnessMonitor()
    run = trainer(monitor)
    run.strategy.__class__ = type("FSDPStrategy", (L.pytorch.strategies.Strategy,), {})
    with pytest.raises(ValueError, match="needs whole weights, which FSDPStrategy does not keep"):
        monitor.setup(run, PlainModule(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "test"}, "Expected `data` to be one of 'val', 'train' but got 'test'"),
        ({"solver": "arnoldi"}, "Expected `solver` to be one of 'lanczos', 'power'"),
        ({"method": "exact"}, "Expected `method` to be one of 'double-backward'"),
        ({"max_samples": 0}, "Expected `max_samples` to be an integer >= 1"),
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be an integer >= 1"),
        ({"every_n_steps": 0}, "Expected `every_n_steps` to be an integer >= 1"),
        ({"max_products": 0}, "Expected `max_products` to be an integer >= 1"),
        ({"trace_products": -1}, "Expected `trace_products` to be an integer >= 0"),
        ({"ascent_steps": -1}, "Expected `ascent_steps` to be an integer >= 0"),
        ({"per_class": [0, -1]}, "Expected `per_class` to be an integer >= 0 but got -1"),
        ({"batch_size": 0}, "Expected `batch_size` to be an integer >= 1"),
        ({"dataloader_idx": -1}, "Expected `dataloader_idx`"),
        ({"seed": -1}, "Expected `seed`"),
        ({"tolerance": 0.0}, "Expected `tolerance` to be a finite number > 0"),
        ({"radius": 0.0}, "Expected `radius` to be a finite number > 0"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**options)

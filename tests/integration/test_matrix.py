"""Every step callback in every Trainer setting equals an explicit loop over the public functions."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from support.modules import PlainModule, loader, trainer
from support.reference import METHODS, SEED, train, twin

SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "accumulate-norm": {"accumulate": 3, "clip": ("norm", 0.3)},
    "value": {"clip": ("value", 0.02)},
    "bf16": {"precision": "bf16-mixed"},
    "bf16-accumulate-norm": {"precision": "bf16-mixed", "accumulate": 3, "clip": ("norm", 0.3)},
    "fp16": {"precision": "16-mixed"},
    "fp16-accumulate-value": {"precision": "16-mixed", "accumulate": 3, "clip": ("value", 0.02)},
}

COLUMNS_OF = {
    "plain": ["fp32"],
    "accumulate": ["accumulate"],
    "accumulate-norm": ["accumulate", "clip"],
    "value": ["clip"],
    "bf16": ["bf16-mixed"],
    "bf16-accumulate-norm": ["bf16-mixed", "accumulate", "clip"],
    "fp16": ["16-mixed"],
    "fp16-accumulate-value": ["16-mixed", "accumulate", "clip"],
}


def fit(module, method, precision="32-true", accumulate=1, clip=None, **kwargs):
    L.seed_everything(SEED)
    options = {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]} if clip else {}
    if precision == "16-mixed":
        # the Trainer itself replaces fp16 by bf16 on a CPU; the plugin with torch's CPU scaler does not
        options["plugins"] = [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu"))]
        precision = None
    run = trainer(
        *METHODS[method].callbacks(),
        max_epochs=2,
        precision=precision,
        accumulate_grad_batches=accumulate,
        **options,
        **kwargs,
    )
    run.fit(module, loader())
    return run


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_explicit_loop(method, setting, cell):
    for column in COLUMNS_OF[setting]:
        cell(method, column)
    ours = PlainModule()
    reference = twin(ours)
    fit(ours, method, **SETTINGS[setting])
    train(reference, METHODS[method], **SETTINGS[setting])
    moved = torch.cat([p.detach().flatten() for p in PlainModule().parameters()])
    assert not torch.equal(moved, torch.cat([p.detach().flatten() for p in ours.parameters()]))
    state = reference.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_seeded_twice_gives_the_same_numbers(method, cell):
    cell(method, "fp32")
    first, second = PlainModule(dropout=0.3), PlainModule(dropout=0.3)
    metrics = [fit(module, method).callback_metrics for module in (first, second)]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert metrics[0].keys() == metrics[1].keys()
    assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module"])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method, what, cell):
    cell(method, "compile")
    eager, compiled = PlainModule(), PlainModule()
    fit(eager, method)
    torch._dynamo.reset()
    target = compiled
    if what == "network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
    else:
        target = torch.compile(compiled, backend="aot_eager")
    fit(target, method)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

"""Modules that know nothing of this library get callbacks and keep their code."""

import copy
import inspect

import lightning as L
import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import CalibrationMonitor, RobustnessMonitor
from lightning_robust.models import ImageClassifier
from support.modules import CHANNELS, CLASSES, CollectionModule, DictModule, PlainModule, loader, network, trainer
from support.reference import METHODS, SEED

FORMS = {PlainModule: "pair", DictModule: "dict", CollectionModule: "triple"}


def monitors():
    return [CalibrationMonitor(display="off", save_figures=False), RobustnessMonitor(PGD(eps=0.1, steps=2))]


# an objective takes the place of the step in which this module updates its metrics
@pytest.mark.filterwarnings("ignore:The ..compute.. method of metric")
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_callback_on_every_module(kind, method, cell):
    cell(method, "other modules")
    module = kind()
    before = copy.deepcopy(module.state_dict())
    attributes = {name: value for name, value in vars(module).items() if callable(value)}
    L.seed_everything(SEED)
    run = trainer(*METHODS[method].callbacks(), *monitors(), max_epochs=2)
    run.fit(module, loader(form=FORMS[kind]), loader(form=FORMS[kind], seed=1))
    metrics = run.callback_metrics
    assert {"val/ece", "val/nll", "val/brier", "val/adv_acc"} <= set(metrics)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {name: value for name, value in vars(module).items() if callable(value)} == attributes
    assert inspect.ismethod(module.training_step)
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_any_forward_leaves_the_module_as_found(method, error, cell):
    cell(method, "exceptions")
    module = PlainModule()
    module.net[1].eval()  # a BatchNorm frozen by the user must stay frozen
    calls = []

    def counting(_, inputs):
        calls.append(1)
        if len(calls) == failing:
            raise error("stop")

    def fit(steps):
        calls.clear()
        torch.manual_seed(SEED)
        run = trainer(*METHODS[method].callbacks(), max_steps=steps)
        run.fit(module, loader())

    handle = module.net.register_forward_pre_hook(counting)
    failing = -1
    fit(1)
    total = len(calls)
    state, modes = copy.deepcopy(module.state_dict()), [child.training for child in module.modules()]
    for failing in range(1, total + 1):
        with pytest.raises((error, SystemExit)):
            fit(1)
        for name, value in module.state_dict().items():
            # a pass that finished before the failure may have moved statistics, as in plain training
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(value, state[name]), (failing, name)
        assert [child.training for child in module.modules()] == modes
        assert not {"training_step", "log", "log_dict"} & set(vars(module))
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    handle.remove()


def test_images_that_make_no_sense_are_refused():
    def fit(change, module=None):
        data = loader()
        data.dataset.x = change(data.dataset.x)
        module = module or ImageClassifier(network(), num_classes=CLASSES, in_chans=CHANNELS)
        trainer(*METHODS["adversarial"].callbacks(), fast_dev_run=True).fit(module, data)

    for module in (None, PlainModule()):
        with pytest.raises(ValueError, match="NaN"):
            fit(lambda x: x.masked_fill(x > 0.5, float("nan")), module)
        with pytest.raises(ValueError, match=r"\[0(\.0)?, 1(\.0)?\]"):
            fit(lambda x: 2 * x - 1, module)
        with pytest.raises(TypeError, match="uint8"):
            fit(lambda x: (255 * x).byte(), module)

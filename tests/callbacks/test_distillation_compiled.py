"""Distillation of features under torch.compile."""

import lightning as L
import pytest
import torch

from lightning_robust.callbacks import Distillation
from lightning_robust.distillation import DHKD, USKD, FeatureMSE
from support.modules import PlainModule, loader, trainer, weights_of
from support.teachers import teacher_network

LOSSES = {
    "hint": lambda: Distillation(teacher_network(), FeatureMSE("net.0", "0")),
    "penultimate": lambda: Distillation(teacher_network(), FeatureMSE()),
    "aligned": lambda: Distillation(
        teacher_network(), DHKD(temperature=1.0), weight=5.0, base_weight=1.0, align_gradients=True
    ),
    "uskd": lambda: Distillation(None, USKD("net.0"), base_weight=1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_is_trained_alike(loss, backend):
    modules = [PlainModule(norm=False), PlainModule(norm=False)]
    for module, compiled in zip(modules, (False, True), strict=True):
        torch._dynamo.reset()
        L.seed_everything(0)
        if compiled:
            module.net.compile(backend=backend)
        trainer(LOSSES[loss](), max_steps=3).fit(module, loader())
    torch._dynamo.reset()
    torch.testing.assert_close(*map(weights_of, modules), rtol=1e-4, atol=1e-5)

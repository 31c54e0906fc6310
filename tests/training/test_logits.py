import lightning as L
import pytest
import torch
from torch import nn

from lightning_robust.training import LogitsCapture, LogitsFunction, LogitsNotCaptured
from support.modules import CLASSES, CollectionModule, Images, PlainModule

X = Images().x[:6]


class TwoParts(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(72, 8))
        self.head = nn.Linear(8, CLASSES)

    def step(self, x):
        return self.head(self.backbone(x))


def test_sources_in_their_order():
    module = PlainModule()
    with LogitsCapture(module) as capture:
        own = module(X)
        assert capture.take() is own
        given = torch.zeros(6, CLASSES)
        assert capture.take({"logits": given}) is given
        assert capture.take({"loss": torch.tensor(0.0)}) is own
    with LogitsCapture(module) as capture:
        net = module.net(X)
        assert capture.take() is net
    with LogitsCapture(module, "net.1") as capture:
        module(X)
        assert capture.take().shape == (6, 5, 6, 6)
    assert not module._forward_hooks
    assert not module.net._forward_hooks


def test_last_forward_wins():
    module = PlainModule()
    with LogitsCapture(module) as capture:
        module(X)
        second = module(X + 1)
        assert capture.take() is second


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: type("Output", (), {"logits": z})()])
def test_outputs_that_hold_logits(wrap):
    module = PlainModule()
    net = module.net
    module.forward = lambda x: wrap(net(x))
    with LogitsCapture(module) as capture:
        module(X)
        assert capture.take().shape == (6, CLASSES)
    assert LogitsFunction(module)(X).shape == (6, CLASSES)


def test_ambiguity_is_an_error_that_names_the_candidates():
    module = TwoParts()
    with LogitsCapture(module) as capture:
        module.step(X)
        with pytest.raises(LogitsNotCaptured, match=r"backbone \[6, 8\], head \[6, 4\].*logits_from='head'"):
            capture.take()
    with LogitsCapture(module, "head") as capture:
        logits = module.step(X)
        assert capture.take() is logits
    with pytest.raises(LogitsNotCaptured, match="no forward and 2 child networks"):
        LogitsFunction(module)


def test_nothing_seen_is_an_error_with_the_remedy():
    module = PlainModule()
    with LogitsCapture(module) as capture, pytest.raises(LogitsNotCaptured, match=r"No logits were seen.*logits_from"):
        capture.take()
    with LogitsCapture(module, "net.0") as capture, pytest.raises(LogitsNotCaptured, match="was not called"):
        capture.take()


def test_unknown_name_gets_near_names():
    with pytest.raises(ValueError, match="names no sub-module of PlainModule; it has net"):
        LogitsCapture(PlainModule(), "nett")


def test_function_without_forward_uses_the_only_network():
    module = CollectionModule()
    assert torch.equal(LogitsFunction(module)(X), module.net(X))
    assert torch.equal(LogitsFunction(module, "net")(X), module.net(X))
    module = PlainModule().eval()
    assert torch.equal(LogitsFunction(module, "net")(X), module(X))


def test_what_is_computed_from_the_forward_is_not_mistaken_for_logits():
    class Headed(PlainModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(CLASSES, 3)

    module = Headed()
    with LogitsCapture(module) as capture:
        module.head(module(X))
        with pytest.raises(LogitsNotCaptured, match="Several sub-modules"):
            capture.take()


def test_logits_without_a_graph_are_overlooked_where_a_loss_needs_them():
    module = PlainModule()
    with LogitsCapture(module, needs_grad=True) as capture:
        own = module(X)
        with torch.no_grad():
            module(X)
        assert capture.take() is own
        assert capture.take({"logits": own.detach()}) is own
        capture.clear()
        with torch.no_grad():
            module(X)
        with pytest.raises(LogitsNotCaptured, match="not detached"):
            capture.take({"logits": own.detach()})


def test_compiled_module_without_forward():
    module = CollectionModule()
    torch.compile(module, backend="eager")
    compiled = torch.compile(module, backend="eager")
    module.forward = compiled.dynamo_ctx(module.forward)  # as Lightning does
    assert torch.equal(LogitsFunction(module)(X), module.net(X))

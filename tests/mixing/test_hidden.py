"""Mixing what goes into a layer, against a network that is written out."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_robust.mixing import HiddenMixing, Mixup, mix_rows


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 3)).double()


def inputs():
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixture():
    return Mixup(alpha=2.0).mix(inputs(), torch.Generator().manual_seed(2))


@pytest.fixture
def mixing():
    net = network()
    hidden = HiddenMixing(net, ["0", "3"])
    hidden.attach()
    return net, hidden


@pytest.mark.parametrize("layer", ["0", "3"])
def test_equals_the_network_written_out(mixing, layer):
    net, hidden = mixing
    drawn = mixture()
    with hidden.of(layer, drawn):
        out = net(inputs())
    assert hidden.applied
    x = mix_rows(inputs(), drawn.second, drawn.lam) if layer == "0" else inputs()
    h = net[1](net[0](x))
    h = mix_rows(h, drawn.second, drawn.lam) if layer == "3" else h
    torch.testing.assert_close(out, net[3](h))
    assert not torch.equal(out, net(inputs()))


def test_acts_inside_and_in_training_mode_only(mixing):
    net, hidden = mixing
    plain = net(inputs())
    net.eval()
    with hidden.of("3", mixture()):
        assert torch.equal(net(inputs()), plain)
        assert not hidden.applied
    net.train()
    net[3].eval()  # a layer that is frozen takes part
    with hidden.of("3", mixture()):
        assert not torch.equal(net(inputs()), plain)
    assert torch.equal(net(inputs()), plain)
    hidden.attach()
    assert len(net[3]._forward_pre_hooks) == 1
    hidden.detach()
    assert not net[3]._forward_pre_hooks


def test_a_copy_of_the_network_does_not_mix(mixing):
    net, hidden = mixing
    with hidden.of("3", mixture()):
        twin = copy.deepcopy(net)
        assert not torch.equal(twin(inputs()), net(inputs()))
    assert torch.equal(twin(inputs()), net(inputs()))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_activation_checkpointing_repeats_the_mixture(mixing, reentrant):
    net, hidden = mixing

    def gradients(checkpointed):
        net.zero_grad()
        x = inputs().requires_grad_()
        with hidden.of("3", mixture()):
            out = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
            out.square().sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, expected)


def test_refusals(mixing):
    net, hidden = mixing
    with pytest.raises(ValueError, match="at least one layer"):
        HiddenMixing(net, [])
    with pytest.raises(ValueError, match="The layer 'head' is no sub-module of Sequential; it has 0, 1, 2, 3"):
        HiddenMixing(net, ["head"])
    with hidden.of("3", mixture()):
        with pytest.raises(RuntimeError, match=r"shape \(5, 5\) for a batch of 6 samples"):
            net[3](torch.zeros(5, 5, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="is not called with a floating-point tensor as its first argument"):
            net[3](torch.zeros(6, 5, dtype=torch.long))
        with pytest.raises(RuntimeError, match="is not called with a floating-point tensor as its first argument"):
            net[3](input=torch.zeros(6, 5, dtype=torch.float64))

"""Which weights are perturbed, and that all others only see the perturbed point."""

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from lightning_robust.sharpness import ASAM, SAM, ParameterSelection, Weights, sharp_backward


class NormedLinear(nn.Linear):
    """A linear layer that normalises its weights: no normalisation layer."""


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), LayerNorm2d(4), nn.Flatten(), NormedLinear(36, 3)
    )
    return net.double()


ALL = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (ParameterSelection(), ALL),
        (ParameterSelection(include="weight"), ALL[0::2]),
        (ParameterSelection(include=[r"^0\.", r"^4\.bias$"]), ["0.weight", "0.bias", "4.bias"]),
        (ParameterSelection(exclude="bias"), ALL[0::2]),
        (ParameterSelection(exclude=[r"^0", r"^4"]), ALL[2:6]),
        (ParameterSelection(min_ndim=2), ["0.weight", "4.weight"]),
        (ParameterSelection(bias=False), ALL[0::2]),
        (ParameterSelection(norm=False), [*ALL[:2], *ALL[6:]]),
        (ParameterSelection(bias=False, norm=False), ["0.weight", "4.weight"]),
        (ParameterSelection(only_norm=True), ALL[2:6]),
        (ParameterSelection(only_norm=True, bias=False), ["1.weight", "2.weight"]),
    ],
    ids=repr,
)
def test_choices(selection, expected):
    weights = selection.apply(Weights.of(network()))
    assert weights.perturbed.names == expected
    assert weights.names == ALL
    tensors = [torch.tensor(float(i)) for i in range(len(ALL))]
    assert [ALL[int(t)] for t in weights.pick(tensors)] == expected
    assert len(weights.perturbed.tensors) == len(weights.perturbed.owners) == len(weights.perturbed.options)


def test_group_option_leaves_a_group_out():
    net = network()
    optimizer = torch.optim.SGD(
        [{"params": net[0].parameters()}, {"params": net[1:].parameters(), "perturb": False}], lr=0.1
    )
    assert ParameterSelection().apply(Weights.of(optimizer, net)).perturbed.names == ALL[:2]
    assert ParameterSelection(bias=False).apply(Weights.of(optimizer, net)).perturbed.names == ALL[:1]


def closure_of(net):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (5,), generator=generator)
    return lambda: nn.functional.cross_entropy(net(x), y)


@pytest.mark.parametrize("selection", [ParameterSelection(only_norm=True), ParameterSelection(min_ndim=2)], ids=repr)
@pytest.mark.parametrize("method", [SAM(rho=0.3), ASAM(rho=0.5, scaling="all")], ids=repr)
def test_norm_and_perturbation_belong_to_the_chosen_weights(selection, method):
    net = network()
    closure = closure_of(net)
    named = dict(net.named_parameters())
    chosen = selection.apply(Weights.of(net)).perturbed.names
    gradients = dict(zip(named, torch.autograd.grad(closure(), list(named.values())), strict=True))
    scale = {n: named[n].detach().abs() + 0.01 if isinstance(method, ASAM) else 1.0 for n in chosen}
    norm = torch.cat([(scale[n] * gradients[n]).flatten() for n in chosen]).norm()
    clean = {n: p.detach().clone() for n, p in named.items()}
    with torch.no_grad():
        for n in chosen:
            named[n] += method.rho * scale[n] ** 2 * gradients[n] / norm
    expected = torch.autograd.grad(closure(), list(named.values()))
    with torch.no_grad():
        for n in chosen:
            named[n].copy_(clean[n])
    sharp_backward(closure, method, net, perturb=selection)
    torch.testing.assert_close([p.grad for p in named.values()], list(expected), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(named[n], clean[n]) for n in named)


def test_refusals():
    net = network()
    with pytest.raises(ValueError, match=r"chooses none of the 8 trainable parameters.*0\.weight"):
        sharp_backward(closure_of(net), SAM(), net, perturb=ParameterSelection(include="encoder"))
    with pytest.raises(ValueError, match=r"names are not known; pass the module"):
        sharp_backward(closure_of(net), SAM(), net.parameters(), perturb=ParameterSelection(norm=False))
    with pytest.raises(ValueError, match=r"`include` to hold regular expressions but got '\('"):
        ParameterSelection(include="(")
    with pytest.raises(ValueError, match=r"`norm` to be True"):
        ParameterSelection(only_norm=True, norm=False)
    with pytest.raises(ValueError, match=r"`min_ndim` to be an integer >= 0"):
        ParameterSelection(min_ndim=-1)


def test_shapes_need_no_names():
    net = network()
    sharp_backward(closure_of(net), SAM(), net.parameters(), perturb=ParameterSelection(min_ndim=2))
    assert net[0].weight.grad is not None

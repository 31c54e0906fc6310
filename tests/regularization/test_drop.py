import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from lightning_robust.regularization import DropLayers, drop_rate_at, drop_schedule


@pytest.mark.parametrize(("epochs", "cutoff"), [(1, 0), (1, 1), (5, 1), (5, 3), (5, 5)])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_equals_arrays(epochs, cutoff, steps):
    before, after = cutoff * steps, (epochs - cutoff) * steps
    expected = {
        ("early", "linear"): np.concatenate([np.linspace(0.3, 0, before), np.zeros(after)]),
        ("early", "constant"): np.concatenate([np.full(before, 0.3), np.zeros(after)]),
        ("late", "constant"): np.concatenate([np.zeros(before), np.full(after, 0.3)]),
        ("late", "linear"): np.concatenate([np.zeros(before), np.full(after, 0.3)]),
        ("standard", "constant"): np.full(before + after, 0.3),
    }
    for (mode, kind), values in expected.items():
        ours = drop_schedule(0.3, epochs=epochs, steps_per_epoch=steps, cutoff_epochs=cutoff, mode=mode, kind=kind)
        np.testing.assert_allclose(ours, values, rtol=1e-12, atol=1e-15, err_msg=f"{mode} {kind}")


def test_the_line_ends_at_zero_before_the_cut_off():
    assert drop_rate_at(9, rate=0.1, cutoff_steps=10) == 0.0
    assert drop_rate_at(8, rate=0.1, cutoff_steps=10) > 0.0
    assert drop_rate_at(10_000, rate=0.1, cutoff_steps=10) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1.5}, r"Expected `rate` to be in \[0.0, 1.0\] but got 1.5"),
        ({"epochs": 0}, "Expected `epochs` to be an integer >= 1 but got 0"),
        ({"steps_per_epoch": 0}, "Expected `steps_per_epoch` to be an integer >= 1 but got 0"),
        ({"cutoff_epochs": -1}, "Expected `cutoff_epochs` to be an integer >= 0 but got -1"),
        ({"cutoff_epochs": 4}, r"Expected `cutoff_epochs` to be at most `epochs` \(3\) but got 4"),
        ({"mode": "mid"}, "Expected `mode` to be one of 'standard', 'early', 'late' but got 'mid'"),
        ({"kind": "cosine"}, "Expected `kind` to be one of 'linear', 'constant' but got 'cosine'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_arguments(change, message):
    arguments = {"rate": 0.1, "epochs": 3, "steps_per_epoch": 2, "cutoff_epochs": 1, **change}
    with pytest.raises(ValueError, match=message):
        drop_schedule(arguments.pop("rate"), **arguments)


def vit(rate):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=3, drop_path_rate=rate
    )


def test_drop_path_of_timm_grows_linearly_with_the_depth():
    net = vit(0.1)
    layers = DropLayers(net)
    built = layers.rates
    layers.set_rate(0.6)
    expected = torch.linspace(0, 0.6, 4)
    for position, block in enumerate(net.blocks):
        if position:  # timm puts nn.Identity where the rate is 0
            assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == pytest.approx(expected[position].item())
    layers.set_rate(0.0)
    assert set(layers.rates) == {0.0}
    layers.restore()
    assert layers.rates == built == [block.drop_prob for block in net.modules() if isinstance(block, DropPath)]


def test_the_rates_work():
    net = vit(0.1)
    layers, images = DropLayers(net), torch.randn(2, 3, 32, 32)
    plain = net.eval()(images)
    net.train()
    layers.set_rate(0.0)
    torch.testing.assert_close(net(images), plain)
    layers.set_rate(1.0)
    assert not torch.allclose(net(images), plain)


def test_drop_paths_that_were_all_built_with_zero():
    block = lambda: nn.ModuleDict({"path1": DropPath(0.0), "path2": StochasticDepth(0.0, "row")})  # noqa: E731
    layers = DropLayers(nn.Sequential(block(), block(), block()))
    layers.set_rate(0.4)
    assert layers.rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    single = DropLayers(block())
    single.set_rate(0.4)
    assert single.rates == pytest.approx([0.4, 0.4])


def test_dropout_layers_all_get_the_rate():
    net = nn.Sequential(nn.Dropout(0.2), nn.Dropout2d(0.0), nn.AlphaDropout(0.5), nn.Linear(2, 2), DropPath(0.3))
    layers = DropLayers(net, what="dropout")
    assert len(layers) == 3
    assert repr(layers) == "DropLayers(3 of dropout)"
    layers.set_rate(0.7)
    assert [net[0].p, net[1].p, net[2].p, net[4].drop_prob] == [0.7, 0.7, 0.7, 0.3]
    layers.restore()
    assert layers.rates == [0.2, 0.0, 0.5]
    with pytest.raises(ValueError, match=r"Expected `rate` to be in \[0.0, 1.0\] but got -0.1"):
        layers.set_rate(-0.1)


def test_a_network_without_such_layers_is_refused_with_what_it_has():
    with pytest.raises(ValueError, match=r"drop_path layers in VisionTransformer but it has none.*8 places.*0\.1"):
        DropLayers(vit(0.0))
    with pytest.raises(ValueError, match="dropout layers in DropPath but it has none, only 1 drop-path layers; put nn"):
        DropLayers(DropPath(0.1), what="dropout")
    with pytest.raises(ValueError, match="Expected `what` to be one of 'dropout', 'drop_path' but got 'block'"):
        DropLayers(nn.Dropout(), what="block")

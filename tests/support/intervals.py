"""Interval bound propagation in float64: what no attack can get below."""

from torch import Tensor, nn
from torch.nn import functional as F


def interval_bounds(model: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the outputs for all inputs between ``low`` and ``high``; convolutions, linear layers, ReLU, flatten.

    An affine map takes the centre to the centre and the radius to the radius times the absolute weights.
    """
    low, high = low.double(), high.double()
    for layer in model:
        if isinstance(layer, nn.ReLU):
            low, high = low.clamp(min=0), high.clamp(min=0)
        elif isinstance(layer, nn.Flatten):
            low, high = low.flatten(1), high.flatten(1)
        else:
            centre, radius = _affine(layer, (low + high) / 2, (high - low) / 2)
            low, high = centre - radius, centre + radius
    return low, high


def margin_bounds(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Lower bounds ``[B, C]`` of ``z_y - z_j`` over all images within ``eps`` in linf and in [0, 1]; 0 where j is y.

    The margins are an affine map of the features before the last layer, so that layer is merged with the difference.
    """
    *features, last = model
    low, high = interval_bounds(nn.Sequential(*features), *box(x, eps))
    weight, bias = last.weight.double(), last.bias.double()
    centre, radius = ((high + low) / 2).unsqueeze(1), ((high - low) / 2).unsqueeze(1)
    differences = weight[y].unsqueeze(1) - weight
    return (differences * centre - differences.abs() * radius).sum(2) + bias[y].unsqueeze(1) - bias


def verified(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Whether no image within ``eps`` is misclassified, ``[B]``; ``False`` if that is not known."""
    margins = margin_bounds(model, x, y, eps)
    return (margins.scatter(1, y.unsqueeze(1), 1.0) > 0).all(1)


def box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Corners of the linf ball within [0, 1]."""
    return (x.double() - eps).clamp(0, 1), (x.double() + eps).clamp(0, 1)


def _affine(layer: nn.Module, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.double(), layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(centre, weight, bias), F.linear(radius, weight.abs())
    assert isinstance(layer, nn.Conv2d), layer
    assert layer.padding_mode == "zeros", layer
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.conv2d(centre, weight, bias, *options), F.conv2d(radius, weight.abs(), None, *options)

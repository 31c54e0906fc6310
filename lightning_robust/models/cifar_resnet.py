# SPDX-License-Identifier: Apache-2.0
"""The small residual network that He et al. designed for 32 x 32 images."""

from typing import Any

from timm.layers.classifier import create_classifier
from timm.models import checkpoint_seq
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

__all__ = ["CifarResNet"]


class PaddedShortcut(nn.Module):
    """The parameter-free shortcut of the CIFAR networks ("option A"): every second pixel, zeros for new channels.

    Args:
        new_channels: number of channels to add.
        stride: step between kept pixels.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut of ``x``, ``[B, C + new, H / stride, W / stride]``."""
        before = self.new_channels // 2
        kept = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(kept, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """ResNet with three stages of 16, 32 and 64 channels, ``6 * blocks + 2`` layers; built from timm's blocks.

    Made for 32 x 32 images; anything from 4 x 4 works. It has the interface of timm's models.

    Args:
        blocks: residual blocks per stage.
        width: channels of the first stage; each following stage has twice as many.
        num_classes: number of classes, 0 for none (features).
        in_chans: number of input channels.
        global_pool: pooling before the classifier, as in timm.
        drop_rate: dropout before the classifier.

    Shape:
        ``[B, in_chans, H, W]`` -> ``[B, num_classes]``.

    References:
        He et al., arXiv:1512.03385, section 4.2.

    Example:
        >>> sum(p.numel() for p in CifarResNet(blocks=3).parameters())
        269722
    """

    def __init__(
        self,
        *,
        blocks: int,
        width: int = 16,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: Any = [{"num_chs": width, "reduction": 1, "module": "act1"}]
        channels = width
        for stage in range(3):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            layers = [BasicBlock(channels, planes, stride, _shortcut(channels, planes, stride))]
            layers += [BasicBlock(planes, planes) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": planes, "reduction": 2**stage, "module": f"layer{stage + 1}"})
            channels = planes
        self.num_features = channels
        self.global_pool, self.fc = create_classifier(channels, num_classes, pool_type=global_pool)
        self.head_hidden_size = channels * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer.

        Args:
            num_classes: number of classes, 0 for none.
            global_pool: another pooling; the present one when ``None``.
        """
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        weight = self.conv1.weight
        self.global_pool, classifier = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.fc = classifier.to(weight.device, weight.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory.

        Args:
            enable: switch.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameters into layers, for timm's optimizer factories.

        Args:
            coarse: by stage instead of by block.
        """
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the features of the stem and the stages, as timm's models do.

        Args:
            x: images.
            indices: the last n if an integer, all if ``None``, those listed otherwise.
            norm: accepted for compatibility; there is no final norm.
            stop_early: leave out stages after the last wanted one.
            output_fmt: only ``"NCHW"``.
            intermediates_only: return the list alone instead of (features, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Expected `output_fmt` to be 'NCHW' but got {output_fmt!r}.")
        wanted = _taken(4, indices)
        found = []
        for index in range(1 + (max(wanted) if stop_early else 3)):
            x = self._stem(x) if index == 0 else self.get_submodule(f"layer{index}")(x)
            if index in wanted:
                found.append(x)
        return found if intermediates_only else (x, found)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before pooling, ``[B, 4 * width, H / 4, W / 4]``."""
        x = self._stem(x)
        for index in (1, 2, 3):
            stage = self.get_submodule(f"layer{index}")
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: what :meth:`forward_features` returned.
            pre_logits: return the pooled features instead of logits.
        """
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))

    def _stem(self, x: Tensor) -> Tensor:
        stem: Tensor = self.act1(self.bn1(self.conv1(x)))
        return stem


def _taken(stages: int, indices: int | list[int] | None) -> list[int]:
    every = list(range(stages))
    if indices is None:
        return every
    return every[-indices:] if isinstance(indices, int) else [every[index] for index in indices]


def _shortcut(channels: int, planes: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == planes:
        return None
    return PaddedShortcut(planes - channels, stride)

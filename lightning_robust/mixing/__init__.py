# SPDX-License-Identifier: Apache-2.0
"""Ways to train on mixtures of samples: mixup, CutMix and their kin, for any training loop."""

from lightning_robust.mixing.cutmix import CutMix, cut_box
from lightning_robust.mixing.hidden import HiddenMixing
from lightning_robust.mixing.mixer import Mixer
from lightning_robust.mixing.mixture import Mixture, mix_rows
from lightning_robust.mixing.mixup import Mixup, RegMixup
from lightning_robust.mixing.timm_mixup import TimmMixup

__all__ = [
    "CutMix",
    "HiddenMixing",
    "Mixer",
    "Mixture",
    "Mixup",
    "RegMixup",
    "TimmMixup",
    "cut_box",
    "mix_rows",
]

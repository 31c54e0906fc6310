"""Interval bounds, with which the sandwich test judges attacks, against auto_LiRPA."""

import re

import torch
from torch import nn

from conformance.adapters.attacks import Net
from support.golden import Golden, adapter
from support.intervals import box, interval_bounds, margin_bounds


@adapter("attacks", "ibp")
def ibp(golden: Golden) -> None:
    net = Net(golden.tensors("w."))
    model = nn.Sequential(net.c1, nn.ReLU(), net.c2, nn.ReLU(), nn.Flatten(), net.fc)
    x, y = golden.tensor("x"), golden.tensor("y")
    radii = [found[1] for name in golden.arrays if (found := re.fullmatch(r"ibp_lo_(.+)", name))]
    assert radii
    for radius in radii:
        with torch.no_grad():
            low, high = interval_bounds(model, *box(x, float(radius)))
            margins = margin_bounds(model, x, y, float(radius))
        golden.check(f"ibp_lo_{radius}", low, rtol=1e-4, atol=1e-4)
        golden.check(f"ibp_hi_{radius}", high, rtol=1e-4, atol=1e-4)
        golden.check(f"margin_IBP_{radius}", margins, rtol=1e-4, atol=1e-4)
        golden.skip(
            f"margin_CROWN_IBP_{radius}",
            f"margin_CROWN_{radius}",
            reason="linear relaxations are not a part of the library",
        )

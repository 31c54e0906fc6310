"""The standard AutoAttack: how many samples are left after each of its attacks."""

import re

import torch

from conformance.adapters.attacks import Net
from lightning_robust.attacks import AutoAttack
from support.golden import Golden, adapter


@adapter("attacks", "autoattack")
def autoattack(golden: Golden) -> None:
    model = Net(golden.tensors("w.")).eval()
    x, y = golden.tensor("x"), golden.tensor("y")
    indices = torch.arange(len(x))
    # random starts are drawn otherwise, so counts may differ by a sample (of 16) from the recorded seeds
    slack = max(1, round(len(x) / 16))
    for key, recorded in golden.hyper["robust_counts"].items():
        found = re.fullmatch(r"(\w+)_x([\d.]+)", key)
        assert found, key
        name = found[1]
        attack = AutoAttack(norm=name.lower(), eps=golden.hyper["eps"][name] * float(found[2]))
        stages = attack.stages(model.fc.out_features)
        assert list(stages) == golden.hyper["order"]
        masks = golden.tensor(f"{key}_mask")  # [seeds, stages, samples]
        left = torch.ones(len(x), dtype=torch.bool)
        for number, stage in enumerate(stages.values()):
            if bool(left.any()):
                x_adv = stage(model, x[left], y[left], indices=indices[left])
                with torch.no_grad():
                    left[left.clone()] = model(x_adv).argmax(1) == y[left]
            counts = [seed[number] for seed in recorded]
            assert min(counts) - slack <= int(left.sum()) <= max(counts) + slack, (key, number, int(left.sum()), counts)
            robust_always, robust_ever = masks[:, number].all(0), masks[:, number].any(0)
            assert int((robust_always & ~left).sum()) <= slack, (key, number)
            assert int((left & ~robust_ever).sum()) <= slack, (key, number)

"""Square, PMA and MD against the official implementations, as statistics over seeds."""

from conformance.adapters.attacks import Net
from lightning_robust.attacks import MD, PMA, Square
from lightning_robust.attacks.losses import margin
from support.golden import Golden, adapter

#: Seeds by number of queries; the recorded runs have 20 and 5.
SEEDS = {500: 4, 5000: 1}


@adapter("attacks", "square")
def square(golden: Golden) -> None:
    model = Net(golden.tensors("w.")).requires_grad_(False)
    x, y = golden.tensor("x"), golden.tensor("y")
    for name, recorded in golden.hyper["stats"].items():
        norm, queries = name.rsplit("_", 1)
        masks, margins = golden.tensor(f"{name}_mask"), golden.tensor(f"{name}_margin")
        assert masks.sum(1).tolist() == recorded["robust"]
        robust, left = [], []
        for seed in range(SEEDS.get(int(queries), 2)):
            attack = Square(eps=golden.hyper["eps"][norm], norm=norm.lower(), queries=int(queries), seed=seed)
            logits = model(attack(model, x, y))
            robust.append((logits.argmax(1) == y).sum().item())
            left.append(-margin(logits, y).mean().item())
        # windows of their own and pixels that the official ones never reach make it stronger, never weaker
        counts, levels = masks.sum(1).float(), margins.mean(1)
        assert counts.min() - len(x) / 4 <= min(robust), (name, robust)
        assert max(robust) <= counts.max() + 1, (name, robust)
        spread = 4 * levels.std().item() * (1 / len(left) + 1 / len(levels)) ** 0.5
        assert sum(left) / len(left) <= levels.mean().item() + spread, (name, left, levels)


@adapter("attacks", "pma")
def pma(golden: Golden) -> None:
    model = Net(golden.tensors("w.")).requires_grad_(False)
    x, y = golden.tensor("x"), golden.tensor("y")
    for name, recorded in golden.hyper["robust_counts"].items():
        method, steps = name.rsplit("_", 1)
        kind = {"pma": PMA, "md": MD}[method]
        masks = golden.tensor(f"{name}_mask")
        assert masks.sum(1).tolist() == recorded
        for seed in range(3):
            # both were recorded with the authors' code of PMA, whose first stage is half of the steps
            attack = kind(eps=golden.hyper["eps_Linf"], steps=int(steps), first_stage=int(steps) // 2, seed=seed)
            robust = model(attack(model, x, y)).argmax(1) == y
            assert min(recorded) - 1 <= robust.sum().item() <= max(recorded) + 1, (name, seed)
            # what no recorded run broke, or every run did, is the same here
            certain = masks.all(0) | ~masks.any(0)
            assert (robust == masks[0])[certain].float().mean() >= 0.9, (name, seed)

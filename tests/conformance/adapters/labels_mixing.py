"""Mixing of samples: mixup, CutMix, Cutout, manifold mixup, RegMixup, decoupled mixup."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.data import cutout_mask
from lightning_robust.losses import MixedTarget, cross_entropy, decoupled_mixup_loss
from lightning_robust.mixing import HiddenMixing, Mixture, TimmMixup, cut_box, mix_rows
from support.golden import Golden, adapter


def recorded_mixture(golden: Golden, x: torch.Tensor) -> Mixture:
    """The mixture whose permutation torch draws from the recorded seed, with the recorded share."""
    partner = torch.randperm(len(x), generator=torch.Generator().manual_seed(golden.hyper["seed"]))
    lam = golden.tensor("lam")
    return Mixture(mix_rows(x, partner, lam), torch.arange(len(x)), partner, lam)


@adapter("labels", "mixup_fb")
def mixup_fb(golden: Golden) -> None:
    labels = golden.tensor("labels")
    mixture = recorded_mixture(golden, golden.tensor("x"))
    target = mixture.target(labels)
    golden.check("mixed", mixture.x)
    golden.check("y_a", target.first)
    golden.check("y_b", target.second)
    logits = golden.tensor("logits").requires_grad_()
    loss = cross_entropy(logits, target)
    golden.check("loss", loss)
    golden.check("grad", torch.autograd.grad(loss, logits)[0])
    golden.check("soft_ce_equivalent", cross_entropy(logits, mixture.probabilities(labels, logits.shape[1])))


@adapter("labels", "mixup_timm")
def mixup_timm(golden: Golden) -> None:
    hyper = golden.hyper
    options = {key: value for key, value in hyper.items() if key not in ("seed", "num_classes")}
    options.setdefault("label_smoothing", 0.1)
    mixer, x, labels = TimmMixup(**options), golden.tensor("x"), golden.tensor("labels")
    before = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)  # timm makes targets of the default type
    try:
        mixture = mixer.mix_seeded(x, hyper["seed"])
    finally:
        torch.set_default_dtype(before)
    logits = golden.tensor("logits").requires_grad_()
    target = mixture.probabilities(labels, logits.shape[1], label_smoothing=mixer.label_smoothing)
    loss = cross_entropy(logits, target)
    golden.check("mixed", mixture.x)
    golden.check("target", target)
    golden.check("loss", loss)
    golden.check("grad", torch.autograd.grad(loss, logits)[0])


@adapter("labels", "cutmix_box")
def cutmix_box(golden: Golden) -> None:
    """The published function takes the image's third dimension for its width, so its x runs along our rows."""
    height, width = golden.hyper["size"][-2:]
    alpha = golden.hyper.get("alpha", 1)
    boxes, shares = [], []
    for seed, lam in zip(golden.tensor("seeds").tolist(), golden.tensor("lam").tolist(), strict=True):
        np.random.seed(seed)
        np.random.beta(alpha, alpha)  # the share
        box, share = cut_box(height, width, lam, (np.random.randint(height), np.random.randint(width)))
        boxes.append(box)
        shares.append(share)
    golden.check("boxes", torch.tensor(boxes))
    golden.check("lam_adjusted", torch.tensor(shares, dtype=torch.float64))


@adapter("labels", "cutout")
def cutout(golden: Golden) -> None:
    hyper = golden.hyper
    channels, height, width = hyper["shape"]
    np.random.seed(hyper["seed"])
    centers = [(np.random.randint(height), np.random.randint(width)) for _ in range(hyper["n_holes"])]
    golden.check("mask", cutout_mask(height, width, hyper["length"], centers).expand(channels, -1, -1))


class Probe(nn.Module):
    """A network of which only the hidden state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden)


@adapter("labels", "manifold_mixup")
def manifold_mixup(golden: Golden) -> None:
    hidden, labels, partner = golden.tensor("hidden"), golden.tensor("labels"), golden.tensor("perm")
    mixture = Mixture(hidden, torch.arange(len(hidden)), partner, golden.tensor("lam"))
    network = Probe()
    mixing = HiddenMixing(network, ["layer"])
    mixing.attach()
    with mixing.of("layer", mixture):
        golden.check("mixed", network(hidden))
    logits = golden.tensor("logits").requires_grad_()
    target = mixture.probabilities(labels, logits.shape[1])
    golden.check("target", target)
    # The published loss needs no class of ours; our target fits it.
    loss = F.binary_cross_entropy(logits.softmax(1), target)
    golden.check("bce_on_softmax", loss)
    golden.check("grad", torch.autograd.grad(loss, logits)[0])


@adapter("labels", "regmixup")
def regmixup(golden: Golden) -> None:
    labels, x = golden.tensor("labels"), golden.tensor("x")
    half = recorded_mixture(golden, x)
    target = half.target(labels)
    golden.check("mixed", half.x)
    golden.check("y_a", target.first)
    golden.check("y_b", target.second)
    rows = torch.arange(len(x))
    shares = torch.cat([torch.ones(len(x), dtype=x.dtype), half.lam.expand(len(x))])
    doubled = Mixture(torch.cat([x, half.x]), rows.repeat(2), torch.cat([rows, half.second]), shares)
    clean, mixed = golden.tensor("logits_cat").chunk(2)
    golden.check("ce_clean", cross_entropy(clean, labels))
    golden.check("mix_term", cross_entropy(mixed, target))
    logits = golden.tensor("logits_cat").requires_grad_()
    loss = cross_entropy(logits, doubled.target(labels))
    golden.check("loss", loss)
    golden.check("grad", torch.autograd.grad(loss, logits)[0])


@adapter("labels", "decoupled_mixup")
def decoupled_mixup(golden: Golden) -> None:
    logits, labels, lam = golden.tensor("logits"), golden.tensor("labels"), golden.tensor("lam")
    mixture = Mixture(logits, torch.arange(len(labels)), golden.tensor("perm"), lam)
    target = mixture.target(labels)
    golden.check("target", mixture.probabilities(labels, logits.shape[1]))
    mixed = target.first != target.second
    eta = published_order(golden, target, mixed)

    def losses(z: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_loss(z, target, eta=eta)

    def apart(z: torch.Tensor) -> torch.Tensor:
        """Without its `avg_factor` the published function adds the means over both kinds of rows."""
        return sum((losses(z)[kind].mean() for kind in (mixed, ~mixed) if bool(kind.any())), torch.zeros(()))

    for suffix, loss in {
        "": apart,
        "_avg_factor": lambda z: losses(z).mean(),
        "_plain": lambda z: decoupled_mixup_loss(z, target, eta=(0.0, 0.0)).mean(),
    }.items():
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        golden.check(f"loss{suffix}", value)
        golden.check(f"grad{suffix}", torch.autograd.grad(value, leaf)[0])


def published_order(golden: Golden, target: MixedTarget, mixed: torch.Tensor) -> tuple[float, float]:
    """The recorded weights as those of first and second label.

    The published function gives them to the classes of its first mixed row in the order of their indices.
    """
    eta = golden.tensor("eta").tolist()
    if float(target.lam) == 0.5 or not bool(mixed.any()):
        return 0.0, 0.0  # then it has no decoupled terms
    row = int(mixed.nonzero()[0])
    return (eta[0], eta[1]) if int(target.first[row]) < int(target.second[row]) else (eta[1], eta[0])

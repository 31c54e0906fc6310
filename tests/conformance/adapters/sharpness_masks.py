"""Friendly-SAM, FSAM's Fisher mask and AMP against the recorded optimizers."""

import torch

from conformance.adapters.sharpness import Recorder, check_all, network, replay
from lightning_robust.sharpness import AMP, FisherSAM, FriendlySAM, Weights, sharp_backward
from support.golden import Golden, adapter


@adapter("sharpness", "fsam_friendly")
def fsam_friendly(golden: Golden) -> None:
    hyper = golden.hyper
    options = {"adaptive": hyper.get("adaptive", False), "norm_eps": hyper.get("norm_eps", hyper.get("eps", 1e-12))}
    replay(golden, FriendlySAM(rho=hyper["rho"], sigma=hyper["sigma"], lmbda=hyper["lmbda"], **options))


@adapter("sharpness", "amp")
def amp(golden: Golden) -> None:
    hyper = golden.hyper
    hyper.setdefault("base_lr", hyper.get("lr"))
    options = {"inner_lr": hyper.get("inner_lr", 1), "inner_iter": hyper.get("inner_iter", 1)}
    replay(golden, AMP(rho=hyper["epsilon"], **options))


@adapter("sharpness", "fsam_mask")
def fsam_mask(golden: Golden) -> None:
    """The published class fails before it steps, so only the first mask and perturbation are recorded."""
    hyper = golden.hyper
    method = FisherSAM(rho=hyper["rho"], keep_ratio=hyper["keep_ratio"], norm_eps=hyper.get("norm_eps", 1e-7))
    net = network(golden)
    record = Recorder(net, golden.tensor("X")[0], golden.tensor("Y")[0])
    sharp_backward(record, method, torch.optim.SGD(net.parameters(), lr=0.1), module=net, step=0)
    weights = Weights.of(net)
    masks = dict(zip(weights.names, method.recall("mask", weights), strict=True))
    check_all(golden, "mask.", {name: mask for name, mask in masks.items() if mask is not None})
    clean, moved = record.weights
    check_all(golden, "e_step1.", {name: moved[name] - clean[name] for name in clean})
    states = {f"w{step}." for step in range(1, 4)}
    later = [name for name in golden.arrays if name[:3] in states]
    golden.skip(*later, reason="weights after a step, which the published class cannot take")
    if "masked_parameters" in hyper:
        assert {name for name, mask in masks.items() if mask is not None} == set(hyper["masked_parameters"])

"""Training on a shuffled loader whose order is known, for callbacks that remember samples or weights."""

import lightning as L
import torch

from lightning_robust.data import EpochSampler, ResumableDataLoader
from support.modules import Images, trainer


def shuffled(form="pair", length=22):
    data = Images(length, form)
    return ResumableDataLoader(data, 6, sampler=EpochSampler(data, seed=5))


def fit(module, *callbacks, loader=None, ckpt_path=None, **kwargs):
    L.seed_everything(0)
    run = trainer(*callbacks, **kwargs)
    run.fit(module, loader or shuffled(), ckpt_path=ckpt_path)
    return run


def close(ours, reference, **tolerance):
    state = reference.state_dict()
    for name, value in ours.state_dict().items():
        if not name.startswith("train_acc"):
            torch.testing.assert_close(value, state[name], **{"rtol": 1e-5, "atol": 1e-6, **tolerance}, msg=name)


def differ(first, second):
    return any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

import random

import numpy as np
import torch
from torch import nn

from lightning_robust.guards import RandomState, buffers_restored, evaluation_mode, frozen_modes, rng_preserved


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_random_state_covers_torch_numpy_and_python():
    state = RandomState.capture()
    first = draws()
    assert draws() != first
    state.restore()
    assert draws() == first


def test_rng_preserved_even_when_the_body_fails():
    before = torch.get_rng_state()
    try:
        with rng_preserved():
            draws()
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_restored_one_by_one():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    model[0].eval()
    flags = [m.training for m in model.modules()]
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags
    with frozen_modes(model):
        model.train()
    assert [m.training for m in model.modules()] == flags


def test_buffers_come_back_by_value_and_identity():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    buffer = model[0].running_mean
    with buffers_restored(model):
        model(torch.randn(8, 3))
        assert model[0].num_batches_tracked == 1
        model[0].running_mean = torch.ones(3)
    assert model[0].running_mean is buffer
    assert torch.equal(buffer, torch.zeros(3))
    assert model[0].num_batches_tracked == 0

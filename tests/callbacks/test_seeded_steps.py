"""Random layers that depend on the position of the step alone."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_robust.callbacks import SeededSteps
from support.modules import PlainModule, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Draws(Callback):
    """Notes what each generator gives at the beginning of a step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((torch.rand(1).item(), np.random.rand(), random.random()))


def draws(callback, epochs=2):
    noted = Draws()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, noted],
    )  # fmt: skip
    trainer.fit(PlainModule(dropout=0.5), loader())
    return noted.seen


def test_draws_depend_on_the_position_only():
    first = draws(SeededSteps(seed=1))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert draws(SeededSteps(seed=1)) == first
    assert draws(SeededSteps(seed=2)) != first
    assert len({value for step in first for value in step}) == 3 * len(first) == 3 * 8


def test_ranks_and_epochs_differ():
    class Position:
        def __init__(self, rank, epoch):
            self.global_rank, self.current_epoch = rank, epoch

    values = set()
    for rank in range(2):
        for epoch in range(2):
            SeededSteps(seed=0).on_train_batch_start(Position(rank, epoch), PlainModule(), None, 0)
            values.add(torch.rand(1).item())
    assert len(values) == 4


def test_global_seed_is_taken(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert draws(SeededSteps(), 1) == draws(SeededSteps(seed=1), 1)


def test_no_seed_is_refused(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    with pytest.raises(ValueError, match="Expected a seed for SeededSteps: call seed_everything"):
        draws(SeededSteps())


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="Expected `seed` to be an integer >= 0 but got -1"):
        SeededSteps(seed=-1)

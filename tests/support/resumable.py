"""Training that is interrupted, and the script of a process that gets killed."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robust.data import EpochSampler, ResumableDataLoader
from support.modules import Images, PlainModule, trainer
from support.reference import METHODS, SEED

EPOCHS, BATCHES = 2, 4


def shuffled_loader():
    data = Images()
    return ResumableDataLoader(data, 6, sampler=EpochSampler(data, seed=SEED))


def run(method, folder, *callbacks, ckpt_path=None):
    """Train with a checkpoint after every step; returns the module and its Trainer."""
    L.seed_everything(SEED)
    module = PlainModule()
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fitting = trainer(*METHODS[method].callbacks(), saving, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    fitting.fit(module, shuffled_loader(), ckpt_path=ckpt_path)
    return module, fitting


class Killer(L.Callback):
    """Ends the process without any farewell in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Killer(int(sys.argv[3])))

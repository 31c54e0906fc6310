# SPDX-License-Identifier: Apache-2.0
"""What CalibrationMonitor adds to a validation epoch of a resnet18 on 32x32 images, in one process on the CPU.

Epochs with and without the monitor alternate, and the median of each kind is compared, in CPU time so that other
programs matter little. Figures are measured apart: they cost the same whatever the model. Run:

    OMP_NUM_THREADS=1 python benchmarks/calibration_monitor_share.py --rounds 7
"""

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.calibration import reliability_figure
from lightning_robust.callbacks import CalibrationMonitor
from lightning_robust.metrics import TopLabelReliability


class Classifier(L.LightningModule):
    """A resnet18 that only validates."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = timm.create_model("resnet18", num_classes=classes)

    def validation_step(self, batch, batch_idx):
        """One forward and one logged loss."""
        self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class EpochTime(L.Callback):
    """CPU seconds from the start to the end of the validation epoch."""

    def on_validation_start(self, trainer, pl_module):
        """Start."""
        self.start = time.process_time()

    def on_validation_end(self, trainer, pl_module):
        """Stop."""
        self.seconds = time.process_time() - self.start


class TimedMonitor(CalibrationMonitor):
    """Adds up the CPU seconds of its own hooks: far less noisy than a difference of two epochs."""

    def __init__(self) -> None:
        super().__init__(display="line", save_figures=False)
        self.seconds = 0.0
        for name in ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"):
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, hook):
        def timed(*args, **kwargs):
            start = time.process_time()
            hook(*args, **kwargs)
            self.seconds += time.process_time() - start

        return timed


def epoch(module: Classifier, data: DataLoader, monitor: CalibrationMonitor | None, folder: str) -> float:
    """CPU seconds of one validation epoch."""
    clock = EpochTime()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[clock, *([monitor] if monitor is not None else [])],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.validate(module, data, verbose=False)
    return clock.seconds


def figure_seconds(classes: int, folder: str, rounds: int) -> float:
    """Median CPU seconds to draw one figure and write it as PNG."""
    metric = TopLabelReliability()
    metric.update(torch.randn(2000, classes) * 3, torch.randint(0, classes, (2000,)))
    table = metric.compute()
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        reliability_figure(table).savefig(Path(folder) / "figure.png")
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])  # the first one imports matplotlib


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each kind")
    parser.add_argument("--batches", type=int, default=20, help="batches per epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)

    module = Classifier(arguments.classes)
    samples = arguments.batches * arguments.batch_size
    labels = torch.randint(0, arguments.classes, (samples,))
    data = DataLoader(TensorDataset(torch.randn(samples, 3, 32, 32), labels), arguments.batch_size)
    without, with_monitor, hooks = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        epoch(module, data, TimedMonitor(), folder)  # warm-up
        for _ in range(arguments.rounds):
            without.append(epoch(module, data, None, folder))
            monitor = TimedMonitor()
            with_monitor.append(epoch(module, data, monitor, folder))
            hooks.append(monitor.seconds)
        figure = figure_seconds(arguments.classes, folder, arguments.rounds)
    plain, watched = statistics.median(without), statistics.median(with_monitor)
    extra = statistics.median(b - a for a, b in zip(without, with_monitor, strict=True))
    print(f"{arguments.batches} batches of {arguments.batch_size}, {arguments.classes} classes, median of each kind:")
    print(f"  without {plain:.3f} s   with {watched:.3f} s   share {100 * (watched / plain - 1):+.2f} %")
    print(f"  median of the paired differences {1000 * extra:+.1f} ms ({100 * extra / plain:+.2f} %)")
    own = statistics.median(hooks)
    print(f"  in the monitor's own hooks {1000 * own:.1f} ms ({100 * own / plain:.2f} %)")
    print(f"  spread of the epochs without it {100 * (max(without) / min(without) - 1):.1f} %")
    print(f"  one figure, drawn and written: {figure:.3f} s")


if __name__ == "__main__":
    main()

"""One rank of a teacher cache written and trained with by two processes; under torchrun's variables."""

import os

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_robust.callbacks import Distillation, cache_teacher
from lightning_robust.data import ResumableDataLoader, SeededViews, ViewSampler
from lightning_robust.distillation import KD, Teacher, TeacherCache
from support.modules import Images, PlainModule, network, trainer
from support.ranks import WORLD, as_rank

SAMPLES, EPOCHS, VARIANTS = 33, 2, 2


class Noisy(Images):
    """Images with noise that is drawn anew each time."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.3 * torch.rand_like(x)).clamp(0, 1), y


class Recorded(KD):
    """Keeps what it is told of the teacher."""

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, student_logits, teacher_logits, target=None):
        self.told.append(teacher_logits.clone())
        return super().forward(student_logits, teacher_logits, target)


def teacher():
    torch.manual_seed(1)
    return Teacher(network(), source="net.ckpt")


def run(*callbacks, **options):
    return trainer(*callbacks, devices=WORLD, strategy=DDPStrategy(process_group_backend="gloo"), **options)


def views():
    return SeededViews(Noisy(SAMPLES), variants=VARIANTS)


def fit(source, rank, *, seeded=False):
    L.seed_everything(3)
    loss, module = Recorded(), PlainModule(norm=False)
    if seeded:
        data = views()
        sampler = ViewSampler(data, seed=7, num_replicas=WORLD, rank=rank)
        loader = ResumableDataLoader(data, 4, sampler=sampler, num_workers=1)
    else:
        loader = DataLoader(Images(SAMPLES), 4, shuffle=True)  # Lightning puts its distributed sampler in
    run(Distillation(source, loss), max_epochs=EPOCHS).fit(module, loader)
    return {"told": loss.told, "weights": dict(module.named_parameters())}


def refused(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder):
    rank = int(os.environ["RANK"])
    fixed, seeded, short = folder / "fixed", folder / "seeded", folder / "short"
    common = {"dtype": "float32", "batch_size": 4}
    cache_teacher(teacher(), Images(SAMPLES), fixed, trainer=run(), **common)
    cache_teacher(teacher(), views(), seeded, trainer=run(), view="seeded", **common)
    results = {
        "rows": TeacherCache(fixed).logits(torch.arange(SAMPLES)),
        "live": fit(teacher(), rank),
        "cached": fit(TeacherCache(fixed), rank),
        "live views": fit(teacher(), rank, seeded=True),
        "cached views": fit(TeacherCache(seeded), rank, seeded=True),
        "again": refused(lambda: cache_teacher(teacher(), Images(SAMPLES), fixed, trainer=run())),
        "part": refused(
            lambda: cache_teacher(teacher(), Images(SAMPLES), short, trainer=run(limit_predict_batches=2), batch_size=4)
        ),
    }
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)

"""When an objective is told of epochs and batches."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ScheduledAttack
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining, SharpnessAware
from lightning_robust.objectives import TRADES, Objective, ObjectiveOutput, Prepared
from lightning_robust.schedules import Linear
from lightning_robust.sharpness import AWP, SAM
from support.modules import PlainModule, loader, trainer


class Told(Objective):
    """Writes down what it is told; the loss of each pass is another number."""

    def __init__(self):
        super().__init__()
        self.heard, self.passes_seen = [], 0
        self.register_buffer("total", torch.zeros(()))

    def epoch_starts(self, epoch, max_epochs):
        self.heard.append(f"start {epoch}/{max_epochs}")

    def batch_ends(self, output, total):
        self.total += total(torch.tensor(1.0))
        self.heard.append(f"batch {int(output.logs['pass'])}")

    def epoch_ends(self, epoch, total):
        self.heard.append(f"end {epoch} after {int(total(self.total))}")

    def prepare(self, model, x, y, *, generator=None):
        return Prepared(x, y)

    def forward(self, model, prepared):
        logits = model(prepared.x)
        self.passes_seen += 1
        return ObjectiveOutput(
            F.cross_entropy(logits, prepared.y), logits, {"pass": torch.tensor(float(self.passes_seen))}
        )


def fit(objective, *callbacks, epochs=2, batches=2, **options):
    run = trainer(ObjectiveTraining(objective), *callbacks, max_epochs=epochs, limit_train_batches=batches, **options)
    run.fit(PlainModule(), loader())
    return run


def test_order_of_what_is_told():
    objective = Told()
    fit(objective)
    assert objective.heard == [
        "start 0/2",
        "batch 1",
        "batch 2",
        "end 0 after 2",
        "start 1/2",
        "batch 3",
        "batch 4",
        "end 1 after 4",
    ]


@pytest.mark.parametrize(("method", "counted"), [(SAM(), ["batch 1", "batch 3"]), (AWP(), ["batch 2", "batch 4"])])
def test_a_batch_ends_once_with_the_pass_that_counts(method, counted):
    objective = Told()
    fit(objective, SharpnessAware(method), epochs=1)
    assert [each for each in objective.heard if each.startswith("batch")] == counted


def test_accumulated_batches_end_one_by_one():
    objective = Told()
    fit(objective, epochs=1, batches=4, accumulate_grad_batches=2)
    assert sum(each.startswith("batch") for each in objective.heard) == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint that ended before")
def test_an_epoch_that_is_continued_in_its_middle_starts_again(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="middle", save_top_k=1)
    fit(Told(), keep, epochs=1, batches=3, enable_checkpointing=True)
    second = Told()
    run = trainer(ObjectiveTraining(second), keep, max_epochs=1, limit_train_batches=3, enable_checkpointing=True)
    run.fit(PlainModule(), loader(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert second.heard == ["start 0/1", "batch 1", "end 0 after 3"]  # its buffer came along


SEEN = []


class Watched(PGD):
    def run(self, problem, x_adv):
        SEEN.append(round(self.eps, 6))
        return super().run(problem, x_adv)


@pytest.mark.parametrize("kind", ["callback", "objective"])
def test_a_scheduled_attack_follows_the_epoch(kind):
    SEEN.clear()
    loss = "ce" if kind == "callback" else "kl"
    attack = ScheduledAttack(Watched(eps=0.2, steps=1, loss=loss), eps=Linear(start=0.0, end=0.2, epochs=3))
    callback = AdversarialTraining(attack) if kind == "callback" else ObjectiveTraining(TRADES(attack=attack))
    trainer(callback, max_epochs=4, limit_train_batches=2).fit(PlainModule(), loader())
    assert SEEN == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2]


def test_a_plain_loop_tells_the_objective_itself():
    objective = TRADES(
        attack=ScheduledAttack(PGD(eps=0.2, steps=2, loss="kl"), eps=Linear(start=0.0, end=0.2, epochs=3))
    )
    net, x, y = torch.nn.Linear(4, 3), torch.rand(5, 4), torch.randint(3, (5,))
    largest = []
    for epoch in range(3):
        objective.epoch_starts(epoch, 3)
        largest.append(float((objective.prepare(net, x, y).x_adv - x).abs().max()))
    assert largest[0] == 0
    assert largest[1] == pytest.approx(0.1, abs=1e-6)
    assert largest[2] > 0.1

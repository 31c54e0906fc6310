"""Two processes: different training samples, and every evaluation sample exactly once."""

import pytest
import torch

from lightning_robust.models import ImageClassifier
from support.ranks import launch

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, warnings
import lightning as L
import torch
from lightning_robust.data import ArrayDataModule
from lightning_robust.models import ImageClassifier

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

class Seen(L.Callback):
    def __init__(self):
        self.batches = {"train": [], "val": [], "test": []}
    def note(self, stage, batch):
        # the first pixel is the number of the image
        self.batches[stage].append((batch[0][:, 0, 0, 0] * 100).round().int())
    def on_train_batch_start(self, trainer, module, batch, index):
        self.note("train", batch)
    def on_validation_batch_start(self, trainer, module, batch, index, loader=0):
        if not trainer.sanity_checking:
            self.note("val", batch)
    def on_test_batch_start(self, trainer, module, batch, index, loader=0):
        self.note("test", batch)

def images(count):
    values = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    values[:, 0, 0, 0] = torch.arange(count) / 100
    return values, torch.arange(count) % 2

L.seed_everything(1)
data = ArrayDataModule(train=images(40), val=images(21), test=images(17), batch_size=5, augment="none")
model = ImageClassifier("resnet8_cifar", num_classes=2, in_chans=1, backbone_options={"width": 2})
seen = Seen()
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[seen],
)
trainer.fit(model, data)
metrics = {"val": dict(trainer.callback_metrics)}
trainer.test(model, data, verbose=False)
metrics["test"] = dict(trainer.callback_metrics)
torch.save({"seen": {key: value for key, value in seen.batches.items()}, "metrics": metrics,
            "weights": model.state_dict()}, f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "script.py").write_text(SCRIPT)
    launch(str(folder / "script.py"), str(folder), cwd=folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def numbers(rank, stage):
    return torch.cat(rank["seen"][stage]).tolist()


def test_training_epochs_are_shared_and_shuffled(ranks):
    first, second = (numbers(rank, "train") for rank in ranks)
    assert len(first) == len(second) == 40
    for epoch in (0, 1):
        part = slice(20 * epoch, 20 * epoch + 20)
        assert sorted(first[part] + second[part]) == list(range(40))
    assert first[:20] != first[20:]


@pytest.mark.parametrize(("stage", "count", "epochs"), [("val", 21, 2), ("test", 17, 1)])
def test_every_evaluation_sample_exactly_once(ranks, stage, count, epochs):
    assert sorted(numbers(ranks[0], stage) + numbers(ranks[1], stage)) == sorted(list(range(count)) * epochs)
    # 21 samples are 11 and 10: three batches here, two there
    assert stage == "test" or [len(rank["seen"]["val"]) for rank in ranks] == [6, 4]


def test_metrics_count_every_sample_once(ranks):
    values = torch.rand(17, 1, 8, 8, generator=torch.Generator().manual_seed(17))
    values[:, 0, 0, 0] = torch.arange(17) / 100
    labels = torch.arange(17) % 2
    # DDP leaves each process its own batch norm statistics, so each computes the logits of its own samples
    logits = torch.zeros(17, 2)
    for index, rank in enumerate(ranks):
        model = ImageClassifier("resnet8_cifar", num_classes=2, in_chans=1, backbone_options={"width": 2})
        model.load_state_dict(rank["weights"])
        with torch.no_grad():
            logits[index::2] = model.eval()(values[index::2])
    for rank in ranks:
        metrics = rank["metrics"]["test"]
        torch.testing.assert_close(metrics["test/loss"], torch.nn.functional.cross_entropy(logits, labels))
        torch.testing.assert_close(metrics["test/acc"], (logits.argmax(1) == labels).float().mean())

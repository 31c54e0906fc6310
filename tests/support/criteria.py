"""Every criterion of the library, as tests can build it: name -> factory of a criterion for some number of classes."""

import inspect

import torch

from lightning_robust import losses
from lightning_robust.losses import Criterion, CrossEntropy, SampleCriterion, SampleTable

# what a criterion needs besides its defaults
OWN = {
    "GroupDRO": lambda classes, samples: {"num_groups": 2},
    "MarginBias": lambda classes, samples: {"old_classes": 1},
    "OnlineLabelSmoothing": lambda classes, samples: {"num_classes": classes},
    "VSLoss": lambda classes, samples: {"class_counts": [10 * (k + 1) for k in range(classes)]},
}

# takes sets of samples, so that no test of single samples fits; see test_oko.py
OF_SETS = {"OKO"}

NAMES = [
    name
    for name in losses.__all__
    if inspect.isclass(kind := getattr(losses, name))
    and issubclass(kind, Criterion)
    and kind not in (Criterion, SampleCriterion)
    and name not in OF_SETS
]


def build(name, classes, samples, **options):
    """The criterion with its defaults, for a training set of `samples` samples of `classes` classes."""
    own = OWN[name](classes, samples) if name in OWN else {}
    criterion = getattr(losses, name)(**own, **options)
    if "index" in criterion.needs:
        criterion.samples_known(samples)
    return criterion


def context_of(criterion, index, classes):
    """What the criterion needs to know of samples with these positions in the training set."""
    known = {"index": index, "group": index % 2, "features": index[:, None].float()}
    return {name: known[name] for name in criterion.needs}


class Memory(SampleCriterion):
    """Cross-entropy towards the mean of the label and a running average of the sample's own predictions."""

    needs = ("index",)

    def __init__(self, **options):
        super().__init__(**options)
        self.table = SampleTable()

    def samples_known(self, num_samples):
        self.table.resize(num_samples)

    def sample_losses(self, logits, target, *, index):
        past = self.table.look_up(index, like=logits)
        if self.recording:
            past = 0.5 * past + 0.5 * logits.detach().softmax(1)
            self.table.record(index, past)
        log_p = logits.log_softmax(1)
        return -target.expected(log_p) - (past * log_p).sum(1)


class Watching(CrossEntropy):
    """Cross-entropy that writes down which hooks are called, and grows with epochs and mistakes."""

    needs_epoch = True
    needs_validation = True

    def __init__(self):
        super().__init__()
        self.calls = []
        self.register_buffer("ends", torch.zeros((), dtype=torch.long))
        self.register_buffer("mistakes", torch.zeros(()))
        self.register_buffer("pending", torch.zeros(()))

    def epoch_starts(self, epoch, max_epochs):
        self.calls.append(("starts", epoch, max_epochs))

    def epoch_ends(self, epoch, total):
        self.calls.append(("ends", epoch))
        self.ends += 1

    def observe(self, logits, target):
        self.calls.append(("observe", len(logits)))
        self.pending += (logits.argmax(1) != target).sum()

    def validation_ends(self, total):
        self.calls.append(("validation",))
        self.mistakes = total(self.pending)
        self.pending.zero_()

    def sample_losses(self, logits, target, **context):
        return (1 + 0.1 * self.ends + 0.01 * self.mistakes) * super().sample_losses(logits, target, **context)

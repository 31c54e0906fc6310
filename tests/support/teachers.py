"""Every place in which a teacher can live, as tests can build it."""

import inspect

import torch
from torch import nn

from lightning_robust import objectives
from lightning_robust.callbacks import Distillation, ObjectiveTraining
from lightning_robust.models import ImageClassifier
from support.modules import CHANNELS, CLASSES, PlainModule, loader, network


def asked(name):
    """Arguments of an objective that are teachers."""
    parameters = inspect.signature(getattr(objectives, name)).parameters.values()
    return [each.name for each in parameters if each.name.endswith("teacher") and each.default is each.empty]


TAUGHT = [name for name in objectives.__all__ if inspect.isclass(getattr(objectives, name)) and asked(name)]


def taught(name, *sources, **options):
    """An objective with the defaults of its attack; the last source stands for all further teachers."""
    names = asked(name)
    given = [*sources, *[sources[-1]] * len(names)][: len(names)]
    return getattr(objectives, name)(**dict(zip(names, given, strict=True)), **options)


def teachers_of(holder):
    """The teachers of a callback or an objective."""
    bank = getattr(holder, "teachers", None)
    return [holder.teacher] if bank is None else [bank.teacher(name) for name in bank]


def teacher_network(seed=7, width=5, classes=CLASSES):
    """A network with dropout and norm statistics away from their start."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(CHANNELS, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * width, classes),
    )
    for _ in range(3):
        net(torch.rand(8, CHANNELS, 6, 6))
    return net


def data_for(place):
    """A loader; the teacher of SRSTAWR sees images without labels only."""
    data = loader()
    if "SRSTAWR" in place:
        data.dataset.y[::2] = -100
    return data


def same_optimizer(params):
    """That of PlainModule."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)


def plain(net=None):
    """A module that knows nothing of teachers."""
    module = PlainModule()
    module.net = module.net if net is None else net
    return module


def classifier(net=None, **options):
    """The reusable module with the same network and optimizer."""
    torch.manual_seed(0)
    net = network() if net is None else net
    return ImageClassifier(net, num_classes=CLASSES, in_chans=CHANNELS, optimizer=same_optimizer, **options)


def in_callback(source, net=None):
    callback = Distillation(source)
    return plain(net), [callback], callback


def around_any_module(name):
    def place(source, net=None):
        objective = taught(name, source)
        return plain(net), [ObjectiveTraining(objective)], objective

    return place


def in_classifier(name):
    def place(source, net=None):
        objective = taught(name, source)
        return classifier(net, objective=objective), [], objective

    return place


#: Of a source and a network for the student: a module, its callbacks, and who holds the teachers.
PLACES = {
    "callback": in_callback,
    **{f"{name} around a module": around_any_module(name) for name in TAUGHT},
    "MTARD in a classifier": in_classifier("MTARD"),
}

#: One for each kind of holder.
HOLDERS = ["callback", "HAT around a module", "LTD around a module", "MTARD in a classifier"]

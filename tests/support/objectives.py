"""Every objective of the library, as tests can build it."""

import inspect

from lightning_robust import objectives
from lightning_robust.objectives import Objective

# what an objective needs besides its defaults, or to be at work from the first batch on
OWN = {
    "DAFA": lambda network, classes: {"num_classes": classes},
    "GAIRAT": lambda network, classes: {"start_epoch": 0},
    "HAT": lambda network, classes: {"teacher": network},
}

NAMES = [
    name
    for name in objectives.__all__
    if inspect.isclass(kind := getattr(objectives, name)) and issubclass(kind, Objective) and kind is not Objective
]


def build(name, network, classes, **options):
    """The objective with its defaults; `network` is a model for those that need a further one."""
    own = OWN[name](network, classes) if name in OWN else {}
    return getattr(objectives, name)(**own, **options)

"""Every objective of the library, as tests can build it."""

import inspect

from lightning_robust import objectives
from lightning_robust.objectives import Objective

# what an objective needs besides its defaults, or to be at work from the first batch on
OWN = {
    "ADR": lambda network, classes: {"temperature": 2.0, "interpolation": 0.8},
    "ARD": lambda network, classes: {"teacher": network},
    "ARREST": lambda network, classes: {"teacher": network},
    "AdaAD": lambda network, classes: {"teacher": network},
    "AdaIAD": lambda network, classes: {"teacher": network, "begin": 0},
    "DAFA": lambda network, classes: {"num_classes": classes},
    "GAIRAT": lambda network, classes: {"start_epoch": 0},
    "HAT": lambda network, classes: {"teacher": network},
    "IADI": lambda network, classes: {"teacher": network, "begin": 0},
    "IADII": lambda network, classes: {"teacher": network, "clean_teacher": network, "begin": 0},
    "IGDM": lambda network, classes: {"objective": objectives.AdaAD(network, alpha=0.5), "ramp": "none"},
    "LTD": lambda network, classes: {"teacher": network},
    "MTARD": lambda network, classes: {"clean_teacher": network, "robust_teacher": network},
    "RSLAD": lambda network, classes: {"teacher": network},
    "SAAD": lambda network, classes: {"teacher": network, "beta": 1.0, "ramp": "none"},
    "SRSTAWR": lambda network, classes: {"teacher": network},
}

# whose further model has to be like the trained one
SAME_ARCHITECTURE = ("ARREST",)

NAMES = [
    name
    for name in objectives.__all__
    if inspect.isclass(kind := getattr(objectives, name))
    and issubclass(kind, Objective)
    and not inspect.isabstract(kind)
]


def build(name, network, classes, **options):
    """The objective with its defaults; `network` is a model for those that need a further one."""
    own = OWN[name](network, classes) if name in OWN else {}
    return getattr(objectives, name)(**own, **options)

"""The modules of the package, for tests that make a statement about all of them."""

import pkgutil

import lightning_robust
import lightning_robust.callbacks
import lightning_robust.recipes


def module_names() -> list[str]:
    """Dotted names of all modules, except what is run with ``python -m``."""
    names = {"lightning_robust"}
    # The mapped packages are walked by name: in a plain editable installation the root does not contain them.
    for package in (lightning_robust, lightning_robust.callbacks, lightning_robust.recipes):
        names.add(package.__name__)
        names.update(module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    return sorted(name for name in names if not name.endswith("__main__"))

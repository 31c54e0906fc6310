# SPDX-License-Identifier: Apache-2.0
"""Tables that need no torch: recipes and the environment."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from rich import box
from rich.table import Table

from lightning_robust.cli.recipes import bundled_recipes

__all__ = ["environment_table", "new_table", "recipe_table"]

PACKAGES = (
    "lightning-robust",
    "torch",
    "lightning",
    "torchmetrics",
    "timm",
    "torchvision",
    "jsonargparse",
    "rich",
    "scikit-learn",
    "numpy",
    "matplotlib",
)


def new_table(title: str | None = None, caption: str | None = None) -> Table:
    """An empty table in the house's look."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def recipe_table() -> Table:
    """All bundled recipes: name, what each shows, what it costs."""
    table = new_table()
    table.add_column("recipe", style="cyan", no_wrap=True)
    table.add_column("shows")
    table.add_column("cost and time")
    for recipe in bundled_recipes().values():
        table.add_row(recipe.name, recipe.summary, recipe.cost.removeprefix("Cost "))
    return table


def environment_table() -> Table:
    """Versions and platform, as a bug report needs them."""
    table = new_table()
    table.add_column("what", style="cyan")
    table.add_column("version")
    table.add_row("python", sys.version.split()[0])
    table.add_row("platform", platform.platform())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("accelerator", _accelerator())
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _accelerator() -> str:
    # A bug report needs this line although it costs the import of torch.
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))} (CUDA {torch.version.cuda})"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"CPU, {torch.get_num_threads()} threads"

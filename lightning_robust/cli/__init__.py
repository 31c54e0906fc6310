# SPDX-License-Identifier: Apache-2.0
"""The command line: a light front, with Lightning's own configuration system behind ``run`` and ``check``.

Nothing here imports torch before a command needs it, so ``list``, ``show`` and ``copy`` answer at once.
"""

from lightning_robust.cli.front import main

__all__ = ["main"]

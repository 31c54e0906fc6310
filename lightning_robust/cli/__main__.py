# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_robust.cli``: the same as the command ``lightning-robust``."""

import sys

from lightning_robust.cli import main

sys.exit(main())

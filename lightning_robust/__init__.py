# SPDX-License-Identifier: Apache-2.0
"""Robust, flat and calibrated models for any Lightning project.

The package root imports nothing heavy: take names from the rooms, for example
``from lightning_robust.callbacks import SharpnessAware`` or ``from lightning_robust.losses import MaxSup``.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]

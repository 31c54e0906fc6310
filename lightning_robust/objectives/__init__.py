# SPDX-License-Identifier: Apache-2.0
"""Objectives: whole training losses that own their forward passes."""

from lightning_robust.objectives.arow import ARoW, arow_loss
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared
from lightning_robust.objectives.trades import TRADES, trades_loss

__all__ = ["TRADES", "ARoW", "Objective", "ObjectiveOutput", "Prepared", "arow_loss", "trades_loss"]

# SPDX-License-Identifier: Apache-2.0
"""Objectives: whole training losses that own their forward passes."""

from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared
from lightning_robust.objectives.trades import TRADES, trades_loss

__all__ = ["TRADES", "Objective", "ObjectiveOutput", "Prepared", "trades_loss"]

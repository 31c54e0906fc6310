# SPDX-License-Identifier: Apache-2.0
"""Optimizers beyond ``torch.optim``: second order, without a learning rate, with little memory. Plain PyTorch."""

from lightning_robust.optimizers.adahessian import AdaHessian
from lightning_robust.optimizers.base import ExactOptimizer
from lightning_robust.optimizers.dog import DoG, PolynomialAverage, distance_over_gradients
from lightning_robust.optimizers.hessian import hessian_diagonal, rademacher
from lightning_robust.optimizers.subset_norm import SubsetNorm, SubsetSize, subset_layout, subset_second_moment

__all__ = [
    "AdaHessian",
    "DoG",
    "ExactOptimizer",
    "PolynomialAverage",
    "SubsetNorm",
    "SubsetSize",
    "distance_over_gradients",
    "hessian_diagonal",
    "rademacher",
    "subset_layout",
    "subset_second_moment",
]

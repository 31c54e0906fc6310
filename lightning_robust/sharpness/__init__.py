# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware methods, usable with a bare PyTorch loop and through the ``SharpnessAware`` callback."""

from lightning_robust.sharpness.amp import AMP
from lightning_robust.sharpness.asam import ASAM
from lightning_robust.sharpness.ascent import add_scaled, inner_product, steepest, subtract_perpendicular
from lightning_robust.sharpness.average import WeightAverage
from lightning_robust.sharpness.awp import AWP, GlobalAWP, SAMStyleAWP, global_scales, layerwise_scales
from lightning_robust.sharpness.backup import Scale, WeightBackup
from lightning_robust.sharpness.curvature import (
    EpsilonSharpness,
    HessianTrace,
    epsilon_sharpness,
    gradient_norm,
    hutchinson_trace,
    stability_ratio,
)
from lightning_robust.sharpness.fisher_sam import FisherSAM, top_entries
from lightning_robust.sharpness.friendly_sam import FriendlySAM
from lightning_robust.sharpness.gam import GAM
from lightning_robust.sharpness.gradients import (
    global_norm,
    graph_nodes,
    hides_gradients,
    own_memory,
    parameter_hooks_off,
    take_gradients,
    take_hidden_gradients,
    tensor_norms,
)
from lightning_robust.sharpness.gsam import GSAM
from lightning_robust.sharpness.injection import inject_gradients
from lightning_robust.sharpness.lap import LAP, layer_factors
from lightning_robust.sharpness.lap_loop import SharedGradientAttack, lap_backward
from lightning_robust.sharpness.look_sam import LookSAM
from lightning_robust.sharpness.loop import average_over_processes, sharp_backward
from lightning_robust.sharpness.method import Evaluation, SharpnessMethod, sharp_direction
from lightning_robust.sharpness.momentum_sam import MSAM
from lightning_robust.sharpness.moves import PendingMoves
from lightning_robust.sharpness.orthogonal import (
    attach_orthogonal_gradients,
    orthogonal_gradients,
    orthogonalize,
)
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import ProportionalToLR, Radius, ascent_scales
from lightning_robust.sharpness.rwp import RWP, stationary_loss
from lightning_robust.sharpness.sam import SAM
from lightning_robust.sharpness.selection import ParameterSelection
from lightning_robust.sharpness.sharded import is_sharded, reshard
from lightning_robust.sharpness.spectrum import Eigenvalues, lanczos, power_iteration
from lightning_robust.sharpness.step import SharpStep
from lightning_robust.sharpness.surface import LossSurface
from lightning_robust.sharpness.trajectory import LogitHistory, trajectory_loss
from lightning_robust.sharpness.trial import trial_step
from lightning_robust.sharpness.weight_function import WeightFunction
from lightning_robust.sharpness.weights import Gradients, Weights
from lightning_robust.sharpness.wsam import WSAM

__all__ = [
    "AMP",
    "ASAM",
    "AWP",
    "GAM",
    "GSAM",
    "LAP",
    "MSAM",
    "RWP",
    "SAM",
    "WSAM",
    "Eigenvalues",
    "EpsilonSharpness",
    "Evaluation",
    "FisherSAM",
    "FriendlySAM",
    "GlobalAWP",
    "Gradients",
    "HessianTrace",
    "LogitHistory",
    "LookSAM",
    "LossSurface",
    "ParameterSelection",
    "PendingMoves",
    "Probe",
    "ProportionalToLR",
    "Radius",
    "SAMStyleAWP",
    "Scale",
    "SharedGradientAttack",
    "SharpStep",
    "SharpnessMethod",
    "WeightAverage",
    "WeightBackup",
    "WeightFunction",
    "Weights",
    "add_scaled",
    "ascent_scales",
    "attach_orthogonal_gradients",
    "average_over_processes",
    "epsilon_sharpness",
    "global_norm",
    "global_scales",
    "gradient_norm",
    "graph_nodes",
    "hides_gradients",
    "hutchinson_trace",
    "inject_gradients",
    "inner_product",
    "is_sharded",
    "lanczos",
    "lap_backward",
    "layer_factors",
    "layerwise_scales",
    "orthogonal_gradients",
    "orthogonalize",
    "own_memory",
    "parameter_hooks_off",
    "power_iteration",
    "reshard",
    "sharp_backward",
    "sharp_direction",
    "stability_ratio",
    "stationary_loss",
    "steepest",
    "subtract_perpendicular",
    "take_gradients",
    "take_hidden_gradients",
    "tensor_norms",
    "top_entries",
    "trajectory_loss",
    "trial_step",
]

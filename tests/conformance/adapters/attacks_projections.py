"""Projections against those of AutoAttack, in its float32 and repeated in float64."""

import torch

from lightning_robust.attacks import projections
from support.golden import Golden, adapter

HYPERPLANES = {
    "linf": projections.project_hyperplane_linf,
    "l2": projections.project_hyperplane_l2,
    "l1": projections.project_hyperplane_l1,
}


@adapter("attacks", "projections")
def hyperplanes_and_l1_ball(golden: Golden) -> None:
    points, normals, offsets = (golden.tensor(name) for name in ("t", "w", "b"))
    for name, project in HYPERPLANES.items():
        if f"proj_{name}" not in golden:
            continue
        golden.check(f"proj_{name}", project(points, normals, offsets), rtol=1e-4, atol=2e-6)
        if f"proj_{name}_f64" in golden:
            step = project(points.double(), normals.double(), offsets.double())
            golden.check(f"proj_{name}_f64", step, rtol=1e-9, atol=1e-12)
    if "l1_v" not in golden:
        return
    x, before, eps = golden.tensor("l1_x"), golden.tensor("l1_v"), golden.tensor("l1_eps")
    projected = projections.project_l1_box(x.double(), before.double(), eps.double())
    torch.testing.assert_close(projections.project_l1_box(x, before, eps), projected.to(x.dtype), rtol=1e-5, atol=5e-6)
    # recorded is the way to the projection, computed in float32
    way, norm = golden.tensor("l1_delta").flatten(1), golden.tensor("l1_final_norm")
    rtol = max(1e-5, way.shape[1] * torch.finfo(torch.float32).eps)
    # with few entries the search of the official code can end one entry early, beyond the budget
    kept = norm <= eps * (1 + rtol)
    norms = projected.flatten(1).abs().sum(1)
    assert (norms <= eps * (1 + 1e-12)).all()
    torch.testing.assert_close((projected - before).flatten(1)[kept].to(way.dtype), way[kept], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(norms[kept].to(norm.dtype), norm[kept], rtol=rtol, atol=1e-6)

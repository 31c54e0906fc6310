"""Feature metrics, the activation indicator and the area under the margin."""

import torch
from torch import nn

from lightning_robust.metrics import (
    ActivationPatterns,
    MarginTable,
    centred_means,
    class_separation,
    equiangularity,
    equinorm,
    feature_sums,
    logit_margin,
    nearest_mean_disagreement,
    oui,
    self_duality,
    simplex_error,
    within_class_variability,
)
from support.golden import Golden, adapter


@adapter("labels", "nc_metrics")
def nc_metrics(golden: Golden) -> None:
    features, labels = golden.tensor("features"), golden.tensor("labels")
    weight, bias = golden.tensor("W"), golden.tensor("b")
    sums = feature_sums(features, labels, len(weight))
    # the recorded tools take the mean of classes or of samples, which differ for unequal classes
    recorded = golden.tensor("global_mean")
    center = next(of for of in ("classes", "samples") if torch.allclose(sums.global_mean(of), recorded))
    means = centred_means(sums, center=center)
    spread = class_separation(sums)
    values = {
        "means": sums.means,
        "nc1_pinv": within_class_variability(sums, center=center),
        "nc1_svd": within_class_variability(sums, center=center),
        "nc1_quotient": within_class_variability(sums, method="trace", center=center),
        "nc2_etf_error_means": simplex_error(means),
        "nc2_etf_error_W": simplex_error(weight),
        "td_nc2_W": simplex_error(weight),
        "nc3_self_duality": simplex_error(means, weight),
        "td_nc3": simplex_error(weight, means),
        "td_Whb": (weight @ sums.global_mean(center) + bias).norm(),
        "pp_norm_cov_M": equinorm(means),
        "pp_norm_cov_W": equinorm(weight),
        "pp_W_M_dist": self_duality(means, weight),
        "pp_ncc_mismatch": nearest_mean_disagreement(
            features, (features @ weight.T + bias).argmax(1), sums.means
        ).double()
        / len(features),
        "cs_d_within_own": spread.d_within,
        "cs_d_total_own": spread.d_total,
        "cs_R2_own": spread.r2,
        "cs_d_within_per_class_own": spread.d_within_per_class,
    }
    for name, value in values.items():
        if name in golden:
            golden.check(name, value)
    # the notebook's 1 / (C - 1) is a float32 number
    single = {"pp_cos_M": equiangularity(means), "pp_cos_W": equiangularity(weight)}
    for name, value in single.items():
        if name in golden:
            golden.check(name, value, 1e-6)
    golden.skip("Sw", "td_SigmaB", reason="covariances are not kept as matrices; nc1_* are made of them")


@adapter("labels", "oui")
def indicator(golden: Golden) -> None:
    """An MLP of nested Sequentials; the recorded code drew the pairs, and used them for both batches."""
    activation = getattr(nn, golden.hyper["act"])
    shapes = {name: golden.tensor(f"{name}.weight").shape for name in ("0", "2.0", "3")}
    (a, b, c) = (nn.Linear(shape[1], shape[0]) for shape in shapes.values())
    network = nn.Sequential(a, activation(), nn.Sequential(b, activation()), c).double()
    network.load_state_dict(
        {f"{name}.{kind}": golden.tensor(f"{name}.{kind}") for name in shapes for kind in ("weight", "bias")}
    )
    pairs = golden.tensor("pairs")
    for step in range(sum(name[1:].isdigit() and name[0] == "x" for name in golden.arrays)):
        with ActivationPatterns(network) as patterns:
            patterns.rows = slice(None)
            network(golden.tensor(f"x{step}"))
            bits = list(patterns.take().values())
        for layer, seen in enumerate(bits):
            golden.check(f"act{step}_{layer}", seen)
        golden.check(f"oui{step}", oui(bits, pairs), 1e-6)


@adapter("labels", "aum")
def aum(golden: Golden) -> None:
    steps = [name[3:] for name in golden.arrays if name.startswith("ids")]
    table = MarginTable(1 + max(int(golden.tensor(f"ids{step}").max()) for step in steps))
    for number, step in enumerate(steps):
        ids, logits, labels = (golden.tensor(f"{name}{step}") for name in ("ids", "logits", "labels"))
        golden.check(f"margin{step}", logit_margin(logits, labels))
        table.record(ids, logits, labels, step=number)
        golden.check(f"aum{step}", table.aum[ids])

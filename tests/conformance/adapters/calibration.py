# SPDX-License-Identifier: Apache-2.0
"""Recorded calibration numbers against the metrics and scalers; rows are levels of confidence."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_robust.calibration import TemperatureScaling
from lightning_robust.metrics import ReliabilityTable, TopLabelReliability, reliability_table
from lightning_robust.metrics.reliability import Closed
from support.golden import Golden, adapter

# The streaming sums round each value to a multiple of 2**-32: visible where few samples give a small error.
ROUNDING = 2.0**-32
PHANTOM = "torchmetrics puts a confidence of 1 into a bin of its own (its issue 3510); ours belongs to the last bin"


@adapter("calibration", "inputs")
def inputs(golden: Golden) -> None:
    golden.skip(*golden.arrays, reason="inputs of the other files of this case, nothing is computed")


def levels(golden: Golden) -> tuple[list[str], Tensor, Tensor]:
    """Level names, logits [levels, N, C] in float64, labels."""
    source = Golden(golden.path.with_name(f"{golden.hyper['inputs']}.npz"))
    return source.hyper["levels"], source.tensor("logits").double(), source.tensor("labels")


def table(scores: Tensor, labels: Tensor, n_bins: int, closed: Closed, from_logits: bool = True) -> ReliabilityTable:
    metric = TopLabelReliability(n_bins=n_bins, closed=closed, from_logits=from_logits)
    metric.update(scores, labels)
    return metric.compute()


def errors(bins: ReliabilityTable) -> Tensor:
    return torch.stack([bins.error("l1"), bins.error("max"), bins.error("l2")])


def ece_mce_average(bins: ReliabilityTable) -> Tensor:
    return torch.stack([bins.error("l1"), bins.error("max"), bins.gap.abs().nanmean()])


def bin_counts(golden: Golden) -> Iterator[int]:
    for name in golden.arrays:
        if name.startswith("own__") and name.endswith("_rightclosed"):
            yield int(name.removesuffix("_rightclosed").rpartition("_b")[2])


@adapter("calibration", "ece")
def ece(golden: Golden) -> None:
    _, logits, labels = levels(golden)
    for n in bin_counts(golden):
        right = [table(z, labels, n, "right") for z in logits]
        left = [table(z, labels, n, "left") for z in logits]
        golden.check(f"own__ece_mce_rms_b{n}_rightclosed", torch.stack([errors(t) for t in right]), atol=ROUNDING)
        golden.check(f"own__ece_mce_rms_b{n}_leftclosed", torch.stack([errors(t) for t in left]), atol=ROUNDING)
        golden.check(f"netcal__ece_mce_averageCE_b{n}", torch.stack([ece_mce_average(t) for t in left]), atol=ROUNDING)
        # torchmetrics sums in float32
        saturated = logits.float().softmax(2).amax(2).eq(1).any(1)
        for name in (f"torchmetrics_f32logits__ece_mce_rms_b{n}", f"torchmetrics_f64probs__ece_mce_rms_b{n}"):
            recorded = golden.tensor(name)
            for row, bins in enumerate(left):
                kept = slice(0, 1) if saturated[row] else slice(None)  # PHANTOM spoils the maximum and the RMS
                torch.testing.assert_close(errors(bins)[kept], recorded[row, kept], rtol=0, atol=2e-6)


@adapter("calibration", "bins")
def bins(golden: Golden) -> None:
    names, logits, labels = levels(golden)
    for name, z in zip(names, logits, strict=True):
        n = len(golden.arrays[f"own__{name}_count"])
        right = table(z, labels, n, "right")
        golden.check(f"own__{name}_count", right.counts)
        golden.check(f"own__{name}_sumconf", right.confidence_sum, atol=len(labels) * ROUNDING)
        golden.check(f"own__{name}_sumcorrect", right.correct)
        theirs = [f"torchmetrics__{name}_{column}" for column in ("acc", "conf", "prop")]
        if golden.arrays[theirs[2]][-1] > 0:
            golden.skip(*theirs, reason=PHANTOM)
            continue
        left = table(z, labels, n, "left")
        for array, ours in zip(theirs, (left.accuracy, left.confidence, left.counts / left.total), strict=True):
            filled = ours.reshape(-1).nan_to_num(0.0).double()
            golden.check(array, torch.cat([filled, torch.zeros(1)]), rtol=1e-5, atol=2e-6)


@adapter("calibration", "scores")
def scores(golden: Golden) -> None:
    _, logits, labels = levels(golden)
    tables = [table(z, labels, 15, "right") for z in logits]

    def row(name: str) -> Tensor:
        return torch.stack([getattr(t, name) for t in tables])

    for name in ("torch__nll", "torch_uncertainty__nll", "sklearn__log_loss"):
        golden.check(name, row("nll"), rtol=1e-7)
    golden.check("own__brier_sum", row("brier"), atol=ROUNDING)
    golden.check("torch_uncertainty__brier", row("brier"), rtol=1e-7)
    golden.check("own__accuracy", row("overall_accuracy"))
    golden.check("own__mean_conf", row("mean_confidence"), atol=ROUNDING)
    golden.check("own__signed_gap", row("confidence_gap"), atol=ROUNDING)
    golden.check("own__balance_toplabel", -row("confidence_gap"), atol=ROUNDING)
    one_sided = torch.stack([row("overconfidence"), row("underconfidence")], dim=1)
    golden.check("own__overconf_underconf", one_sided, atol=ROUNDING)
    golden.skip(
        *(name for name in golden.arrays if "topclass" in name or "binary" in name or "murphy" in name),
        reason="top-label and binary Brier scores and their decomposition are not offered",
    )


@adapter("calibration", "edges")
def edges(golden: Golden) -> None:
    for case in golden.hyper["cases"]:
        probabilities, labels = golden.tensor(f"{case}__probs"), golden.tensor(f"{case}__labels")
        for closed in ("right", "left"):
            if probabilities.ndim == 1:
                # binary: the recorded tools bin P(class 1) against the label
                bins = reliability_table(probabilities, labels, n_bins=10, closed=closed)
            else:
                bins = table(probabilities, labels, 10, closed, from_logits=False)
            golden.check(f"{case}__own_{closed}_ece_mce_rms", errors(bins), atol=ROUNDING)
            if closed == "left":
                _edge_tools(golden, case, bins)
        _edge_scores(golden, case, probabilities, labels)


def _edge_tools(golden: Golden, case: str, bins: ReliabilityTable) -> None:
    netcal = f"{case}__netcal_ece_mce_averageCE"
    if golden.tensor(netcal).isnan().any():
        golden.skip(netcal, reason="netcal raised")
    else:
        golden.check(netcal, ece_mce_average(bins), atol=ROUNDING)
    golden.skip(*(f"{case}__torchmetrics_{dtype}_ece_mce_rms" for dtype in ("float32", "float64")), reason=PHANTOM)


def _edge_scores(golden: Golden, case: str, probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim == 2:
        right = table(probabilities, labels, 10, "right", from_logits=False)
        golden.check(f"{case}__torch_uncertainty_brier", right.brier, rtol=1e-7)
        golden.check(f"{case}__torch_nll", right.nll, rtol=1e-7)
    tools = ("torch_uncertainty_", "sklearn_", "focal_")
    golden.skip(
        *(name for name in golden.arrays if name.startswith(f"{case}__") and name.split("__")[1].startswith(tools)),
        reason="adaptive, classwise and smooth errors and failure scores are not offered",
    )


@adapter("calibration", "scaling")
def scaling(golden: Golden) -> None:
    _, logits, labels = levels(golden)
    half = len(labels) // 2
    fits = [TemperatureScaling().fit(z[:half], labels[:half]) for z in logits]
    temperatures = torch.tensor([fit.temperature for fit in fits], dtype=torch.float64)
    for name in ("scipy__T", "newton__T", "lbfgs_logT_wolfe__T"):
        golden.check(name, temperatures, rtol=1e-6)
    evaluated = [
        [table(scores, labels[half:], 15, "right").nll for scores in (z[half:], fit(z[half:]))]
        for z, fit in zip(logits, fits, strict=True)
    ]
    fitted = torch.tensor([[fit.nll_before, fit.nll_after] for fit in fits], dtype=torch.float64)
    golden.check("scipy__nll_fit_eval_before_after", torch.cat([fitted, torch.tensor(evaluated)], dim=1), rtol=1e-7)
    golden.skip(
        *(name for name in golden.arrays if name.startswith("guo_recipe")),
        reason="a negative example: that recipe stops before the optimum",
    )
    golden.skip("lbfgs_logT_wolfe__closure_calls", reason="another optimiser")
    golden.skip(
        *(name for name in golden.arrays if name.startswith("torch_uncertainty__temperature")),
        reason="its fit stops before the optimum (relative error 1e-3 to 1e-4)",
    )
    golden.skip(
        *(name for name in golden.arrays if name.startswith(("torch_uncertainty__", "mix_n_match__", "netcal__"))),
        reason="vector, matrix, Dirichlet, ensemble, isotonic and histogram scaling are not offered",
    )

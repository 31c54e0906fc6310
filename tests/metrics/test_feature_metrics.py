"""Separation, collapse and rank of features against naive loops over samples, pairs and whole matrices."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_robust.metrics import (
    ClassSeparation,
    EffectiveRank,
    FeatureAccumulator,
    NeuralCollapse,
    centred_means,
    class_distance_variance,
    class_separation,
    effective_rank,
    equiangularity,
    equinorm,
    feature_sums,
    nearest_mean_disagreement,
    self_duality,
    simplex,
    simplex_error,
    stable_rank,
    within_class_variability,
)


def sample(n=40, classes=4, dims=6, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator).sort().values  # unequal classes
    centers = torch.randn(classes, dims, generator=generator, dtype=torch.float64)
    return centers[labels] + spread * torch.randn(n, dims, generator=generator, dtype=torch.float64), labels


def covariances(h, y, classes, center):
    means = torch.stack([h[y == c].mean(0) for c in range(classes)])
    middle = means.mean(0) if center == "classes" else h.mean(0)
    within = sum(torch.outer(row - means[c], row - means[c]) for row, c in zip(h, y, strict=True)) / len(h)
    between = sum(torch.outer(mean - middle, mean - middle) for mean in means) / classes
    return means, middle, within, between


def close(ours, expected, rtol=1e-9):
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float64), expected.double(), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_separation_is_the_mean_over_all_pairs(seed):
    h, y = sample(seed=seed)
    distance = 1 - F.cosine_similarity(h[:, None], h[None], dim=-1)
    blocks = torch.tensor([[distance[y == j][:, y == k].mean() for k in range(4)] for j in range(4)]).double()
    spread = class_separation(feature_sums(h, y, 4))
    close(spread.d_within, blocks.diagonal().mean(), 1e-6)  # float32 tensor of blocks
    close(spread.d_total, blocks.mean(), 1e-6)
    close(spread.r2, 1 - blocks.diagonal().mean() / blocks.mean(), 1e-6)
    close(spread.d_within_per_class, blocks.diagonal(), 1e-5)


def test_a_zero_feature_has_no_direction():
    h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    spread = class_separation(feature_sums(h, torch.tensor([0, 0, 1]), 2))
    assert spread.d_within_per_class.tolist() == [0.75, 0.0]


@pytest.mark.parametrize("center", ["classes", "samples"])
@pytest.mark.parametrize(("classes", "dims"), [(4, 6), (6, 4), (3, 2), (2, 5)])
def test_variability_is_that_of_the_whole_matrices(classes, dims, center):
    h, y = sample(classes=classes, dims=dims)
    _, _, within, between = covariances(h, y, classes, center)
    sums = feature_sums(h, y, classes)
    expected = torch.trace(within @ torch.linalg.pinv(between, hermitian=True)) / classes
    close(within_class_variability(sums, center=center), expected)
    ratio = within_class_variability(sums, method="trace", center=center)
    close(ratio, within.trace() / between.trace())


def test_geometry_against_loops():
    h, y = sample()
    means, middle, _, _ = covariances(h, y, 4, "classes")
    m = centred_means(feature_sums(h, y, 4))
    close(m, means - middle)
    lengths = torch.tensor([row.norm() for row in m])
    close(equinorm(m), lengths.double().std() / lengths.double().mean(), 1e-6)
    cosines = [abs(F.cosine_similarity(m[i], m[j], dim=0) + 1 / 3) for i in range(4) for j in range(4) if i != j]
    close(equiangularity(m), torch.stack(cosines).mean())
    ideal = (torch.eye(4, dtype=torch.float64) - 1 / 4) / math.sqrt(3)
    close(simplex_error(m), (m @ m.T / (m @ m.T).norm() - ideal).norm())
    w = torch.randn(4, 6, dtype=torch.float64)
    close(simplex_error(w, m), (w @ m.T / (w @ m.T).norm() - ideal).norm())
    close(self_duality(m, w), (w / w.norm() - m / m.norm()).norm() ** 2)
    v = torch.stack([(h[y == c] - means[c]).square().sum(1).mean() for c in range(4)])
    pairs = [(v[i] + v[j]) / (2 * (means[i] - means[j]).square().sum()) for i in range(4) for j in range(4) if i != j]
    close(class_distance_variance(feature_sums(h, y, 4)), torch.stack(pairs).mean())
    answers = torch.arange(40) % 4
    assert nearest_mean_disagreement(h, answers, means) == (torch.cdist(h, means).argmin(1) != answers).sum()


def test_blocks_of_rows_change_nothing(monkeypatch):
    h, y = sample(classes=5)
    metric = NeuralCollapse(num_classes=5, num_features=6)
    metric.update(h, y)
    whole = metric.compute()
    monkeypatch.setattr(simplex, "_ROWS", 2)
    other = NeuralCollapse(num_classes=5, num_features=6)
    other.update(h, y)
    torch.testing.assert_close(tuple(other.compute()), tuple(whole), rtol=1e-12, atol=0)


def test_full_collapse_is_zero_and_its_rank_is_that_of_a_simplex():
    y = torch.arange(20) % 5
    h = torch.eye(7)[y] + 3.0
    metric = NeuralCollapse(num_classes=5, num_features=7)
    metric.update(h, y)
    assert max(map(abs, map(float, metric.compute()))) < 1e-7
    rank = EffectiveRank(num_features=7)
    rank.update(h)
    assert rank.compute().effective.item() == pytest.approx(4, abs=1e-4)
    assert rank.compute().stable.item() == pytest.approx(4)


@pytest.mark.parametrize("centered", [True, False])
def test_ranks_are_those_of_the_feature_matrix(centered):
    h, _ = sample()
    metric = EffectiveRank(num_features=6, centered=centered)
    for part in h.split(7):
        metric.update(part)
    values = torch.linalg.svdvals(h - h.mean(0) if centered else h)
    p = values / values.sum()
    close(metric.compute().effective, (-(p * p.log()).sum()).exp())
    close(metric.compute().stable, (h - h.mean(0) * centered).norm() ** 2 / values[0] ** 2)
    close(effective_rank(torch.ones(3).double()), torch.tensor(3.0))
    close(stable_rank(torch.ones(3).double()), torch.tensor(3.0))


def test_any_sharding_gives_the_same():
    h, y = sample(n=60)
    whole = feature_sums(h, y, 4)
    parts = [feature_sums(h[rows], y[rows], 4) for rows in torch.randperm(60).split(17)]
    for name, value in whole._asdict().items():
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), value, rtol=1e-13, atol=1e-13)


def test_metrics_that_sum_the_same_share_one_state():
    h, y = sample()
    options = {"num_classes": 4, "num_features": 6}
    together = MetricCollection(
        {"nc": NeuralCollapse(**options), "samples": NeuralCollapse(center="samples", **options)}
    )
    for rows in torch.arange(40).split(16):
        together.update(h[rows], y[rows])
    assert len(together.compute_groups) == 1
    found = together.compute()
    for name, center in (("nc", "classes"), ("samples", "samples")):
        alone = NeuralCollapse(center=center, **options)
        alone.update(h, y)
        torch.testing.assert_close(tuple(found[name]) if name in found else None, tuple(alone.compute()))


def test_ignored_samples_and_classes_without_samples_are_left_out():
    h, y = sample()
    h = torch.cat([h, torch.full((2, 6), torch.nan, dtype=torch.float64)])
    y = torch.cat([y, torch.tensor([-100, -1])])
    small, large = feature_sums(h, y, 4), feature_sums(h, torch.where(y >= 2, y + 3, y), 9)
    assert large.counts.tolist()[2:5] == [0, 0, 0]
    for of in (
        within_class_variability,
        class_distance_variance,
        lambda sums: class_separation(sums).r2,
        lambda sums: simplex_error(centred_means(sums)),
    ):
        close(of(large), of(small))
        assert of(small).isfinite()
    assert (
        class_separation(large).d_within_per_class.isnan().tolist()
        == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float64_of_what_was_given(dtype):
    h, y = sample()
    low = h.to(dtype)
    sums = feature_sums(low, y, 4)
    assert {value.dtype for name, value in sums._asdict().items() if name != "counts"} == {torch.float64}
    close(within_class_variability(sums), within_class_variability(feature_sums(low.double(), y, 4)))
    metric = NeuralCollapse(num_classes=4, num_features=6).set_dtype(dtype)
    metric.update(low, y)
    close(metric.compute().nc1, within_class_variability(sums))


def test_a_tight_class_is_resolved_far_from_the_origin():
    h, y = sample(spread=1e-3)
    _, _, within, between = covariances(h, y, 4, "classes")
    sums = feature_sums(h + 100, y, 4)
    close(within_class_variability(sums, method="trace"), within.trace() / between.trace(), 1e-5)
    close(within_class_variability(sums), torch.trace(within @ torch.linalg.pinv(between, hermitian=True)) / 4, 1e-5)


def test_no_sample_one_class_and_nan_give_nan():
    for h, y in (
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.long)),
        (torch.full((4, 3), torch.nan), torch.arange(4) % 2),
    ):
        metric = NeuralCollapse(num_classes=2, num_features=3)
        metric.update(h, y)
        found = metric.compute()
        assert found.nc1.isnan()
        assert found.nc2.isnan()
        assert found.cdnv.isnan()
    rank = EffectiveRank(num_features=3)
    rank.update(torch.full((4, 3), torch.inf))
    assert rank.compute().effective.isnan()
    spread = ClassSeparation(num_classes=2, num_features=3)
    spread.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert spread.compute().d_within.isnan()


def test_refusals():
    h, y = sample()
    with pytest.raises(ValueError, match=r"`features` to be a floating point tensor \[B, D\] but got torch.int64"):
        feature_sums(y[:, None], y, 4)
    with pytest.raises(ValueError, match=r"class probabilities .* name no class"):
        feature_sums(h, torch.rand(40, 4), 4)
    with pytest.raises(ValueError, match="`labels` below 3, the number of classes, but got 3"):
        feature_sums(h, y, 3)
    with pytest.raises(ValueError, match='use method="trace"'):
        within_class_variability(feature_sums(h, y, 4, covariance=False))
    with pytest.raises(ValueError, match="`method` to be one of 'pinv', 'trace' but got 'svd'"):
        within_class_variability(feature_sums(h, y, 4), method="svd")
    with pytest.raises(ValueError, match="`num_classes` to be an integer >= 2 but got 1"):
        FeatureAccumulator(num_classes=1, num_features=3)
    with pytest.raises(ValueError, match="`center` to be one of"):
        NeuralCollapse(num_classes=2, num_features=3, center="all")
    with pytest.raises(ValueError, match="Expected 3 features per sample but got 6"):
        ClassSeparation(num_classes=4, num_features=3).update(h, y)
    with pytest.raises(ValueError, match=r"`features` \[B, 3\] but got \[40, 6\]"):
        EffectiveRank(num_features=3).update(h)

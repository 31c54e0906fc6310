"""Mixup, CutMix, RegMixup and timm's mixture against naive loops, timm and torchvision."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup as TimmReference
from torch.nn import functional as F
from torchvision.transforms import v2

from lightning_robust.losses import CrossEntropy
from lightning_robust.mixing import CutMix, Mixer, Mixture, Mixup, RegMixup, TimmMixup, cut_box, mix_rows

LABELS = torch.tensor([0, 2, 1, 1, 3, 0, 2, 3])
MIXERS = {
    "mixup": Mixup(alpha=1.0),
    "cutmix": CutMix(alpha=1.0),
    "regmixup": RegMixup(alpha=20.0),
    "timm-batch": TimmMixup(mixup_alpha=0.8, cutmix_alpha=1.0),
    "timm-pair": TimmMixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair"),
    "timm-elem": TimmMixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem", prob=0.7),
    "timm-minmax": TimmMixup(cutmix_minmax=[0.2, 0.8], mixup_alpha=0.0),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def images(count=8, dtype=torch.float64):
    return torch.randn(count, 3, 6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@every_mixer
@pytest.mark.parametrize("count", [8, 7, 2, 1])
def test_rows_are_made_of_the_pixels_that_the_shares_say(name, count):
    x = images(count)
    before = x.clone()
    for seed in range(6):
        mixture = MIXERS[name].mix(x, generator(seed))
        assert torch.equal(x, before)
        lam = mixture.lam.expand(len(mixture.x))
        assert bool((lam >= 0).all() and (lam <= 1).all())
        for row, first, second, share in zip(mixture.x, mixture.first, mixture.second, lam, strict=True):
            pure = (row == x[first]) | (row == x[second])
            if bool(pure.all()):  # a box, or nothing at all
                outside = (row == x[first]).all(0).double().mean() if first != second else 1.0
                expected = outside if first != second else share
                torch.testing.assert_close(torch.as_tensor(expected, dtype=torch.float64), share.double())
            else:
                torch.testing.assert_close(row, share * x[first] + (1 - share) * x[second], rtol=1e-6, atol=1e-6)


@every_mixer
def test_repeats_with_the_generator_and_leaves_the_global_ones_alone(name):
    mixer, x = MIXERS[name], images()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (mixer.mix(x, generator(3)) for _ in range(2))
    others = [mixer.mix(x, generator(seed)) for seed in range(4, 8)]
    for ours, theirs in zip(first, again, strict=True):
        assert torch.equal(ours, theirs)
    assert not all(torch.equal(first.x, other.x) for other in others)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@every_mixer
def test_draws_from_torchs_generator_when_none_is_given(name):
    mixer, x = MIXERS[name], images()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(mixer.mix(x))
    assert torch.equal(results[0].x, results[1].x)
    torch.manual_seed(5)
    assert torch.equal(mixer.mix(x, torch.default_generator).x, results[0].x)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_type_and_has_shares_in_full_precision(name, dtype):
    mixture = MIXERS[name].mix(images(dtype=dtype), generator())
    assert mixture.x.dtype == dtype
    assert mixture.lam.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_mixer
def test_the_loss_of_the_pair_is_that_of_its_probabilities(name):
    mixture = MIXERS[name].mix(images(), generator(2))
    logits = torch.randn(len(mixture.x), 4, dtype=torch.float64, generator=generator(1))
    probabilities = mixture.probabilities(LABELS, 4)
    lam = mixture.lam.expand(len(logits))
    losses = [F.cross_entropy(logits, LABELS[rows], reduction="none") for rows in (mixture.first, mixture.second)]
    naive = (lam * losses[0] + (1 - lam) * losses[1]).mean()
    torch.testing.assert_close(F.cross_entropy(logits, probabilities.double()), naive)
    torch.testing.assert_close(CrossEntropy()(logits, mixture.target(LABELS)), naive)
    torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))


@every_mixer
def test_soft_labels_are_mixed_like_one_hot_ones(name):
    mixture = MIXERS[name].mix(images(), generator(2))
    one_hot = F.one_hot(LABELS, 4).double()
    for smoothing in (0.0, 0.1):
        ours = mixture.probabilities(one_hot, 4, label_smoothing=smoothing)
        expected = mixture.probabilities(LABELS, 4, label_smoothing=smoothing)
        torch.testing.assert_close(ours, expected.to(ours.dtype))
        torch.testing.assert_close(ours.sum(1), torch.ones_like(ours[:, 0]))


def test_the_dominant_label_has_the_larger_share():
    rows = torch.arange(3)
    mixture = Mixture(images(3), rows, rows.flip(0), torch.tensor([0.8, 0.5, 0.3]))
    assert mixture.dominant(torch.tensor([7, 8, 9])).tolist() == [7, 8, 7]


def test_regmixup_puts_the_clean_batch_first():
    x = images()
    doubled, plain = RegMixup(alpha=3.0).mix(x, generator(4)), Mixup(alpha=3.0).mix(x, generator(4))
    assert torch.equal(doubled.x, torch.cat([x, plain.x]))
    assert torch.equal(doubled.target(LABELS).first, LABELS.repeat(2))
    assert torch.equal(doubled.target(LABELS).second, torch.cat([LABELS, LABELS[plain.second]]))
    assert torch.equal(doubled.lam, torch.cat([torch.ones(8), plain.lam.expand(8)]))


def test_mixup_takes_inputs_of_any_shape():
    for shape in ((5,), (5, 4), (5, 2, 3, 4, 2)):
        x = torch.randn(shape)
        mixture = Mixup(alpha=1.0).mix(x, generator())
        torch.testing.assert_close(mixture.x, mix_rows(x, mixture.second, mixture.lam))


def test_shares_follow_the_beta_distribution():
    x = torch.zeros(2, 1)
    for alpha in (0.2, 1.0, 20.0):
        drawn = torch.stack([Mixup(alpha=alpha).mix(x, generator(seed)).lam for seed in range(2000)]).double()
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


@pytest.mark.parametrize("size", [(32, 32), (7, 12), (1, 1)])
def test_the_box_is_torchvisions(size, monkeypatch):
    cut = v2.CutMix(num_classes=4)
    for seed in range(40):
        torch.manual_seed(seed)
        monkeypatch.setattr(cut._dist, "sample", lambda _, seed=seed: torch.tensor([(seed + 1) / 41]))
        theirs = cut.make_params([torch.zeros(2, 3, *size)])
        torch.manual_seed(seed)
        column, row = (int(torch.randint(side, (1,))) for side in reversed(size))
        (top, left, bottom, right), lam = cut_box(*size, float(torch.tensor((seed + 1) / 41)), (row, column))
        assert theirs["box"] == (left, top, right, bottom)
        assert lam == pytest.approx(theirs["lam_adjusted"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "pair"},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "elem", "prob": 0.6, "switch_prob": 0.3},
        {"mixup_alpha": 0.0, "cutmix_alpha": 0.5, "correct_lam": False},
        {"cutmix_minmax": [0.2, 0.8], "switch_prob": 1.0},
    ],
    ids=["batch", "pair", "elem", "cutmix", "minmax"],
)
def test_equals_timm_after_the_same_seed(options, smoothing):
    ours = TimmMixup(**options, label_smoothing=smoothing)
    reference = TimmReference(**options, label_smoothing=smoothing, num_classes=4)
    x = images(dtype=torch.float32)
    for seed in range(8):
        mixture = ours.mix_seeded(x, seed)
        np.random.seed(seed)
        mixed, target = reference(x.clone(), LABELS)
        assert torch.equal(mixture.x, mixed)
        torch.testing.assert_close(mixture.probabilities(LABELS, 4, label_smoothing=smoothing), target)


def test_the_last_sample_of_an_odd_batch_stays_beside_timms_mixture():
    x, mixer = images(7), TimmMixup(mixup_alpha=0.8)
    odd, even = mixer.mix_seeded(x, 1), mixer.mix_seeded(x[:6], 1)
    assert torch.equal(odd.x, torch.cat([even.x, x[6:]]))
    assert odd.second.tolist() == [5, 4, 3, 2, 1, 0, 6]
    assert torch.equal(odd.lam, torch.cat([even.lam.expand(6), torch.ones(1, dtype=torch.float64)]))


def test_ignored_labels_of_a_pair_are_ignored():
    mixture = Mixup(alpha=1.0).mix(images(), generator())
    labels = torch.where(LABELS == 3, -100, LABELS)
    target = mixture.target(labels)
    logits = torch.randn(8, 4, generator=generator())
    kept = (target.first != -100) & (target.second != -100)
    assert 0 < int(kept.sum()) < 8
    alone = type(target)(target.first[kept], target.second[kept], target.lam)
    torch.testing.assert_close(CrossEntropy()(logits, target), CrossEntropy()(logits[kept], alone))


@every_mixer
def test_refuses_integers(name):
    with pytest.raises(TypeError, match=r"mixes floating-point inputs but got torch.uint8; convert"):
        MIXERS[name].mix(torch.zeros(4, 3, 6, 6, dtype=torch.uint8))


def test_refused_shapes():
    for mixer in (CutMix(), TimmMixup()):
        with pytest.raises(ValueError, match=r"mixes images \[B, C, H, W\] but got shape \(4, 3\)"):
            mixer.mix(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"Mixup mixes a batch \[B, ...\] but got shape \(\)"):
        Mixup().mix(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(alpha=0.0), "`alpha` to be a finite number > 0"),
        (lambda: CutMix(alpha=-1.0), "`alpha` to be a finite number > 0"),
        (lambda: TimmMixup(mixup_alpha=-1.0), "mixup_alpha"),
        (lambda: TimmMixup(cutmix_alpha=-1.0), "cutmix_alpha"),
        (lambda: TimmMixup(mixup_alpha=0.0), "`mixup_alpha` or `cutmix_alpha` to be > 0"),
        (lambda: TimmMixup(prob=1.5), "prob"),
        (lambda: TimmMixup(switch_prob=-0.5), "switch_prob"),
        (lambda: TimmMixup(mode="row"), "'batch', 'pair', 'elem'"),
        (lambda: TimmMixup(label_smoothing=1.5), "label_smoothing"),
        (lambda: TimmMixup(cutmix_minmax=[0.5]), "two numbers 0 <= min < max <= 1"),
        (lambda: TimmMixup(cutmix_minmax=[0.5, 0.2]), "two numbers 0 <= min < max <= 1"),
    ],
)
def test_refused_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_boxes_that_no_image_has_room_for_are_refused():
    with pytest.raises(ValueError, match=r"leaves no size of a box in images of \(6, 9\) pixels"):
        TimmMixup(cutmix_minmax=[0.2, 0.25]).mix(images())


def test_smoothing_does_not_get_lost_in_a_pair():
    with pytest.raises(ValueError, match="which a pair of labels cannot express"):
        TimmMixup(label_smoothing=0.1)(images(), LABELS)


def test_a_generator_of_a_device_is_refused():
    class Elsewhere(torch.Generator):
        device = torch.device("meta")

    with pytest.raises(ValueError, match="Expected a CPU generator but got one on meta"):
        Mixup().mix(images(), Elsewhere())


def test_a_mixer_of_ones_own():
    class Halves(Mixer):
        def mix(self, x, generator=None):
            rows = torch.arange(len(x))
            return Mixture(mix_rows(x, rows.flip(0), 0.5), rows, rows.flip(0), torch.tensor(0.5))

    mixed, target = Halves()(images(), LABELS)
    torch.testing.assert_close(mixed, (images() + images().flip(0)) / 2)
    assert torch.equal(target.second, LABELS.flip(0))

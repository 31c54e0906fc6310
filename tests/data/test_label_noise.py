"""Wrong labels: where, how many, which, and that nothing else is touched."""

import pytest
import torch

from lightning_robust.data import ArrayDataModule, ArrayImages, DigitsDataModule, RelabelledImages, noisy_labels

LABELS = torch.arange(4000) % 10


def module(**kwargs):
    images, labels = torch.rand(200, 1, 8, 8), torch.arange(200) % 4
    pair = images, labels
    return ArrayDataModule(**{"train": pair, "test": (images[:12], labels[:12]), "batch_size": 16, **kwargs})


def trained_labels(data):
    data.setup("fit")
    return torch.cat([labels for _, labels in data.clean_train_loader()])


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.8])
def test_share_of_wrong_labels(rate):
    wrong = noisy_labels(LABELS, rate, num_classes=10) != LABELS
    assert wrong.double().mean().item() == pytest.approx(rate, abs=0.03)


def test_symmetric_noise_spreads_over_all_other_classes():
    offsets = (noisy_labels(LABELS, 1.0, num_classes=10) - LABELS) % 10
    counts = offsets.bincount(minlength=10)
    assert counts[0] == 0
    assert (counts[1:] / 4000 - 1 / 9).abs().max() < 0.02


def test_pairflip_takes_the_next_class():
    noisy = noisy_labels(LABELS, 0.5, num_classes=10, kind="pairflip")
    assert set(((noisy - LABELS) % 10).tolist()) == {0, 1}
    assert noisy_labels(torch.tensor([9]), 1.0, num_classes=10, kind="pairflip").tolist() == [0]


def test_it_is_a_function_of_seed_and_index():
    noisy = noisy_labels(LABELS, 0.4, num_classes=10, seed=3)
    assert torch.equal(noisy, noisy_labels(LABELS, 0.4, num_classes=10, seed=3))
    assert torch.equal(noisy[:100], noisy_labels(LABELS[:100], 0.4, num_classes=10, seed=3))
    assert not torch.equal(noisy, noisy_labels(LABELS, 0.4, num_classes=10, seed=4))


def test_the_first_release_is_kept():
    # a change here changes everybody's noise
    kept = noisy_labels(torch.zeros(12, dtype=torch.long), 0.4, num_classes=10)
    assert kept.tolist() == [
        3,
        0,
        0,
        0,
        0,
        3,
        0,
        9,
        0,
        5,
        0,
        1,
    ]


def test_more_noise_keeps_what_less_noise_made_wrong():
    less, more = (noisy_labels(LABELS, rate, num_classes=10) for rate in (0.2, 0.6))
    wrong = less != LABELS
    assert torch.equal(more[wrong], less[wrong])


def test_edges():
    assert torch.equal(noisy_labels(LABELS, 0.0, num_classes=10), LABELS)
    assert (noisy_labels(LABELS, 1.0, num_classes=10) != LABELS).all()
    two = noisy_labels(torch.tensor([0, 1]), 1.0, num_classes=2)
    assert two.tolist() == [1, 0]


def test_only_training_labels_are_wrong():
    clean, noisy = module(), module(label_noise=0.5)
    for data in (clean, noisy):
        data.setup()
    assert [label for _, label in clean.val_set] == [label for _, label in noisy.val_set]
    assert [label for _, label in clean.test_set] == [label for _, label in noisy.test_set]
    assert clean.train_set.indices == noisy.train_set.indices
    true, given = noisy.true_train_labels(), trained_labels(noisy)
    assert torch.equal(true, trained_labels(clean))
    assert 0.35 < (true != given).double().mean() < 0.65
    assert torch.equal(clean.true_train_labels(), trained_labels(clean))


def test_every_epoch_and_every_seed_of_training_sees_the_same_wrong_labels():
    first, second = module(label_noise=0.5, seed=1), module(label_noise=0.5, seed=2)
    assert torch.equal(trained_labels(first), trained_labels(second))
    other = module(label_noise=0.5, noise_seed=1)
    assert not torch.equal(trained_labels(first), trained_labels(other))
    loader = first.train_dataloader()
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        seen = torch.cat([labels for _, labels in loader])
        assert torch.equal(seen.bincount(), trained_labels(first).bincount())


def test_the_clean_loader_is_in_order_and_not_augmented():
    data = DigitsDataModule(image_size=8, augment="shift", label_noise=0.3)
    data.setup("fit")
    images = torch.cat([batch for batch, _ in data.clean_train_loader()])
    raw = data.load_train()
    assert torch.equal(images, torch.stack([raw[index][0] for index in data.train_set.indices]))


def test_a_fraction_of_the_training_images():
    whole, quarter = module(), module(train_fraction=0.25)
    whole.setup("fit")
    quarter.setup("fit")
    assert len(whole.train_set) == 180
    assert len(quarter.train_set) == 44  # 11.25 of each class
    assert set(quarter.train_set.indices) < set(whole.train_set.indices)
    assert quarter.val_set.indices == whole.val_set.indices
    assert trained_labels(quarter).bincount().tolist() == [11, 11, 11, 11]
    assert quarter.true_train_labels().tolist() == trained_labels(quarter).tolist()
    without = module(train_fraction=0.5, val_fraction=0.0)
    without.setup("fit")
    assert len(without.train_set) == 100


def test_no_training_image_left():
    with pytest.raises(ValueError, match=r"`train_fraction` 0\.001 leaves no training image; choose a larger one"):
        module(train_fraction=0.001).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_noise": 1.1}, r"Expected `label_noise` to be in \[0.0, 1.0\] but got 1.1"),
        ({"train_fraction": -0.1}, r"Expected `train_fraction` to be in \[0.0, 1.0\] but got -0.1"),
        ({"noise_kind": "flip"}, "Expected `noise_kind` to be one of 'symmetric', 'pairflip' but got 'flip'"),
        ({"noise_seed": -1}, "Expected `noise_seed` to be an integer >= 0 but got -1"),
    ],
    ids=["label_noise", "train_fraction", "noise_kind", "noise_seed"],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_refused_by_the_functions():
    with pytest.raises(ValueError, match="Expected `num_classes` to be an integer >= 2 but got 1"):
        noisy_labels(LABELS, 0.4, num_classes=1)
    with pytest.raises(ValueError, match="Expected as many labels as images but got 3 for 2"):
        RelabelledImages(ArrayImages(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="is not set up"):
        module().true_train_labels()

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.callbacks import Criterion
from lightning_robust.losses import PSKD, MixedTarget, pskd_targets
from support.modules import PlainModule
from support.shuffled import close, fit, shuffled

LABELS = torch.tensor([0, 3, 2, 2, 1, 3])
INDEX = torch.tensor([4, 3, 9, 0, 7, 5])
EPOCHS = 5


def random_logits(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(6, 4, generator=generator, dtype=dtype)).requires_grad_()


def naive(logits, labels, index, memory, alpha):
    """Sample by sample; changes `memory`, a dictionary."""
    losses = []
    for z, y, i in zip(logits, labels.tolist(), index.tolist(), strict=True):
        label = F.one_hot(torch.tensor(y), len(z)).to(z)
        target = (1 - alpha) * label + alpha * memory.get(i, label)
        losses.append(-(target * z.log_softmax(0)).sum())
        memory[i] = z.detach().softmax(0)
    return torch.stack(losses)


def test_equals_a_loop_over_samples_with_a_memory():
    criterion, memory = PSKD(alpha=0.8, num_samples=10, reduction="none"), {}
    for epoch in range(EPOCHS):
        criterion.epoch_starts(epoch, EPOCHS)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(epoch))
        logits = random_logits(epoch)
        ours = criterion(logits, LABELS[order], index=INDEX[order])
        reference = naive(logits, LABELS[order], INDEX[order], memory, 0.8 * (epoch + 1) / EPOCHS)
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, reference))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    for index, row in memory.items():
        torch.testing.assert_close(criterion.predictions.rows[index], row)


def test_the_first_epoch_is_cross_entropy_even_for_a_sample_that_comes_twice():
    criterion = PSKD(alpha=1.0, num_samples=10)
    criterion.epoch_starts(0, 1)
    for seed in range(2):
        logits = random_logits(seed)
        torch.testing.assert_close(criterion(logits, LABELS, index=INDEX), F.cross_entropy(logits, LABELS))


def test_a_sample_that_was_left_out_keeps_its_label():
    criterion = PSKD(alpha=1.0, num_samples=10, reduction="none")
    criterion(random_logits(0)[:5], LABELS[:5], index=INDEX[:5])
    criterion.epoch_starts(1, 2)
    logits = random_logits(1)
    losses = criterion(logits, LABELS, index=INDEX)
    torch.testing.assert_close(losses[5], F.cross_entropy(logits, LABELS, reduction="none")[5])
    torch.testing.assert_close(losses[:5], F.cross_entropy(logits, random_logits(0).softmax(1), reduction="none")[:5])


def test_a_pass_that_does_not_count_sees_the_same_loss_and_leaves_the_table_alone():
    criterion = PSKD(num_samples=10)
    criterion(random_logits(0), LABELS, index=INDEX)
    criterion.epoch_starts(1, 2)
    criterion.counted(False)
    before = criterion.predictions.rows.clone()
    first = criterion(random_logits(1), LABELS, index=INDEX)
    assert torch.equal(criterion.predictions.rows, before)
    criterion.counted(True)
    assert torch.equal(criterion(random_logits(1), LABELS, index=INDEX), first)
    assert not torch.equal(criterion.predictions.rows, before)


@pytest.mark.parametrize(("epochs", "epoch", "share"), [(None, 1, 0.4), (8, 1, 0.2), (2, 3, 0.8)])
def test_the_share_of_predictions_grows_and_ends(epochs, epoch, share):
    criterion = PSKD(alpha=0.8, epochs=epochs, num_samples=10)
    criterion(random_logits(0), LABELS, index=INDEX)
    criterion.epoch_starts(epoch, 4)
    logits = random_logits(1)
    target = (1 - share) * F.one_hot(LABELS, 4) + share * random_logits(0).detach().softmax(1)
    torch.testing.assert_close(criterion(logits, LABELS, index=INDEX), F.cross_entropy(logits, target))


def test_a_table_in_half_precision_is_half_as_large_and_nearly_the_same():
    losses = []
    for half_precision in (False, True):
        criterion = PSKD(alpha=1.0, half_precision=half_precision, num_samples=10)
        criterion(random_logits(0, torch.float32), LABELS, index=INDEX)
        assert criterion.predictions.rows.dtype == (torch.float16 if half_precision else torch.float32)
        criterion.epoch_starts(1, 2)
        losses.append(criterion(random_logits(1, torch.float32), LABELS, index=INDEX))
    assert losses[1].dtype == torch.float32
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_class_weights_weigh_the_refined_label():
    criterion = PSKD(alpha=1.0, weight=[1.0, 2.0, 3.0, 4.0], num_samples=10, reduction="none")
    criterion(random_logits(0), LABELS, index=INDEX)
    criterion.epoch_starts(1, 2)
    logits = random_logits(1)
    expected = -(torch.arange(1.0, 5.0) * random_logits(0).softmax(1) * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(criterion(logits, LABELS, index=INDEX), expected)


def test_targets_of_a_mixture():
    mixed = MixedTarget(torch.tensor([0]), torch.tensor([1]), torch.tensor(0.75))
    found = pskd_targets(torch.tensor([[0.0, 1.0]]), mixed, alpha=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.375, 0.625]]))


def test_trains_any_module_as_a_loop_does():
    module = PlainModule(norm=False)
    fit(module, Criterion(PSKD(alpha=1.0)), max_epochs=3)
    reference, memory = PlainModule(norm=False).train(), {}
    optimizer = reference.configure_optimizers()
    for epoch in range(3):
        data = shuffled()
        data.sampler.set_epoch(epoch)
        for index in torch.tensor(list(data.sampler)).split(6):
            x, y = data.dataset.x[index], data.dataset.y[index]
            optimizer.zero_grad()
            naive(reference(x), y, index, memory, (epoch + 1) / 3).mean().backward()
            optimizer.step()
    close(module, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"`alpha` to be in \[0, 1\] but got 1.5"),
        ({"epochs": 0}, "`epochs` to be an integer >= 1"),
        ({"num_samples": 0}, "`num_samples` to be an integer >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PSKD(**options)


def test_what_cannot_be_refined_is_refused():
    criterion = PSKD(num_samples=10)
    with pytest.raises(ValueError, match="PSKD needs class indices as targets"):
        criterion(random_logits(0), torch.rand(6, 4).softmax(1).double(), index=INDEX)
    with pytest.raises(ValueError, match=r"one row per sample: expected `logits` \[B, C\]"):
        criterion(torch.zeros(6, 4, 2), torch.zeros(6, 2, dtype=torch.long), index=INDEX)
    with pytest.raises(ValueError, match="max_epochs is -1; set `max_epochs` of the Trainer, or `epochs` of PSKD"):
        criterion.epoch_starts(1, -1)
    with pytest.raises(RuntimeError, match="number of training samples is not known"):
        PSKD()(random_logits(0), LABELS, index=INDEX)
    with pytest.raises(ValueError, match="belongs to 10 training samples, but there are 7 now"):
        criterion.samples_known(7)

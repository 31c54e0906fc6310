import copy

import pytest
import torch

from lightning_robust.losses import GCE, TruncatedGCE, gce_loss
from support.labels import logits_and_labels

SAMPLES = 10


def identity(tensor):
    return tensor


def criterion(**options):
    return TruncatedGCE(num_samples=SAMPLES, **options).double()


def weights(module):
    return module.weights.look_up(torch.arange(SAMPLES), like=torch.zeros(SAMPLES, dtype=torch.double))


def pair(confidence):
    """Two-class logits whose first class has this probability."""
    p = torch.as_tensor(confidence, dtype=torch.double)
    return torch.stack([p, 1 - p], 1).log()


FIRST = torch.zeros(4, dtype=torch.long)
INDEX = torch.tensor([7, 0, 3, 9])


def run_epoch(module, epoch, *batches):
    module.epoch_starts(epoch, -1)
    losses = [module(pair(p), FIRST[: len(p)], index=torch.tensor(index)) for index, p in batches]
    module.epoch_ends(epoch, identity)
    return losses


def test_before_pruning_it_is_gce_minus_a_constant():
    logits, labels = logits_and_labels()
    constant = (1 - 0.5**0.7) / 0.7
    loss = criterion()(logits, labels, index=torch.arange(6))
    torch.testing.assert_close(loss, GCE()(logits, labels) - constant)


def test_pruned_samples_add_nothing_but_count_in_the_mean():
    module = criterion()
    logits = pair([0.9, 0.4, 0.51, 0.1]).requires_grad_()
    module.prune(logits, FIRST, index=INDEX)
    expected = torch.ones(SAMPLES, dtype=torch.double)
    expected[[0, 9]] = 0
    assert torch.equal(weights(module), expected)
    loss = module(logits, FIRST, index=INDEX)
    kept = torch.tensor([1.0, 0, 1, 0], dtype=torch.double)
    torch.testing.assert_close(loss, (kept * (gce_loss(logits, FIRST) - module.threshold)).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[[1, 3]].any()
    module.prune(pair([0.1, 0.9, 0.9, 0.9]), FIRST, index=INDEX)  # and they come back
    assert weights(module)[[7, 0, 3, 9]].tolist() == [0, 1, 1, 1]


def test_decisions_come_before_every_tenth_epoch_from_the_fortieth_on():
    module = criterion()
    changed = []
    for epoch in range(62):
        before = weights(module)
        # in turn good and bad
        run_epoch(module, epoch, ([5], [0.9 if (epoch // 10) % 2 else 0.1]))
        if not torch.equal(before, weights(module)):
            changed.append(epoch + 2)  # the number from 1 of the epoch that begins
    # 40 decides by epoch index 38 (good: as before), 50 by 48 (bad), 60 by 58 (good)
    assert changed == [50, 60]


@pytest.mark.parametrize(("start", "every", "numbers"), [(3, 2, {4, 6, 8}), (1, 1, set(range(2, 10))), (5, 4, {8})])
def test_schedule(start, every, numbers):
    module = criterion(start_epoch=start, every=every)
    decided = set()
    for epoch in range(8):
        module.prune(pair([0.9]), FIRST[:1], index=torch.tensor([5]))
        run_epoch(module, epoch, ([5], [0.1]))
        if weights(module)[5] == 0:
            decided.add(epoch + 2)
    assert decided == numbers


def test_the_latest_visit_decides_and_a_sample_that_was_never_seen_stays():
    module = criterion(start_epoch=1, every=1)
    run_epoch(module, 0, ([1, 2], [0.9, 0.1]), ([3], [0.1]), ([3], [0.8]))
    assert weights(module).tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    # left-out samples are still looked at
    run_epoch(module, 1, ([2], [0.7]))
    assert weights(module).tolist() == [1] * SAMPLES


def test_passes_that_do_not_count_are_not_recorded():
    module = criterion(start_epoch=1, every=1)
    module.epoch_starts(0, -1)
    module.counted(False)
    module(pair([0.1]), FIRST[:1], index=torch.tensor([4]))
    module.counted(True)
    module.eval()(pair([0.1]), FIRST[:1], index=torch.tensor([5]))
    module.epoch_ends(0, identity)
    assert weights(module).all()


def test_two_processes_keep_one_table():
    first, second, alone = (criterion(start_epoch=1, every=1) for _ in range(3))
    for module in (first, second, alone):
        module.epoch_starts(0, -1)
    first(pair([0.1, 0.8]), FIRST[:2], index=torch.tensor([0, 1]))
    second(pair([0.7, 0.2]), FIRST[:2], index=torch.tensor([2, 3]))
    alone(pair([0.1, 0.8, 0.7, 0.2]), FIRST, index=torch.arange(4))
    sent = []  # what each process puts in, in the order of the sums
    for module in (first, second):
        copy.deepcopy(module).losses.merge(lambda tensor: sent.append(tensor.clone()) or tensor)
    half = len(sent) // 2
    sums = [a + b for a, b in zip(sent[:half], sent[half:], strict=True)]
    alone.epoch_ends(0, identity)
    for module in (first, second):
        queue = iter(sums)
        module.epoch_ends(0, lambda tensor, queue=queue: next(queue))
        assert torch.equal(weights(module), weights(alone))
    assert weights(alone)[:4].tolist() == [0, 1, 1, 0]


def test_a_checkpoint_carries_weights_and_losses_and_refuses_another_number_of_samples():
    module = criterion(start_epoch=1, every=1)
    run_epoch(module, 0, ([1, 2], [0.9, 0.1]))
    restored = TruncatedGCE(start_epoch=1, every=1).double()
    restored.load_state_dict(module.state_dict())
    assert torch.equal(weights(restored), weights(module))
    restored.samples_known(SAMPLES)
    with pytest.raises(ValueError, match="belongs to 10 training samples, but there are 11 now"):
        restored.samples_known(11)


def test_ignored_labels_and_class_weights():
    logits, labels = logits_and_labels()
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.double)
    module = criterion(weight=weight.tolist(), ignore_index=int(labels[0]))
    kept = labels != labels[0]
    each = weight[labels] * (gce_loss(logits, labels) - module.threshold)
    loss = module(logits, labels, index=torch.arange(6))
    torch.testing.assert_close(loss, each[kept].sum() / weight[labels][kept].sum())


def test_refusals_and_repr():
    assert repr(TruncatedGCE()).startswith("TruncatedGCE(\n  q=0.7, k=0.5, start_epoch=40, every=10")
    for name, value in {"q": 0.0, "k": 1.5, "start_epoch": 0, "every": 0, "num_samples": 0}.items():
        with pytest.raises(ValueError, match=f"Expected `{name}`"):
            TruncatedGCE(**{name: value})
    with pytest.raises(RuntimeError, match="number of training samples is not known"):
        TruncatedGCE()(pair([0.5]), FIRST[:1], index=torch.tensor([0]))
    with pytest.raises(ValueError, match="TruncatedGCE needs class indices"):
        criterion()(pair([0.5]), pair([0.5]).exp(), index=torch.tensor([0]))
    with pytest.raises(TypeError, match="index"):
        criterion()(pair([0.5]), FIRST[:1])

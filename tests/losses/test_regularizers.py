import subprocess
import sys

import pytest
import torch

from lightning_robust.losses import Linear, LogitRegularizer, MaxSup, autocast_off


def test_only_masked_samples_count():
    logits = torch.randn(5, 3, requires_grad=True)
    mask = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(MaxSup()(logits, mask), MaxSup()(logits[mask]))
    MaxSup()(logits, mask).backward()
    assert not logits.grad[~mask].any()


@pytest.mark.parametrize("samples", [0, 3])
def test_nothing_to_count_gives_zero(samples):
    logits = torch.randn(samples, 4, requires_grad=True)
    loss = MaxSup()(logits, torch.zeros(samples, dtype=torch.bool)) + MaxSup()(logits[:0])
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_the_mask_must_fit():
    with pytest.raises(ValueError, match=r"Expected `mask` of shape \(3,\) but got \(2,\)"):
        MaxSup()(torch.randn(3, 4), torch.ones(2, dtype=torch.bool))


def test_a_schedule_without_an_epoch_is_refused():
    maxsup = MaxSup(alpha=Linear(start=0.1, end=0.2))
    with pytest.raises(RuntimeError, match=r"MaxSup follows a schedule .* `set_progress\(epoch, max_epochs\)`"):
        maxsup(torch.randn(3, 4))
    maxsup.set_progress(0, 10)
    assert maxsup.coefficient == 0.1


def test_a_constant_keeps_its_value():
    maxsup = MaxSup(alpha=0.3)
    maxsup.set_progress(5, -1)
    assert maxsup.coefficient == 0.3


def test_repr_names_the_argument_of_the_subclass():
    assert repr(MaxSup(alpha=0.3)) == "MaxSup(alpha=Constant(value=0.3))"


def test_the_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        LogitRegularizer(coefficient=1.0)(torch.randn(3, 4))


def test_autocast_is_off_inside():
    with torch.autocast("cpu", torch.bfloat16), autocast_off(torch.zeros(1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_the_room_does_not_import_lightning():
    code = "import sys, lightning_robust.losses; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

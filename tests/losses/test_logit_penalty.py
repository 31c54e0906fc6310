import pytest
import torch

from lightning_robust.losses import LogitPenalty, logit_norm_penalty


def test_half_the_squared_norm():
    logits = torch.randn(4, 7)
    torch.testing.assert_close(logit_norm_penalty(logits), logits.norm(dim=1) ** 2 / 2)
    torch.testing.assert_close(LogitPenalty(beta=0.3)(logits), 0.3 * logits.norm(dim=1).square().mean() / 2)


def test_large_half_precision_logits_do_not_overflow():
    logits = torch.full((2, 10), 120.0, dtype=torch.float16)
    assert LogitPenalty()(logits).isfinite()


def test_refuses_a_factor_that_is_not_finite():
    with pytest.raises(ValueError, match="Expected `beta` to be a finite number but got inf"):
        LogitPenalty(beta=float("inf"))

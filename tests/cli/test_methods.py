"""The table and the pages of the methods come from the classes."""

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_robust import callbacks
from lightning_robust.cli.methods import KINDS, methods


def test_every_public_callback_is_in_the_table(lr):
    out = lr("methods").out
    for name in callbacks.__all__:
        item = getattr(callbacks, name)
        if isinstance(item, type) and issubclass(item, Callback):
            assert name in out
    for name in ("SAM", "ASAM", "PGD", "MaxSup", "KD", "2010.01412", "callback, weights", "callback, monitor"):
        assert name in out


def test_base_classes_are_not():
    assert not set(KINDS) & {item for _, item in methods().values()}


@pytest.mark.parametrize("name", sorted(methods()))
def test_each_method_has_a_page_with_all_options_explained(lr, name):
    from lightning_robust.cli.methods import _options

    answer = lr("methods", name)
    assert answer.code == 0
    for option, _, default, meaning in _options(methods()[name][1]):
        assert meaning, f"{name}.{option} is not explained"
        assert default
        assert option in answer.out


def test_the_page_of_a_callback_shows_how_to_use_it(lr):
    out = lr("methods", "SharpnessAware").out
    assert "trainer = L.Trainer(callbacks=[SharpnessAware(SAM(rho=0.05))])" in out
    assert "class_path: SharpnessAware" in out
    assert "--methods.sharpness_aware SharpnessAware" in out
    assert "Choose from AMP, ASAM, AWP," in " ".join(out.split())
    assert "method: SAM" in out  # as in the example in Python, not the first of all


def test_unknown_method(lr):
    answer = lr("methods", "SharpnesAware")
    assert answer.code == 2
    assert answer.lines == [
        "error: There is no method called 'SharpnesAware'.",
        "  Did you mean `SharpnessAware` or `SharpnessMonitor`?",
        "  All: lightning-robust methods",
    ]

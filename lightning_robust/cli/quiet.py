# SPDX-License-Identifier: Apache-2.0
"""Keep the screen for what matters: leave out promotional tips and hints that do not apply to a recipe."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hush", "silence"]

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_UNWANTED = ("💡 Tip", "TPU available", "HPU available", "Seed set to", "[rank: ", "Running in `fast_dev_run` mode")


def hush() -> None:
    """Filter Lightning's messages for the rest of this process."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_wanted)
    # Data that lies in memory is slower with worker processes than without.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The folder is ours, and a resumed run continues in it.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning's own business with newer versions of torch and jsonargparse.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="(?s).*(JsonargparseDeprecationWarning|instantiate_classes.*deprecated)")


@contextmanager
def silence(*, warnings_too: bool = True) -> Iterator[None]:
    """No message of Lightning at all in the body, for what is built a second time.

    Args:
        warnings_too: Leave out warnings as well.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            if warnings_too:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _wanted(record: logging.LogRecord) -> bool:
    text = record.getMessage().lstrip()
    return not text.startswith(_UNWANTED) or (text.startswith("[rank: ") and "Seed set to" not in text)


def _nothing(record: logging.LogRecord) -> bool:
    return False

# SPDX-License-Identifier: Apache-2.0
"""Build a training and read its teachers before anything is trained or written."""

from collections.abc import Iterator

from torch import nn

from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.messages import build_refusal
from lightning_robust.cli.quiet import silence
from lightning_robust.distillation import TeacherBank

__all__ = ["rehearse"]


def rehearse(cli: RecipeCLI) -> None:
    """Build everything once and read every file of a teacher, so that what can be refused is refused now.

    Args:
        cli: The training, parsed.

    Raises:
        UsageError: If a constructor refuses, module and data disagree, or a teacher cannot be read.
    """
    cli.rehearse()
    shape = {name: getattr(cli.model, name, None) for name in ("num_classes", "in_chans")}
    for bank in _banks(cli):
        try:
            with silence():
                bank.build(**shape)
        except (ValueError, OSError) as error:
            raise UsageError(*str(error).splitlines()[:6]) from error
        except Exception as error:
            raise build_refusal(error) from error


def _banks(cli: RecipeCLI) -> Iterator[TeacherBank]:
    """The teachers of callbacks, of their objectives, and of the module's own objective."""
    for holder in (*cli.trainer.callbacks, cli.model):  # type: ignore[attr-defined]
        networks = [item for item in (holder, *vars(holder).values()) if isinstance(item, nn.Module)]
        parts = {id(part): part for network in networks for part in network.modules()}
        for part in (holder, *parts.values()):
            yield from (item for item in vars(part).values() if isinstance(item, TeacherBank))

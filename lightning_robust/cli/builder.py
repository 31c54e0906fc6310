# SPDX-License-Identifier: Apache-2.0
"""From a recipe and the options of the command line to a Trainer, a module and data: Lightning's own configuration."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_robust.attacks import Attack
from lightning_robust.callbacks import SeededSteps
from lightning_robust.checks import check_integer
from lightning_robust.cli.catalog import import_rooms
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.messages import build_refusal, check_methods, parse_refusal
from lightning_robust.cli.quiet import silence

__all__ = ["COMPARE", "LINKED", "TEACHERS", "RecipeCLI"]

# The option of jsonargparse's `dump` that writes null values too was renamed.
_JSONARGPARSE = tuple(int(part) for part in version("jsonargparse").split(".")[:2])
_KEEP_EMPTY = {"skip_unset" if _JSONARGPARSE >= (4, 49) else "skip_none": False}

#: The part of a recipe that lists arms; taken out before the rest is parsed.
COMPARE = "compare"
#: The part of a recipe that names the recipes of its teachers.
TEACHERS = "teachers"
#: What the data knows and the model needs; never asked twice.
LINKED = ("num_classes", "in_chans", "mean", "std")


class RecipeCLI(LightningCLI):
    """A recipe that is parsed at once and built on demand.

    Beside Lightning's own parts (``model``, ``data``, ``trainer``, ``seed_everything``) a recipe has ``methods``,
    callbacks by name; ``monitor`` and ``monitor_mode``, the metric whose best epoch is kept; ``evaluation``, how the
    result is measured; ``baseline``, the recipe to compare with, and ``teachers``, recipes to learn from, by name;
    ``threads``, the number of CPU threads. The arms of a ``compare`` part are recipes of their own: see `Comparison`.

    Args:
        config: The recipe.
        changes: Options of the command line, which win over the recipe.

    Raises:
        UsageError: If the configuration is not accepted.
    """

    linked: tuple[str, ...] = LINKED

    def __init__(self, config: dict[str, Any], changes: Sequence[str] = ()) -> None:
        import_rooms()
        check_methods(config, changes)
        self.given = config
        self.changes = tuple(changes)
        self.own_callbacks: list[Callback] = []
        self.own_trainer_options: dict[str, Any] = {}
        self._built = False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            super().__init__(
                args=["--config", str(path), *changes],
                run=False,
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--methods", type=dict[str, Callback | None], default={}, help="callbacks by a name of your choice"
        )
        parser.add_argument("--monitor", type=str, default="val/acc", help="metric whose best epoch is kept")
        parser.add_argument("--monitor_mode", type=str, default="max", choices=["max", "min"])
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads; one is best for tiny networks"
        )
        parser.add_argument("--baseline", type=str | None, default=None, help="recipe to compare with")
        parser.add_argument(
            f"--{TEACHERS}", type=dict[str, str] | None, default=None, help="recipes of the teachers by name"
        )
        parser.add_argument("--evaluation.attack", type=Attack | None, default=None, help="attack to withstand")
        parser.add_argument(
            "--evaluation.max_attacked", type=int | None, default=None, help="attack only the first so many samples"
        )
        parser.add_argument(
            "--evaluation.transfer",
            type=L.LightningDataModule | None,
            default=None,
            help="what the linear probe of a comparison learns; the turn of an image by default",
        )
        parser.add_argument(
            "--evaluation.features_from",
            type=str | None,
            default=None,
            help="layer whose output a comparison takes for features; what enters the classifier by default",
        )
        parser.add_argument(f"--{COMPARE}", type=dict | None, default=None, help="arms to compare")
        for name in self.linked:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own version warns whenever the process has arguments, which is always the case here.
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, ValueError, TypeError, KeyError) as error:
            options = [action.dest for action in parser._actions if not action.dest.endswith(".help")]
            raise parse_refusal(error, options, self.given, self.changes) from error

    @override
    def instantiate_classes(self) -> None:
        # Called by the base constructor: nothing is built before `build` says so.
        if self._built:
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = self.config_init.trainer
        methods = [method for method in (self.config_init.methods or {}).values() if method is not None]
        given = trainer.callbacks or []
        listed = list(given) if isinstance(given, list) else [given]
        options = {**self.own_trainer_options, **kwargs}
        if (loggers := options.pop("loggers", None)) is not None:
            users = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
            options["logger"] = [*loggers, *(logger for logger in users if not isinstance(logger, bool | None))]
        callbacks = [*listed, *methods, *self.own_callbacks]
        if self.config.seed_everything is not False and not any(isinstance(item, SeededSteps) for item in callbacks):
            # Whatever a step draws then depends on the seed, epoch and batch alone, so resumed runs repeat.
            callbacks.insert(0, SeededSteps())
        return super().instantiate_trainer(callbacks=callbacks, **options)

    def build(self, *callbacks: Callback, **trainer_options: Any) -> None:
        """Seed everything, then build data, module and Trainer.

        Args:
            *callbacks: Callbacks to add after those of the recipe.
            **trainer_options: Options of the Trainer that win over the recipe's; ``loggers`` are added to its own.

        Raises:
            UsageError: If a constructor refuses, or module and data disagree.
        """
        self.own_callbacks = list(callbacks)
        self.own_trainer_options = trainer_options
        self._built = True
        self._set_seed()
        try:
            if (threads := self.config.threads) is not None:
                check_integer("threads", threads, 1)
                torch.set_num_threads(threads)
            self.instantiate_classes()
        except UsageError:
            raise
        except Exception as error:
            raise build_refusal(error) from error
        self._refuse_disagreement()

    def rehearse(self) -> None:
        """Build everything once, so that whatever a constructor refuses is refused before anything is written.

        Raises:
            UsageError: If a constructor refuses, or module and data disagree.
        """
        with silence():
            self.build(logger=False)

    def evaluation_settings(self) -> dict[str, Any]:
        """How the result is measured, in a form that can be compared; available once it is built."""
        settings = self.config_init.evaluation
        return {
            "attack": None if settings.attack is None else repr(settings.attack),
            "max_attacked": settings.max_attacked,
        }

    def text(self) -> str:
        """The whole configuration as YAML, every default written out."""
        return str(self.parser.dump(self.config, **_KEEP_EMPTY))

    def fingerprint(self) -> str:
        """A digest of everything that decides the outcome of training: configuration, versions, the library's code."""
        values = yaml.safe_load(self.text())
        for measured_later in ("evaluation", "baseline", COMPARE):
            values.pop(measured_later, None)
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
        for package in ("torch", "lightning", "timm"):
            digest.update(f"{package} {version(package)}".encode())
        for room in ("lightning_robust", "lightning_robust.callbacks"):
            _add_code(digest, files(room))
        return digest.hexdigest()

    def _refuse_disagreement(self) -> None:
        """A link silently overrides what the user gave to the model; that must not happen."""
        for name in self.linked:
            if self.datamodule is None or not hasattr(self.datamodule, name):
                continue
            asked = self._given_to_model(name)
            offered = getattr(self.datamodule, name)
            if asked is not None and _plain(asked) != _plain(offered):
                raise UsageError(
                    f"`model.{name}` is {_plain(asked)} but {type(self.datamodule).__name__} has {_plain(offered)}.",
                    f"Leave `model.{name}` out: it is taken from the data.",
                )

    def _given_to_model(self, name: str) -> Any:
        asked = (self.given.get("model") or {}).get("init_args", {}).get(name)
        words = list(self.changes)
        for index, word in enumerate(words):
            option, equals, value = word.partition("=")
            if option in (f"--model.{name}", f"--model.init_args.{name}"):
                asked = yaml.safe_load(value if equals else words[index + 1])
        return asked


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _add_code(digest: Any, folder: Any) -> None:
    for entry in sorted(folder.iterdir(), key=lambda entry: str(entry.name)):
        if entry.is_dir() and entry.name != "__pycache__":
            _add_code(digest, entry)
        elif entry.name.endswith(".py"):
            digest.update(entry.name.encode() + entry.read_bytes())

# SPDX-License-Identifier: Apache-2.0
"""Turn the long refusals of the configuration system into two to six lines with a suggestion.

The texts belong to jsonargparse and may change: one that is not recognised is passed on, without its repetitions.
"""

import re
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

from lightning_robust.cli.catalog import class_names, constructor_parameters, find_class
from lightning_robust.cli.errors import UsageError, did_you_mean

__all__ = ["build_refusal", "check_methods", "parse_refusal"]

_NOISE = re.compile(
    r"^\s*(Given value|Subtypes:|Errors:|Does not validate against|- Does not validate against|Parser key"
    r"|- Expected a <class 'NoneType'>|- Expected a path but)"
)
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_KEY = re.compile(r'Parser key "([\w.]+)"')
_METHOD_SHAPE = "Write it as NAME: {class_path: CLASS, init_args: {option: value}}."


def check_methods(config: dict[str, Any], changes: Sequence[str]) -> None:
    """Refuse a `methods` part that has the wrong shape, and options of a method that the recipe does not name.

    Args:
        config: The recipe.
        changes: Options of the command line.

    Raises:
        UsageError: With the name that was probably meant.
    """
    methods = config.get("methods")
    if not isinstance(methods, dict | None):
        raise UsageError("`methods` must map names of your choice to callbacks.", _METHOD_SHAPE)
    names = set(methods or {})
    for name, value in (methods or {}).items():
        if isinstance(value, dict) and "class_path" not in value:
            wrong = next(iter(value), "nothing")
            raise UsageError(f"`methods.{name}` has no class_path, only `{wrong}`.", _METHOD_SHAPE)
    for word, following in zip_longest(changes, changes[1:], fillvalue=""):
        path, given, value = word.partition("=")
        parts = path.removeprefix("--").split(".")
        if not path.startswith("--methods.") or len(parts) < 2:
            continue
        removed = (value if given else following) == "null"
        if len(parts) == 2 and not removed:
            names.add(parts[1])
        elif parts[1] not in names:
            raise UsageError(
                f"{path}: there is no method called `{parts[1]}` in this recipe.",
                did_you_mean(parts[1], names) or (f"It has: {', '.join(sorted(names))}." if names else ""),
                f"Add one with: --methods.{parts[1]} CLASS (all classes: lightning-robust methods)",
            )


def parse_refusal(
    error: Exception, options: Collection[str], config: dict[str, Any], changes: Sequence[str]
) -> UsageError:
    """Say in a few lines why a configuration was not accepted.

    Args:
        error: What the parser raised.
        options: Every option that the parser knows, with dots.
        config: The recipe, to say where the wrong key stands.
        changes: Options of the command line, for the same reason.
    """
    text = str(error)
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return _unknown_option(found[1], options)
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        return _unknown_option(f"{found[1]}.{found[2]}", options)
    classes = _CLASS.findall(text)
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        if not classes:
            return _unknown_option(found[1], options)
        return _unknown_argument(classes[-1], found[1], config, changes)
    if found := re.search(
        r"- Expected a <class '(float|int)'>\n.*- Expected a dot import path string: (\S+)", text, re.S
    ):
        # a number that may also be an object: what was typed is more likely to be meant as the number
        return _wrong_value(text, f"Expected a {found[1]} or the name of a class", found[2], classes)
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return UsageError(
            f"There is no class called `{found[1]}`{_where(text)}.",
            did_you_mean(found[1], class_names()),
            "A class of your own needs its full path, for example mypackage.module.MyClass.",
        )
    if found := re.search(r"the following arguments are required: (.+)", text):
        owner = f"{_short(classes[-1])} " if classes else "The configuration "
        return UsageError(f"{owner}needs a value for `{found[1].strip()}`{_where(text)}.")
    if found := re.search(r"(Expected a[^\n]*?)\.? Got value: ([^\n]*)", text):
        return _wrong_value(text, found[1], found[2], classes)
    return UsageError("The configuration is not accepted:", *_informative(text))


def build_refusal(error: BaseException) -> UsageError:
    """Say in a few lines why something could not be built: the message of the constructor that refused.

    Args:
        error: What was raised while the configuration was built.
    """
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    message = str(root) or type(root).__name__
    if isinstance(root, KeyError | AttributeError | ImportError | AssertionError):
        message = f"{type(root).__name__}: {message}"
    return UsageError(*[line for line in message.splitlines() if line.strip()][:6])


def _unknown_option(given: str, options: Collection[str]) -> UsageError:
    name = given.removeprefix("--").partition("=")[0]
    group = name.partition(".")[0]
    groups = _groups(options)
    if group not in groups:
        hint = did_you_mean(group, groups) or f"The parts of a recipe are: {', '.join(sorted(groups))}."
    else:
        hint = did_you_mean(name, [option for option in options if option.startswith(f"{group}.")])
    return UsageError(f"There is no option `{name}`.", hint)


def _groups(options: Collection[str]) -> set[str]:
    return {option.partition(".")[0] for option in options}


def _unknown_argument(class_path: str, key: str, config: dict[str, Any], changes: Sequence[str]) -> UsageError:
    known = _arguments(class_path)
    where = _locate(key.split(".")[-1], config, changes)
    return UsageError(
        f"{where or 'The configuration'}: {_short(class_path)} has no option `{key}`.",
        did_you_mean(key, known),
        f"Its options: {', '.join(known)}." if known else "It has no options.",
    )


def _wrong_value(text: str, expectation: str, got: str, classes: Sequence[str]) -> UsageError:
    key = _KEY.findall(text)[-1] if _KEY.search(text) else "value"
    owner = f" of {_short(classes[-1])}" if classes else ""
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expectation).removeprefix("Expected ")
    kind = re.sub(r"\ba int\b", "an integer", re.sub(r"\ba typing\.Literal\[(.*)\]", r"one of \1", kind))
    return UsageError(f"Expected `{key}`{owner} to be {kind} but got {got}.")


def _informative(text: str) -> list[str]:
    kept = [line for line in text.splitlines() if line.strip() and not _NOISE.match(line)]
    return [line.strip().removeprefix("- ") for line in kept][:5]


def _where(text: str) -> str:
    keys = _KEY.findall(text)
    return f" (in `{'.'.join(keys)}`)" if keys else ""


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _arguments(class_path: str) -> list[str]:
    found = find_class(class_path)
    if found is None:
        return []
    return [parameter.name for parameter in constructor_parameters(found)]


def _locate(key: str, config: dict[str, Any], changes: Sequence[str]) -> str:
    for word in changes:
        path = word.partition("=")[0]
        if path.startswith("--") and path.rpartition(".")[2] == key:
            return path
    return next(iter(_paths(key, config, "")), "")


def _paths(key: str, value: Any, prefix: str) -> list[str]:
    if not isinstance(value, dict):
        return []
    found = []
    for name, inner in value.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        found += [path] if name == key else _paths(key, inner, path)
    return found

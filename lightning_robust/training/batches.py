# SPDX-License-Identifier: Apache-2.0
"""Reading inputs and targets out of somebody else's batch, and putting new ones back."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["BatchAdapter", "RepeatableBatch", "loss_of", "replace_loss"]

INPUT_KEYS = ("image", "images", "x", "input", "inputs", "pixel_values", "img")
TARGET_KEYS = ("label", "labels", "y", "target", "targets")


class BatchAdapter:
    """Reads ``(x, y)`` from a batch and writes them back into a new one of the same form.

    Pairs and longer sequences hold the input first and the target second (a third entry, an index say, is kept);
    mappings are searched for the usual keys. The user's batch is never changed.

    Args:
        input_key: key (mapping) or position (sequence) of the input; found by itself when ``None``.
        target_key: key or position of the target; found by itself when ``None``.

    Raises:
        TypeError: the batch is neither a sequence nor a mapping, or its entries are not tensors.
        KeyError: a mapping has none of the usual keys.

    Example:
        >>> import torch
        >>> adapter = BatchAdapter()
        >>> x, y = adapter.unpack({"image": torch.zeros(2, 3), "label": torch.ones(2)})
        >>> sorted(adapter.repack({"image": x, "label": y, "id": 7}, x=x + 1))
        ['id', 'image', 'label']
    """

    # a number comes first, so that "0" on a command line is a position
    def __init__(self, input_key: int | str | None = None, target_key: int | str | None = None) -> None:
        self.input_key = input_key
        self.target_key = target_key

    def __repr__(self) -> str:
        return f"BatchAdapter(input_key={self.input_key!r}, target_key={self.target_key!r})"

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return input and target of ``batch``."""
        return self.input_of(batch), self.target_of(batch)

    def input_of(self, batch: Any) -> Tensor:
        """Return the input of ``batch``, whatever its target is."""
        return self._entry(batch, 0)

    def target_of(self, batch: Any) -> Tensor:
        """Return the target of ``batch``."""
        return self._entry(batch, 1)

    def repack(self, batch: Any, x: Tensor | None = None, y: Tensor | None = None) -> Any:
        """Return a batch like ``batch`` with the input and/or the target replaced."""
        input_key, target_key = self._keys(batch)
        new = {key: value for key, value in ((input_key, x), (target_key, y)) if value is not None}
        if isinstance(batch, Mapping):
            return _like_mapping(batch, {**batch, **new})
        return _like_sequence(batch, [new.get(index, entry) for index, entry in enumerate(batch)])

    def first(self, batch: Any, count: int) -> Any:
        """Return a batch of the first ``count`` samples: every tensor with one row per sample is cut.

        Args:
            batch: the batch.
            count: number of samples.
        """
        x = self.input_of(batch)

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != len(x):
                return leaf
            return leaf[:count]

        if any(isinstance(leaf, Mapping) for leaf in tree_leaves(batch)):  # a container that torch does not know
            return self.repack(batch, x=cut(x), y=cut(self.target_of(batch)))
        return tree_map(cut, batch)

    def _entry(self, batch: Any, which: int) -> Tensor:
        key = self._keys(batch)[which]
        value = batch[key]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected entry {key!r} of the batch to be a tensor but got {type(value).__name__}; name the right "
                "entries with batch=BatchAdapter(input_key=..., target_key=...)."
            )
        return value

    def _keys(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            return (
                self.input_key if self.input_key is not None else _find(batch, INPUT_KEYS, "input_key"),
                self.target_key if self.target_key is not None else _find(batch, TARGET_KEYS, "target_key"),
            )
        if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
            return (
                self.input_key if self.input_key is not None else 0,
                self.target_key if self.target_key is not None else 1,
            )
        raise TypeError(
            f"Cannot read inputs and targets from a batch of type {type(batch).__name__}: expected a sequence "
            "(input, target, ...) or a mapping; make the loader return one, or subclass BatchAdapter and pass it as "
            "batch=..."
        )


def _find(batch: Mapping[Any, Any], names: Sequence[str], argument: str) -> str:
    for name in names:
        if name in batch:
            return name
    raise KeyError(
        f"The batch has the keys {sorted(map(str, batch))}, none of {list(names)}; name the right one with "
        f"batch=BatchAdapter({argument}=...)."
    )


def _like_mapping(batch: Mapping[Any, Any], content: dict[Any, Any]) -> Any:
    # Hugging Face batches and the like are built from a dictionary; plain dictionaries stay plain.
    return content if type(batch) is dict else type(batch)(content)  # type: ignore[call-arg]


def _like_sequence(batch: Sequence[Any], content: list[Any]) -> Any:
    if hasattr(batch, "_fields"):  # a namedtuple takes its entries one by one
        return type(batch)(*content)
    return type(batch)(content)  # type: ignore[call-arg]


class RepeatableBatch:
    """A batch that a step may take apart and that is whole again for the next pass.

    Containers are copied, tensors are not: what a step pops or replaces in its batch is there again in a fresh copy.

    Args:
        batch: the batch before any pass.

    Raises:
        RuntimeError: from :meth:`fresh`, if a pass changed a tensor of the batch in place.

    Example:
        >>> batch = RepeatableBatch({"x": 1, "y": 2})
        >>> batch.fresh().pop("y"), batch.fresh()
        (2, {'x': 1, 'y': 2})
    """

    def __init__(self, batch: Any) -> None:
        self._batch = tree_map(lambda leaf: leaf, batch)
        self._versions = [(leaf, leaf._version) for leaf in tree_leaves(batch) if _counts_changes(leaf)]

    def fresh(self) -> Any:
        """A copy for one pass."""
        if any(leaf._version != version for leaf, version in self._versions):
            raise RuntimeError(
                "training_step changes a tensor of its batch in place, so evaluating it again would apply the change "
                "twice; write x = (x - mean) / std instead of x.sub_(mean).div_(std), or prepare batches in "
                "on_after_batch_transfer."
            )
        return tree_map(lambda leaf: leaf, self._batch)


def _counts_changes(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_inference()


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a ``training_step`` returned: the tensor itself, entry ``"loss"`` of a mapping, or ``None``.

    Args:
        output: return value of a training step.

    Raises:
        TypeError: the output holds no loss.
    """
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss: Tensor = output["loss"]
        return loss
    raise TypeError(
        f"Expected training_step to return a loss tensor, a mapping with a 'loss' tensor, or None but got "
        f"{type(output).__name__}."
    )


def replace_loss(output: Any, loss: Tensor) -> Any:
    """Return ``output`` with its loss replaced, in the same form; the given object stays as it is.

    Args:
        output: return value of a training step.
        loss: the scalar that takes the place of the loss.
    """
    if isinstance(output, Mapping):
        return _like_mapping(output, {**output, "loss": loss})
    return loss

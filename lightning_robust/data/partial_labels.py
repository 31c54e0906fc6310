# SPDX-License-Identifier: Apache-2.0
"""Batches in which only some samples have labels, for semi-supervised objectives."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_robust.training import BatchAdapter

__all__ = ["NO_LABEL", "LabelledAndUnlabelled", "PartialLabels"]

#: The label of samples that have none.
NO_LABEL = -100


class PartialLabels(Dataset[tuple[Any, ...]]):
    """A data set of which only some labels are shown; the label of the others is -100.

    Args:
        dataset: pairs ``(image, label)``, or longer sequences that begin so.
        labelled: positions of the samples whose labels are shown.

    Raises:
        IndexError: a position outside of the data set.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_robust.data import PartialLabels
        >>> dataset = PartialLabels(TensorDataset(torch.rand(4, 3), torch.arange(4)), labelled=[0, 2])
        >>> [int(label) for _, label in dataset]
        [0, -100, 2, -100]
    """

    def __init__(self, dataset: Dataset[Any], labelled: Sequence[int]) -> None:
        self.dataset = dataset
        self.labelled = frozenset(int(index) for index in labelled)
        outside = [index for index in self.labelled if not 0 <= index < len(self)]
        if outside:
            raise IndexError(
                f"Expected `labelled` to be positions in a data set of {len(self)} samples but got {outside[0]}."
            )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no sample {index} in a data set of {len(self)}.")
        image, label, *rest = self.dataset[index]
        if index not in self.labelled:
            label = torch.full_like(label, NO_LABEL) if isinstance(label, Tensor) else NO_LABEL
        return (image, label, *rest)


class LabelledAndUnlabelled(BatchAdapter):
    """Reads the batches that Lightning's ``CombinedLoader`` makes of a labelled and an unlabelled loader.

    Both are one batch for the objective, labelled samples first; the labels of the others are -100, also where their
    data set has some.

    Args:
        labelled: key of the labelled part, a pair ``(image, label)`` or a mapping.
        unlabelled: key of the unlabelled part, images or something that begins with or has them.

    Raises:
        KeyError: the batch has no such part.

    Example:
        >>> import torch
        >>> from lightning_robust.data import LabelledAndUnlabelled
        >>> batch = {"labelled": (torch.rand(2, 3), torch.tensor([0, 1])), "unlabelled": torch.rand(3, 3)}
        >>> x, y = LabelledAndUnlabelled().unpack(batch)
        >>> x.shape, y
        (torch.Size([5, 3]), tensor([   0,    1, -100, -100, -100]))
    """

    pairs: ClassVar[BatchAdapter] = BatchAdapter()
    images: ClassVar[BatchAdapter] = BatchAdapter(target_key=1)  # told, so that it need not be there

    def __init__(self, labelled: str = "labelled", unlabelled: str = "unlabelled") -> None:
        super().__init__()
        self.labelled = labelled
        self.unlabelled = unlabelled

    def __repr__(self) -> str:
        return f"LabelledAndUnlabelled(labelled={self.labelled!r}, unlabelled={self.unlabelled!r})"

    @override
    def input_of(self, batch: Any) -> Tensor:
        return torch.cat([self.pairs.input_of(self._part(batch, self.labelled)), self._images(batch)])

    @override
    def target_of(self, batch: Any) -> Tensor:
        labels = self.pairs.target_of(self._part(batch, self.labelled))
        return torch.cat([labels, labels.new_full((len(self._images(batch)),), NO_LABEL)])

    def _images(self, batch: Any) -> Tensor:
        part = self._part(batch, self.unlabelled)
        if isinstance(part, Tensor):
            return part
        if isinstance(part, Sequence) and len(part) == 1:  # of a TensorDataset(images)
            images: Tensor = part[0]
            return images
        return self.images.input_of(part)

    def _part(self, batch: Any, name: str) -> Any:
        if not isinstance(batch, Mapping) or name not in batch:
            found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise KeyError(
                f"Expected a batch with the part {name!r} but got {found}; train with "
                f"CombinedLoader({{{self.labelled!r}: ..., {self.unlabelled!r}: ...}}, 'max_size_cycle')."
            )
        return batch[name]

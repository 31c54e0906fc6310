# SPDX-License-Identifier: Apache-2.0
"""How the logits of a teacher become rows of small numbers, and logits again."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Arrays", "StoredDtype", "decode_rows", "encode_rows", "row_layout"]

Arrays = dict[str, NDArray[Any]]
#: Types of the stored numbers.
StoredDtype = str


def row_layout(rows: int, num_classes: int, dtype: StoredDtype, top_k: int | None) -> dict[str, tuple[Any, ...]]:
    """Shape and type of each array of a cache, by name.

    Args:
        rows: number of samples, or of samples and variants.
        num_classes: number of classes.
        dtype: ``"float16"`` or ``"float32"``.
        top_k: kept classes per row; all when ``None``.

    Example:
        >>> row_layout(5, 3, "float16", None)
        {'logits': ((5, 3), 'float16'), 'offset': ((5,), 'float32')}
    """
    if top_k is None:
        logits = {"logits": ((rows, num_classes), dtype)}
        return logits if dtype == "float32" else {**logits, "offset": ((rows,), "float32")}
    return {
        "logits": ((rows, top_k), dtype),
        "offset": ((rows,), "float32"),
        "classes": ((rows, top_k), "uint16" if num_classes <= 2**16 else "int32"),
        "rest": ((rows,), "float32"),
    }


def encode_rows(
    logits: Tensor, *, dtype: StoredDtype = "float16", top_k: int | None = None, labels: Tensor | None = None
) -> Arrays:
    r"""Turn logits into the rows of a cache.

    All classes in float32 stay as they are. In float16 the row's maximum :math:`m` is subtracted and stored apart in
    float32, so that the rounding error is relative to the distance from the largest logit. With ``top_k`` the log
    probabilities of the most probable classes are stored with their numbers, and the log of what all the others have
    together; the label's class takes the place of the last one where it is not among them.

    Args:
        logits: ``[B, C]``.
        dtype: type of the stored numbers.
        top_k: kept classes per row; all when ``None``.
        labels: classes of the samples, ``[B]``, for ``top_k``.

    Raises:
        ValueError: the logits are not finite or too far apart for float16, or labels are missing or out of range.

    Example:
        >>> encode_rows(torch.tensor([[1.0, 3.0]]))
        {'logits': array([[-2.,  0.]], dtype=float16), 'offset': array([3.], dtype=float32)}
    """
    logits = logits.detach().cpu().float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("The teacher answered with logits that are NaN or infinite, which no cache can be made of.")
    if top_k is None:
        if dtype == "float32":
            return {"logits": logits.numpy()}
        offset = logits.amax(1)
        return {"logits": _rounded(logits - offset[:, None], dtype), "offset": offset.numpy()}
    log_p = logits.double().log_softmax(1)
    kept = log_p.topk(top_k).indices
    target = _checked_labels(labels, logits)
    without = ~(kept == target[:, None]).any(1)
    kept[without, -1] = target[without]
    return {
        "logits": _rounded(log_p.gather(1, kept), dtype),
        "offset": logits.double().logsumexp(1).float().numpy(),
        "classes": kept.numpy(),
        "rest": log_p.scatter(1, kept, -math.inf).logsumexp(1).float().numpy(),
    }


def decode_rows(rows: Mapping[str, NDArray[Any]], num_classes: int) -> Tensor:
    """Turn rows of a cache into float32 logits ``[B, num_classes]``, in memory of their own.

    Args:
        rows: what :func:`encode_rows` returned, or the same rows of the stored arrays.
        num_classes: number of classes.

    Example:
        >>> decode_rows(encode_rows(torch.tensor([[1.0, 3.0]])), 2)
        tensor([[1., 3.]])
    """
    # a copy: losses may write into what they are given
    logits = torch.from_numpy(rows["logits"]).to(torch.float32, copy=True)
    if "classes" in rows:
        kept = torch.from_numpy(rows["classes"].astype(np.int64))
        spread = torch.from_numpy(rows["rest"].astype(np.float32)) - math.log(num_classes - kept.shape[1])
        logits = spread[:, None].repeat(1, num_classes).scatter_(1, kept, logits)
    if "offset" in rows:
        logits += torch.from_numpy(rows["offset"].astype(np.float32))[:, None]
    return logits


def _rounded(values: Tensor, dtype: StoredDtype) -> NDArray[Any]:
    rounded = values.to(getattr(torch, dtype))
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(
            f"Logits of the teacher lie {-float(values.min()):.0f} below the largest of their row, too far for "
            'float16; store them with dtype="float32".'
        )
    stored: NDArray[Any] = rounded.numpy()
    return stored


def _checked_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise ValueError(
            "`top_k` always keeps the probability of the label, so it needs one class for each sample; let the data "
            "set return (image, label), or keep all classes."
        )
    labels = labels.detach().cpu().long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"Expected labels from 0 to {logits.shape[1] - 1}, the classes of the teacher, but got "
            f"{int(labels.min())} to {int(labels.max())}; keep all classes instead of `top_k`, or map the teacher's "
            "classes with TeacherSource(classes=...)."
        )
    return labels

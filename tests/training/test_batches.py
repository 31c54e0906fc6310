from collections import UserDict, namedtuple

import pytest
import torch

from lightning_robust.training import BatchAdapter, loss_of, replace_loss

X, Y = torch.zeros(2, 3), torch.ones(2)
Pair = namedtuple("Pair", ["image", "label"])


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], (X, Y, 7), Pair(X, Y), {"image": X, "label": Y, "id": 7}, UserDict(pixel_values=X, labels=Y)],
    ids=["tuple", "list", "triple", "namedtuple", "dict", "mapping"],
)
def test_unpack_and_repack_keep_the_form(batch):
    adapter = BatchAdapter()
    x, y = adapter.unpack(batch)
    assert x is X
    assert y is Y
    new = adapter.repack(batch, x=X + 1, y=Y + 1)
    assert type(new) is type(batch)
    assert len(new) == len(batch)
    x, y = adapter.unpack(new)
    assert torch.equal(x, X + 1)
    assert torch.equal(y, Y + 1)
    assert adapter.unpack(batch)[0] is X
    if len(batch) == 3:
        assert any(isinstance(entry, int) and entry == 7 for entry in (new.values() if isinstance(new, dict) else new))


def test_named_entries():
    adapter = BatchAdapter(input_key="a", target_key="b")
    assert adapter.unpack({"a": X, "b": Y, "x": 0})[0] is X
    assert BatchAdapter(input_key=1, target_key=0).unpack((Y, X))[0] is X


def test_unreadable_batches_are_refused_with_the_remedy():
    adapter = BatchAdapter()
    with pytest.raises(KeyError, match=r"none of .*'image'.*BatchAdapter\(input_key="):
        adapter.unpack({"picture": X, "label": Y})
    with pytest.raises(TypeError, match="batch of type Tensor"):
        adapter.unpack(X)
    with pytest.raises(TypeError, match="batch of type tuple"):
        adapter.unpack((X,))
    with pytest.raises(TypeError, match="entry 1 of the batch to be a tensor but got list"):
        adapter.unpack((X, [1, 2]))


def test_loss_in_every_form():
    loss = torch.tensor(1.0)
    output = {"loss": loss, "extra": 3}
    assert loss_of(None) is None
    assert loss_of(loss) is loss
    assert loss_of(output) is loss
    new = replace_loss(output, loss + 1)
    assert new == {"loss": torch.tensor(2.0), "extra": 3}
    assert output["loss"] is loss
    assert replace_loss(loss, loss + 1) == 2
    with pytest.raises(TypeError, match="got float"):
        loss_of(1.0)
    with pytest.raises(TypeError, match="got dict"):
        loss_of({"logits": loss})

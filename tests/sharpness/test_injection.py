import pytest
import torch

from lightning_robust.sharpness import inject_gradients


def test_value_and_gradients_are_delivered_scaled():
    parameters = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    gradients = [torch.randn(3), torch.randn(2, 2)]
    expected = [g.clone() * 0.25 for g in gradients]
    loss = inject_gradients(torch.tensor(1.5, requires_grad=True), parameters, gradients)
    assert loss.item() == 1.5
    (loss / 4).backward()
    torch.testing.assert_close([p.grad for p in parameters], expected)


def test_gradients_are_handed_over_without_a_copy():
    parameter = torch.zeros(5, requires_grad=True)
    gradients = [torch.ones(5)]
    pointer = gradients[0].data_ptr()
    loss = inject_gradients(torch.tensor(0.0), [parameter], gradients)
    del gradients
    loss.backward()
    assert parameter.grad.data_ptr() == pointer


def test_a_second_backward_is_refused():
    parameter = torch.zeros(1, requires_grad=True)
    loss = inject_gradients(torch.tensor(0.0), [parameter], [torch.ones(1)])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backpropagated once"):
        loss.backward()

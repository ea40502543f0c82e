"""Small parameters as views into one flat buffer."""

import numpy as np
import pytest
import torch
from torch import nn

from skqlora.model.flat import FlatParameters
from skqlora.training.optimizer import make_optimizer


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (300,), (16, 64)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return {str(i): nn.Parameter(value) for i, value in enumerate(values)}


def test_flat_parameters_keep_their_values_and_start_at_blocks():
    expected, parameters = make_parameters(), make_parameters()
    flat = FlatParameters(parameters)
    assert flat.leaf.numel() == 256 + 512 + 1024
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name])
        offset = parameter.data_ptr() - flat.leaf.data_ptr()
        assert offset % (256 * 4) == 0


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw"])
def test_flat_update_equals_the_update_of_single_tensors(optim):
    parameters = make_parameters()
    flat = FlatParameters(parameters)
    flat.attach_gradients()
    single, parameters = list(make_parameters().values()), list(parameters.values())
    one = make_optimizer("adamw", [{"params": single, "lr": 1e-2, "weight_decay": 0.1}])
    other = make_optimizer(optim, [{"params": [flat.leaf], "lr": 1e-2, "weight_decay": 0.1}])
    for step in range(3):
        flat.gradient.zero_()
        one.zero_grad()
        for group in (single, parameters):
            sum((p.sin() * (step + 1)).sum() for p in group).backward()
        one.step()
        other.step()
    for expected, parameter in zip(single, parameters, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_values_are_written_and_read_by_name():
    flat = FlatParameters(make_parameters())
    values = {
        name: np.full(value.shape, 7, np.float32) for name, value in flat.state_dict().items()
    }
    flat.load_state_dict(values)
    assert flat.leaf.sum() == 7 * (15 + 300 + 1024)  # the gaps are zero
    read = flat.state_dict()
    flat.leaf.data.zero_()
    for name, value in read.items():
        np.testing.assert_array_equal(value, values[name])


def test_parameters_of_another_precision_become_float32():
    parameter = nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))
    FlatParameters({"only": parameter})
    assert parameter.dtype == torch.float32


def test_gradients_are_freed():
    parameters = make_parameters()
    flat = FlatParameters(parameters)
    flat.attach_gradients()
    sum(p.sum() for p in parameters.values()).backward()
    assert flat.gradient.sum() == 15 + 300 + 1024
    flat.detach_gradients()
    assert all(p.grad is None for p in (flat.leaf, *parameters.values()))

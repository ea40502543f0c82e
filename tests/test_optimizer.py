"""Flat parameters and the pool of paged memory."""

import pytest
import torch
from torch import nn

from skqlora import optimizer as optimizer_module
from skqlora.optimizer import FlatParameters, PagedPool, make_optimizer


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (300,), (16, 64)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_flat_parameters_keep_their_values_and_start_at_blocks():
    expected = [p.detach().clone() for p in make_parameters()]
    parameters = make_parameters()
    flat = FlatParameters(parameters)
    assert flat.leaf.numel() == 256 + 512 + 1024
    for parameter, values in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, values)
        offset = parameter.data_ptr() - flat.leaf.data_ptr()
        assert offset % (256 * 4) == 0


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw"])
def test_flat_update_equals_the_update_of_single_tensors(optim):
    single, parameters = make_parameters(), make_parameters()
    flat = FlatParameters(parameters)
    one = make_optimizer("adamw", [{"params": single, "lr": 1e-2, "weight_decay": 0.1}])
    other = make_optimizer(optim, [{"params": [flat.leaf], "lr": 1e-2, "weight_decay": 0.1}])
    for step in range(3):
        flat.zero_grad()
        one.zero_grad()
        for group in (single, parameters):
            sum((p.sin() * (step + 1)).sum() for p in group).backward()
        one.step()
        other.step()
    for expected, parameter in zip(single, parameters, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_pool_gives_the_smallest_fitting_buffer_zeroed(monkeypatch):
    allocated = []

    def allocate(n_bytes, dtype, device):
        allocated.append(n_bytes)
        return torch.empty(n_bytes, dtype=dtype)

    monkeypatch.setattr(optimizer_module.bnb.functional, "get_paged", allocate)
    monkeypatch.setattr(optimizer_module.bnb.functional, "fill", lambda buffer, x: buffer.fill_(x))
    device = torch.device("cuda", 0)
    pool = PagedPool()
    large, small = pool.take(1000, device), pool.take(100, device)
    large.fill_(7), small.fill_(7)
    pool.give_back(large, device), pool.give_back(small, device)
    assert pool.take(80, device) is small
    assert pool.take(80, device) is large
    assert not large[:80].any()
    assert pool.take(80, torch.device("cuda", 1)).numel() == 80
    assert allocated == [1000, 100, 80]

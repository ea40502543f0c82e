"""The pool of paged memory."""

import torch

from skqlora.training import optimizer as optimizer_module
from skqlora.training.optimizer import PagedPool


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

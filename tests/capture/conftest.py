"""The emulation of CUDA graphs as a fixture."""

import pytest
import torch
from emulated_cuda import Cuda

from pyro_metassm import capture


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    fake = Cuda()
    names = [
        "current_stream",
        "default_stream",
        "Stream",
        "graph_pool_handle",
        "CUDAGraph",
        "stream",
        "graph",
    ]
    for name in names:
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(capture, "DEVICE", "cpu")
    monkeypatch.setattr(capture, "_stream", capture._stream.__wrapped__)
    monkeypatch.setenv("METASSM_NATIVE", "0")  # C would answer first
    monkeypatch.delenv("METASSM_CUDA_GRAPHS", raising=False)
    return fake

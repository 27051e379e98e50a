"""One thread, as the networks here are so small that a second waits more than it computes; and memory that tells."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_lucky_memory():
    """Fill fresh memory with 3e38 (any float type's 0x7f bytes), where the C library is glibc.

    Of small 3D maps PyTorch's CPU build computes a bfloat16 convolution's weight gradient from memory that it has not
    written (seen with 2.15; networks avoid it). That memory is mostly harmless, and now and then NaN.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_perturb, fill = -6, 0x7F
    if mallopt is not None:
        mallopt(m_perturb, fill ^ 0xFF)
    yield
    if mallopt is not None:
        mallopt(m_perturb, 0)

"""Shared by all tests: one thread for torch (bit-identical runs), and the CPU.

The tests are written for the CPU: they compare tensors with the host's, and fork, which a process that has touched a
GPU cannot. So GPUs are hidden from them and from the processes that they start. `pytest -m gpu` leaves the GPUs in
sight: its tests are written for one, and start new processes instead of forking. tests/test_other_device.py walks every
verb over a device that is not the CPU on any machine.
"""

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Before any test module, and with it torch, is imported."""
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def wants_gpu(marks):
    """Whether an expression of -m chooses the tests that need a GPU."""
    return bool(re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", marks or "")))

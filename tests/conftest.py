"""Shared by all tests: several processes, one thread for torch in each of them (bit-identical runs), and the CPU.

**Processes.** `pytest` spreads the tests over several processes (pytest-xdist, `-n auto`): one for each core that it
may use. tests/helpers/workers.py bounds them, and says when one process is enough. Each process begins with its own
stretch of the tests, in their order, so that what a file prepares once (fixtures of scope "module") is prepared by one
of them; whoever is done first takes over half of what another has left (`--dist worksteal`). So no test may rely on
another one or on its place in the order, and the cases of a test have the same names in every process.

**The CPU.** The tests compare tensors with the host's, and fork, which a process that has touched a GPU cannot. So GPUs
are hidden from them and from the processes that they start. `pytest -m gpu` leaves the GPUs in sight: its tests are
written for one, and start new processes instead of forking. tests/test_other_device.py walks every verb over a device
that is not the CPU on any machine.

**The disk.** What a test writes is deleted when it has passed. It lies in memory where there is room (quick_folder),
for the package syncs every file that it writes, and thousands of such waits are minutes.

**Where things are.** The folders mirror the rooms of the package. What several tests use is in tests/helpers, which
pyproject.toml puts on the path; tests/test_tests.py holds this. What takes more than 20 seconds has the marker `slow`.
"""

import gc
import os
import sys
from types import SimpleNamespace

import pytest
from workers import count_workers, quick_folder, wants_gpu

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", quick_folder())  # of tmp_path


def pytest_configure(config):
    """Before any test module, and with it torch, is imported."""
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection():
    """Importing makes no garbage; to look for it again and again takes a third of the time."""
    gc.disable()


def pytest_collection_finish():
    """What is imported stays: the collector need not walk over it, nor a fork copy its marks. It comes rarely."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if "torch" in sys.modules and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        let_autograd_count_the_devices()


def let_autograd_count_the_devices():
    """It does so once, at its first backward pass. What simulates a GPU, as torch does where it compiles or exports,
    would be counted as one, and no fork of a process with such a device can run backward."""
    import torch

    torch.ones(1, requires_grad=True).sum().backward()


def pytest_xdist_auto_num_workers(config):
    """What `-n auto` means; 0 runs the tests in this process, as `-n 0` does."""
    return count_workers(config)


def pytest_make_parametrize_id(val, argname):
    """A long text is no name of a case: one with a clock in it would be another name in every process."""
    return argname if isinstance(val, str | bytes) and len(val) > 120 else None


@pytest.fixture
def forked_workers(monkeypatch):
    """The processes of --processes are forks of the one that starts them: the same, without seconds of imports."""
    from new_process import Worker
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    start = SubprocessHandler._popen.__globals__
    if "Popen" in start:
        monkeypatch.setitem(start, "Popen", Worker)
    else:  # torch 2.6
        monkeypatch.setitem(start, "subprocess", SimpleNamespace(Popen=Worker))

"""TF32 is one switch, whichever of torch's two sets of names it is read by."""

import pytest
import torch

from alphaflow_cli.runtime.precision import (
    AT_START,
    as_torch_begins,
    encoder_precision,
    has_bf16,
    set_tf32,
    tf32,
    true_float32,
)
from alphaflow_cli.runtime.processes import join_world

CPU = torch.device("cpu")


def modes():
    """By every name that this torch has; a reader raises where two of them disagree."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    read = {matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision() == "high"}
    if hasattr(cudnn, "conv"):
        read |= {matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"}
    return read


@pytest.fixture(autouse=True)
def as_before():
    with tf32(False):
        yield


@pytest.mark.parametrize("allowed", [True, False])
def test_every_name_tells_the_same(allowed):
    set_tf32(allowed)
    assert modes() == {allowed}
    join_world(allow_tf32=not allowed)
    assert modes() == {not allowed}


def test_an_nvidia_card_before_the_a100_has_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, there in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, now=capability: now)
        assert has_bf16(torch.device("cuda")) is there
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD counts otherwise
    assert has_bf16(torch.device("cuda"))
    assert not has_bf16(CPU)


@pytest.mark.parametrize("outside", [True, False])
def test_inside_and_afterwards_no_reader_finds_a_contradiction(outside):
    set_tf32(outside)
    with true_float32():
        assert modes() == {False}
        with encoder_precision("tf32", CPU):
            assert modes() == {True}
        with encoder_precision("fp32", CPU):
            assert modes() == {False}
        with encoder_precision("bf16", CPU):
            assert modes() == {False}
            assert torch.is_autocast_enabled("cpu")
        assert modes() == {False}
    assert modes() == {outside}


def test_the_setting_of_a_fresh_process_comes_back():
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("this torch has one set of names only")
    torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision = "none", "tf32"
    with true_float32():
        assert modes() == {False}
    assert (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision) == ("none", "tf32")


@pytest.mark.parametrize("outside", [True, False])
def test_scores_of_a_run_multiply_as_a_command_does_that_chose_nothing(outside):
    set_tf32(outside)
    with as_torch_begins():
        inside = (
            "tf32" in (torch.backends.cudnn.conv.fp32_precision,) if hasattr(torch.backends.cudnn, "conv") else None
        )
        assert inside in (AT_START[1] == "tf32", None)
        assert torch.backends.cudnn.allow_tf32 == (AT_START[1] == "tf32")
    assert modes() == {outside}

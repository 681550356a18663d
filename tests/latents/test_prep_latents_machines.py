"""`prep-latents` and `reference` on several machines: they share the work in a shared folder, and say where it is none.

Two processes on loopback stand for two machines, started with the variables of Slurm or by torchrun as two nodes.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_stores import prepare_latents
from new_process import Command, forget_joined

from alphaflow_cli.cli import run as cli
from alphaflow_cli.evaluate.reference import load_reference

pytestmark = pytest.mark.distributed
PREP = ["prep-latents", "glyphs:600", "--size", "16", "--out", "store"]
REFERENCE = ["reference", "glyphs:300", "--metrics", "fd-tiny", "-o", "r.safetensors"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def tasks(line, folders):
    """The command as two tasks of Slurm, each in its folder; exit codes and streams."""
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
    task |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    started = [
        Command(line, cwd=folder, env={**task, "SLURM_PROCID": str(i)}, first=forget_joined)
        for i, folder in enumerate(folders)
    ]
    ends = [each.communicate(timeout=120) for each in started]
    return [each.returncode for each in started], [out for out, _ in ends], [err for _, err in ends]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_tasks_of_slurm_make_the_store_of_one(tmp_path):
    codes, out, err = tasks(PREP, [tmp_path, tmp_path])
    assert codes == [0, 0], err
    assert [text.splitlines()[-1:] for text in out] == [["store"], []], "the first one prints for both"
    assert [text.count("prep-latents glyphs:600") for text in err] == [1, 0]
    one = prepare_latents("glyphs:600", tmp_path / "one", size=16, autoencoder="none", shown=False)
    assert contents(tmp_path / "store") == contents(one)


def apart(tmp_path):
    """Two folders of two machines that share nothing."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    return folders


def test_machines_that_share_no_folder_are_told_so_once_and_all_leave(tmp_path):
    codes, _, err = tasks(PREP, apart(tmp_path))
    assert codes == [1, 1]
    assert f"store: process 1 on {socket.gethostname()} does not see what process 0 wrote there. All machines" in err[1]
    assert "error" not in err[0]
    codes, _, err = tasks(REFERENCE, [tmp_path / "here", tmp_path / "there"])
    assert codes == [1, 1]
    assert "All machines need this folder, and the pictures under one path, on a shared file system" in err[1]


def test_what_the_first_machine_refuses_ends_all(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "letter.txt").touch()
    codes, _, err = tasks(PREP, [tmp_path, tmp_path])
    assert codes == [1, 1]
    assert "holds files that belong to no latent store" in err[0]
    assert "error" not in err[1]


def test_a_machine_whose_pictures_are_others_is_named_with_the_difference(tmp_path):
    for folder, names in zip(apart(tmp_path), ("ab", "ac"), strict=True):
        for name in names:
            (folder / "photos" / name).mkdir(parents=True)
            torch.save({}, folder / "photos" / name / "x.png")  # never opened
    shared = str(tmp_path / "store")
    line = ["prep-latents", "photos", "--size", "16", "--autoencoder", "none", "--out", shared]
    codes, _, err = tasks(line, [tmp_path / "here", tmp_path / "there"])
    assert codes == [1, 1]
    assert (
        "1 picture of the store not here, the first 'b/x.png'; 1 picture here not in the store, the first 'c/x.png'"
        in err[1]
    )


def test_the_estimate_of_many_processes_is_printed_once(tmp_path):
    codes, out, err = tasks([*PREP, "--estimate"], [tmp_path, tmp_path])
    assert codes == [0, 0], err
    assert out[0].startswith("pictures: 600")
    assert out[1] == ""


def test_two_tasks_of_slurm_measure_the_reference_of_one(tmp_path):
    codes, out, err = tasks(REFERENCE, [tmp_path, tmp_path])
    assert codes == [0, 0], err
    assert [text.splitlines()[-1:] for text in out] == [["r.safetensors"], []]
    one = [*REFERENCE[:-1], str(tmp_path / "one.safetensors"), "--work", str(tmp_path / "work")]
    assert cli(one) == 0
    two, alone = (load_reference(tmp_path / name).stats["tiny"] for name in ("r.safetensors", "one.safetensors"))
    torch.testing.assert_close(two.cov, alone.cov, rtol=1e-12, atol=1e-12)
    assert torch.equal(two.features, alone.features)


@pytest.mark.slow
@pytest.mark.parametrize("line", [PREP, REFERENCE])
def test_two_nodes_of_torchrun_share_the_work(line, tmp_path):
    port = free_port()
    head = [Path(sys.executable).parent / "torchrun", "--nnodes", "2", "--nproc-per-node", "1"]
    head += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    words = [*map(str, head), "-m", "alphaflow_cli", *line]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen(words, env=environment, **options) for _ in range(2)]
    ends = [each.communicate(timeout=200) for each in started]
    assert [each.returncode for each in started] == [0, 0], ends
    if line is PREP:
        one = prepare_latents("glyphs:600", tmp_path / "one", size=16, autoencoder="none", shown=False)
        assert contents(tmp_path / "store") == contents(one)
    else:
        assert load_reference(tmp_path / "r.safetensors").facts["count"] == 300

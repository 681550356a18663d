"""The riding tangent goes through the module's own forward, so the hooks that synchronise gradients fire."""

import os
import re
from dataclasses import fields

import pytest
import torch
from torch import distributed, multiprocessing, nn
from workload import Size, asking, build, draw, objective

from alphaflow_cli.train.step import Rows, training_step

TINY = Size(dim=32, depth=2, heads=4, latent=8)
TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def share_of(rows, rank, processes):
    """Every other row, r = t rows first."""
    places = [torch.arange(rows.n_equal)[rank::processes], torch.arange(rows.n_equal, len(rows.t))[rank::processes]]
    names = [f.name for f in fields(Rows) if f.name not in ("n_equal", "question", "factor", "guide", "ratio")]
    values = {name: getattr(rows, name)[torch.cat(places)] for name in names}
    return Rows(**values, n_equal=len(places[0]))


def sharded(net):
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


WRAP = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": sharded}


def one_process(rank, kinds, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows, settings = draw(TINY, 8, 0.5, seed=0, device="cpu", dtype=torch.float64), objective(guided=True, bf16=False)
    for kind in kinds:
        for alpha in (1.0, 0.5, 0.0):
            single, net = (build(TINY, seed=0, device="cpu", dtype=torch.float64) for _ in range(2))
            (training_step(single, single, rows, alpha=alpha, objective=settings).loss / 8).backward()
            wrapped = WRAP[kind](net)
            mine = asking(share_of(rows, rank, 2), settings)
            (training_step(wrapped, net, mine, alpha=alpha, objective=settings).loss / 4).backward()
            for a, b in zip(net.parameters(), single.parameters(), strict=True):
                grad = a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad
                torch.testing.assert_close(grad, b.grad, rtol=1e-12, atol=1e-13, msg=f"{kind}, α = {alpha}")
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then, after the right result


@pytest.mark.distributed
def test_gradients_on_two_processes_are_those_of_one(tmp_path):
    kinds = ["ddp", "fsdp2"] if TORCH >= (2, 13) else ["ddp"]  # FSDP2 on a CPU is whole from torch 2.13 on
    multiprocessing.start_processes(one_process, (kinds, str(tmp_path)), nprocs=2, start_method="fork")

"""What a GPU computes is what the CPU does: `pytest -m gpu`. Without a GPU the same tests run on the CPU.

Bounds: float64 1e-9 of the published numbers; float32 2e-5; bf16 2% of the whole gradient.
"""

from dataclasses import replace

import pytest
import torch
from golden_data import LOSS_META, assert_close, golden_case, network, tensor
from small_models import checkpoint_m, recipe_m
from torch import distributed as dist
from workload import Size, asking, build, draw, objective

from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.sample.generator import Generator
from alphaflow_cli.sample.walk import plan_walk
from alphaflow_cli.train.parallel import local, shard_network
from alphaflow_cli.train.step import training_step

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE = Size(dim=384, depth=4, heads=6, latent=16)
PHASES = (1.0, 0.5, 0.0)


def there(rows):
    """The rows on the device."""
    names = ("x", "noise", "t", "r", "y", "uniforms")
    return replace(rows, **{name: getattr(rows, name).to(DEVICE) for name in names})


def gradient(net, rows, alpha, settings):
    """The whole gradient in one vector, float64, on the host."""
    loss = training_step(net, net, rows, alpha=alpha, objective=settings).loss
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([local(grad).flatten() for grad in grads]).double().cpu()


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("case", sorted(LOSS_META))
def test_the_published_numbers_come_out_in_float64(case):
    which, meta, rows, settings = golden_case(case)
    net = network(which).to(DEVICE)
    result = training_step(net, net, there(rows), alpha=meta["alpha"], objective=settings)
    assert result.loss.item() / len(rows.t) == pytest.approx(meta["total_loss"], rel=1e-9, abs=1e-9)
    assert_close(result.target.cpu(), tensor("loss_f64.npz", f"{case}/target"))


@pytest.mark.parametrize("case", ["a1_b2cfg", "a05_b2cfg", "a0_b2cfg", "fm_nocfg"])
def test_the_published_targets_come_out_in_float32(case):
    which, meta, rows, settings = golden_case(case)
    net = network(which, torch.float32).to(DEVICE)
    single = {name: getattr(rows, name).float() for name in ("x", "noise", "t", "r", "uniforms")}
    result = training_step(net, net, there(replace(rows, **single)), alpha=meta["alpha"], objective=settings)
    assert (result.target.double().cpu() - tensor("loss_f64.npz", f"{case}/target")).abs().max() < 2e-5


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("alpha", PHASES)
def test_the_gradient_in_bf16_is_that_of_float32_to_two_percent(alpha, guided):
    net = build(WIDE, seed=0, device=str(DEVICE), dtype=torch.float32)
    rows = draw(WIDE, 16, 0.25, seed=1, device=str(DEVICE), dtype=torch.float32)
    exact, rounded = (gradient(net, rows, alpha, objective(guided=guided, bf16=bf16)) for bf16 in (False, True))
    assert apart(rounded, exact) < 0.02


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("alpha", PHASES)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_gradients_are_the_eager_ones(alpha, guided):
    size = replace(WIDE, depth=1)
    eager, compiled = (build(size, seed=0, device=str(DEVICE), dtype=torch.float32) for _ in range(2))
    compile_blocks(compiled, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    rows = draw(size, 16, 0.25, seed=1, device=str(DEVICE), dtype=torch.float32)
    settings = objective(guided=guided, bf16=False)
    assert apart(gradient(compiled, rows, alpha, settings), gradient(eager, rows, alpha, settings)) < 1e-5
    torch.compiler.reset()


def test_sample_i_is_sample_i_whatever_is_drawn_with_it():
    generator = Generator(checkpoint_m(recipe_m("fp32")), device=DEVICE)
    walk = plan_walk(generator.recipe, nfe=2)
    together = generator.latents(list(range(16)), [3] * 16, walk)
    for some in ([5, 2], [15, 0, 7]):
        assert torch.equal(generator.latents(some, [3] * len(some), walk), together[some])
    here = Generator(checkpoint_m(recipe_m("fp32")), device=torch.device("cpu"))
    torch.testing.assert_close(together.cpu(), here.latents(list(range(16)), [3] * 16, walk), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_one_process_of_many_has_the_gradient_of_one_alone(way, monkeypatch):
    if DEVICE.type == "cpu" and way == "fsdp2" and torch.__version__ < "2.13":
        pytest.skip("older torch shards no network on a CPU")
    size = replace(WIDE, depth=2)
    alone, net = (build(size, seed=0, device=str(DEVICE), dtype=torch.float32) for _ in range(2))
    rows = draw(size, 8, 0.25, seed=1, device=str(DEVICE), dtype=torch.float32)
    settings = objective(guided=True, bf16=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        if way == "fsdp2":
            shard_network(net, DEVICE, 1)
            wrapped = net
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(net)
        for alpha in PHASES:
            net.zero_grad(set_to_none=True)  # first: between forward and backward FSDP2 has other parameters
            training_step(wrapped, net, asking(rows, settings), alpha=alpha, objective=settings).loss.backward()
            ours = torch.cat([local(p.grad).flatten() for p in net.parameters()]).double().cpu()
            assert apart(ours, gradient(alone, asking(rows, settings), alpha, settings)) < 1e-6
    finally:
        dist.destroy_process_group()

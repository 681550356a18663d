"""Equal runs are equal on a GPU: what a step is made of, and the runs themselves where there is one (-m gpu)."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from train_helpers import assert_same, make_recipe, saved_step

from alphaflow_cli.cli import run
from alphaflow_cli.core.objective import interval_bins
from alphaflow_cli.model.build import build_network
from alphaflow_cli.nn.layers import PatchEmbed
from alphaflow_cli.nn.tangent import Dual
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.train.estimate import random_rows
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.step import Objective, training_step

# What torch.use_deterministic_algorithms says may differ from call to call on a GPU, by the operators' names. The label
# table's gradient (embedding_dense_backward) and index_copy are on that list too: the first did not differ when it was
# measured, the second writes every place once.
MAY_DIFFER = (
    "convolution", "convolution_backward", "index_add", "index_add_", "_index_put_impl_", "index_put", "index_put_",
    "scatter_add", "scatter_add_", "scatter_reduce", "scatter", "put_", "gather", "cumsum", "histc", "bincount",
    "median", "kthvalue", "upsample_bilinear2d_backward", "_adaptive_avg_pool2d_backward", "nll_loss_forward",
)  # fmt: skip


class Names(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_no_operator_of_a_step_adds_in_another_order_at_every_call(tmp_path, alpha, guided):
    recipe = make_recipe(tmp_path, *(() if guided else ("guidance.omega=1", "guidance.kappa=0")))
    net = build_network(recipe)
    optimiser, sums = Optimiser(net, recipe), Sums(torch.device("cpu"))
    rows = random_rows(recipe, 8, 2, torch.device("cpu"))
    with Names() as names:
        result = training_step(net, net, rows, alpha=alpha, objective=Objective.of(recipe))
        result.loss.backward()
        sums.add(result.terms, rows.t, rows.r, rows.n_equal)
        optimiser.step(0)
    assert {"addmm", "embedding_dense_backward"} <= names.found
    assert not names.found & set(MAY_DIFFER)


@pytest.mark.parametrize(("size", "patch", "channels"), [(8, 2, 4), (12, 4, 3), (6, 1, 4)])
def test_the_patch_embedding_is_the_convolution_whose_weights_it_has(size, patch, channels):
    torch.manual_seed(0)
    embed = PatchEmbed(size, patch, channels, 16).double()
    z, dz = (torch.randn(5, channels, size, size, dtype=torch.float64) for _ in range(2))
    weight, bias = embed.proj.weight, embed.proj.bias
    assert weight.shape == (16, channels, patch, patch)

    def convolved(x, bias=None):
        return functional.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(embed(z), convolved(z, bias), **close)
    both = embed(Dual(z, dz[2:]))
    assert torch.equal(both.value, embed(z))
    assert not both.tangent.requires_grad
    torch.testing.assert_close(both.tangent, convolved(dz[2:]).detach(), **close)
    kick = torch.randn_like(embed(z))
    for ours, theirs in zip(
        torch.autograd.grad((embed(z) * kick).sum(), (weight, bias)),
        torch.autograd.grad((convolved(z, bias) * kick).sum(), (weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **close)


def test_a_latent_of_another_size_is_refused():
    with pytest.raises(AssertionError, match=r"\(1, 4, 6, 6\), 8"):
        PatchEmbed(8, 2, 4, 16)(torch.zeros(1, 4, 6, 6))


def test_bins_are_the_same_whatever_the_order_of_the_rows():
    t, r = torch.tensor([0.9, 0.5, 0.5, 0.3, 1.0]), torch.tensor([0.1, 0.5, 0.2, 0.2, 0.0])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    sums, counts = interval_bins(t, r, values, 4)
    assert sums.tolist() == [8.0, 4.0, 0.0, 17.0]
    assert counts.tolist() == [1.0, 1.0, 0.0, 2.0]


# --- on a GPU: pytest -m gpu ---


def train_line(out, *sets):
    line = ["train", "quickstart", "--out", str(out), "--micro-batch", "32"]
    for value in ("train.steps=120", "train.save_every=40", "train.sample_every=0", *sets):
        line += ["--set", value]
    return line


def new_process(line):
    return subprocess.Popen([sys.executable, "-m", "alphaflow_cli", *line])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # an error of one here would be a warning in a process of its own
@pytest.mark.parametrize("sets", [(), ("train.precision=bf16",), ("train.compile=true",)])
def test_equal_runs_and_a_killed_and_resumed_one_are_the_same_bits_on_a_gpu(tmp_path, sets):
    assert torch.cuda.is_available()
    killed = new_process(train_line(tmp_path / "three", *sets))
    other = new_process(train_line(tmp_path / "two", *sets))
    while not (tmp_path / "three" / "model.safetensors").exists():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert saved_step(tmp_path / "three") < 120
    assert run(train_line(tmp_path / "one", *sets)) == 0
    assert other.wait(600) == 0
    assert_same(tmp_path / "one", tmp_path / "two")
    assert run(train_line(tmp_path / "three", *sets)) == 0
    assert_same(tmp_path / "one", tmp_path / "three")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["b2-cfg", "xl2-cfg"])
def test_every_gradient_is_the_same_at_every_call_on_a_gpu(name, precision):
    recipe, device = load_recipe(name), torch.device("cuda")
    recipe = replace(recipe, train=replace(recipe.train, precision=precision, compile=False))
    net = build_network(recipe).to(device)
    draw = torch.Generator(device).manual_seed(0)
    for weight in net.parameters():  # the modulations begin at zero, and so would most gradients
        weight.data.add_(torch.randn(weight.shape, generator=draw, device=device) * 0.02)
    rows = random_rows(recipe, 32, 8, device)
    for alpha in (1.0, 0.5, 0.0):
        seen = []
        for _ in range(4):
            loss = training_step(net, net, rows, alpha=alpha, objective=Objective.of(recipe)).loss
            seen.append(torch.autograd.grad(loss, list(net.parameters())))
        for parameter, *grads in zip(dict(net.named_parameters()), *seen, strict=True):
            assert all(torch.equal(grads[0], each) for each in grads), (alpha, parameter)

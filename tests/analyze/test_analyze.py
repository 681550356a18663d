"""`alphaflow analyze`: known gradients on a linear network, resuming, and a probe that leaves training alone."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from analyzed_runs import analyze, train
from torch import nn
from train_helpers import fork

from alphaflow_cli.analyze import analyze as engine
from alphaflow_cli.analyze.summary import percentile, spread, summarise
from alphaflow_cli.cli import run as cli
from alphaflow_cli.core.conflict import cosine
from alphaflow_cli.recipe.schema import Guidance, Loss
from alphaflow_cli.train import conflict
from alphaflow_cli.train.step import Objective, Rows

pytestmark = pytest.mark.usefixtures("short")
BATCH, DIM = 200, 3
PLAIN = Objective(loss=Loss(clamp=0.0), guidance=Guidance(), y_null=0, has_labels=False, bf16=False)


class Linear(nn.Module):
    """u = A z + b t + c (t − r): a network whose gradients can be written down."""

    def __init__(self, scale=0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("A", (DIM, DIM)), ("b", (DIM,)), ("c", (DIM,))):
            value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, z, t, r, y, tangent=None, first=0, beside=None, guide=None, heads="u"):
        flat = z.flatten(1)
        u = flat @ self.A.T + t[:, None] * self.b + (t - r)[:, None] * self.c
        if tangent is None:
            return u.view_as(z)
        with torch.no_grad():
            du = tangent.flatten(1) @ self.A.T + self.b + self.c
        return u.view_as(z), du.view_as(z[first:])


def linear_rows(batch=BATCH, seed=0):
    """Gaussian data of standard deviation 0.7, uniform times r < t."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.7 * torch.randn(batch, DIM, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, DIM, 1, 1, generator=generator, dtype=torch.float64)
    both = torch.rand(2, batch, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(batch, dtype=torch.long)
    return Rows(x=x, noise=noise, t=both.amax(0), r=both.amin(0), y=zeros, uniforms=both[0], n_equal=0)


def analytic(net, rows):
    """The three gradients by hand: 2/n Σ (u − v) fᵀ and 2/n Σ (t − r) du fᵀ, with f = (z, t, t − r) and n = B·DIM."""
    A, b, c = (p.detach() for p in net.parameters())
    x, noise = rows.x.flatten(1), rows.noise.flatten(1)
    t, interval = rows.t[:, None], (rows.t - rows.r)[:, None]
    z, v = (1 - t) * x + t * noise, noise - x
    du = v @ A.T + b + c
    size = z.numel()

    def gradient(residual, second):
        features = {"A": z, "b": t, "c": second}
        return {name: 2 * (residual.T @ f).squeeze(-1) / size for name, f in features.items()}

    at_r, at_t = z @ A.T + t * b + interval * c, z @ A.T + t * b
    return {
        "tfm": gradient(at_r - v, interval),
        "tc": gradient(interval * du, interval),
        "fm": gradient(at_t - v, torch.zeros_like(interval)),
    }


def dot(a, b):
    return sum(float((a[name] * b[name]).sum()) for name in a)


def test_on_a_linear_network_every_product_is_the_analytic_one():
    net, rows = Linear(), linear_rows()
    expected = analytic(net, rows)
    found = conflict.measure_batch(net, rows, PLAIN, bins=4)
    for pair, groups in found["products"].items():
        a, b = pair.split(".")
        for name, value in groups.items():
            assert value == pytest.approx(dot({0: expected[a][name]}, {0: expected[b][name]}), rel=1e-10, abs=1e-12)
    cosines = summarise([found])["cosines"]
    for pair, got in cosines.items():
        a, b = (expected[name] for name in pair.split("."))
        assert got["p50"] == pytest.approx(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)), abs=1e-12)


def test_gradients_themselves_are_the_analytic_ones():
    net, rows = Linear(), linear_rows()
    later, expected = conflict.prepare_rows(net, rows, PLAIN), analytic(net, rows)
    for term, wanted in expected.items():
        _, found = conflict.gradient_of(net, later, PLAIN, term)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12)


def test_in_expectation_the_cosine_is_the_closed_form():
    """u = a z on Gaussian data of variance s², fixed r < t: ∇L_TFM = 2 (a E z² − E zv), ∇L_TC = 2 (t − r) a E zv.

    With E z² = (1 − t)² s² + t² and E zv = t − (1 − t) s². In one parameter per direction the cosine is a sign; two
    independent coordinates of different variance make it a number. The rows are moment-matched, so that their
    empirical second moments are exactly those of the Gaussian.
    """
    a, s2, t, r = torch.tensor([0.9, -0.4]), torch.tensor([0.3, 2.0]), 0.6, 0.25
    z2, zv = (1 - t) ** 2 * s2 + t**2, t - (1 - t) * s2
    tfm, tc = 2 * (a * z2 - zv), 2 * (t - r) * a * zv
    expected = float(torch.dot(tfm, tc) / (tfm.norm() * tc.norm()))

    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(a.double())

        def forward(self, z, t, r, y, tangent=None, first=0, beside=None, guide=None, heads="u"):
            u = z * self.a.view(1, 2, 1, 1)
            return u if tangent is None else (u, tangent * self.a.detach().view(1, 2, 1, 1))

    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()  # 16 rows with unit, uncorrelated moments
    x, noise = signs[:, :2] * s2.double().sqrt(), signs[:, 2:]
    times = torch.full((16,), t, dtype=torch.float64)
    rows = Rows(
        x=x.view(16, 2, 1, 1), noise=noise.reshape(16, 2, 1, 1), t=times, r=torch.full_like(times, r),
        y=torch.zeros(16, dtype=torch.long), uniforms=times, n_equal=0,
    )  # fmt: skip
    found = summarise([conflict.measure_batch(Diagonal(), rows, PLAIN, bins=2)])
    assert found["cosines"]["tfm.tc"]["p50"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected) < 0.99  # a sign would prove nothing


def test_bins_add_up_to_the_whole_gradient():
    net, rows = Linear(), linear_rows()
    found = conflict.measure_batch(net, rows, PLAIN, bins=4)
    assert sum(each["rows"] for each in found["bins"]) == found["rows"] == BATCH
    for number, each in enumerate(found["bins"]):
        interval = rows.t - rows.r
        inside = (interval > number / 4) & (interval <= (number + 1) / 4)
        some = Rows(**{name: v[inside] if torch.is_tensor(v) else v for name, v in vars(rows).items()})
        g = analytic(net, some)
        assert each["rows"] == int(inside.sum())
        assert each["products"]["tfm.tc"] == pytest.approx(dot(g["tfm"], g["tc"]), rel=1e-10, abs=1e-12)


def test_ties_have_no_say():
    rows = linear_rows(8)
    rows.r[3] = rows.t[3]
    assert conflict.measure_batch(Linear(), rows, PLAIN, bins=2)["rows"] == 7


def test_the_published_weight_fades_and_the_converging_one_does_not():
    found = conflict.sizes_over_alpha(Linear(), linear_rows(), PLAIN, (1.0, 0.01, 0.001, 0.0))
    fading, steady = ([entry["size"] for entry in found[kind]] for kind in ("adaptive", "converging"))
    assert fading[-1] == steady[-1] == 1.0
    assert fading[2] < 0.05
    assert steady[2] == pytest.approx(1.0, abs=0.01)
    assert found["converging"][2]["cosine"] == pytest.approx(1.0, abs=1e-4)


def test_no_gradient_is_left_in_the_network():
    net = Linear()
    conflict.measure_batch(net, linear_rows(), PLAIN, bins=2)
    conflict.sizes_over_alpha(net, linear_rows(), PLAIN, (0.1, 0.0))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_percentiles_are_those_of_linear_interpolation():
    values = [3.0, 1.0, 2.0, 10.0]
    assert [percentile(sorted(values), p) for p in (0.0, 0.5, 1.0)] == [1.0, 2.5, 10.0]
    assert spread([*values, None, float("nan")])["count"] == 4
    assert spread([])["p50"] is None
    known = spread([*values, None])
    assert [known[f"p{percent}"] for percent in (5, 50, 95)] == pytest.approx(np.percentile(values, [5, 50, 95]))


def line_of(cosine_of_halves, group="blocks.0", rows=8):
    """A batch whose gradients are unit vectors in the plane, FM' at a right angle to TFM; they lie in one group."""
    sine = math.sqrt(1 - cosine_of_halves**2)
    products = {"tfm.tfm": 1.0, "tc.tc": 1.0, "fm.fm": 1.0, "tfm.fm": 0.0, "tfm.tc": cosine_of_halves, "tc.fm": sine}
    half = {"rows": rows // 2, "products": products, "losses": dict.fromkeys(("tfm", "tc", "fm"), 2.0)}
    groups = {name: {group: value, "final": 0.0} for name, value in products.items()}
    empty = {**half, "rows": 0, "products": dict.fromkeys(products, 0.0), "losses": dict.fromkeys(half["losses"], 0.0)}
    return {"rows": rows, "products": groups, "losses": half["losses"], "bins": [half, empty]}


def test_a_summary_says_how_many_batches_are_strongly_opposed():
    """The paper's bound is −0.4, which itself is not below it; a gradient of zero has no cosine and no say."""
    lines = [line_of(value) for value in (-0.9, -0.5, -0.41, -0.4, 0.3)]
    without = line_of(0.0)
    without["products"]["tc.tc"] = {"blocks.0": 0.0, "final": 0.0}
    found = summarise([*lines, without])
    assert found["share_below_-0.4"] == pytest.approx(3 / 5)
    assert (found["batches"], found["rows"]) == (6, 48)
    assert found["cosines"]["tfm.tc"]["count"] == 5
    assert found["cosines"]["tfm.tc"]["p50"] == pytest.approx(-0.41)
    assert found["cosines"]["tfm.fm"]["p50"] == 0
    assert found["groups"]["blocks.0"]["cosines"]["tfm.tc"] == found["cosines"]["tfm.tc"]
    assert found["groups"]["final"]["cosines"]["tfm.tc"]["p50"] is None
    whole = summarise([line_of(-0.5)])["norms"]["mean_flow"]["p50"]
    assert whole == pytest.approx(math.sqrt(1 + 2 * -0.5 + 1))


def test_a_bin_without_rows_does_not_count():
    full, empty = summarise([line_of(-0.9), line_of(-0.5)])["bins"]
    assert [(each["from"], each["to"], each["rows"]) for each in (full, empty)] == [(0, 0.5, 8), (0.5, 1, 0)]
    assert (full["losses"]["tc"]["mean"], full["losses"]["tc"]["count"]) == (2.0, 2)
    assert full["cosines"]["tfm.tc"]["p50"] == pytest.approx(-0.7)
    assert (empty["losses"]["tc"]["count"], empty["cosines"]["tfm.tc"]["count"]) == (0, 0)


def test_tensors_are_grouped_by_block():
    values = {"pos_embed": 1.0, "blocks.0.attn.qkv.weight": 2.0, "blocks.0.mlp.fc1.bias": 3.0, "final.linear.bias": 4.0}
    assert conflict.grouped(values) == {"pos_embed": 1.0, "blocks.0": 5.0, "final": 4.0}


def test_a_run_is_analyzed_along_its_checkpoints_with_pictures(tiny_run, tmp_path, capsys):
    found = analyze(tiny_run, tmp_path, capsys, "--batches", "2", "--all-checkpoints")
    assert [each["step"] for each in found["checkpoints"]] == [3, 6]
    for each in found["checkpoints"]:
        assert each["batches"] == 2
        assert {"blocks.0", "blocks.1", "final"} <= set(each["groups"])
        assert all(-1 <= value["p5"] <= value["p95"] <= 1 for value in each["cosines"].values())
        assert each["guidance"]["omega"] == 0.7
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"conflict-{name}.png" for name in ("bins", "blocks", "alpha", "steps")
    }


def test_a_checkpoint_that_was_removed_since_stays_in_the_document_and_the_pictures(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    line = ["analyze", str(run), "--batch", "8", "--batches", "1", "--all-checkpoints"]
    document = run / "analysis" / "conflict.json"
    assert cli(line) == 0
    before = json.loads(document.read_text())["checkpoints"]
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    assert cli(line) == 0
    assert json.loads(document.read_text())["checkpoints"] == before
    said = capsys.readouterr().err
    assert "measured before, and shown beside these: step 3, which the run does not keep any more" in said
    assert "no longer show" not in said

    def steps_with(*more):
        assert cli([*line, *more]) == 0
        return [each["step"] for each in json.loads(document.read_text())["checkpoints"]]

    assert steps_with("--seed", "1") == [6], "other settings are other numbers"
    assert "no longer show step 6, ema weights, 8 rows per batch, seed 0, nor 1 other" in capsys.readouterr().err
    assert steps_with() == [3, 6]
    assert (run / "analysis" / "conflict-steps.png").exists()
    assert cli(line[:-1]) == 0
    assert not (run / "analysis" / "conflict-steps.png").exists(), "it would show another analysis than the document"


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_analysis_goes_on_and_ends_the_same(tiny_run, measured, tmp_path, capsys):
    whole = json.loads((measured / "conflict.json").read_text())
    analyze(tiny_run, tmp_path / "b", capsys, "--batches", "2")
    (lines,) = (tmp_path / "b").glob("*/batches.jsonl")
    kept = lines.read_text()
    lines.write_text(kept[:-30])  # a kill in the middle of the second line
    parts = analyze(tiny_run, tmp_path / "b", capsys, "--batches", "3")
    assert parts["checkpoints"] == whole["checkpoints"]
    assert lines.read_text().startswith(kept)


@pytest.mark.usefixtures("no_pictures")
def test_an_analysis_that_is_ended_says_that_it_goes_on(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "measure_one", lambda *_arguments: sys.exit(143))  # as the command's SIGTERM does
    with pytest.raises(SystemExit):
        cli(["analyze", str(tiny_run), "--out", str(tmp_path), "--batches", "1"])
    assert "interrupted; finished batches are kept" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_another_seed_never_mixes_with_the_lines_of_the_first(tiny_run, tmp_path, capsys):
    line = ["analyze", str(tiny_run), "--out", str(tmp_path), "--batch", "8", "--batches", "1"]
    made, told = [], []
    for more in ((), (), ("--seed", "1")):
        assert cli([*line, *more]) == 0
        made.append(json.loads((tmp_path / "conflict.json").read_text())["checkpoints"][0]["cosines"])
        told.append("no longer show step 6, ema weights, 8 rows per batch, seed 0. Its" in capsys.readouterr().err)
    assert made[0] == made[1] != made[2]
    assert told == [False, False, True], "the document shows the last one alone"
    assert len(list(tmp_path.glob("*/batches.jsonl"))) == 2


@pytest.mark.usefixtures("no_pictures")
def test_raw_weights_give_other_numbers_than_the_average(tiny_run, tmp_path, capsys):
    averaged, raw = (
        analyze(tiny_run, tmp_path, capsys, "--batches", "1", "--weights", kind)["checkpoints"][0]
        for kind in ("ema", "raw")
    )
    assert (averaged["weights"], raw["weights"]) == ("ema", "raw")
    assert averaged["losses"] != raw["losses"]


def test_averaged_weights_never_pass_as_raw_ones(tiny_run, tmp_path, capsys):
    file = tiny_run / "checkpoints" / "step-00000006" / "model.safetensors"
    line = ["analyze", str(file), "--data", str(tiny_run / "latents"), "--out", str(tmp_path), "--weights", "raw"]
    assert cli(line) == 1
    assert "averaged weights only" in capsys.readouterr().err


def test_a_missing_store_is_told_with_what_to_do(tiny_run, tmp_path, capsys):
    file = tmp_path / "alone.safetensors"
    shutil.copy(tiny_run / "model.safetensors", file)
    assert cli(["analyze", str(file), "--out", str(tmp_path)]) == 1
    assert "Give --data DIR" in capsys.readouterr().err


def test_measuring_while_training_changes_no_weight(tiny_run, tmp_path):
    measured = train(tmp_path / "measured", "train.conflict_every=2")
    rows = [json.loads(line) for line in (measured / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "conflict" in row] == [2, 4, 6]
    assert all(-1 <= row["conflict"]["cos_tfm_tc"] <= 1 for row in rows)
    from safetensors.torch import load_file

    for name in ("model", "raw"):
        place = f"checkpoints/step-00000006/{name}.safetensors"
        one, other = load_file(tiny_run / place), load_file(measured / place)
        assert all(torch.equal(one[key], other[key]) for key in one), name
    plain = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["l_tfm"], row["l_tc"], row["grad_norm"]) for row in rows] == [
        (row["l_tfm"], row["l_tc"], row["grad_norm"]) for row in plain
    ]


@pytest.mark.parametrize(("every", "due"), [(0, []), (3, [4, 6, 10]), (4, [4, 8]), (5, [6, 10])])
def test_the_probe_is_due_at_the_first_row_after_each_multiple(every, due):
    from types import SimpleNamespace as Space

    def at(step):
        return conflict.is_due(Space(step=step, recipe=Space(train=Space(conflict_every=every, log_every=2))))

    assert [step for step in (2, 4, 6, 8, 10) if at(step)] == due


def test_cosine_of_the_sum_is_that_of_meanflow():
    net, rows = Linear(), linear_rows()
    g = analytic(net, rows)
    whole = {name: g["tfm"][name] + g["tc"][name] for name in g["tfm"]}
    found = summarise([conflict.measure_batch(net, rows, PLAIN, bins=1)])["norms"]["mean_flow"]["p50"]
    assert found == pytest.approx(math.sqrt(dot(whole, whole)), rel=1e-10)
    mean_flow = conflict.sizes_over_alpha(net, rows, PLAIN, (0.0,))
    assert cosine([1.0], [1.0], [1.0]) == mean_flow["adaptive"][0]["cosine"] == pytest.approx(1.0)


@pytest.mark.distributed
def test_two_processes_measure_what_one_measures(tiny_run, tmp_path, capsys):
    alone = analyze(tiny_run, tmp_path / "one", capsys, "--batches", "5")
    line = ["analyze", str(tiny_run), "--out", str(tmp_path / "two"), "--batch", "8", "--batches", "5"]
    started = fork(lambda: cli(line), tmp_path / "errors", 2)
    assert started.wait() == [0, 0], started.said()
    one, two = (next((tmp_path / name).glob("*/batches.jsonl")) for name in ("one", "two"))
    assert one.parent.name == two.parent.name
    assert sorted(one.read_text().splitlines()) == sorted(two.read_text().splitlines())
    assert json.loads((tmp_path / "two" / "conflict.json").read_text())["checkpoints"] == alone["checkpoints"]
    assert started.said().count("conflict.json") == 1, "the first process prints for both"

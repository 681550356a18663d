"""`alphaflow eval CKPT`: the same pictures as `sample`, one ruler for every NFE, the whole protocol in results.json."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from new_process import alphaflow
from PIL import Image
from run_pages import score
from small_models import pixel_checkpoint

from alphaflow_cli import cli
from alphaflow_cli.core.sampler import time_grid
from alphaflow_cli.evaluate import measure, results
from alphaflow_cli.evaluate.results import Evaluation, read_results, save_results, score_chart, value_text
from alphaflow_cli.hub.card import result_rows
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.model.find import run_folder
from alphaflow_cli.report.run import scores_of
from alphaflow_cli.sample.walk import Walk


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a model that draws noise, 3×16×16."""
    folder = tmp_path / "run"
    folder.mkdir()
    pixel_checkpoint(folder / "model.safetensors", side=16)
    (folder / "recipe.yaml").write_text("name: noise\n")
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Pictures to compare with, 16×16."""
    folder = tmp_path / "real" / "one"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(120):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder.parent


def rows(path: Path) -> list[dict]:
    return [row for each in json.loads(path.read_text())["evaluations"] for row in each["rows"]]


def evaluate(run: Path, real: Path, *options: str) -> int:
    line = ["eval", str(run), "--metrics", "fd-tiny", "--reference", str(real), "--images", "110", *options]
    return cli.run(line)


def test_every_nfe_is_a_row_with_its_whole_protocol(run, real, capsys):
    assert evaluate(run, real, "--nfe", "1", "--nfe", "2") == 0
    out, err = capsys.readouterr()
    assert err.count("note: FD-tiny-110: biased upwards") == 1  # it holds for both
    assert out.strip().endswith(str(run / "results.json"))
    assert "FID" not in out
    one, two = rows(run / "results.json")
    assert (one["name"], one["pictures"]["nfe"], two["pictures"]["nfe"]) == ("FD-tiny-110", 1, 2)
    told = one["pictures"]
    assert told["weights"] == "ema"
    assert told["seeds"] == [0, 109]
    assert told["labels"] == "random"
    assert told["times"] == [1.0, 0.0]
    assert len(told["checkpoint_sha256"]) == 64
    assert one["reference"]["count"] == 120
    assert one["label"].startswith(f"{run.name}, 1 NFE"), "several runs may be of one recipe"
    assert (run / "scores.png").is_file()
    assert len((run / "evals" / "history.jsonl").read_text().splitlines()) == 2


def test_the_chart_of_scores_names_the_model_the_protocol_and_the_better_side():
    two = [Evaluation("e", "ab", [score(nfe, value)], [], {}, 1) for nfe, value in ((1, 7.5), (2, 3.25))]
    chart = score_chart(two, sweep=False)
    assert chart.title == "Scores of quickstart"
    protocol = "fd_haar192; reference glyphs (pictures, 2,000 pictures, abababab); 2,000 pictures"
    assert chart.subtitle == f"{protocol}; weights cdcdcdcd"
    assert [panel.title for panel in chart.panels] == ["FD-tiny-2k: lower is better"]


def test_the_chart_of_scores_goes_from_few_evaluations_to_many_in_whatever_order_they_were_named():
    named = [Evaluation("e", "ab", [score(nfe, value)], [], {}, 1) for nfe, value in ((4, 2.0), (1, 7.5), (2, 3.25))]
    (panel,) = score_chart(named, sweep=False).panels
    assert panel.lines[0].points == [(1.0, 7.5), (2.0, 3.25), (4.0, 2.0)]


def test_a_number_of_evaluations_that_is_named_twice_is_measured_once(run, real):
    assert evaluate(run, real, "--nfe", "2", "--nfe", "1", "--nfe", "2") == 0
    assert [row["pictures"]["nfe"] for row in rows(run / "results.json")] == [2, 1]


def test_more_pictures_than_real_ones_are_pointed_out(run, real, capsys):
    assert evaluate(run, real, "--nfe", "1", "--images", "130") == 0
    assert "beware: 130 pictures are compared with 120 real ones" in capsys.readouterr().err


def test_values_far_beyond_what_bytes_hold_are_warned_of(run, real, tmp_path, capsys):
    assert cli.run(["sample", str(run), "--seeds", "0-109", "--latents", str(tmp_path / "made.npy")]) == 0
    share = (np.abs(np.load(tmp_path / "made.npy")) > 1.2).mean()
    assert share > 0.05, "noise, as the network has learnt nothing in its few steps"
    for _ in range(2):  # measured, then read from what is kept
        assert evaluate(run, real, "--nfe", "1") == 0
        assert f"{share:.1%} of the values lay beyond ±1.2 and were cut to [−1, 1]" in capsys.readouterr().err


def test_measured_pictures_are_the_sampled_ones(run, real, tmp_path):
    assert evaluate(run, real, "--nfe", "1") == 0
    direct = rows(run / "results.json")[0]["value"]
    folder = tmp_path / "pictures"
    assert cli.run(["sample", str(run), "--seeds", "0-109", "--out", str(folder)]) == 0
    line = ["eval", str(folder), "--metrics", "fd-tiny", "--reference", str(real), "--out", str(tmp_path / "e")]
    assert cli.run(line) == 0
    (written,) = (tmp_path / "e").glob("*/results.json")
    assert rows(written)[0]["value"] == pytest.approx(direct, rel=1e-9)


def test_a_second_run_measures_nothing_again(run, real, capsys):
    for _ in range(2):
        assert evaluate(run, real, "--nfe", "1", "--json") == 0
    first, second = (json.loads(text) for text in _documents(capsys.readouterr().out))
    assert first["evaluations"][0]["rows"][0]["value"] == second["evaluations"][0]["rows"][0]["value"]
    assert second["evaluations"][0]["seconds"].get("network", 0.0) == 0.0


def _documents(text: str) -> list[str]:
    cut = text.index("\n}\n") + 3
    return [text[:cut], text[cut:]]


def test_a_repeated_evaluation_gives_the_mean_and_spread_of_sets_of_new_seeds(run, real, tmp_path, capsys):
    assert evaluate(run, real, "--nfe", "1") == 0
    assert evaluate(run, real, "--nfe", "1", "--nfe", "2", "--repeat", "3") == 0
    out, err = capsys.readouterr()
    assert "110 of 110 pictures were measured before" in err, "the first set is that of an evaluation alone"
    assert ", seeds 220 to 329" in err
    assert err.count("features tiny") == 3, "of the first command, and of both rows of the second"
    alone, one, _ = rows(run / "results.json")
    values = one["settings"]["values"]
    assert (values[0], len(set(values))) == (alone["value"], 3)
    assert one["value"] == pytest.approx(np.mean(values), rel=1e-14)
    assert one["spread"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert (one["pictures"]["seeds"], one["count"], one["label"]) == ([0, 329], 110, alone["label"])
    assert f"{one['value']:.2f} ± {one['spread']:.2g}" in out
    assert out.count("3 sets of 110 pictures: run, ") == 2
    assert {row["pictures"]["nfe"] for row in result_rows(read_results(run / "results.json"))} == {1, 2}
    shown = result_rows(read_results(run / "results.json"))
    assert [row["spread"] is None for row in shown] == [False, False], "of two, the one of more sets is shown"
    assert cli.run(["sample", str(run), "--nfe", "1", "--seeds", "110-219", "--out", str(tmp_path / "second")]) == 0
    told = ["--metrics", "fd-tiny", "--reference", str(real), "--out", str(tmp_path / "second-evals"), "--json"]
    assert cli.run(["eval", str(tmp_path / "second"), *told]) == 0
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["evaluations"][0]["rows"][0]["value"] == pytest.approx(
        values[1], rel=1e-12
    )


def test_the_chart_of_a_repeated_evaluation_has_its_spread():
    row = replace(score(1, 7.5), spread=0.5, pictures={**score(1, 7.5).pictures, "sets": 3})
    two = [Evaluation("e", "ab", [each], [], {}, 1) for each in (row, score(2, 3.25))]
    (panel,) = score_chart(two, sweep=False).panels
    assert panel.lines[0].spread == [(1.0, 7.0, 8.0)]


def test_the_protocol_says_how_labels_were_drawn(tmp_path):
    """They move a score by up to a tenth: two numbers that differ in the draw alone looked like one, measured twice."""
    one = score(1, 3.25)
    balanced, drawn, none = (
        replace(one, pictures={**one.pictures, "labels": draw}) for draw in ("balanced", "random", "none")
    )
    assert balanced.protocol().endswith("2,000 pictures: quickstart, 1 NFE, balanced labels")
    assert drawn.protocol() == balanced.protocol().replace("balanced", "random")
    assert none.protocol() == one.protocol() == balanced.protocol().removesuffix(", balanced labels")
    evaluations = [Evaluation(name, "ab", [row], [], {}, 1) for name, row in (("e", balanced), ("f", drawn))]
    save_results(tmp_path / "results.json", tmp_path / "history.jsonl", evaluations)
    protocols = [protocol for *_, protocol in scores_of(tmp_path / "results.json", "")]
    assert protocols == [balanced.protocol(), drawn.protocol()]


def test_the_midpoint_is_swept(run, real):
    assert evaluate(run, real, "--sweep-midpoint") == 0
    found = rows(run / "results.json")
    assert [row["pictures"]["times"][1] for row in found] == pytest.approx([0.1 * i for i in range(1, 10)])
    assert (run / "midpoints.png").is_file()


@pytest.mark.parametrize(
    ("value", "text"),
    [(15.0, "15.00"), (7.963, "7.96"), (123.456, "123.46"), (1234.5, "1234.50"), (0.5, "0.50"), (0.001234, "0.001234")],
)
def test_a_distance_has_two_decimals_in_every_table(value, text):
    assert value_text(score(1, value)) == text


def test_a_guided_sweep_is_guided(run, real):
    assert evaluate(run, real, "--sweep-midpoint", "--guidance", "2") == 0
    assert {row["pictures"]["guidance_at_sampling"] for row in rows(run / "results.json")} == {2.0}


def test_the_protocol_says_how_many_channels_are_guided(run, real):
    options = ("--guidance", "2", "--times", "0.99,0")
    assert evaluate(run, real, *options, "--guidance-channels", "2") == 0
    (row,) = rows(run / "results.json")
    assert row["pictures"]["guidance_channels"] == 2
    assert row["pictures"]["times"] == [0.99, 0.0]
    assert "guidance 2 on 2 channels" in row["label"]
    assert evaluate(run, real, *options) == 0
    assert "guidance_channels" not in rows(run / "results.json")[-1]["pictures"]


def test_a_sweep_refuses_guidance_where_it_is_built_in(run, real, capsys):
    path = run / "model.safetensors"
    model = load_checkpoint(path)
    built_in = replace(model.recipe.guidance, omega=1.0, kappa=0.5)
    save_checkpoint(path, replace(model, recipe=replace(model.recipe, guidance=built_in)))
    assert evaluate(run, real, "--sweep-midpoint", "--guidance", "2") == 1
    assert "built into these weights" in capsys.readouterr().err


def test_scores_of_an_older_checkpoint_do_not_replace_those_of_the_run(run, real, capsys):
    assert evaluate(run, real, "--nfe", "1") == 0
    before = (run / "results.json").read_bytes()
    older = run / "checkpoints" / "step-00000010" / "model.safetensors"
    older.parent.mkdir(parents=True)
    model = load_checkpoint(run / "model.safetensors")
    weights = {name: 2 * tensor for name, tensor in model.weights.items()}
    save_checkpoint(older, replace(model, weights=weights))
    capsys.readouterr()
    assert evaluate(older, real, "--nfe", "1", "--nfe", "2") == 0
    assert (run / "results.json").read_bytes() == before
    assert not (run / "scores.png").exists()
    beside = Path(capsys.readouterr().out.splitlines()[-1])
    assert beside.is_relative_to(run / "evals")
    assert (beside.parent / "scores.png").is_file()
    assert len((run / "evals" / "history.jsonl").read_text().splitlines()) == 3


def test_a_small_evaluation_does_not_displace_a_larger_one(run, real, capsys):
    assert evaluate(run, real, "--nfe", "1", "--nfe", "2") == 0
    picture = (run / "scores.png").read_bytes()
    small = ["--images", "100", "--nfe", "1", "--nfe", "2"]
    assert evaluate(run, real, *small) == 0
    assert evaluate(run, real, *small) == 0  # again: the same numbers stand once
    assert sorted(row["name"] for row in rows(run / "results.json")) == ["FD-tiny-100"] * 2 + ["FD-tiny-110"] * 2
    assert (run / "scores.png").read_bytes() == picture
    shown = [row["name"] for row in result_rows(read_results(run / "results.json"))]
    assert shown == ["FD-tiny-110"] * 2
    assert [name for name, *_ in scores_of(run / "results.json", "")] == shown
    assert all(each["environment"] for each in json.loads((run / "results.json").read_text())["evaluations"][:2])


def test_numbers_of_weights_that_are_gone_do_not_stay(run, real):
    assert evaluate(run, real, "--nfe", "1") == 0
    model = load_checkpoint(run / "model.safetensors")
    save_checkpoint(run / "model.safetensors", replace(model, origin={**model.origin, "step": 8}))
    assert evaluate(run, real, "--nfe", "1", "--images", "100") == 0
    assert [row["name"] for row in rows(run / "results.json")] == ["FD-tiny-100"]


def test_results_that_cannot_be_read_are_replaced_and_that_is_said(run, real, capsys):
    (run / "results.json").write_text("{")
    assert evaluate(run, real, "--nfe", "1") == 0
    assert "written anew, because what it held cannot be read" in capsys.readouterr().err
    assert len(rows(run / "results.json")) == 1


def test_results_of_many_steps_can_be_read_again(tmp_path):
    walk = Walk("flow", tuple(time_grid(250)), 1.0)
    assert str(walk) == "flow on 250 steps: 1, 0.996, 0.992, …, 0.004, 0"
    written = ", ".join(map("{:g}".format, walk.grid))  # as it once was
    for label in (str(walk), written):
        row = replace(score(250, 3.25), label=f"run, 250 NFE, {label}")
        save_results(tmp_path / "results.json", tmp_path / "history.jsonl", [Evaluation("e", "ab", [row], [], {}, 1)])
        assert read_results(tmp_path / "results.json")["evaluations"][0]["rows"][0]["label"] == row.label


def test_of_evaluations_that_end_at_once_none_is_lost(tmp_path, monkeypatch):
    """Commands on one run: each reads results.json, and a moment later writes it with its own numbers."""
    path, read = tmp_path / "results.json", results.still_true

    def slowly(*arguments):
        there = read(*arguments)
        time.sleep(0.1)
        return there

    monkeypatch.setattr(results, "still_true", slowly)

    def command(nfe):
        save_results(path, tmp_path / "history.jsonl", [Evaluation("e", "ab", [score(nfe, 3.25)], [], {}, 1)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(command, range(1, 5)))
    assert sorted(row["pictures"]["nfe"] for row in rows(path)) == [1, 2, 3, 4]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["history.jsonl", "results.json"]


def test_a_metric_whose_weights_are_missing_does_not_stop_the_others(run, real, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("ALPHAFLOW_WEIGHTS", raising=False)
    assert evaluate(run, real, "--nfe", "1", "--metrics", "fid,kid,fd-tiny") == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in rows(run / "results.json")] == ["FD-tiny-110"]
    assert "FD-tiny-110" in out
    assert err.count("not measured: Inception-v3 of 2015-12-05") == err.count("curl -L") == 1  # how to get them: once
    assert err.index("curl -L") < err.index("not measured, for want of weights: fid, kid\n")  # with the numbers
    assert evaluate(run, real, "--nfe", "1", "--metrics", "fid") == 1
    assert "is not on this machine" in capsys.readouterr().err


def test_every_part_of_an_evaluation_has_its_bar(run, real, capsys):
    assert evaluate(run, real, "--nfe", "1") == 0
    err = capsys.readouterr().err
    parts = (f"eval {run}", "reference 120 120/120 img", "sampling, features 110/110 img", "computing FD-tiny of 110")
    assert sorted(parts, key=err.index) == [*parts]
    assert evaluate(run, real, "--nfe", "1") == 0
    assert "sampling, features 110/110 img\n" in capsys.readouterr().err  # all were measured before: no speed


def test_an_evaluation_that_is_ended_says_that_it_goes_on(run, real, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_queue", lambda *_arguments, **_options: cli._terminate(signal.SIGTERM, None))
    with pytest.raises(SystemExit):
        evaluate(run, real, "--nfe", "1")
    assert "interrupted; finished chunks are kept in" in capsys.readouterr().err


def test_the_newest_checkpoint_is_the_runs_whatever_it_is_called(run, real):
    newest = run / "checkpoints" / "step-00000020" / "model.safetensors"
    newest.parent.mkdir(parents=True)
    newest.write_bytes((run / "model.safetensors").read_bytes())
    assert evaluate(newest, real, "--nfe", "1") == 0
    assert len(rows(run / "results.json")) == 1


def test_the_run_of_a_checkpoint_is_found_and_no_other_folder_taken_for_it(run):
    step = run / "checkpoints" / "step-00000020"
    step.mkdir(parents=True)
    (step / "model.safetensors").touch()
    for place in (run, run / "model.safetensors", step, step / "model.safetensors"):
        assert run_folder(str(place)) == run
    converted = run / "converted"
    converted.mkdir()
    assert run_folder(str(converted)) is None
    assert run_folder("user/model") is None


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_workers")
def test_two_processes_measure_what_one_measures(run, real):
    assert evaluate(run, real, "--nfe", "1") == 0
    alone = rows(run / "results.json")[0]["value"]
    line = ["eval", str(run), "--metrics", "fd-tiny", "--reference", str(real), "--images", "110", "--nfe", "1"]
    done = alphaflow([*line, "--processes", "2", "--out", run / "two"])
    assert done.returncode == 0, done.stderr
    (written,) = (run / "two").glob("*/results.json")
    assert rows(written)[0]["value"] == pytest.approx(alone, rel=1e-6)
    assert json.loads(written.read_text())["evaluations"][0]["processes"] == 2


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--nfe", "1", "--times", "1,0"], 2, "exclude each other"),
        (["--times", "1,0.5"], 1, "a grid falls from 1 to 0"),
        (["--images", "20"], 1, "a score needs at least"),
    ],
)
def test_a_wish_that_cannot_be_granted_gets_one_line(run, real, capsys, options, code, words):
    assert evaluate(run, real, *options) == code
    said = capsys.readouterr()
    assert words in said.err
    assert not said.out
    assert not (run / "results.json").exists()


def test_a_checkpoint_without_a_reference_asks_for_one(run, capsys):
    assert cli.run(["eval", str(run), "--metrics", "fd-tiny", "--images", "110"]) == 1
    assert "--reference" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--draw", "random")])
def test_a_run_without_a_checkpoint_yet_is_not_taken_for_pictures(run, real, capsys, options):
    (run / "model.safetensors").unlink()
    (run / "samples").mkdir()
    Image.new("RGB", (64, 64)).save(run / "samples" / "step-00000100.png")
    assert evaluate(run, real, *options) == 1
    assert f"{run}: no checkpoint in this folder yet" in capsys.readouterr().err


def test_pictures_are_not_repeated(real, capsys):
    assert cli.run(["eval", str(real), "--repeat", "3", "--metrics", "fd-tiny", "--reference", str(real)]) == 2
    assert "--repeat, --autoencoder and --decoder are for checkpoints" in capsys.readouterr().err


def test_pictures_take_no_sampler(real, capsys):
    assert cli.run(["eval", str(real), "--nfe", "2", "--metrics", "fd-tiny", "--reference", "glyphs:200"]) == 2
    assert "for checkpoints" in capsys.readouterr().err

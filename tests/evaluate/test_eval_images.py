"""`alphaflow eval IMAGES` and `alphaflow reference` on the command line: results, refusals, resuming, two processes."""

import json
import os
import resource
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ruler
import torch
from new_process import Command, torchrun
from PIL import Image

from alphaflow_cli.cli import run
from alphaflow_cli.evaluate.measure import CHUNK
from alphaflow_cli.evaluate.reference import load_reference


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no weights anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("ALPHAFLOW_WEIGHTS", raising=False)
    return tmp_path


def alphaflow(line: str) -> int:
    return run(shlex.split(line))


def results() -> dict:
    (path,) = Path("evals").glob("*/results.json")
    return json.loads(path.read_text())


def test_a_folder_is_measured_against_a_reference_file(capsys: pytest.CaptureFixture[str]) -> None:
    ruler.write_pictures(Path("samples"), ruler.pictures(150, contrast=0.9))
    assert alphaflow("reference glyphs:400 --metrics fd-tiny -o real.safetensors") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "real.safetensors"
    assert alphaflow("eval samples --reference real.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FD-tiny-150 ")
    for part in ("fd_haar192", "glyphs:400 (glyphs, 400 pictures, ", "150 pictures: samples", "times the floor"):
        assert part in lines[1]
    assert Path(lines[-1]).name == "results.json"
    (found,) = results()["evaluations"]
    row = found["rows"][0]
    assert row["value"] > 0
    assert row["reference"]["count"] == 400
    assert row["space"]["preprocessing"].startswith("larger than 32 px")
    assert row["pictures"]["prepared"] == "as they are"
    assert set(found["seconds"]) == {"pictures", "features tiny", "distances"}
    assert results()["environment"]["torch"]


def test_a_source_of_real_pictures_serves_as_reference_and_is_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "eval glyphs:150 --metrics fd-tiny --reference glyphs:300 --json"
    assert alphaflow(line) == 0
    first = json.loads(capsys.readouterr().out)
    assert alphaflow(line) == 0
    captured = capsys.readouterr()
    assert "measured before" in captured.err
    assert "300/300" not in captured.err
    second = json.loads(captured.out)
    assert first["evaluations"][0]["rows"] == second["evaluations"][0]["rows"]
    assert len(Path("evals/history.jsonl").read_text().splitlines()) == 2


def test_folder_zip_and_npz_of_the_same_pictures_score_the_same() -> None:
    import shutil

    images = ruler.pictures(120)
    ruler.write_pictures(Path("samples"), images)
    shutil.make_archive("samples", "zip", "samples")
    np.savez("samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    for source in ("samples", "samples.zip", "samples.npz"):
        assert alphaflow(f"eval {source} --metrics fd-tiny --reference glyphs:200") == 0
    history = [json.loads(line) for line in Path("evals/history.jsonl").read_text().splitlines()]
    assert len({each["id"] for each in history}) == 3
    assert len({each["pictures_sha256"] for each in history}) == 1
    assert len({each["rows"][0]["value"] for each in history}) == 1


def test_changed_pictures_under_the_same_names_are_measured_anew() -> None:
    line = "eval samples --metrics fd-tiny --reference glyphs:200"
    ruler.write_pictures(Path("samples"), ruler.pictures(120))
    assert alphaflow(line) == 0
    ruler.write_pictures(Path("samples"), ruler.pictures(120, seed=5, contrast=0.3))
    assert alphaflow(line) == 0
    one, two = (json.loads(line)["rows"][0]["value"] for line in Path("evals/history.jsonl").read_text().splitlines())
    assert abs(one - two) > 0.1 * one


def test_so_many_pictures_are_taken_evenly_from_all_classes() -> None:
    from alphaflow_cli.evaluate.pictures import open_pictures

    for i in range(4):
        ruler.write_pictures(Path(f"classes/{i}"), torch.full((30, 3, 32, 32), i, dtype=torch.uint8))
    few = open_pictures("classes", size=None, limit=8)
    assert (few.count, few.describe()["of"]) == (8, 120)
    assert few.images(0, 8)[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_count_is_in_the_name_and_the_bias_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert alphaflow("eval glyphs:2000 --images 1000 --metrics fd-tiny --reference glyphs:200 --markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| pictures | FD-tiny-1k |"
    assert "biased upwards" in lines[4]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several kinds, of which some cannot be measured, and references."""
    folder = tmp_path_factory.mktemp("faulty")
    ruler.write_pictures(folder / "samples", ruler.pictures(120))
    ruler.write_pictures(folder / "large", ruler.pictures(120, size=48))
    ruler.write_pictures(folder / "mixed", ruler.pictures(120))
    ruler.write_pictures(folder / "mixed/z", ruler.pictures(1, size=40))
    (folder / "wide").mkdir()
    for i in range(100):
        Image.new("RGB", (40, 32), (i, i, i)).save(folder / "wide" / f"{i}.png")
    broken = ruler.write_pictures(folder / "broken", ruler.pictures(120)) / "00007.png"
    broken.write_bytes(broken.read_bytes()[:200])
    np.savez(folder / "floats.npz", arr_0=np.full((120, 32, 32, 3), np.nan, np.float32))
    np.savez(folder / "first.npz", arr_0=np.zeros((120, 3, 32, 32), np.uint8))
    np.savez(folder / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    made = folder / "real.safetensors"
    assert alphaflow(f"reference glyphs:200 --metrics fd-tiny -o {made} --work {folder / 'work'}") == 0
    return folder


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("eval samples --metrics fid --reference glyphs:200", 1, "Inception-v3 of 2015-12-05"),
        ("eval samples --reference glyphs:200", 1, "--metrics fd-tiny"),
        ("eval samples --metrics fd-tiny", 1, "--reference FILE or --reference SOURCE"),
        ("eval samples --metrics fdi --reference glyphs:200", 2, "'fdi' is not one of fid, fdd"),
        ("eval samples --metrics fd-tiny --weights tiny=x --reference glyphs:200", 2, "NETWORK=FILE"),
        ("eval samples --metrics fd-tiny --weights clip=x --reference glyphs:200", 1, "the requested metrics use tiny"),
        ("eval glyphs:10 --metrics fd-tiny --reference glyphs:200", 1, "10 pictures; a score needs at least 100"),
        ("eval nowhere --metrics fd-tiny --reference glyphs:200", 1, "nowhere"),
        ("eval samples --metrics fd-tiny --reference nowhere.npz", 1, "nowhere.npz"),
        ("eval floats.npz --metrics fd-tiny --reference glyphs:200", 1, "arr_0 is float32"),
        (
            "eval first.npz --metrics fd-tiny --reference glyphs:200",
            1,
            "pictures are uint8 (N, H, W, 3). Write them so.",
        ),
        ("eval large --metrics fd-tiny --reference real.safetensors", 1, "here:      48×48 px"),
        ("eval broken --metrics fd-tiny --reference glyphs:200", 1, "00007.png"),
        ("eval mixed --metrics fd-tiny --reference glyphs:200", 1, "must be of one size"),
        (
            "eval wide --metrics fd-tiny --reference glyphs:200",
            1,
            "and the measured pictures have 32×40 px",
        ),
        ("eval samples --metrics kid --reference adm.npz", 1, "Inception-v3"),
        ("eval samples --metrics fd-tiny --reference real.safetensors --out floats.npz/x", 1, "cannot be written"),
        ("reference samples --metrics fd-tiny -o real.npz", 2, ".safetensors"),
        ("reference samples --metrics fd-tiny -o real.safetensors", 1, "exists already"),
    ],
)
def test_a_fault_is_one_clear_line_and_nothing_that_looks_like_a_score(
    line: str, code: int, said: str, faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(faulty)
    capsys.readouterr()
    assert alphaflow(line) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert not list(Path("evals").glob("*/results.json"))


def test_a_folder_whose_name_is_no_utf8_is_measured_and_written_down(capsys: pytest.CaptureFixture[str]) -> None:
    """It was refused after the whole pass, and the message was the line of the history."""
    name = os.fsdecode(b"sam\xffples")
    ruler.write_pictures(Path(name), ruler.pictures(120))
    assert run(["eval", name, "--metrics", "fd-tiny", "--reference", "glyphs:200"]) == 0
    assert "120 pictures: sam\\xffples" in capsys.readouterr().out
    (line,) = Path("evals", "history.jsonl").read_text().splitlines()
    assert json.loads(line)["rows"][0]["label"] == results()["evaluations"][0]["rows"][0]["label"] == name


def test_copies_among_the_pictures_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    ruler.write_pictures(Path("samples"), ruler.pictures(60))
    ruler.write_pictures(Path("samples/again"), ruler.pictures(60))
    assert alphaflow("eval samples --metrics fd-tiny --reference glyphs:200") == 0
    assert "60 of 120 pictures are exact copies" in capsys.readouterr().err


def test_pictures_of_one_colour_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = ruler.pictures(110)
    pictures[[3, 100]] = torch.tensor([5, 250, 9], dtype=torch.uint8)[:, None, None]
    pictures[7] = torch.arange(3, dtype=torch.uint8)[:, None, None]  # three grounds, each of one value
    pictures[7, 0, 0, 0] += 1  # and a single pixel that differs
    ruler.write_pictures(Path("samples"), pictures)
    for _ in range(2):  # measured, then read from what is kept
        assert alphaflow("eval samples --metrics fd-tiny --reference glyphs:200") == 0
        assert "2 of 110 pictures are of one colour throughout" in capsys.readouterr().err


def test_ctrl_c_keeps_the_finished_chunks_and_the_same_command_goes_on() -> None:
    line = "eval glyphs:1500 --metrics fd-tiny --reference real.safetensors"
    assert alphaflow("reference glyphs:200 --metrics fd-tiny -o real.safetensors") == 0
    process = Command(shlex.split(line))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(Path("evals").glob(f"*/features-0000000-{CHUNK:07d}*"))) < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "run the same command again" in err
    kept = len(list(Path("evals").glob("*/features-*")))
    assert alphaflow(line) == 0
    assert kept < 7  # of 6, and the reference's one
    assert results()["evaluations"][0]["rows"][0]["count"] == 1500


def test_a_full_disk_is_said_and_can_be_resumed() -> None:
    assert alphaflow("reference glyphs:200 --metrics fd-tiny -o real.safetensors") == 0

    def no_room() -> None:  # a file may not grow beyond 50 kB: the write fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    line = "eval glyphs:500 --metrics fd-tiny --reference real.safetensors"
    process = Command(shlex.split(line), first=no_room)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert out == ""
    assert "Make room and run the same command again" in err
    assert "Traceback" not in err
    assert alphaflow(line) == 0


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_workers")
def test_two_processes_give_the_same_numbers_as_one() -> None:
    line = shlex.split("eval glyphs:1100 --metrics fd-tiny --reference glyphs:600 --json")
    running = [Command(line), torchrun([*line, "--out", "together"], 2)]
    said = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    found = [json.loads(out)["evaluations"][0] for out, _ in said]
    assert found[0]["rows"][0]["value"] == pytest.approx(found[1]["rows"][0]["value"], rel=1e-10)
    assert found[0]["pictures_sha256"] == found[1]["pictures_sha256"]
    assert [each["processes"] for each in found] == [1, 2]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_two_processes_make_the_reference_that_one_makes() -> None:
    assert alphaflow("reference glyphs:600 --metrics fd-tiny -o one.safetensors --work one") == 0
    line = "reference glyphs:600 --metrics fd-tiny -o two.safetensors --work two --processes 2"
    process = Command(shlex.split(line))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "two.safetensors"
    one, two = (load_reference(Path(name)) for name in ("one.safetensors", "two.safetensors"))
    assert one.facts["pictures_sha256"] == two.facts["pictures_sha256"]
    for name, stats in one.stats.items():
        assert torch.allclose(stats.mean, two.stats[name].mean, rtol=1e-10, atol=1e-12)
        assert torch.allclose(stats.cov, two.stats[name].cov, rtol=1e-10, atol=1e-12)
        assert torch.equal(stats.features, two.stats[name].features)


@pytest.mark.parametrize("verb", ["eval", "reference"])
def test_the_example_on_the_embedded_pictures_runs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert alphaflow(f"{verb} --help") == 0
    lines = capsys.readouterr().out.partition("Examples:")[2].split("alphaflow ")
    assert alphaflow(next(line for line in lines if "shapes:" in line)) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).is_file()

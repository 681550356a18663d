"""One stream of pictures: written as they come, resumed where a kill stopped them, shared out, told apart."""

import gc
import hashlib
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import pixel_checkpoint
from train_helpers import fork

from alphaflow_cli import cli
from alphaflow_cli.commands.sample import Seeds
from alphaflow_cli.files import write_whole
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.sample import generator, write
from alphaflow_cli.sample.generator import Generator, open_generator, pictures
from alphaflow_cli.sample.walk import LazyLabels, draw_labels, plan_walk

COUNT, BATCH = 150, 16
LINE = ("--seeds", f"0-{COUNT - 1}", "--batch", str(BATCH))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pixel_checkpoint(tmp_path_factory.mktemp("model") / "c.safetensors")


@pytest.fixture(scope="module")
def whole(model):
    """What an undisturbed command writes: name → bytes, for every form of --out."""
    for form in ("all.npz", "all"):
        assert cli.run(["sample", str(model), *LINE, "--out", str(model.parent / form)]) == 0
    return {form: content(model.parent / form) for form in ("all.npz", "all")}


def content(path: Path) -> dict[str, bytes]:
    files = sorted(path.glob("*.png")) if path.is_dir() else [path]
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


def sample(model, *options) -> int:
    return cli.run(["sample", str(model), *map(str, options)])


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that are drawn in this process, in order."""
    seen, plain = [], Generator.latents
    monkeypatch.setattr(
        Generator, "latents", lambda self, seeds, *rest: seen.extend(seeds) or plain(self, seeds, *rest)
    )
    return seen


def killed_in_the_middle(model, out, processes, folder, batches=2, *options):
    """Each process is killed when it has drawn so many batches and is about to draw one more."""
    plain, left = Generator.latents, [batches]

    def latents(self, *rest):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *rest)

    def work():
        Generator.latents = latents
        return sample(model, *LINE, "--out", out, *options)

    return fork(work, folder, processes).wait()


def test_an_npz_is_the_array_that_others_read_and_holds_the_pictures_of_the_files(whole, model):
    with np.load(model.parent / "all.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert (array.shape, array.dtype) == ((COUNT, 8, 8, 3), np.uint8)
    for picture, file in zip(array, sorted((model.parent / "all").glob("*.png")), strict=True):
        assert np.array_equal(picture, np.asarray(Image.open(file)))
    assert not list(model.parent.glob("*.part*"))
    assert not list(model.parent.glob(".*.lock"))


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["all.npz", "all"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_command_goes_on_with_the_same_bytes_and_draws_no_batch_twice(
    model, whole, tmp_path, drawn, form, processes
):
    out = tmp_path / form
    assert killed_in_the_middle(model, out, processes, tmp_path / "killed") == [-signal.SIGKILL] * processes
    assert not out.exists() or out.is_dir()
    there = 2 * BATCH * processes
    assert sample(model, *LINE, "--out", out) == 0
    assert len(drawn) == COUNT - there
    assert content(out) == whole[form]


@pytest.mark.parametrize("form", ["all.npz", "all"])
def test_another_batch_goes_on_as_well_and_what_is_finished_draws_nothing(model, whole, tmp_path, drawn, form):
    out = tmp_path / form
    killed_in_the_middle(model, out, 1, tmp_path / "killed")
    assert sample(model, *LINE, "--out", out, "--batch", 50) == 0
    assert content(out) == whole[form]
    assert len(drawn) < COUNT - 2 * BATCH + 50
    drawn.clear()
    assert sample(model, *LINE, "--out", out) == 0
    assert drawn == []
    assert content(out) == whole[form]


def test_a_finished_npz_of_another_request_is_drawn_anew_and_a_grid_beside_it_too(model, whole, tmp_path, drawn):
    out = tmp_path / "all.npz"
    assert sample(model, "--seeds", "1-20", "--out", out) == 0
    drawn.clear()
    assert sample(model, *LINE, "--out", out) == 0
    assert len(drawn) == COUNT
    assert content(out) == whole["all.npz"]
    assert sample(model, *LINE, "--out", out, "--grid", tmp_path / "g.png") == 0
    assert len(drawn) == 2 * COUNT
    assert content(out) == whole["all.npz"]
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["all.npz", "all"])
def test_two_processes_write_what_one_writes(model, whole, tmp_path, form):
    out, grid, latents = tmp_path / form, tmp_path / "g.png", tmp_path / "z.npy"
    line = (*LINE, "--grid", grid, "--latents", latents)
    started = fork(lambda: sample(model, *line, "--out", out), tmp_path / "two", 2)
    assert started.wait() == [0, 0], started.said()
    assert content(out) == whole[form]
    assert started.said().count(f"sampling {COUNT}/{COUNT} img") == 1, "the first process shows the progress of all"
    two = grid.read_bytes(), latents.read_bytes()
    assert sample(model, *line) == 0
    assert two == (grid.read_bytes(), latents.read_bytes())


@pytest.mark.parametrize("name", ["sync", "write_at"])
def test_a_kill_while_an_npz_is_closed_loses_nothing(model, whole, tmp_path, monkeypatch, capsys, drawn, name):
    """After the zip's directory was written, and before the last rows were marked."""
    out, plain, calls = tmp_path / "all.npz", getattr(write, name), []

    def stop(*arguments):
        calls.append(1)
        if name == "sync" or len(calls) > 2 * -(-COUNT // BATCH) - 1:
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(write, name, stop)
    assert sample(model, *LINE, "--out", out) == 130
    assert (name == "write_at") == ("what is drawn is kept, the same command goes on" in capsys.readouterr().err)
    monkeypatch.setattr(write, name, plain)
    drawn.clear()
    assert sample(model, *LINE, "--out", out) == 0
    assert len(drawn) < BATCH
    assert content(out) == whole["all.npz"]


def test_a_kill_after_an_npz_got_its_name_draws_nothing_again(model, whole, tmp_path, monkeypatch, drawn):
    out, plain = tmp_path / "all.npz", write.sync

    def stop(path):
        if path == tmp_path:  # the folder, whose sync comes before the marks are forgotten
            raise KeyboardInterrupt
        plain(path)

    monkeypatch.setattr(write, "sync", stop)
    assert sample(model, *LINE, "--out", out) == 130
    assert content(out) == whole["all.npz"]
    monkeypatch.setattr(write, "sync", plain)
    drawn.clear()
    assert sample(model, *LINE, "--out", out) == 0
    assert drawn == []
    assert content(out) == whole["all.npz"]
    assert not list(tmp_path.glob("*.part*"))


def test_only_the_batch_in_hand_is_kept(model, tmp_path, monkeypatch):
    alive, most, plain = weakref.WeakSet(), [], Generator.stream

    class Kept:
        """A mark beside a batch's pictures."""

    def stream(self, *rest, **more):
        for batch in plain(self, *rest, **more):
            mark = Kept()
            batch.laps.mark = mark
            alive.add(mark)
            del mark
            gc.collect()
            most.append(len(alive))
            yield batch

    monkeypatch.setattr(Generator, "stream", stream)
    targets = ("--out", tmp_path / "p", "--grid", tmp_path / "g.png", "--latents", tmp_path / "z.npy")
    assert sample(model, *LINE, *targets) == 0
    assert len(most) > 8
    assert max(most) <= 2


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        (("--nfe", "2"), "walk trajectory on 1.0, 0.0"),
        (("--times", "1,0.1234567,0"), "here"),
        (("--nfe", "2", "--sampler", "consistency"), "consistency"),
    ],
)
@pytest.mark.parametrize("form", ["all.npz", "all"])
def test_pictures_of_another_request_are_not_mixed_in(model, tmp_path, capsys, form, options, differs):
    out = tmp_path / form
    killed_in_the_middle(model, out, 1, tmp_path / "killed")
    before = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert sample(model, *LINE, "--out", out, *options) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    assert "holds pictures of another request" in said[0]
    assert differs in said[0]
    after = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {name: data for name, data in after.items() if "lock" not in name} == {
        name: data for name, data in before.items() if "lock" not in name
    }


@pytest.mark.parametrize("other", ["mine.JPG", "cat/1.png"])
def test_pictures_that_others_made_are_not_mixed_in(model, tmp_path, capsys, other):
    file = tmp_path / "photos" / other
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "photos" / "notes.txt").touch()
    assert sample(model, "--seeds", "0-3", "--out", tmp_path / "photos") == 1
    err = capsys.readouterr().err
    assert f"photos: holds {other.split('/')[0]}, which is not of alphaflow sample" in err
    assert "Give a new or an empty folder: --out DIR" in err
    assert {path.name for path in (tmp_path / "photos").rglob("*") if not path.name.startswith(".")} == {
        "notes.txt",
        *other.split("/"),
    }


def test_another_checkpoint_is_another_request_and_other_seeds_of_a_folder_are_not(model, tmp_path, capsys):
    other = pixel_checkpoint(tmp_path / "other.safetensors", side=16)
    out = tmp_path / "p"
    assert sample(model, "--seeds", "0-3", "--out", out) == 0
    assert sample(model, "--seeds", "4-7", "--classes", "3", "--out", out) == 0
    assert len(list(out.glob("*.png"))) == 8
    assert sample(other, "--seeds", "0-3", "--out", out) == 1
    assert "checkpoint" in capsys.readouterr().err
    (out / write.RECORD_FILE).write_text("{")
    assert sample(model, "--seeds", "0-3", "--out", out) == 1
    assert "record damaged there" in capsys.readouterr().err


@pytest.mark.parametrize("other", [("--classes", "3"), ("--seeds", f"1-{COUNT}"), ("--seeds", f"0-{COUNT}")])
def test_an_unfinished_array_knows_its_seeds_and_classes(model, tmp_path, capsys, other):
    out = tmp_path / "all.npz"
    killed_in_the_middle(model, out, 1, tmp_path / "killed")
    assert sample(model, *LINE, "--out", out, *other) == 1
    assert f"{out}.part: holds pictures of another request ({other[0][2:]}" in capsys.readouterr().err


def test_a_folder_of_before_without_a_record_is_written_over(model, whole, tmp_path):
    out = tmp_path / "all"
    out.mkdir()
    first = sorted(whole["all"])[0]
    (out / first).write_bytes(b"of another model")
    (out / "notes.txt").write_bytes(b"not of sample")
    assert sample(model, *LINE, "--out", out) == 0
    assert content(out) == whole["all"]
    assert (out / "notes.txt").read_bytes() == b"not of sample"


def test_a_grid_shows_a_bounded_number_and_says_so(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "MOST_SHOWN", 30)
    assert sample(model, *LINE, "--grid", tmp_path / "all.png") == 0
    assert "shows the first 30 of 150 pictures" in capsys.readouterr().err
    assert sample(model, "--seeds", "0-29", "--grid", tmp_path / "few.png") == 0
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "few.png").read_bytes()


def test_several_walks_are_resumed_and_drawn_below_each_other(model, tmp_path, drawn):
    line = ("--seeds", "0-39", "--nfe", "1", "--nfe", "2", "--grid")
    assert sample(model, *line, tmp_path / "whole.png", "--out", tmp_path / "whole") == 0
    killed_in_the_middle(model, tmp_path / "p", 1, tmp_path / "k", 3, *line, tmp_path / "g.png")
    drawn.clear()
    assert sample(model, *line, tmp_path / "g.png", "--batch", str(BATCH), "--out", tmp_path / "p") == 0
    assert len(drawn) == 80 - 40
    assert content(tmp_path / "p") == content(tmp_path / "whole")
    assert (tmp_path / "g.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_a_second_command_on_one_file_is_refused(model, tmp_path, capsys):
    out = tmp_path / "all.npz"

    def work():
        return sample(model, *LINE, "--out", out)

    with hold(out, "sample", is_file=True):
        second = fork(work, tmp_path / "second")
        assert second.wait() == [1]
    assert f"{out}: another command is writing here (sample, process {os.getpid()}" in second.said()
    assert not out.exists()


@pytest.mark.parametrize("line", [("--nfe", "1", "--nfe", "2"), ("--grid", "x.npz")])
def test_an_npz_wants_one_walk_and_a_name_of_its_own(model, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    assert sample(model, "--out", "x.npz", *line) == (2 if "--nfe" in line else 1)
    assert ("wants one --nfe" if "--nfe" in line else "is named twice") in capsys.readouterr().err


def test_a_file_that_takes_no_more_bytes_is_one_line_and_the_command_goes_on(model, whole, tmp_path, capsys):
    """The whole length is asked for at once, so that a small disk shows before hours of work."""
    import resource

    out, before = tmp_path / "all.npz", resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert sample(model, *LINE, "--out", out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in capsys.readouterr().err
    assert sample(model, *LINE, "--out", out) == 0
    assert content(out) == whole["all.npz"]


def test_pictures_come_one_by_one_with_seed_and_label(model, whole):
    loaded = open_generator(str(model))
    seeds = range(5, 40)
    labels = LazyLabels(seeds, lambda places, some: draw_labels(some, 10, "random"))
    for seed, label, picture in pictures(loaded, seeds, labels, plan_walk(loaded.recipe, nfe=1), batch=16):
        file = model.parent / "all" / f"seed-{seed:06d}-class-{label}.png"
        assert np.array_equal(picture, np.asarray(Image.open(file)))
    assert seed == 39


def test_seeds_of_ranges_read_like_a_list():
    seeds = Seeds([range(5), range(7, 8), range(100, 104), range(2)])
    whole = [*range(5), 7, *range(100, 104), 0, 1]
    assert (list(seeds), len(seeds), str(seeds)) == (whole, 12, "0-4,7,100-103,0-1")
    for start in range(13):
        for stop in range(start, 14):
            assert seeds[start:stop] == whole[start:stop]
    assert (seeds[3], seeds[-1]) == (3, 1)
    assert Seeds([range(2**64 - 2, 2**64)])[:] == [2**64 - 2, 2**64 - 1]
    labels = LazyLabels(seeds, lambda places, some: [place * 10 for place in places])
    assert labels[2:4] == [20, 30]


def replaced_after_hashing(monkeypatch, path, times):
    """Each of the first so many times that the file was hashed, a training run puts another one in its place."""
    plain, number = generator.sha256_of, [0]

    def sha256_of(file):
        digest = plain(file)
        if number[0] < times:
            number[0] += 1
            pixel_checkpoint(path.with_name("next"), side=8)
            data = bytearray(path.with_name("next").read_bytes())
            data[-1 - number[0]] ^= 1
            write_whole(path, bytes(data))
        return digest

    monkeypatch.setattr(generator, "sha256_of", sha256_of)


def test_the_checksum_is_that_of_the_bytes_that_were_loaded(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    path = pixel_checkpoint(run / "model.safetensors")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    replaced_after_hashing(monkeypatch, path, 1)
    line = ["eval", str(run), "--metrics", "is", "--images", "100", "--nfe", "1"]
    loaded = open_generator(str(run))
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest() != before
    replaced_after_hashing(monkeypatch, path, 99)
    assert cli.run([*line, "--reference", "glyphs:100", "--out", str(tmp_path / "e")]) == 1
    assert f"{path}: was changed or replaced while it was read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "left"), [("all", "all/.seed-000001-class-5.png.12.tmp"), ("all.npz", ".all.npz.part.state.12.tmp")]
)
def test_what_a_kill_left_half_written_goes(model, tmp_path, form, left):
    (tmp_path / "all").mkdir()
    (tmp_path / left).write_bytes(b"half")
    assert sample(model, "--seeds", "0-3", "--out", tmp_path / form) == 0
    assert not list(tmp_path.rglob("*.tmp"))

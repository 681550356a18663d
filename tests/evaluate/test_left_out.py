"""`alphaflow reference --bad skip`: the statistics of the whole pictures, whatever lies between them."""

import errno
import json
import shlex
import shutil
import zipfile
from functools import partial
from pathlib import Path

import pytest
import ruler
import torch
from new_process import Command

from alphaflow_cli.cli import run
from alphaflow_cli.data.pictures import decode_whole, read_picture
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.evaluate import Ruler, make_reference
from alphaflow_cli.evaluate.measure import CHUNK
from alphaflow_cli.evaluate.pictures import open_pictures
from alphaflow_cli.evaluate.reference import Reference, load_reference
from alphaflow_cli.evaluate.tiny import Tiny
from alphaflow_cli.runtime.processes import Processes

COUNT = CHUNK + 44
BAD = ("00000.png", "00100.png", f"{COUNT - 1:05d}.png")  # the first, one in the middle, the last
LINE = "reference broken --metrics fd-tiny -o r.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures, and a copy in which three are broken."""
    monkeypatch.chdir(tmp_path)
    ruler.write_pictures(tmp_path / "broken", ruler.pictures(COUNT))
    shutil.copytree("broken", "whole")
    for name in BAD:
        (tmp_path / "whole" / name).unlink()
    (tmp_path / "broken" / BAD[0]).write_text("no picture")
    (tmp_path / "broken" / BAD[1]).write_bytes(Path("broken", BAD[1]).read_bytes()[:200])
    (tmp_path / "broken" / BAD[2]).write_bytes(b"")
    return tmp_path


def alphaflow(line: str) -> int:
    return run(shlex.split(line))


def packed() -> str:
    with zipfile.ZipFile("broken.zip", "w") as archive:
        for path in sorted(Path("broken").iterdir()):
            archive.write(path, path.name)
    return "broken.zip"


def assert_of_the_same_pictures(one: Reference, other: Reference) -> None:
    assert one.facts["pictures_sha256"] == other.facts["pictures_sha256"]
    assert one.facts["count"] == other.facts["count"]
    a, b = one.stats["tiny"], other.stats["tiny"]
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.cov, b.cov, rtol=1e-10, atol=1e-12)
    assert a.features is not None
    assert b.features is not None
    assert torch.equal(a.features, b.features)


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("size", ["", "--size 16"])
def test_it_is_the_reference_of_the_whole_pictures(form: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = "broken" if form == "folder" else packed()
    assert alphaflow(f"reference {source} {size} --bad skip --metrics fd-tiny --keep 50 -o r.safetensors") == 0
    err = capsys.readouterr().err
    assert "left out: 3 pictures, the first '00000.png': not a whole picture" in err
    assert alphaflow(f"reference whole {size} --metrics fd-tiny --keep 50 -o w.safetensors") == 0
    found, wanted = (load_reference(Path(name)) for name in ("r.safetensors", "w.safetensors"))
    assert_of_the_same_pictures(found, wanted)
    assert found.facts["count"] == found.facts["source"]["count"] == COUNT - 3
    assert found.facts["left_out"]["count"] == 3
    assert [each["name"] for each in found.facts["left_out"]["first"]] == list(BAD)
    assert found.facts["left_out"]["first"][2]["why"] == "an empty file"
    assert "left_out" not in wanted.facts


def test_without_it_the_message_names_it_and_the_same_command_with_it_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(Path("whole", "00001.png"), Path("broken", BAD[0]))
    shutil.copy(Path("whole", "00001.png"), Path("broken", BAD[1]))  # the first chunk is whole
    assert alphaflow(LINE) == 1
    err = capsys.readouterr().err
    assert f"broken/{BAD[2]}: an empty file. Mend or remove it, or leave such pictures out: alphaflow reference" in err
    assert alphaflow(f"{LINE} --bad skip") == 0
    assert f"{CHUNK} of {COUNT} pictures were measured before: going on" in capsys.readouterr().err
    Path("r.safetensors").unlink()
    assert alphaflow(f"{LINE} --bad skip") == 0
    assert "measured before" in capsys.readouterr().err
    Path("r.safetensors").unlink()
    assert alphaflow(LINE) == 1, "what was left out is not taken for measured where nothing may be"
    assert BAD[2] in capsys.readouterr().err


def test_a_chunk_of_which_nothing_is_whole_is_measured_too(here: Path) -> None:
    for place in range(30, 45):
        (here / "broken" / f"{place:05d}.png").write_bytes(b"")
        (here / "whole" / f"{place:05d}.png").unlink()
    found = []
    for name in ("broken", "whole"):
        tool = Ruler({"tiny": Tiny()}, Processes(torch.device("cpu")), here / "work", None, chunk=10)
        pictures = open_pictures(name, size=None, limit=None, bad="skip")
        made = make_reference(pictures, tool, here / f"{name}.safetensors", name="")
        assert made is not None
        found.append(made[0])
    assert_of_the_same_pictures(*found)


def test_too_few_whole_pictures_are_no_reference(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((here / "broken").iterdir())[99:]:
        path.write_bytes(b"")
    assert alphaflow(f"{LINE} --bad skip") == 1
    assert "98 pictures; a score needs at least 100" in capsys.readouterr().err
    assert not Path("r.safetensors").exists()
    for path in (here / "broken").iterdir():
        path.write_bytes(b"")
    assert alphaflow(f"{LINE} --bad skip") == 1
    assert f"none of its {COUNT} pictures is whole" in capsys.readouterr().err


def test_scored_pictures_are_never_left_out_and_a_source_of_real_ones_says_how(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert alphaflow("eval broken --metrics fd-tiny --reference shapes:150") == 1
    err = capsys.readouterr().err
    assert "Replace or remove it; nothing was measured without it." in err
    assert "--bad" not in err
    assert alphaflow("eval shapes:150 --metrics fd-tiny --reference broken") == 1
    assert "leave such pictures out: alphaflow reference SOURCE --bad skip -o FILE" in capsys.readouterr().err


def test_a_disk_that_fails_is_not_a_bad_picture() -> None:
    def fetch() -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    decode = partial(decode_whole, max_pixels=100)
    with pytest.raises(AlphaflowError, match="the source cannot be read any more"):
        read_picture(fetch, decode)


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_workers")
def test_two_processes_leave_out_what_one_leaves_out() -> None:
    assert alphaflow(f"{LINE} --bad skip --work one --json") == 0
    line = LINE.replace("r.safe", "two.safe")
    process = Command(shlex.split(f"{line} --bad skip --work two --processes 2 --json"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out)["facts"]["left_out"]["count"] == 3
    assert_of_the_same_pictures(load_reference(Path("r.safetensors")), load_reference(Path("two.safetensors")))

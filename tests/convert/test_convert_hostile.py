"""Files made to harm: nothing in them is executed, nothing hangs, each gets its one line."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from snapshots import published_snapshot

from alphaflow_cli.cli import run
from alphaflow_cli.convert import ConvertOptions, convert
from alphaflow_cli.convert.source import read_source
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint

PROOF = "executed"  # the file that a hostile pickle would leave in the working folder


class Calls:
    """A pickle of it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def shell():
    return Calls(os.system, f"touch {PROOF}")


HOSTILE = {
    "os.system": lambda: {"net": shell()},
    "nested in cfg": lambda: published_snapshot() | {"cfg": {"model": {"tokenizer": {"deep": [{"er": shell()}]}}}},
    "subprocess": lambda: {"ema": Calls(subprocess.call, ["touch", PROOF])},
    "eval": lambda: {"ema": Calls(builtins.eval, f"open('{PROOF}', 'w')")},
    "a reduce chain": lambda: {"ema": Calls(builtins.getattr, Calls(__import__, "os"), "system")},
    "open": lambda: {"ema": Calls(builtins.open, PROOF, "w")},
    "a torch function": lambda: {"ema": Calls(torch.hub.load, ".", "x")},
    "a path": lambda: {"ema": Path(PROOF)},
}


def saved(path, tree, **options):
    torch.save(tree, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, monkeypatch, what, legacy):
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path / "x.pt", HOSTILE[what](), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(AlphaflowError, match=r"(refused|cannot be read).*wants to import [\w.]+") as caught:
        convert(file, tmp_path / "out.safetensors", ConvertOptions())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / PROOF).exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused_in_every_protocol(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"ema": shell()}, protocol=protocol))
    with pytest.raises(AlphaflowError):
        read_source(tmp_path / "x.pt")
    assert not (tmp_path / PROOF).exists()


def test_the_line_on_the_command_line_is_one_and_the_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "x.pt", {"net": shell()})
    assert run(["convert", "x.pt", "-o", "out.safetensors"]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 2  # the first says what begins
    assert "system" in err
    assert "nothing in it was executed" in err


def test_known_containers_of_older_snapshots_are_inert(tmp_path):
    """src.structs.EasyDict and TensorGroup, by name, in a process that knows them; read here, where nobody does."""
    script = """
import sys, types, torch
for name in ("src", "src.structs"):
    sys.modules[name] = types.ModuleType(name)
kinds = []
def attribute(self, name):
    if name not in self:
        raise AttributeError(name)  # Python 3.10 asks for __getstate__
    return self[name]
for name in ("EasyDict", "TensorGroup"):
    kind = type(name, (dict,), {"__module__": "src.structs", "__getattr__": attribute})
    setattr(sys.modules["src.structs"], name, kind)
    kinds.append(kind)
easy, group = kinds
torch.save({"cfg": easy(model=easy(dim=8)), "ema": group(a=torch.ones(3))}, sys.argv[1])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "old.pt")], check=True)
    tree = read_source(tmp_path / "old.pt")
    assert tree["cfg"]["model"]["dim"] == 8
    assert torch.equal(tree["ema"]["a"], torch.ones(3))


def rezipped(source, target, *, change=None, compression=zipfile.ZIP_STORED):
    """The same entries, written otherwise."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            name, content = entry.filename, old.read(entry)
            new.writestr(name, change(name, content) if change else content)
    return target


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    good = saved(tmp_path / "good.pt", {"ema": {"w": torch.zeros(1)}})
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        with new.open("good/data/1", "w", force_zip64=True) as stream:
            for _ in range(200):
                stream.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    start = time.perf_counter()
    with pytest.raises(AlphaflowError, match="possibly a zip bomb"):
        read_source(bomb)
    assert time.perf_counter() - start < 2


def test_a_pickle_of_unreasonable_size_is_not_read(tmp_path):
    good = saved(tmp_path / "good.pt", {"ema": {"w": torch.zeros(1)}})
    big = rezipped(good, tmp_path / "big.pt", change=lambda n, c: bytes(17 << 20) if n.endswith("data.pkl") else c)
    with pytest.raises(AlphaflowError, match="reasonable size"):
        read_source(big)


def test_a_pickle_that_would_hang_its_reader_is_refused_at_once(tmp_path):
    nested = ()
    for _ in range(60):
        nested = (nested, nested)  # 2^60 leaves, 300 bytes: hashing it as a key would never end
    good = saved(tmp_path / "good.pt", {"ema": {"w": torch.zeros(1)}})
    content = pickle.dumps([nested], protocol=2)[:-1] + b"}(" + pickle.dumps(nested, protocol=2)[2:-1] + b"K\x01u."
    slow = rezipped(good, tmp_path / "slow.pt", change=lambda n, c: content if n.endswith("data.pkl") else c)
    start = time.perf_counter()
    with pytest.raises(AlphaflowError, match="would never end"):
        read_source(slow)
    assert time.perf_counter() - start < 2


def test_a_second_pickle_hidden_under_the_same_name_is_refused(tmp_path):
    file = saved(tmp_path / "x.pt", {"ema": {"w": torch.zeros(1)}})
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x/data.pkl", pickle.dumps(shell()))
    with pytest.raises(AlphaflowError, match="overlap or repeat"):
        read_source(file)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    file = saved(tmp_path / "x.pt", {"ema": {"w": torch.zeros(1).expand(1 << 40)}})
    with pytest.raises(AlphaflowError, match="claims more numbers than the file holds"):
        convert(file, tmp_path / "out.safetensors", ConvertOptions(family="sit"))


@pytest.mark.parametrize("cut", [0.999, 0.5, 0.01])
def test_a_truncated_file_is_named(tmp_path, cut):
    file = saved(tmp_path / "x.pt", published_snapshot())
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(AlphaflowError, match="truncated"):
        convert(file, tmp_path / "out.safetensors", ConvertOptions())


@pytest.mark.parametrize("content", [b"", b"\x80", b"GIF89a", b"\x80\x02.", bytes(1000)], ids=lambda c: str(c[:6]))
def test_rubbish_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(AlphaflowError, match=r"x\.pt"):
        read_source(tmp_path / "x.pt")


def safetensors_bytes(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


LYING = {
    "offsets beyond the file": safetensors_bytes(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(8)),
    "offsets that overlap": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        bytes(12),
    ),
    "a shape that is not the size": safetensors_bytes(
        b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}', bytes(8)
    ),
    "a header of 10 GB": struct.pack("<Q", 10 << 30) + b"{}",
    "a header of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "a header that is no JSON": safetensors_bytes(b"{" * 5000),
    "no bytes": b"",
}


@pytest.mark.parametrize("read", [read_source, load_checkpoint], ids=["convert", "sample"])
@pytest.mark.parametrize("what", LYING)
def test_a_lying_safetensors_file_is_named_at_once(tmp_path, what, read):
    (tmp_path / "x.safetensors").write_bytes(LYING[what])
    start = time.perf_counter()
    with pytest.raises(AlphaflowError, match=r"x\.safetensors"):
        read(tmp_path / "x.safetensors")
    assert time.perf_counter() - start < 2


def test_a_folder_or_nothing_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.pt"):
        with pytest.raises(AlphaflowError, match="no such file"):
            read_source(path)


def test_an_honest_file_of_the_old_format_is_read(tmp_path):
    file = saved(tmp_path / "x.pt", {"ema": {"w": torch.arange(3.0)}}, _use_new_zipfile_serialization=False)
    assert torch.equal(read_source(file)["ema"]["w"], torch.arange(3.0))


def test_the_hostile_pickles_do_run_where_nobody_guards(tmp_path, monkeypatch):
    """Otherwise the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.load(io.BytesIO(pickle.dumps({"net": shell()})))
    assert (tmp_path / PROOF).exists()

"""A foreign file to a tree of plain values and tensors; nothing in it is executed.

`.pt` is a zip with a pickle in it (or, older, a row of pickles). Before torch reads it with `weights_only=True`, the
zip must be what torch.save writes: entries stored, not compressed, so that it is no bomb. The pickle may name only
torch's own tensor builders and a few plain containers (below), which are mapped to inert dicts by name.
"""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import for_terminal

LARGEST_PICKLE = 16 << 20  # bytes; the pickle of a real 10 GB checkpoint has about 1 MB, its tensors lie beside it
HEAVIEST_TUPLE = 1_000_000  # leaves; nested tuples that share their parts take 2^depth steps to hash
BROKEN_PICKLE = (ValueError, EOFError, LookupError, AttributeError, TypeError)
_MARK = object()
LEGACY_PICKLES = 5  # magic number, protocol, machine, the object, the storages' keys


class Fields:
    """An inert stand-in for an argparse.Namespace: `vars()` gives its fields, and it does nothing."""


CONTAINERS = {  # dict subclasses and records of the known systems → an inert stand-in
    "src.structs.EasyDict": OrderedDict,
    "src.structs.TensorGroup": OrderedDict,
    "argparse.Namespace": Fields,
}
PLAIN = {  # besides torch's own names, which torch.load judges one by one
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "__builtin__.set",
    "builtins.set",
    "__builtin__.bytearray",
    "builtins.bytearray",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALLOWED = frozenset(PLAIN | CONTAINERS.keys())
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    AssertionError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
)


def read_source(path: Path) -> dict[str, Any]:
    """Read a foreign file as a tree: nested dicts with tensors at the leaves. Nothing in it is executed."""
    if not path.is_file():
        raise AlphaflowError(f"{path}: no such file. Give a .pt or .safetensors checkpoint.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    (_check_zip if is_zip else _check_legacy)(path)
    return _load(path, mmap=is_zip)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise AlphaflowError(
            f"{path}: not a whole safetensors file: {for_terminal(error)}. Nothing was converted."
        ) from error


def _check_zip(path: Path) -> None:
    """Refuse a zip that torch.save would not write, then look at the pickle in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _refusal(path, "its entries are compressed, which torch.save never does: possibly a zip bomb")
            if sum(entry.file_size for entry in entries) > path.stat().st_size or len(set(names)) < len(names):
                raise _refusal(path, "its entries overlap or repeat")
            if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
                raise _refusal(path, "it is no torch.save checkpoint: one data.pkl of reasonable size is wanted")
            with archive.open(pickles[0]) as stream:
                _check_pickle(path, stream, 1)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise AlphaflowError(f"{path}: truncated or damaged: {error}. Download it again.") from error


def _check_legacy(path: Path) -> None:
    """Check a file of torch's old format: several pickles in a row, then the tensors."""
    with path.open("rb") as stream:
        head = stream.read(2)
        if head[:1] != b"\x80":
            raise AlphaflowError(
                f"{path}: neither a whole torch.save file nor safetensors: truncated, or another format. "
                "Download it again, or name a .pt or .safetensors checkpoint."
            )
        stream.seek(0)
        _check_pickle(path, stream, LEGACY_PICKLES)


def _check_pickle(path: Path, stream: IO[bytes], pickles: int) -> None:
    try:
        named = foreign_globals(stream, allowed=ALLOWED, pickles=pickles)
    except Dangerous as error:
        raise _refusal(path, str(error)) from error
    except Damaged as error:
        raise AlphaflowError(
            f"{path}: its pickle is truncated or damaged ({error}). Nothing in it was executed. Download it again."
        ) from error
    foreign = [name for name in named if not name.startswith("torch.")]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise _refusal(path, f"it wants to import {', '.join(foreign[:3])}{more}, which a checkpoint does not need")


class Dangerous(Exception):
    """The pickle would keep its reader busy for ever."""


class Damaged(Exception):
    """The pickle ends too early, or there is none."""


def foreign_globals(stream: IO[bytes], *, allowed: frozenset[str], pickles: int) -> list[str]:
    """List the names that a pickle would import and that are not allowed, in order, each once.

    The first `pickles` of the stream are looked through; none of them is run.
    """
    named: dict[str, None] = {}
    rest = io.BytesIO(stream.read(LARGEST_PICKLE))
    try:
        for _ in range(pickles):
            for name in _globals(rest):
                named[name] = None
    except BROKEN_PICKLE as error:
        if named.keys() <= allowed:
            raise Damaged(str(error)) from error
    return [name for name in named if name not in allowed]


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """Yield the names that one pickle would import.

    It is walked with a stack of what matters: strings, of which names are made, and the weight of tuples.
    """
    stack: list[object] = []
    memo: dict[int, object] = {}
    for opcode, arg, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(arg).replace(" ", ".")
        if name == "STACK_GLOBAL" and len(stack) > 1:
            yield f"{stack[-2]}.{stack[-1]}"
        if name == "MEMOIZE" or "PUT" in name:
            memo[len(memo) if arg is None else int(arg)] = stack[-1] if stack else 1
        elif "GET" in name:
            stack.append(memo.get(int(arg or 0), 1))
        else:
            _apply(opcode, arg, stack)


def _apply(opcode: pickletools.OpcodeInfo, arg: object, stack: list[object]) -> None:
    """Do to the stack what an opcode would: pop what it takes, push what it makes."""
    if opcode.name == "MARK":
        stack.append(_MARK)
        return
    items: list[object] = []
    before = list(opcode.stack_before)
    if pickletools.markobject in before:
        while stack and (item := stack.pop()) is not _MARK:
            items.append(item)
        before = before[: before.index(pickletools.markobject)]
    items += [stack.pop() for _ in before if stack]
    made: object = arg if isinstance(arg, str) and not opcode.stack_before else 1
    if opcode.name.startswith("TUPLE"):
        weight = 1 + sum(item if isinstance(item, int) else 1 for item in items)
        if weight > HEAVIEST_TUPLE:
            raise Dangerous("tuples nested so that reading them would never end")
        made = weight
    stack.extend([made] * len(opcode.stack_after))


def _refusal(path: Path, why: str) -> AlphaflowError:
    return AlphaflowError(f"{path}: refused, and nothing in it was executed: {why}.")


def _load(path: Path, *, mmap: bool) -> dict[str, Any]:
    stand_ins: list[Any] = [(kind, name) for name, kind in CONTAINERS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual pickle protocol: what matters is checked
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        raise AlphaflowError(
            f"{path}: cannot be read as a checkpoint ({_reason(error)}). Nothing in it was executed."
        ) from error
    if not isinstance(tree, dict):
        raise AlphaflowError(f"{path}: holds a {type(tree).__name__}, not the dict of a checkpoint.")
    return tree


def _reason(error: BaseException) -> str:
    """Make one line of torch's paragraphs: the name it refused, or the first line that is not advice."""
    unsupported = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", str(error))
    if unsupported:
        return f"it wants to import {unsupported[1]}"
    lines = [
        line for line in str(error).splitlines() if line and not line.startswith(("Weights only", "Please", "Check"))
    ]
    return lines[0][:200] if lines else type(error).__name__


def in_brief(value: object) -> str:
    """Describe a value of a foreign file in one line of a message, however long or strange it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and abs(value) >= 10**15:
        return "a number of more than 15 digits"
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    return " ".join(str(value).split())[:60]


def as_table(value: object) -> dict[Any, Any]:
    """A table of a foreign file as it is; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def bare_name(name: object) -> str:
    """A weight's name without the prefixes that compiled and wrapped networks add."""
    text = name if isinstance(name, str) else in_brief(name)
    return text.replace("_orig_mod.", "").removeprefix("module.")


def state_dict(tree: object, where: str) -> dict[str, Tensor]:
    """Check that a node is a table of honest float tensors; names lose the prefixes of wrapped networks."""
    if not isinstance(tree, dict) or not tree:
        raise AlphaflowError(f"{where}: no table of weights there.")
    weights: dict[str, Tensor] = {}
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise AlphaflowError(f"{where}: {bare_name(name)[:80]!r} is a {type(value).__name__}, not a tensor.")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or _lies(value):
            raise AlphaflowError(f"{where}: {name[:80]} claims more numbers than the file holds.")
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            raise AlphaflowError(f"{where}: {name[:80]} is a table of {kind}; weights are floating-point numbers.")
        weights[bare_name(name)] = value
    if _share(weights):
        raise AlphaflowError(f"{where}: its tables share their bytes, and claim more numbers than the file holds.")
    return weights


def _share(weights: dict[str, Tensor]) -> bool:
    """Tell whether tables overlap, or all together are larger than the memory they lie in."""
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
    if sum(value.numel() * value.element_size() for value in weights.values()) > sum(held.values()):
        return True
    whole = sorted((v.data_ptr(), v.numel() * v.element_size()) for v in weights.values() if v.is_contiguous())
    ranges = [(start, start + size) for start, size in whole if size]
    return any(following[0] < before[1] for before, following in pairwise(ranges))


def _lies(value: Tensor) -> bool:
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()

"""What a pickle would do if it were run, found without running it: the globals it names, the work it would cause."""

import io
import pickletools
from collections.abc import Iterator
from typing import IO

LARGEST_PICKLE = 16 << 20  # bytes; the pickle of a real 10 GB checkpoint has about 1 MB, its tensors lie beside it
HEAVIEST_TUPLE = 1_000_000  # leaves; nested tuples that share their parts take 2^depth steps to hash
DAMAGE = (ValueError, EOFError, LookupError, AttributeError, TypeError)
_MARK = object()


class Dangerous(Exception):
    """The pickle would hang its reader."""


class Damaged(Exception):
    """The pickle ends too early, or is none."""


def foreign_globals(stream: IO[bytes], *, allowed: frozenset[str], pickles: int) -> list[str]:
    """The globals that the first pickles of a stream name and that are not allowed, in order, each once."""
    found: dict[str, None] = {}
    rest = io.BytesIO(stream.read(LARGEST_PICKLE))
    try:
        for _ in range(pickles):
            for name in _globals(rest):
                found[name] = None
    except DAMAGE as error:
        if found.keys() <= allowed:
            raise Damaged(str(error)) from error
    return [name for name in found if name not in allowed]


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """Walk one pickle with a stack of what matters: strings (for the names of globals) and the weight of tuples."""
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
    """Pop what the opcode takes, push what it makes."""
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

"""Fuzzing by hand: interesting values, mutators of bytes, text and JSON, and a runner that watches every trial.

A trial is one command line over one mutated input. It passes when the command ends in time with 0, 1 or 2, says what is
wrong in one short paragraph without control characters, and its own check finds nothing silently wrong. A trial is a
pure function of (target, seed, number); a failure prints the line that repeats it. Environment:

    ALPHAFLOW_FUZZ_SEED=7           other trials (default 0)
    ALPHAFLOW_FUZZ_SHARE=0.1        a tenth of the trials of every target
    ALPHAFLOW_FUZZ_TRIAL=recipes:12 only this trial of this seed; its files stay in pytest's temporary folder
"""

import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from alphaflow_cli.cli import run

SEED = int(os.environ.get("ALPHAFLOW_FUZZ_SEED", "0"))
SHARE = float(os.environ.get("ALPHAFLOW_FUZZ_SHARE", "1"))
ONLY = os.environ.get("ALPHAFLOW_FUZZ_TRIAL", "")
LINES, CHARACTERS, GROWTH = 40, 4000, 400_000_000  # of what is said on stderr; bytes that a trial may take
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

WORDS = """
0 -0 -1 1 2 7 1_ 1__0 _1 1_e5 1_000 1e5 1E5 1e-5 1e400 -1e400 1e-400 5e-324 1.7e308 .5 5. . +1 --1 0x10 0b1 0o17
010 1,000 12:30 ١٢ ² １ nan .nan .inf -.inf inf Infinity -Infinity NaN true false True yes no on off null ~ 100%
50% 0% -5% 101% 100.5% 1e3% % 0.1% 1_0% 2147483648 4294967296 9223372036854775807 9223372036854775808 1e18
1000000000
"""
NUMBERS = re.findall(r"\S+", WORDS)
NUMBERS += ["9" * 400, "9" * 5000, "-" + "9" * 5000, "9" * 400 + "%", "1" + "0" * 30, "1." + "0" * 400 + "1"]
TEXTS = [
    "",
    " ",
    "a",
    "é",
    "🙂",
    "\0",
    "\x1b[2J\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\u202eabc",
    "\u2028",
    "\ufeff",
    "\r",
    "\r\n",
]
TEXTS += [
    "a\nerror: b",
    "\n# Heading",
    "| a | b |",
    "](javascript:alert(1))",
    "<script>alert(1)</script>",
    "--",
    "-1",
    "#",
]
TEXTS += [
    "<img src=x onerror=alert(1)>",
    "../../outside",
    "/dev/zero",
    "/dev/stdin",
    "%s%n{0}{x}",
    "a" * 300,
    "a" * 5000,
]
TEXTS += [
    "x\n" * 5000,
    "https://user:secret@host/x",
    "none",
    "glyphs:10",
    "NUL",
    "\ud800",
    "'",
    '"',
    "{",
    "[",
    "\\",
    "\t",
]
YAML = [
    "[]",
    "{}",
    "[1",
    "{a: 1}",
    "[" * 40 + "]" * 40,
    "[" * 3000,
    "{a: " * 2000,
    "&a 1",
    "*a",
    "!!int 3",
    "|",
    ">",
    "- 1",
    "? a",
]
YAML += [
    "!!python/object/apply:os.system ['true']",
    "[1, 2, 3]",
    "[" + "1, " * 5000 + "1]",
    "a: b: c",
    "---",
    "...",
    "%YAML 9.9",
]
JSON: list[object] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    2**63,
    10**400,
    [],
    {},
    [[]],
    [None],
]
JSON += ["", "x", {"a": 1}, ["a", 1, None, {}], {"": None}, list(range(3000)), {f"k{i}": i for i in range(3000)}]


class Stuck(BaseException):
    """Raised by the alarm: no handler of the package may take it for its own."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Trial:
    """A command line; `check` says what is silently wrong with its outcome, if anything."""

    argv: list[str]
    what: str = ""
    refused: bool = False  # exit 0 would be wrong
    check: Callable[[Outcome], str] | None = None


# Running.


def fuzz(target: str, make: Callable[[random.Random, int], Trial], count: int, *, seconds=20, cpu=2.0, fork=False):
    """Make and watch `count` trials; fails with every distinct fault and the line that repeats it."""
    if ONLY and ONLY.split(":")[0] != target:
        pytest.skip(f"ALPHAFLOW_FUZZ_TRIAL asks for {ONLY}")
    numbers = [int(ONLY.split(":")[1])] if ONLY else range(max(1, round(count * SHARE)))
    slowest = (0.0, "")
    faults: dict[str, int] = {}  # what the last line says → how often
    for number in numbers:
        trial = make(random.Random(f"{target}/{SEED}/{number}"), number)
        started = time.monotonic()
        fault = in_child(trial, seconds, cpu) if fork else attempt(trial, seconds, cpu)
        slowest = max(slowest, (time.monotonic() - started, f"{target}:{number} {trial.what:.80}"))
        if fault:
            repeat = f"ALPHAFLOW_FUZZ_SEED={SEED} ALPHAFLOW_FUZZ_TRIAL={target}:{number}"
            tail = "\n".join(f"    {line:.300}" for line in fault.splitlines()[-8:])
            key = re.sub(r"0x\w+|\d+|'.*'", "N", fault.splitlines()[-1])[:120]
            if key not in faults:
                told = f"{repeat}  {trial.what or trial.argv!r:.200}\n{tail}"
                print(told.encode("ascii", "backslashreplace").decode(), flush=True)
            faults[key] = faults.get(key, 0) + 1
    summary = f"{target}: {len(numbers):,} trials of seed {SEED}, {len(faults)} distinct faults; slowest: {slowest}"
    print(summary, flush=True)
    if faults:
        times = "".join(f"\n{count} × {key}" for key, count in faults.items())
        pytest.fail(f"{summary}{times}", pytrace=False)


def attempt(trial: Trial, seconds: float, cpu: float) -> str:
    """Run a trial in this process; what is wrong with it, or nothing."""
    out, err = io.StringIO(), io.StringIO()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    old = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(trial.argv)
    except SystemExit as leave:
        code = leave.code
    except Stuck:
        return f"{traceback.format_exc(limit=-3)}\nhangs: still running after {seconds} s in {_where()}"
    except BaseException as error:
        return f"{traceback.format_exc(limit=-4)[-1500:]}\n{type(error).__name__} in {_where()}: {str(error)[:60]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    used = time.process_time() - started
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if used > cpu:
        return f"slow: over {cpu} s of processor time\nslow"
    if grown > GROWTH:
        return f"takes {grown:,} bytes of memory\nmemory"
    return judge(trial, Outcome(code, out.getvalue(), err.getvalue()))


def judge(trial: Trial, outcome: Outcome) -> str:
    """The rules for every ending, then the trial's own."""
    code, err = outcome.code, outcome.err
    if code not in (0, 1, 2):
        return f"{err[-500:]}\nexit code {code!r}"
    if "Traceback" in err:
        return f"{err[-1500:]}\na traceback on stderr"
    if len(err) > CHARACTERS or err.count("\n") > LINES:
        return f"{err[:300]}…\na message without bound: {err[:20]!r}"
    if CONTROL.search(err) or CONTROL.search(outcome.out):
        where = "stderr" if CONTROL.search(err) else "stdout"
        return f"{(err or outcome.out)[:500]!r}\ncontrol characters on {where}"
    if code and len(re.findall("^error: ", err, re.MULTILINE)) != 1:
        return f"{err[-800:]}\nexit {code} without exactly one error: line"
    if trial.refused and code == 0:
        return f"{outcome.out[-300:]}\naccepted what must be refused: {trial.what[:60]}"
    return trial.check(outcome) if trial.check else ""


def in_child(trial: Trial, seconds: float, cpu: float) -> str:
    """The same in a fork that can be killed: a pipe opened in C waits for ever, a shrunken map is a SIGBUS."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.write(write, attempt(trial, seconds, cpu).encode("utf-8", "replace")[:60_000])
        finally:
            os._exit(0)
    os.close(write)
    ready = select.select([read], [], [], seconds + 5)[0]
    if not ready:
        os.kill(pid, signal.SIGKILL)
    fault = os.read(read, 65_536).decode()
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not ready:
        return f"hangs: still running after {seconds} s, deaf to signals\nhangs: {trial.what[:60]}"
    return fault if status == 0 else f"{trial.what}\nkilled by signal {-status}"


def _alarm(*_: object) -> None:
    raise Stuck


def _where() -> str:
    """File and line of the innermost frame of ours."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if "alphaflow_cli" in f.filename] or frames
    return f"{ours[-1].filename.rpartition('alphaflow_cli/')[2]}:{ours[-1].name}"


# Mutators: each gives one changed copy.


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes anywhere."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 512))
        new = rng.choice((b"", rng.randbytes(length), b"\0" * length, b"\xff" * length, data[at : at + length] * 2))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):  # one bit
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + new + data[at + length :]
        elif kind == 2:
            data = data[:at] + new + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + length :]
        elif rng.random() < 0.4:
            data = data[:at]
    return data


def mutate_recipe(rng: random.Random, text: str) -> str:
    """A value, a key, a line, the nesting, or any bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        words = [(m.start(), m.end()) for m in re.finditer(r"[^\s:,{}\[\]]+", text)]
        lines = text.splitlines(keepends=True)
        kind = rng.randrange(8)
        if kind < 4 and words:
            start, end = rng.choice(words)
            text = text[:start] + rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, YAML))) + text[end:]
        elif kind == 4 and lines:
            line = rng.choice(lines)
            lines.insert(rng.randrange(len(lines)), rng.choice((line, " " + line, line * 500, line.replace(":", ""))))
            text = "".join(lines)
        elif kind == 5 and lines:
            lines.pop(rng.randrange(len(lines)))
            text = "".join(lines)
        elif kind == 6:
            text += "".join(f"{rng.choice(('k', 'train.', 'é'))}{i}: {i}\n" for i in range(rng.choice((1, 50, 5000))))
        else:
            text = mutate_bytes(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
    return text[:200_000]


def mutate_json(rng: random.Random, document: object) -> str:
    """Values replaced, removed, renamed or nested, then perhaps a broken byte."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 6))):
        holders = list(_holders(document))
        if not holders:
            break
        holder, key = rng.choice(holders)
        kind, value = rng.randrange(8), copy.deepcopy(rng.choice(rng.choice((JSON, JSON, TEXTS, NUMBERS))))
        if kind < 5:
            holder[key] = value
        elif kind == 5:
            del holder[key]
        elif kind == 6 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        else:
            holder[key] = [holder[key]] * rng.choice((1, 2, 500))
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(20)
    if kind == 0:
        text = rng.choice(("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", "", "\0", "null", "[]", '"x"', "1"))
    elif kind == 1:
        text = mutate_bytes(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
    return text


def _holders(node: object):
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield node, key
            yield from _holders(value)


def write(path, text: str):
    """Text that may hold what UTF-8 cannot."""
    path.write_bytes(
        text.encode("utf-8", "surrogateescape") if "\ud800" not in text else text.encode("utf-8", "surrogatepass")
    )
    return path

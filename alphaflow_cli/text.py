"""Words from outside, made harmless: for a terminal, for Markdown, for a code span.

A file's name, a class's name or a server's answer may hold anything: control characters that rewrite the screen,
letters that turn the reading direction, tags, links, or a megabyte. What is shown is always one bounded run of visible
letters.
"""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # of Persian and Indian words and of emoji: they only join their neighbours
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # control, format, surrogate, private, separators of lines
MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")  # what has a meaning inside a line
OPENING = re.compile(r"\A(\s*)([#+=-]|\d+[.)](?=\s|$))")  # what has one at its beginning
LONGEST_WORD, MOST_LINES, LONGEST_MESSAGE = 400, 40, 4000  # more of a message is not read
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def for_terminal(text: object, *, limit: int = 400, lines: bool = False) -> str:
    """The text as one line of at most `limit` letters; what a terminal would obey is shown as `\\x1b`.

    `lines` keeps its line breaks.
    """
    shown = shorten(str(text), limit)
    if shown.isprintable():
        return shown
    return "".join(letter if _is_harmless(letter, lines) else _escape(letter) for letter in shown)


def for_message(text: str) -> str:
    """Make a message readable: harmless, long words cut in the middle, at most 40 lines and 4,000 letters."""
    shown = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: shorten(word[0], LONGEST_WORD), text)
    lines = shown.split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"… and {len(lines) - MOST_LINES + 1:,} more lines"]
    return for_terminal("\n".join(lines), limit=LONGEST_MESSAGE, lines=True)


def shorten(text: str, most: int) -> str:
    """Cut a text in the middle to at most `most` letters; the number of those left out stands there."""
    if len(text) <= most:
        return text
    keep = max(most - 25, 2) // 2
    return f"{text[:keep]}…({len(text) - 2 * keep:,} more)…{text[-keep:]}"


def brief(text: object) -> str:
    """Shorten a path or a reason for a message: of several lines the first, of a long one its two ends."""
    return shorten((str(text).splitlines() or [type(text).__name__])[0], 200)


def counted(number: int, one: str, many: str = "") -> str:
    """Write a number with its noun: `1 class`, `1,000 classes`; `many` where it is not the noun with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def for_markdown(text: object, *, limit: int = 400) -> str:
    """Make a text safe in a line of Markdown or a cell of its table: no tag, link, heading, emphasis or code."""
    shown = "".join(
        ENTITIES.get(letter, letter) for letter in MARKDOWN.sub(r"\\\g<0>", for_terminal(text, limit=limit))
    )
    return OPENING.sub(lambda mark: f"{mark[1]}{mark[2][:-1]}\\{mark[2][-1]}", shown)


def code_span(text: object) -> str:
    """Write a text as code inside a line of Markdown; backticks in it become apostrophes."""
    return f"`{for_terminal(text).replace('`', chr(39)).strip() or ' '}`"


def _is_harmless(letter: str, lines: bool) -> bool:
    return letter in JOINERS or (lines and letter == "\n") or unicodedata.category(letter) not in UNSAFE


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )

"""Words from outside, made harmless: for a terminal, for Markdown, for a code span.

A file's name, a class's name or a server's answer may hold control characters that rewrite the screen, letters that
turn the reading direction, tags, links, or a megabyte. What is shown is always one bounded run of visible letters.
"""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # of Persian and Indian words and of emoji: they only join their neighbours
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # control, format, surrogate, private, separators of lines
MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")  # what has a meaning inside a line
OPENING = re.compile(r"\A(\s*)([#+=-]|\d+[.)](?=\s|$))")  # what has one at its beginning
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def for_terminal(text: object, *, limit: int = 400, lines: bool = False) -> str:
    """One line of at most `limit` letters; what a terminal would obey is shown as `\\x1b`. `lines` keeps newlines."""
    shown = str(text)
    if len(shown) > limit:
        half = (limit - 3) // 2
        shown = f"{shown[: limit - 3 - half]} … {shown[len(shown) - half :]}"
    if shown.isprintable():
        return shown
    return "".join(letter if _is_harmless(letter, lines) else _escape(letter) for letter in shown)


def for_markdown(text: object, *, limit: int = 400) -> str:
    """The same words in a line of Markdown or a cell of its table: no tag, link, heading, emphasis or code."""
    shown = "".join(
        ENTITIES.get(letter, letter) for letter in MARKDOWN.sub(r"\\\g<0>", for_terminal(text, limit=limit))
    )
    return OPENING.sub(lambda found: f"{found[1]}{found[2][:-1]}\\{found[2][-1]}", shown)


def code_span(text: object, *, limit: int = 400) -> str:
    """The same words as code inside a line of Markdown; backticks in them become apostrophes."""
    return f"`{for_terminal(text, limit=limit).replace('`', chr(39)).strip() or ' '}`"


def _is_harmless(letter: str, lines: bool) -> bool:
    return letter in JOINERS or (lines and letter == "\n") or unicodedata.category(letter) not in UNSAFE


def _escape(letter: str) -> str:
    code = ord(letter)
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )

"""Documents and words from outside: every fault is one short line, nothing of them reaches a terminal or a card."""

import json
import os
import re
import time
import unicodedata

import pytest

from alphaflow_cli.cli import say_error
from alphaflow_cli.commands.common import print_json, print_table, tell
from alphaflow_cli.documents import (
    MAX_DEPTH,
    Anything,
    Flag,
    ListOf,
    Maybe,
    Number,
    Table,
    Text,
    Whole,
    check_shape,
    parse_json,
    read_json,
)
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.text import UNSAFE, code_span, for_markdown, for_terminal

SHAPE = Table(
    {"name": Text(20), "rows": ListOf(Table({"value": Number(0, 10)}), most=3)},
    optional={"count": Maybe(Whole(0, 5)), "good": Flag(), "kind": Text(one_of=("a", "b")), "rest": Anything()},
)


def refusal(data, shape=SHAPE, **options):
    with pytest.raises(AlphaflowError) as caught:
        parse_json(data, "x.json", shape, **options)
    said = str(caught.value)
    assert said.startswith("x.json: ")
    assert len(said) < 700
    assert "\n" not in said
    return said


def test_a_document_of_its_shape_is_read():
    text = b'\xef\xbb\xbf{"name": "n", "rows": [{"value": 1}, {"value": 2.5}], "count": null, "rest": {"x": [1]}}'
    assert parse_json(text, "x.json", SHAPE)["rows"] == [{"value": 1}, {"value": 2.5}]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not whole JSON"),
        (b"{", "not whole JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "levels deep"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "levels deep"),
        (b'{"a": ' * 5_000 + b"1" + b"}" * 5_000, "levels deep"),
        (b'{"name": NaN}', "NaN is no number"),
        (b'{"name": -Infinity}', "-Infinity is no number"),
        (b'{"name": 1e999}', "too large"),
        (b'{"name": ' + b"9" * 5_000 + b"}", "a whole number of 5,000 digits"),
        (b'{"name": "a", "name": "b"}', "the key 'name' stands twice"),
        (b'{"a\\u001b": "a", "a\\u001b": "b"}', "the key 'a\\x1b' stands twice"),
        (b"[]", "a table is wanted, this is a list"),
        (b"3", "a table is wanted, this is a whole number"),
        (b'{"rows": []}', "name: is missing"),
        (b'{"name": 3, "rows": []}', "name: text is wanted, this is a whole number"),
        (b'{"name": "n", "rows": {}}', "rows: a list is wanted, this is a table"),
        (b'{"name": "n", "rows": [{"value": "1"}]}', "rows[0].value: a number is wanted, this is text"),
        (b'{"name": "n", "rows": [{"value": true}]}', "rows[0].value: a number is wanted, this is true"),
        (b'{"name": "n", "rows": [{"value": 11}]}', "11 is not between 0 and 10"),
        (b'{"name": "n", "rows": [], "count": 1.0}', "count: a whole number is wanted"),
        (b'{"name": "n", "rows": [], "good": 1}', "good: true or false is wanted"),
        (b'{"name": "n", "rows": [], "kind": "c"}', "kind: 'c' is not one of a, b"),
        (b'{"name": "n", "rows": [], "x\\u001b": 1}', "x\\x1b: no such key is known here"),
        (b'{"name": "n", "rows": [1, 2, 3, 4]}', "rows: 4 entries, 0 to 3 are wanted"),
        (b'{"name": "' + b"n" * 21 + b'", "rows": []}', "21 letters"),
        (
            b'{"name": "n", "rows": []' + b', "a": 1' + b"".join(b', "a%d": 1' % i for i in range(999)) + b"}",
            "and more",
        ),
    ],
)
def test_whatever_is_wrong_with_a_document_is_one_short_line(data, said):
    assert said in refusal(data)


def test_a_document_larger_than_its_limit_is_not_taken_apart():
    assert "larger than 10 bytes" in refusal(b'{"name": "n"}', limit=10)


def test_many_keys_and_one_that_stands_twice_take_no_time():
    start = time.monotonic()
    refusal(b"{" + b"".join(b'"k%d": 1, ' % i for i in range(200_000)) + b'"k0": 1}')
    assert time.monotonic() - start < 5


def test_a_folder_a_pipe_and_a_missing_file_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    names = {"pipe": "not a file", ".": "not a file", "missing": "no such file", "a\0b": "no such file"}
    for name, said in names.items():
        with pytest.raises(AlphaflowError, match=said):
            read_json(tmp_path / name, SHAPE)


def test_a_value_can_be_checked_without_json():
    check_shape({"name": "n", "rows": []}, "here", SHAPE)
    with pytest.raises(AlphaflowError, match=r"here: name: text is wanted, this is null"):
        check_shape({"name": None, "rows": []}, "here", SHAPE)


# Words.

HOSTILE = "a\x1b[2Jb\x9bc\u202ed\u2066e\r\n\tf\x00g\u2028h\ud800i\x7f\u200b"


def test_a_terminal_obeys_nothing_of_what_is_shown():
    shown = for_terminal(HOSTILE)
    assert shown.isprintable()
    assert shown == r"a\x1b[2Jb\x9bc\u202ed\u2066e\r\n\tf\x00g\u2028h\ud800i\x7f\u200b"


def test_plain_words_of_any_language_stay_as_they_are():
    for words in ("α-Flow, 12.3 ± 0.4", "Löwe", "狮子", "شیر", "می\u200cخواهم", "👩\u200d🔬", "a\u0301"):
        assert for_terminal(words) == words


def test_shown_words_are_bounded_and_keep_their_ends():
    shown = for_terminal("x" * 5_000 + "end", limit=100)
    assert 85 < len(shown) <= 100
    assert shown.endswith("end")
    assert for_terminal("a\nb\x1b", lines=True) == "a\nb\\x1b"


@pytest.mark.parametrize(
    "words",
    [
        "<img src=x onerror=alert(1)>",
        "<script>",
        "[click](javascript:alert(1))",
        "![x](https://example.com/spy.png)",
        "<javascript:alert(1)>",
        "a | b | c",
        "`code` and ```",
        "one\n# heading",
        "one\n\n---\n",
        "**bold** __bold__ ~~gone~~",
        "&lt;b&gt;",
        "$$x$$",
        "[ref]: javascript:alert(1)",
    ],
)
def test_no_markdown_and_no_html_is_left_of_foreign_words(words):
    shown = for_markdown(words)
    assert "<" not in shown
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[`*_\[\]|~$]", shown)
    assert "`" not in code_span(words)[1:-1]
    assert "\n" not in code_span(words)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("===", r"\==="),
        ("2,000 pictures", "2,000 pictures"),
        ("FD-tiny-2k", "FD-tiny-2k"),
        ("0.5 of it", "0.5 of it"),
    ],
)
def test_a_word_at_the_beginning_of_a_line_opens_nothing(words, shown):
    assert for_markdown(words) == shown


# Where words are printed.


def test_errors_and_talk_do_not_reach_the_terminal_as_commands(capsys):
    say_error(HOSTILE)
    say(HOSTILE)
    tell(HOSTILE)
    print_table([(HOSTILE, "b"), ("c", "d")], head=("one", "two"))
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in [*shown.out.splitlines(), *shown.err.splitlines()])
    assert shown.out.count(r"\x1b[2J") == 2
    assert shown.err.count(r"\x1b[2J") == 2


def test_json_means_the_same_and_commands_no_terminal(capsys):
    document = {"α": HOSTILE, HOSTILE: ["👩\u200d🔬", 1.5, None]}
    print_json(document)
    text = capsys.readouterr().out
    assert json.loads(text) == document
    assert "α" in text
    assert not any(unicodedata.category(letter) in UNSAFE for letter in text if letter not in "\n\u200d")


def test_a_message_is_bounded(capsys):
    say_error("x" * 100_000)
    assert len(capsys.readouterr().err) < 5_000

"""Progress in a file is plain dated lines; on a terminal it is a bar."""

import io
import os
import re
import sys

import pytest
from terminals import read_all

from alphaflow_cli.runtime import progress
from alphaflow_cli.runtime.progress import Bar, Progress, duration, say, size


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_piped_progress_is_dated_lines_with_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Progress("encode", 100, unit="img", done=20) as bar:
        bar.advance(30, note="9.8 MB")
        bar.advance(50, note="19.6 MB")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d encode 50/100 img, [\d.]+ img/s, 0:\d\d left, 9\.8 MB", lines[0]
    )
    assert re.search(r" encode 100/100 img, [\d.]+ img/s, 19\.6 MB$", lines[-1])


def test_a_terminal_that_does_not_say_how_wide_it_is_gets_a_bar_of_80_columns(monkeypatch):
    """It got none: `ssh -tt`, `script` and web terminals may have 0 columns."""
    terminal, mine = os.openpty()
    with os.fdopen(mine, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("train", 10, unit="step") as bar:
            bar.advance(5)
        monkeypatch.undo()
    text = read_all(terminal).decode()
    assert " 50%|" in text
    assert max(map(len, re.split(r"[\r\n]", text))) <= 80


def test_a_line_never_shows_the_values_of_an_earlier_step(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress("train", 40, unit="step") as bar:
        for step in range(1, 41):
            bar.advance(1)
            if step % 5 == 0:
                bar.advance(0, note=f"values of {step}")
    lines = capsys.readouterr().err.splitlines()
    for line in lines:
        step, values = re.search(r"train (\d+)/40", line)[1], re.search(r"values of (\d+)", line)
        assert values is None or values[1] == step
    assert sum("values of" in line for line in lines) >= 4


@pytest.mark.parametrize("note", ["", "α 0.000  l 1.6656  203 img/s  TFM 1.9022  TC -0.0037  v 1.8904  |g| 0.280"])
def test_a_bar_fits_80_columns_and_keeps_what_matters(monkeypatch, note):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    with Progress("sampling, features", 50_000, unit="img") as bar:
        bar._bar.dynamic_ncols = None
        bar._bar.ncols = 80
        bar.advance(25_000, note=note)
        shown = str(bar._bar)
    assert len(shown) <= 80
    assert "sampling, features  50%|" in shown
    assert "25000/50000" in shown
    assert " left" in shown
    assert note[:10] in shown


def test_the_last_line_stands_there_once_however_slow_the_machine_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Progress("encode", 600, unit="img") as bar:
        for count in (300, 300, 0):
            bar.advance(count)
    assert [line.split()[3] for line in capsys.readouterr().err.splitlines()] == ["300/600", "600/600"]
    with Progress("encode", 600, unit="img", done=600):
        """Nothing is left to do, and that is said."""
    assert capsys.readouterr().err.count("encode 600/600 img") == 1


def test_piped_progress_is_quiet_between_its_lines(capsys):
    with Progress("encode", 1000, unit="img") as bar:
        for _ in range(1000):
            bar.advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_was_done_before_does_not_count_for_the_speed():
    bar = Progress("encode", 100, unit="img", done=99, shown=False)
    bar._started_at -= 10
    assert bar.line() == "encode 99/100 img"  # no speed yet
    bar.advance(1)
    assert "10.00 s/img" in bar.line()


def test_only_the_main_process_shows(capsys):
    with Progress("encode", 2, unit="img", shown=False) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_talk_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("encode", 10, unit="img") as bar:
        bar.advance(4, note="1.0 kB")
        say("hello")
        bar.advance(6)
    shown = terminal.getvalue()
    assert "10/10" in shown
    assert "hello\n" in shown
    assert "1.0 kB" in shown


def test_a_failure_ends_the_lines_without_a_summary(capsys):
    with pytest.raises(RuntimeError), Progress("encode", 10, unit="img"):
        raise RuntimeError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (9, "0:09"), (760, "12:40"), (11220, "3:07:00"), (190_800, "2 d 5:00:00")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (512, "512 B"), (9_800_000, "9.8 MB"), (21e9, "21.0 GB"), (4.2e13, "42.0 TB")]
)
def test_sizes_are_decimal(count, text):
    assert size(count) == text


def test_slow_work_is_told_in_seconds_a_step():
    assert Bar.format_meter(3, 850, 3.57, unit=" step", bar_format="{rate_fmt}").strip() == "1.19 s/step"
    assert Bar.format_meter(30, 850, 3, unit=" step", bar_format="{rate_fmt}").strip() == "10.00 step/s"

"""The kinds of value that the verbs' options take: numbers within bounds, and paths."""

import errno
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import click

from alphaflow_cli.errors import OF_A_PATH, AlphaflowError
from alphaflow_cli.files import user_path
from alphaflow_cli.recipe.schema import MOST_NFE


class WholeWithin(click.ParamType):  # type: ignore[type-arg]
    """A whole number within bounds. The bounds are named only when a value exceeds them, so the help stays short."""

    name = "integer"

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip()
        digits = re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text)
        if not digits or len(text) > 40 or not self.least <= int(text) <= self.most:
            self.fail(f"{text!r} is not a whole number from {self.least:,} to {self.most:,}.", param, ctx)
        return int(text)


class NumberWithin(click.ParamType):  # type: ignore[type-arg]
    """A number within bounds. It refuses NaN, which passes every comparison of click's own range."""

    name = "float"

    def __init__(self, least: float, most: float, *, open_below: bool = False) -> None:
        self.least, self.most, self.open_below = least, most, open_below

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not self.least <= number <= self.most or (self.open_below and number == self.least):
            least = f"more than {self.least:,}" if self.open_below else f"{self.least:,} or more"
            self.fail(f"{value!r} is not a number that is {least}, and at most {self.most:,}.", param, ctx)
        return number


class NumberOrAuto(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or auto, which becomes 0."""

    name = "n|auto"

    def __init__(self, number: WholeWithin) -> None:
        self.number = number

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return 0 if value in ("auto", 0) else self.number.convert(value, param, ctx)


# One type for each kind of number that several verbs take. The upper bounds are far beyond use: what passes them is a
# slip of the hand, and would end in a machine without memory.
NFE = WholeWithin(1, MOST_NFE)
IMAGES = WholeWithin(1, 100_000_000)
BATCH = WholeWithin(1, 65_536)
SIZE = WholeWithin(16, 8192)
SEED = WholeWithin(-(2**63), 2**63 - 1)
PROCESSES = WholeWithin(1, 1024)
THREADS = WholeWithin(1, 1024)
GUIDANCE = NumberWithin(-1000, 1000)


class UserPath(click.Path):
    """A path. The shell leaves the `~` of --data=~/x to us."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(user_path(os.fsdecode(value)), param, ctx)


class Destination(UserPath):
    """A path that will be written. If it cannot be, it is refused before the work begins, not after hours of it."""

    def __init__(self, *, is_folder: bool = False, may_be_folder: bool = False, holds_weights: bool = False) -> None:
        super().__init__(file_okay=not is_folder, dir_okay=is_folder or may_be_folder)
        self.is_folder, self.may_be_folder, self.holds_weights = is_folder, may_be_folder, holds_weights

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path: Path = super().convert(value, param, ctx)
        try:
            where, number = self._obstacle(path)
        except OSError as fault:
            where, number = path, fault.errno or 0
        if number:
            reason, advice = OF_A_PATH.get(number, (os.strerror(number), "Choose another path."))
            what = reason if where == path else f"{where}: {reason}"
            raise AlphaflowError(f"{path}: cannot be written ({what}). {advice}")
        return path

    def _obstacle(self, path: Path) -> tuple[Path, int]:
        """What stands in the way, and the errno that writing would give; 0 for nothing."""
        if self.holds_weights and re.search("[\udc80-\udcff]", str(path)):  # safetensors opens no such path
            return path, errno.EILSEQ
        mode = _mode_of(path)
        if mode is not None:
            if stat.S_ISDIR(mode) and not (self.is_folder or self.may_be_folder):
                return path, errno.EISDIR
            if self.is_folder and not stat.S_ISDIR(mode):
                return path, errno.ENOTDIR
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                return path, errno.ENXIO
        if not self.is_folder and path.name:
            _mode_of(path.with_name(f".{path.name}.1234567.part"))  # files are written under such a name at first
        folder = path if mode is not None and stat.S_ISDIR(mode) else path.parent
        while (mode := _mode_of(folder)) is None and self.is_folder:  # missing ones are made
            folder = folder.parent
        if mode is None or not stat.S_ISDIR(mode):
            return folder, errno.ENOENT if mode is None else errno.ENOTDIR
        if not os.access(folder, os.W_OK | os.X_OK):
            return folder, errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        return path, 0


def _mode_of(path: Path) -> int | None:
    """The mode of what a path leads to; None where there is nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None

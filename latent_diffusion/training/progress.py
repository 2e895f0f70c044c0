"""What a run says: a progress bar on a terminal, a line now and then elsewhere, and messages that do not break it."""

import logging
import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 10  # between two lines where there is no terminal, as in a cluster's log
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}, {rate_fmt}{postfix}]"


def bar(total: int, initial: int, title: str, *, show: bool = True) -> tqdm:
    """A progress bar over training steps on stderr."""
    options: dict[str, Any] = dict(total=total, initial=initial, desc=title, unit="step", smoothing=0.05, position=0,
                                   disable=not show)
    if _is_terminal():
        return tqdm(dynamic_ncols=True, bar_format=_FORMAT, **options)
    return tqdm(mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, bar_format=_FORMAT.replace("|{bar}|", ""),
                file=_Lines(sys.stderr), **options)


def say(message: str, file: TextIO | None = None) -> None:
    """Prints a line, above the bar if there is one."""
    file = file or sys.stdout
    if _is_terminal():
        tqdm.write(message, file=file)
        file.flush()
    else:
        print(message, file=file, flush=True)


class LogHandler(logging.Handler):
    """Shows log records as lines ``warning: ...`` or ``info: ...`` on stderr that do not break the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}", sys.stderr)


def _is_terminal() -> bool:
    """A terminal with a width; those of some containers have none, and a bar there would be cut to nothing."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class _Lines:
    """A text file on which each state of a bar is a line of its own."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._file.write(text + "\n")

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return False

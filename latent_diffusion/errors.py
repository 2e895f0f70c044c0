"""What goes wrong because of the user. A leaf module that imports nothing heavy, so that anything may use it."""

import os
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave. The programs print its message as one line and exit with code 2."""


def read_text(path: Any) -> str:
    """The text of a file that a user wrote (a path with `read_bytes`), UTF-8 with or without the mark that some editors
    put first. Raises UserError for other encodings."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    """``choices[name]``; an unknown name is a `UserError` that names the config key and lists the choices."""
    if name not in choices:
        raise UserError(f"{key}: unknown value {name!r}; choose from {', '.join(choices)}")
    return choices[name]


def choose_by_variable(choices: Mapping[str, Any], variable: str) -> Any:
    """`choose` by a variable of the environment; unset or empty, it means the first of the choices."""
    return choose(choices, os.environ.get(variable) or next(iter(choices)), variable)

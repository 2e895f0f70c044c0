"""What goes wrong because of the user. A leaf module without imports, so that anything may use it at no cost."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave. The programs print its message as one line and exit with code 2."""


def choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    """``choices[name]``; an unknown name is a `UserError` that names the config key and lists the choices."""
    if name not in choices:
        raise UserError(f"{key}: unknown value {name!r}; choose from {', '.join(choices)}")
    return choices[name]

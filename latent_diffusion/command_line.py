"""What is wrong with a command that takes a config, in one line."""

import contextlib
import difflib
import re
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from latent_diffusion.errors import UserError


def parse(argv: Sequence[str], config: flags.FlagHolder, values: flags.FlagValues = flags.FLAGS) -> None:
    """Parses the flags, of which `config` holds a config file; whatever is wrong with them is a `UserError`."""
    try:
        rest = values(argv)
        if config.value is not None:
            config.value.to_dict()  # a config that could not be read says so when it is used
    except Exception as error:
        raise UserError(explain(argv, error, values)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value or --name value")


def explain(argv: Sequence[str], error: BaseException, values: flags.FlagValues) -> str:
    """One line on why flags could not be parsed: ours, where ours is among the causes of what the libraries raise."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError) and "Traceback" not in str(cause):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    named = re.search(r"(?:^|\s)--?config[= ](\S+)", " ".join(argv))
    file = named[1].split(":")[0] if named else ""
    if named and not epath.Path(file).is_file():
        folder = epath.Path(file).parent
        known = sorted(str(path) for path in folder.glob("*.py")) if folder.is_dir() else []
        return f"there is no config file {file}" + (f"; choose from {', '.join(known)}" if known else "")
    if isinstance(error, flags.Error):
        return str(error)
    with contextlib.suppress(Exception):  # of a file that is itself at fault
        if unknown := unknown_key(argv, values["config"].parser.parse(named[1])):
            return unknown
    return f"{file}: {type(error).__name__}: {error}; --debug shows where"


def unknown_key(argv: Sequence[str], config: ConfigDict) -> str:
    """Names the first ``--config.a.b`` that is no key, with the keys that there are; "" if all are keys."""
    for path in re.findall(r"(?:^|\s)--?(?:no)?config\.([^\s=]+)", " ".join(argv)):
        node, known = config, ""
        for key in path.split("."):
            if not isinstance(node, ConfigDict):
                return f"unknown key --config.{path}: config.{known} has no parts"
            if key not in node:
                close = difflib.get_close_matches(key, node, n=1)
                return (f"unknown key --config.{path}; " + (f"did you mean {close[0]}? " if close else "")
                        + f"config{'.' * bool(known)}{known} has {', '.join(node)}")
            node, known = node[key], f"{known}.{key}".lstrip(".")
    return ""

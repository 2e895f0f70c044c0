"""Trains either stage.

    python train.py --config configs/NAME.py:TOKEN,... --config.section.key=value ... --workdir DIR

README.md has the commands, docs/configs.md the keys. Exit code: 0 done, 2 a mistake in what was given, 130 or 143
interrupted (after saving, once training has begun; the same command goes on from there).
"""

import os
import signal
import sys
import threading

GRACE = 5.0  # seconds that an interrupted start has to end by itself


def stop_at_once(signum: int, frame: object) -> None:
    os._exit(128 + signum)


def on_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    on_signals(stop_at_once)  # nothing to tidy up while the imports run

import logging  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from latent_diffusion import command_line, parallel  # noqa: E402
from latent_diffusion.errors import UserError  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:TOKEN,... ; see docs/configs.md", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory (or gs:// path) of checkpoints, logs and pictures.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for several processes off a TPU pod.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show where a mistake was found.")


def parse(argv: Sequence[str]) -> None:
    """Parses the flags; whatever is wrong with them is a `UserError`."""
    command_line.parse(argv, _CONFIG)
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; usage: {' '.join(__doc__.splitlines()[2].split())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags, trains, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(__doc__ + flags.FLAGS.main_module_help())
        return 0
    try:
        parse(argv)
        from latent_diffusion.training import progress
        logging.basicConfig(level=logging.WARNING, handlers=[progress.LogHandler()])
        logging.getLogger("latent_diffusion").setLevel(logging.INFO)
        parallel.keep_compiled()
        parallel.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        from latent_diffusion.training import loop  # after jax.distributed, which must see an untouched JAX
        return loop.run(_CONFIG.value, _WORKDIR.value)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("train.py: interrupted before the first step", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def interrupt(signum: int, frame: object) -> None:
    """Until the loop takes over: what has been begun is tidied up by unwinding; a second signal does not wait.

    Python drops an exception that is raised inside of a destructor or a callback of its garbage collector, of which JAX
    has one, and the signal would be lost: so the program ends after a while in any case.
    """
    on_signals(stop_at_once)
    timer = threading.Timer(GRACE, give_up, (signum,))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt(signum)


def give_up(signum: int) -> None:
    os.write(2, b"train.py: interrupted before the first step\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    on_signals(interrupt)
    code = main()
    on_signals(stop_at_once)  # nor is there anything left to tidy up
    sys.exit(code)

"""What a config's data and workdirs say, and batches of the data as training reads them. The only file of the benchmark
that needs the input pipeline."""

from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epath

from latent_diffusion import request
from latent_diffusion.data import sources
from latent_diffusion.training import first_stage, setup


def first_stage_model(workdir: str) -> Any:
    """The description of the autoencoder in a workdir of either stage. Raises UserError if there is none."""
    return first_stage.read_config(workdir).model


def open_stream(config: Any) -> Iterator[dict]:
    """This process's part of the endless stream of training batches; what follows from the data (classes, the
    vocabulary) is filled into the config. Raises UserError: data that cannot be opened."""
    if not flags.FLAGS.is_parsed():  # the benchmark has flags of its own; grain's workers ask for absl's
        flags.FLAGS.mark_as_parsed()
    sources.prepare(config)
    fields = () if config.stage == "autoencoder" else (
        *request.condition_fields(config), *(name for name in request.map_fields(config) if name != "image"))
    opened = sources.open_source(config, "train", fields=fields)
    vocabulary = setup.complete_conditioning(config, epath.Path("no workdir"), opened)
    return setup.Data(config, {"train": opened}, ("image", *fields), vocabulary).train(0)


def read_ahead(config: Any) -> int:
    """How many batches the stream may hold that nobody has asked for yet (see `data.loader.Batches.set_state`): twice
    the threads, and with workers that many in each, and two more that it has handed on."""
    ahead, workers = 2 * max(1, config.data.threads), config.data.workers
    return workers * (ahead + 2) if workers else ahead

"""Goes on from the weights of another workdir, trained here or imported, of either stage, on other data.

    python train.py --config configs/finetune.py:from=runs/imported,folder=pictures --workdir runs/finetuned

The config is that of the workdir, with everything in it (for imported weights, which do not say how to train on: a rate
of 1e-5, batches of 8 and 5,000 steps); change what differs with --config.section.key=value. A run of stage 2 takes the
first stage, the tokenizer, a frozen text encoder and the scale factor from there, too. Parameters that no longer fit,
such as a table of other classes, begin at random where --config.training.initial_skip="('conditioner',)" says so.
Arguments: from=WORKDIR, size=PIXELS, tfds=NAME, folder=DIR.
"""

from etils import epath

from latent_diffusion import checkpoint
from latent_diffusion import config as config_lib
from latent_diffusion.errors import UserError, read_text

FILE = "configs/finetune.py"
VARIANTS: dict = {}  # the workdir is all
ARGUMENTS = {**config_lib.data_arguments("diffusion"), "from": (str, lambda path: {})}


def _of_workdir(workdir: str):
    saved = epath.Path(workdir).expanduser() / "config.json"
    if not workdir or not saved.exists():
        raise UserError(f"{FILE}: from={workdir} is not a workdir: it has no config.json; name one, as in "
                        f"{FILE}:from=WORKDIR")
    config = config_lib.from_json(read_text(saved)).unlock()
    config.training.update(dict(initial=workdir, initial_skip=()))
    if (epath.Path(workdir).expanduser() / checkpoint.IMPORTED).exists():  # nothing there says how to train on
        config.optimizer.update(dict(scale_lr=False, learning_rate=1e-5))
        config.training.update(dict(batch_size=8, num_steps=5000))
    if config.stage == "diffusion":
        if config.first_stage.model.kind != "identity":
            config.first_stage.update(dict(workdir=workdir, cache=""))
        if config.conditioning.crossattn == "text":
            clip = config.conditioning.text.kind == "clip"
            config.conditioning.text.update(dict(
                vocab=workdir if clip else f"{workdir}/vocab.txt", weights=workdir if clip else ""))
    return config


def get_config(argument: str = ""):
    """The config that ``configs/finetune.py:argument`` names."""
    given = [part.partition("=") for part in (argument or "").split(",")]
    workdir = next((value for key, _, value in given if key == "from"), "")
    return config_lib.resolve(argument, _of_workdir(workdir), file=FILE, variants=VARIANTS, modifiers={},
                              arguments=ARGUMENTS)

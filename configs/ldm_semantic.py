"""Stage 2, semantic synthesis (paper section 4.3.2 and Table 15): a map of classes, rescaled, is joined to z_t.

    python train.py --config configs/ldm_semantic.py:landscapes256,folder=PICTURES --config.first_stage.workdir=AE \\
        --workdir DIR
    python sample.py --workdir DIR --segmentation map.png

Variants: landscapes256, landscapes512 (the released models, f = 4 on VQ latents, 215,229,315 parameters and 546 in the
rescaler, 182 classes; the paper: batch 48, 360k steps, one A100). Their attention_resolutions never occur, so that only
the middle has attention. Neither the data nor scores are published; nothing has been reproduced here yet.
Modifiers: emoji (built-in scenes, minutes on a CPU; train its autoencoder with configs/autoencoder_kl.py:emoji
--config.data.source=emoji_scenes), small (64-pixel pictures of your own), smoke (seconds).
Arguments: size=PIXELS, tfds=NAME, folder=DIR (images with a captions.jsonl that names maps, docs/data.md).
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(size: int, batch_size: int) -> dict:
    return dict(
        data=dict(image_size=size, crop="random", min_crop_scale=2 / 3),
        model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=128, num_res_blocks=2,
                   attention_resolutions=(32, 16, 8), channel_mult=(1, 4, 8), num_heads=8),
        conditioning=dict(concat="segmentation", segmentation=dict(num_classes=182)),
        first_stage=dict(scale_factor=1.0, config="configs/autoencoder_vq.py:f4"),
        diffusion=dict(linear_start=0.0015, linear_end=0.0205, loss="l1"),
        optimizer=dict(learning_rate=1e-6),
        training=dict(batch_size=batch_size, num_steps=360_000), sampling=dict(steps=200, eta=1.0),
    )


VARIANTS = {"landscapes256": _variant(256, 48), "landscapes512": _variant(512, 8)}
_OWN = dict(conditioning=dict(segmentation=dict(num_classes=0, channels=8)))
MODIFIERS = {
    "emoji": defaults.merged(defaults.EMOJI, _OWN, dict(data=dict(source="emoji_scenes", map_key="segmentation"))),
    "small": defaults.merged(defaults.SMALL, _OWN),
    "smoke": defaults.merged(defaults.SMOKE, _OWN),
}
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_semantic.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_semantic.py",
                              variants=VARIANTS, arguments=ARGUMENTS, modifiers=MODIFIERS)

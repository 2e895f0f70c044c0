"""Stage 2, layout-to-image (paper section 4.3.2, Tables 9, 15 and 17; the reference's layout2img-openimages256).

    python train.py --config configs/ldm_layout.py:openimages --config.first_stage.workdir=AE --workdir DIR
    python sample.py --workdir DIR --layout boxes.json

Variants: openimages (LDM-4 on VQ-f4, 246,277,379 parameters and 54,656,000 in the encoder of the layout; the paper:
batch 24, 4.4M steps, FID 32.02 on 2048 pictures), coco (the same network with Table 15's batch 48, 170k steps and
dropout 0.1; the paper: 42.06 for an LDM-8, 40.91 for an LDM-4 that starts from openimages). Not reproduced here yet.
The paper's OpenImages set keeps the 300 commonest classes and is not published; with all 601 of TFDS's the flags of
objects do not fit into 8192 tokens, so openimages goes without.
Modifiers: emoji (built-in scenes, minutes on a CPU; train its autoencoder with configs/autoencoder_kl.py:emoji
--config.data.source=emoji_scenes), small (64-pixel pictures of your own), smoke (seconds).
Arguments: size=PIXELS, folder=DIR (images with a captions.jsonl that lists objects, docs/data.md).
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(name: str, objects_key: str, batch_size: int, num_steps: int, dropout: float, flags: bool) -> dict:
    return dict(
        data=dict(name=name, objects_key=objects_key, crop="random", min_crop_scale=0.7),
        model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=128, num_res_blocks=2,
                   attention_resolutions=(8, 4, 2), channel_mult=(1, 2, 3, 4), num_heads=-1, num_head_channels=32,
                   use_spatial_transformer=True, transformer_depth=3, context_dim=512, dropout=dropout),
        conditioning=dict(crossattn="layout", width=512, layout=dict(flags=flags)),
        first_stage=dict(scale_factor=1.0),
        diffusion=dict(linear_start=0.0015, linear_end=0.0205, loss="l1"),
        optimizer=dict(learning_rate=2e-6),
        training=dict(batch_size=batch_size, num_steps=num_steps), sampling=dict(steps=200, eta=0.0),
    )


VARIANTS = {
    "openimages": _variant("open_images_v4/300k", "bobjects", 24, 4_400_000, 0.0, False),
    "coco": _variant("coco/2017", "objects", 48, 170_000, 0.1, True),
}
_FEW = dict(max_objects=4, crop=False, flags=False, vocab_size=257, max_length=12, layers=0, heads=4, head_dim=32)
EMOJI = defaults.merged(defaults.EMOJI, dict(
    data=dict(source="emoji_scenes", objects_key="objects"),
    model=dict(attention_resolutions=(2, 4), transformer_depth=1, context_dim=128, dropout=0.0),
    conditioning=dict(width=128, layout=_FEW),
    ema=dict(include_conditioner=True),
    training=dict(num_steps=2000, image_every=1000),
    evaluation=dict(every=1000),
    sampling=dict(guidance_scale=2.0),
))
SMALL = defaults.merged(defaults.SMALL, dict(
    model=dict(transformer_depth=1, context_dim=128, dropout=0.0),
    conditioning=dict(width=128, layout=dict(layers=2, heads=4, head_dim=32, flags=False)),
    ema=dict(include_conditioner=True),
))
SMOKE = defaults.merged(defaults.SMOKE, dict(
    data=dict(objects_key="objects"),
    model=dict(transformer_depth=1, context_dim=32, dropout=0.0),
    conditioning=dict(width=32, layout=_FEW | dict(layers=1, heads=2, head_dim=16)),
))
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_layout.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_layout.py",
                              variants=VARIANTS, arguments=ARGUMENTS,
                              modifiers={"emoji": EMOJI, "small": SMALL, "smoke": SMOKE})

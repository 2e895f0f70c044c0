"""Stage 2, layout-to-image (paper section 4.3.2, Tables 9, 15 and 17; the reference's layout2img-openimages256).

    python train.py --config configs/ldm_layout.py:openimages --config.first_stage.workdir=AE --workdir DIR
    python sample.py --workdir DIR --layout boxes.json

Variants: openimages (LDM-4 on VQ-f4, 246,277,379 parameters and 54,656,000 in the encoder of the layout; the paper:
batch 24, 4.4M steps, FID 32.02 on 2048 pictures, on one A100 as all of Table 15's), coco (Table 15's LDM-8 on VQ-f8:
batch 48, 170k steps, dropout 0.1, depth 2; the paper: 42.06, and 40.91 for an LDM-4 that starts from openimages; its
345M parameters do not follow from the table: its numbers make 312,241,540 and the encoder's). Not reproduced here yet.
The reference's OpenImages loader keeps about 360 of the 601 classes, so that all flags of objects fit into 8192 tokens,
and pictures of 2 to 30 objects; here all classes are kept, and the flag "group" alone.
Modifiers: emoji (built-in scenes, minutes on a CPU; train its autoencoder with configs/autoencoder_kl.py:emoji
--config.data.source=emoji_scenes), small (64-pixel pictures of your own), smoke (seconds).
Arguments: size=PIXELS, tfds=NAME, folder=DIR (images with a captions.jsonl that lists objects, docs/data.md).
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(
    name: str, objects_key: str, first: str, batch_size: int, num_steps: int, **model: object
) -> dict:
    return dict(
        data=dict(name=name, objects_key=objects_key, crop="random", min_crop_scale=0.7, flip=True),
        model=dict(image_size=0, in_channels=0, out_channels=0, num_res_blocks=2, num_heads=-1, num_head_channels=32,
                   use_spatial_transformer=True, context_dim=512, **model),
        conditioning=dict(crossattn="layout", width=512, layout=dict(flags="group")),
        first_stage=dict(scale_factor=1.0, config=f"configs/autoencoder_vq.py:{first}"),
        diffusion=dict(linear_start=0.0015, linear_end=0.0205, loss="l1"),
        optimizer=dict(learning_rate=2e-6),
        training=dict(batch_size=batch_size, num_steps=num_steps), sampling=dict(steps=200, eta=0.0),
    )


VARIANTS = {
    "openimages": _variant("open_images_v4/300k", "bobjects", "f4", 24, 4_400_000, model_channels=128,
                           transformer_depth=3, attention_resolutions=(8, 4, 2), channel_mult=(1, 2, 3, 4)),
    "coco": _variant("coco/2017", "objects", "f8", 48, 170_000, model_channels=192, transformer_depth=2, dropout=0.1,
                     attention_resolutions=(4, 2, 1), channel_mult=(1, 2, 4)),
}
_FEW = dict(max_objects=4, crop=False, flags="none", vocab_size=257, max_length=12, layers=0, heads=4, head_dim=32)
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
    conditioning=dict(width=128, layout=dict(layers=2, heads=4, head_dim=32, flags="none")),
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

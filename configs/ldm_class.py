"""Stage 2, class-conditional ImageNet at 256 pixels (paper Tables 3, 10 and 13, Figures 6 and 7).

    python train.py --config configs/ldm_class.py:ldm4 --config.first_stage.workdir=AE --workdir DIR
    python sample.py --workdir DIR --labels 207,88 --guidance_scale 1.5 --steps 250

Variants: cin256_v2 (LDM-4, 400,920,579 parameters, the released model; the paper: batch 1200, 178k steps, 271 V100
days, FID 10.56, 3.60 with guidance 1.5), cin256 (LDM-8, 394,984,196, the released model, VQ-f8, batch 64; FID 15.82,
7.77 with classifier guidance), and the sweep of Table 13 (2M steps, one A100): ldm1, ldm2, ldm4, ldm8, ldm16, ldm32.
Not reproduced here yet. Classes are a table of 512-vectors seen by cross-attention, with one more row for "no class"
but for cin256, which has 1,000 rows and no guidance.
Modifiers: emoji (built-in pictures, 9 classes, minutes on a CPU), small (64-pixel pictures of your own in class
folders), smoke (seconds). Arguments: size=PIXELS, tfds=NAME, folder=DIR (images in one folder for each class).
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(
    channels: int, channel_mult: tuple[int, ...], attention: tuple[int, ...], batch_size: int, rate: float, *,
    num_steps: int = 2_000_000, num_heads: int = 1, num_head_channels: int = -1, sampling: dict | None = None,
    null_class: bool = True, first: str = "", **first_stage: object
) -> dict:
    return dict(
        data=dict(name="imagenet2012", crop="random", min_crop_scale=1.0),
        model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=channels, num_res_blocks=2,
                   attention_resolutions=attention, channel_mult=channel_mult, num_heads=num_heads,
                   num_head_channels=num_head_channels, use_spatial_transformer=True, context_dim=512),
        conditioning=dict(crossattn="class", width=512, null_class=null_class, dropout=0.1 if null_class else 0.0),
        first_stage=dict(scale_factor=1.0, config=first and f"configs/autoencoder_vq.py:{first}", **first_stage),
        diffusion=dict(linear_start=0.0015, linear_end=0.0195),
        optimizer=dict(learning_rate=rate, scale_lr=False),
        training=dict(batch_size=batch_size, num_steps=num_steps), sampling=sampling or dict(steps=100),
    )


VARIANTS = {
    "cin256_v2": _variant(192, (1, 2, 3, 5), (8, 4, 2), 1200, 1e-4, num_steps=178_000, first="f4",
                          sampling=dict(steps=250, guidance_scale=1.5)),
    "cin256": _variant(256, (1, 2, 4), (4, 2, 1), 64, 6.4e-5, num_steps=4_800_000, num_heads=-1, num_head_channels=32,
                       sampling=dict(steps=200, eta=1.0), null_class=False, first="f8"),
    "ldm1": _variant(192, (1, 1, 2, 2, 4, 4), (32, 16, 8), 7, 4.9e-5, model=dict(kind="identity")),
    "ldm2": _variant(192, (1, 2, 2, 4, 4), (16, 8, 4), 9, 6.3e-5, first="f2"),
    "ldm4": _variant(192, (1, 2, 3, 5), (8, 4, 2), 40, 8e-5, first="f4"),
    "ldm8": _variant(256, (1, 2, 4), (4, 2, 1), 64, 6.4e-5, first="f8"),
    "ldm16": _variant(256, (1, 2, 4), (4, 2, 1), 112, 4.5e-5, first="f16"),
    "ldm32": _variant(256, (1, 2, 4), (4, 2, 1), 112, 4.5e-5, first="f32"),
}
_NULL = dict(conditioning=dict(width=128, null_class=True, dropout=0.1))  # whatever the variant says
EMOJI = defaults.merged(defaults.EMOJI, _NULL, dict(
    data=dict(label_key="label"),
    model=dict(attention_resolutions=(2, 4), context_dim=128),
    ema=dict(include_conditioner=True),
    training=dict(batch_size=32, num_steps=1000, image_every=500),
    evaluation=dict(every=500),
    sampling=dict(guidance_scale=2.0),
))
MODIFIERS = {
    "emoji": EMOJI,
    "small": defaults.merged(defaults.SMALL, _NULL, dict(
        model=dict(context_dim=128), ema=dict(include_conditioner=True))),
    "smoke": defaults.merged(defaults.SMOKE, _NULL, dict(model=dict(context_dim=32), conditioning=dict(width=32))),
}
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_class.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_class.py",
                              variants=VARIANTS, arguments=ARGUMENTS, modifiers=MODIFIERS)

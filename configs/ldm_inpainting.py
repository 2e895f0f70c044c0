"""Stage 2, inpainting (paper section 4.5, Tables 6, 7 and 15): z_t is joined by the encoded picture without what is to
be painted, and by the mask.

    python train.py --config configs/ldm_inpainting.py:big,tfds=places365_small --config.first_stage.workdir=AE \\
        --workdir DIR
    python sample.py --workdir DIR --image picture.png --mask mask.png

Variants: big (the released inpainting_big: 387,245,827 parameters; the paper: Places, FID 2.40 / LPIPS 0.142 without
finetuning at 512 pixels), ldm4 (215M, Table 6: batch 128, 360k steps on Places at 256 pixels, eight V100s; that table's
rows "KL, with attention", "VQ, with" and "without attention" differ in the first stage), ldm1 (the same in pixels). big
and ldm4 take a VQ-f4 first stage, big the one without attention; nothing has been reproduced here yet. The rate is that
of the released config at its peak, 1e-7 x batch, but decays over all steps instead of the first 50,000.
Modifiers: emoji (built-in pictures, minutes on a CPU), small (64-pixel pictures of your own), smoke (seconds).
Arguments: size=PIXELS, tfds=NAME, folder=DIR.
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults


def _variant(first: str, **model: object) -> dict:
    return dict(
        data=dict(crop="random", min_crop_scale=0.5),
        model=dict(image_size=0, in_channels=0, out_channels=0, num_res_blocks=2, num_heads=8) | model,
        conditioning=dict(concat="inpainting"),
        first_stage=dict(scale_factor=1.0, config=f"configs/autoencoder_vq.py:{first}"),
        diffusion=dict(linear_start=0.0015, linear_end=0.0205, loss="l1"),
        optimizer=dict(learning_rate=1e-7, warmup_steps=1000, schedule="cosine", final_factor=1e-3),
        training=dict(batch_size=128, num_steps=360_000), sampling=dict(steps=50, eta=0.0),
    )


_LDM4 = _variant("f4", model_channels=128, attention_resolutions=(), channel_mult=(1, 4, 8))
VARIANTS = {
    "big": _variant("f4_noattn", model_channels=256, attention_resolutions=(8, 4, 2), channel_mult=(1, 2, 3, 4),
                    resblock_updown=True),
    "ldm4": _LDM4,
    "ldm1": _LDM4 | dict(first_stage=dict(scale_factor=1.0, model=dict(kind="identity"))),
}
EMOJI = defaults.merged(defaults.EMOJI, dict(
    training=dict(num_steps=1500, image_every=750), evaluation=dict(every=750)))
MODIFIERS = {"emoji": EMOJI, "small": defaults.SMALL, "smoke": defaults.SMOKE}
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_inpainting.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_inpainting.py",
                              variants=VARIANTS, arguments=ARGUMENTS, modifiers=MODIFIERS)

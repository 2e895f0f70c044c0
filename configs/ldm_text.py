"""Stage 2, text-to-image (paper section 4.3.1; the reference's configs/latent-diffusion/txt2img-1p4B-eval.yaml).

    python train.py --config configs/ldm_text.py:txt2img_1p4b,folder=PICTURES --config.first_stage.workdir=AE \\
        --workdir DIR

Variants: txt2img_1p4b (LDM-KL-8 with a 32-layer text transformer, 872M + 582M parameters; the paper: batch 680, 390k
steps, FID 23.31 on COCO, 12.63 with guidance 1.5), cc256 (the released text2img256, Conceptual Captions, LDM-VQ-4,
404M + 167M, batch 28; FID 16.79 in the reference's README), sd_v1 (the shape of Stable Diffusion v1: LDM-KL-8 at 512
pixels, a UNet of 859,520,964 parameters under CLIP ViT-L/14's frozen text encoder of 123,060,480; its model card: batch
2048, 32 x 8 A100s); not reproduced here. sd_v1 needs CLIP's own files (docs/tasks.md):

    --config.conditioning.text.weights=model.safetensors --config.conditioning.text.vocab=FOLDER

Modifiers: emoji (built-in pictures, text and class conditions, minutes on a CPU), small (64x64 pictures of your own,
docs/own_pictures.md), smoke (seconds).
Arguments: size=PIXELS, tfds=NAME, folder=DIR (images with a captions.jsonl).
"""

from latent_diffusion import config as config_lib
from latent_diffusion import defaults

_KL8 = dict(
    model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=320, num_res_blocks=2,
               attention_resolutions=(4, 2, 1), channel_mult=(1, 2, 4, 4), num_heads=8, use_spatial_transformer=True,
               transformer_depth=1, legacy=False, remat="full"),
    conditioning=dict(crossattn="text"),
    diffusion=dict(linear_start=0.00085, linear_end=0.012),
    first_stage=dict(scale_factor=0.18215, config="configs/autoencoder_kl.py:f8"),
    optimizer=dict(learning_rate=1e-4, scale_lr=False, warmup_steps=10_000),
)
VARIANTS = {
    "txt2img_1p4b": defaults.merged(_KL8, dict(
        model=dict(context_dim=1280),
        conditioning=dict(width=1280),
        training=dict(batch_size=680, num_steps=390_000),
        sampling=dict(steps=250, guidance_scale=1.5),
    )),
    "cc256": dict(
        model=dict(image_size=0, in_channels=0, out_channels=0, model_channels=192, num_res_blocks=2,
                   attention_resolutions=(8, 4, 2), channel_mult=(1, 2, 3, 5), num_heads=-1, num_head_channels=32,
                   use_spatial_transformer=True, transformer_depth=1, context_dim=640),
        conditioning=dict(crossattn="text", width=640),
        first_stage=dict(scale_factor=1.0, config="configs/autoencoder_vq.py:f4"),
        optimizer=dict(learning_rate=2e-6),
        training=dict(batch_size=28),
        sampling=dict(steps=100),
    ),
    "sd_v1": defaults.merged(_KL8, dict(
        data=dict(image_size=512),
        model=dict(context_dim=768),
        conditioning=dict(width=768, text=dict(kind="clip", vocab_size=49408, layers=12, heads=12, head_dim=64)),
        training=dict(batch_size=2048, num_steps=431_000),
        sampling=dict(steps=50, guidance_scale=7.5),
    )),
}
EMOJI = defaults.merged(defaults.EMOJI, dict(
    data=dict(label_key="sublabel", groups=(
        "smileys-and-emotion", "food-fruit", "food-vegetable", "country-flag", "time", "sky-and-weather")),
    model=dict(attention_resolutions=(2, 4), context_dim=128),
    conditioning=dict(width=128, label=True, dropout=0.1, label_dropout=0.3,
                      text=dict(kind="bert", vocab_size=2000, max_length=8, layers=0)),
    ema=dict(decay=0.995, include_conditioner=True),
    training=dict(batch_size=32, num_steps=1300, image_every=650),
    evaluation=dict(every=650),
    checkpoint=dict(every=130),
    sampling=dict(guidance_scale=1.5),
))
SMALL = defaults.merged(defaults.SMALL, dict(
    model=dict(context_dim=128),
    conditioning=dict(width=128, text=dict(kind="bert", vocab_size=2000, max_length=32, layers=0)),
    ema=dict(include_conditioner=True),
    sampling=dict(guidance_scale=3.0),
))
SMOKE = defaults.merged(defaults.SMOKE, dict(
    model=dict(context_dim=32),
    conditioning=dict(width=32, text=dict(kind="bert", vocab_size=200, max_length=8, layers=1, heads=2, head_dim=16)),
))
ARGUMENTS = config_lib.data_arguments(stage="diffusion")


def get_config(argument: str = ""):
    """The config that ``configs/ldm_text.py:argument`` names."""
    return config_lib.resolve(argument, defaults.diffusion(), file="configs/ldm_text.py",
                              variants=VARIANTS, arguments=ARGUMENTS,
                              modifiers={"emoji": EMOJI, "small": SMALL, "smoke": SMOKE})

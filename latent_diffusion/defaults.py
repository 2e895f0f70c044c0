"""Every key of a config, with its default and what it means. docs/configs.md is the same list for readers of the docs.

A leaf module: it imports nothing of ours. Every file in ``configs/`` starts from `autoencoder` or `diffusion`; those of
stage 2 build their modifiers on `EMOJI`, `SMALL` and `SMOKE`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def _data() -> dict:
    return dict(
        source="tfds",            # tfds | folder | emoji, emoji_scenes (built in) | memory (drawn, for smoke tests)
        name="",                  # source tfds: set name, with its config: "imagenet2012", "lsun/church"
        path="",                  # source folder: a folder of images
        data_dir="",              # where TFDS sets live; "" = TFDS's own default
        split="train",
        eval_split="validation",
        image_size=256,           # pixels; images are resized (shorter side) and cropped to a square
        channels=3,               # 3 = RGB, 1 = grey
        crop="center",            # center | random
        min_crop_scale=1.0,       # crop random: side U(min_crop_scale, 1) x shorter side, then resized
        flip=False,               # horizontal flip with probability 1/2 in training
        background="white",       # behind transparent images: white | random (plain color per example)
        image_key="image", label_key="label", caption_key="caption",
        map_key="segmentation", objects_key="objects",  # semantic map (class numbers), objects with boxes
        styles=("twemoji", "openmoji"),  # source emoji: the drawing styles to use
        groups=(),                # source emoji: only these groups or subgroups ("flags", "food-fruit" ...); () = all
        skin_tones=False,         # source emoji: keep skin-tone variants
        duplicates=False,         # source emoji: keep pictures that are equal pixel by pixel
        style_prefix=False,       # source emoji: captions "a twemoji emoji of ..."
        holdout=0.1,              # source folder without train/ and val/: fraction held out for evaluation
        on_corrupt="error",       # a file that cannot be decoded: error | skip (and count)
        workers=0,                # grain worker processes; 0 = threads only
        threads=4,                # grain reading threads
        num_examples=64,          # source memory: how many
    )


def _autoencoder_model() -> dict:
    return dict(                  # names and defaults of the reference's ddconfig (LDM-f8-KL, paper Table 8)
        kind="kl",                # kl | vq | identity
        embed_dim=4,              # channels of the latents
        z_channels=4,             # channels of the encoder's output (before quant_conv)
        double_z=True,            # kl: the encoder gives mean and log-variance
        in_channels=3, out_channels=3,
        ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2,
        attn_resolutions=(),      # levels with attention, as feature-map sizes at input size `resolution`
        resolution=256,           # only decides where attention goes
        attn_type="vanilla",      # vanilla | linear | none
        dropout=0.0, resamp_with_conv=True, tanh_out=False,
        norm_groups=32,           # group normalization; fewer for narrow networks: 1 channel a group loses its mean
        n_embed=16384,            # vq: codebook entries
        vq_beta=0.25,
        vq_legacy_beta=True,      # vq: beta on the codebook term, as the released models were trained
        dtype="float32",          # compute: float32 | bfloat16 (parameters stay float32)
        remat="none",             # none | dots | full
    )


def _unet_model() -> dict:
    return dict(
        image_size=32,            # side of the latents in training
        in_channels=4, out_channels=4, model_channels=192, num_res_blocks=2,
        attention_resolutions=(1, 2, 4, 8),  # downsampling factors (not sizes) with attention
        channel_mult=(1, 2, 2, 4, 4), dropout=0.0, conv_resample=True,
        num_heads=8,              # -1 = from num_head_channels
        num_head_channels=-1,     # wins over num_heads when not -1
        num_heads_upsample=-1,
        use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False,
        use_spatial_transformer=False, transformer_depth=1,
        context_dim=0,            # width of the cross-attention context; 0 = none
        num_classes=0,            # rows of the class table added to the time embedding; 0 = from conditioning
        legacy=True,              # the reference's rule for head sizes
        norm_groups=32,           # group normalization; fewer for narrow networks
        dtype="float32", remat="none",
    )


def _beginning() -> dict:
    return dict(
        initial="",               # a workdir whose weights the run begins with; "" = drawn at random
        initial_skip=(),          # parameters that begin at random all the same: "conditioner", "unet/out_2"
    )


def _common() -> dict:
    return dict(
        seed=0,
        data=_data(),
        optimizer=dict(
            name="adam",          # adam | adamw | muon | sgd
            learning_rate=4.5e-6,
            scale_lr=True,        # effective rate = learning_rate x batch_size, as the reference's --scale_lr
            b1=0.5, b2=0.9, eps=1e-8, weight_decay=0.0,
            moment_dtype="float32",  # of the first moments: float32 | bfloat16, which saves 2 bytes a parameter
            schedule="constant",  # constant | cosine | linear (both decay to final_factor at num_steps)
            warmup_steps=0, final_factor=0.0,
            clip_norm=0.0,        # global gradient norm; 0 = no clipping
            disc_factor=1.0,      # stage 1: discriminator's rate relative to the generator's
        ),
        ema=dict(
            decay=0.9999,         # 0 = no EMA
            warmup=True,          # min(decay, (1 + n) / (10 + n))
            include_conditioner=False,  # the reference averages the UNet only
        ),
        evaluation=dict(
            every=5000,           # steps; 0 = only at the end
            max_batches=0,        # 0 = the whole held-out set
            num_images=16,        # pictures in the logged grids
        ),
        checkpoint=dict(every=5000, keep=2),
        sampling=dict(
            sampler="ddim", steps=50, eta=0.0, guidance_scale=1.0, prompts=(), labels=(),
            clip_x0=False,        # clip what is predicted for the data to [-1, 1] at each step; for pixels only
            spacing="clean",      # of the timesteps, see diffusion/grids.py; imported models have their own
            temperature=1.0,      # of the noise that the steps add
            threshold=0.0,        # dynamic thresholding by this quantile, for pixels (0.995); 0 = off
            quantize_x0=False,    # vq: what is predicted for the latents becomes codes at each step
            guidance_interval=(),  # (low, high): guide at noise levels sigma / alpha between them only
            guidance_rescale=0.0,  # 0 .. 1: give guided predictions the deviation of unguided ones
            two_passes=False,     # guidance in two passes with less memory, not one of twice the batch
        ),
    )


def autoencoder() -> ConfigDict:
    """Defaults of stage 1: the reference's KL autoencoder with f = 8 (its configs/autoencoder)."""
    config = ConfigDict(dict(
        stage="autoencoder",
        model=_autoencoder_model(),
        training=dict(
            **_beginning(),
            batch_size=12,        # images per optimizer step, over all devices, processes and accumulation steps
            num_steps=250_000,
            accumulate=1,         # gradient accumulation: the batch is cut into this many pieces
            log_every=100, image_every=5000,
            loss=dict(
                pixel="l1",       # l1 | l2
                perceptual="vgg",  # LPIPS network: vgg (the paper) | alex (20 times cheaper) | none
                perceptual_weight=1.0,
                perceptual_dropout=False,  # the reference trains with LPIPS's dropout on, by oversight
                logvar_init=0.0,
                learn_logvar=False,  # the reference never gives it to the optimizer
                kl_weight=1e-6,
                codebook_weight=1.0,
                disc_start=50_001, disc_factor=1.0, disc_weight=0.5,
                disc_loss="hinge",  # hinge | vanilla | non_saturating
                disc_channels=64, disc_layers=3,
                disc_norm="batch",  # batch | actnorm
            ),
        ),
        first_stage=dict(),
        conditioning=dict(),
        diffusion=dict(),
        **_common(),
    ))
    config.ema.decay = 0.0        # the reference's KL models have none
    return config.lock()


def diffusion() -> ConfigDict:
    """Defaults of stage 2: an unconditional LDM-8 (LSUN-churches, paper Table 12) on KL latents."""
    config = ConfigDict(dict(
        stage="diffusion",
        model=_unet_model(),
        training=dict(
            **_beginning(), batch_size=96, num_steps=500_000, accumulate=1, log_every=100, image_every=5000),
        first_stage=dict(
            workdir="",           # the stage-1 workdir; its weights are copied into this run's workdir
            config="",            # FILE:TOKEN of the first stage that it was published with
            scale_factor=0.0,     # latents are multiplied by it; 0 = measure 1/std on the first batches
            scale_by_std=False,   # imported models: the factor was measured there, and is part of the weights
            cache="",             # folder of the latents cache (written when missing); "" = encode online
            model=_autoencoder_model(),
        ),
        conditioning=dict(
            crossattn="none",     # none | class | text | layout | vectors: tau_theta, seen by cross-attention
            label=False,          # class embedding added to the time embedding
            concat="none",        # none | segmentation | low_res | inpainting: joined to z_t channel by channel
            num_classes=0,        # 0 = from the data
            null_class=True,      # one more row of the class table stands for "no class"
            width=512,            # width of tau_theta's output
            dropout=0.1,          # probability of training with the null condition (classifier-free guidance)
            text_dropout=0.0,     # in addition, of dropping the text alone
            label_dropout=0.0,    # in addition, of dropping the class alone
            text=dict(
                kind="bert",      # bert: the paper's, trained along | clip: Stable Diffusion v1's, frozen
                vocab="",         # bert: a BERT vocab.txt; "" = train a WordPiece vocabulary on the captions
                                  # clip: a folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz
                weights="",       # clip: a file of CLIP's text encoder; copied into the workdir
                vocab_size=30522, max_length=77, layers=32, heads=8, head_dim=64,
            ),
            layout=dict(
                num_classes=0,    # of objects; 0 = from the data
                form="boxes",     # boxes (class, two corners) | centers (class, center)
                max_objects=30,   # per picture
                crop=True,        # add the crop of the picture as two tokens
                flags="all",      # none | group | all (and occluded, depiction, inside): object classes times 1, 2, 16
                vocab_size=8192,  # object classes, places and "none" share it; places lie on a grid of its root's side
                max_length=92,    # 3 (or 2) tokens an object, 2 for the crop
                layers=16, heads=8, head_dim=64,
            ),
            segmentation=dict(
                num_classes=0,    # of the map; 0 = from the data
                channels=3,       # that the map becomes before it is joined
            ),
            low_res=dict(
                factor=4,         # of the super-resolution
                degradation="bicubic",  # bicubic | bsrgan | bsrgan_light | bsrgan_plus
            ),
            inpainting=dict(
                masks="mixed",    # narrow | medium | wide | boxes | mixed
            ),
        ),
        diffusion=dict(
            timesteps=1000,
            beta_schedule="linear",  # linear (in sqrt(beta), the paper's) | cosine | sqrt_linear | sqrt
            linear_start=0.0015, linear_end=0.0195, cosine_s=8e-3,
            parameterization="eps",  # eps | x0 | v
            loss="l2",            # l1 | l2
            l_simple_weight=1.0, original_elbo_weight=0.0, v_posterior=0.0,
            learn_logvar=False, logvar_init=0.0,
            min_snr_gamma=0.0,    # min-SNR weighting (Hang et al. 2023); 0 = off
        ),
        **_common(),
    ))
    config.optimizer.update(dict(name="adamw", learning_rate=1e-6, b1=0.9, b2=0.999, weight_decay=0.01))
    return config.lock()


# --- modifiers -------------------------------------------------------------------------------------------------------


SETS = {  # the sets that the paper's autoencoders were trained on, as TFDS calls them
    "imagenet": dict(data=dict(source="tfds", name="imagenet2012")),
    "openimages": dict(data=dict(source="tfds", name="open_images_v4/300k")),
}


# --- modifiers of stage 2 --------------------------------------------------------------------------------------------


def merged(*overrides: Mapping[str, Any]) -> dict[str, Any]:
    """One override of all, where later ones win: sections are joined, other values replaced."""
    out: dict[str, Any] = {}
    for override in overrides:
        for key, value in override.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merged(out[key], value) if both else value
    return out


_PLAIN = dict(  # whatever the variant says
    data=dict(flip=False, crop="center", min_crop_scale=1.0),
    model=dict(num_heads=-1, num_res_blocks=1, norm_groups=8, use_scale_shift_norm=False, resblock_updown=False,
               remat="none"),
    first_stage=dict(scale_factor=0.0),
)
_KL = "configs/autoencoder_kl.py"
_LEARN_FAST = dict(
    model=dict(conv_resample=False, num_head_channels=32),
    diffusion=dict(linear_start=0.0015, linear_end=0.0195, loss="l2", parameterization="v"),
    optimizer=dict(scale_lr=False, b2=0.99, schedule="cosine", warmup_steps=100, clip_norm=1.0),
)
EMOJI = merged(_PLAIN, _LEARN_FAST, dict(  # built-in pictures of 64 pixels, minutes on a CPU
    data=dict(source="emoji", image_size=64, styles=("twemoji",)),
    first_stage=dict(config=f"{_KL}:emoji"),
    model=dict(model_channels=32, attention_resolutions=(4,), channel_mult=(1, 2, 4)),
    optimizer=dict(name="muon", learning_rate=6e-3),
    ema=dict(decay=0.99),
    training=dict(batch_size=16, num_steps=600, log_every=25, image_every=300),
    evaluation=dict(every=300),
    checkpoint=dict(every=100),
    sampling=dict(steps=40, eta=0.0),
))
SMALL = merged(_PLAIN, _LEARN_FAST, dict(  # pictures of 64 pixels of any source
    data=dict(image_size=64),
    first_stage=dict(config=f"{_KL}:small"),
    model=dict(model_channels=64, attention_resolutions=(2, 4), channel_mult=(1, 2, 3)),
    optimizer=dict(learning_rate=1.5e-3),
    ema=dict(decay=0.998),
    training=dict(batch_size=16, num_steps=4000, log_every=25, image_every=500),
    evaluation=dict(every=500),
    checkpoint=dict(every=250),
    sampling=dict(steps=50, eta=0.0),
))
SMOKE = merged(_PLAIN, dict(  # seconds
    data=dict(source="memory", image_size=32),
    first_stage=dict(config=f"{_KL}:smoke"),
    model=dict(model_channels=32, attention_resolutions=(2,), channel_mult=(1, 2), num_head_channels=16),
    training=dict(batch_size=8, num_steps=4, log_every=2, image_every=0),
    evaluation=dict(every=0, num_images=4),
    checkpoint=dict(every=2),
    sampling=dict(steps=4),
))

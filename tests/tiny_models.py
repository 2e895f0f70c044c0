"""Tiny latent diffusion models with random weights, in memory and as workdirs, for the tests of sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion import checkpoint, conditions, defaults, models, sizes
from latent_diffusion import config as config_lib
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.pipeline import LatentDiffusion
from latent_diffusion.training import diffusion as stage2

CAPTIONS = ["red apple", "green apple", "flag of japan", "grinning face", "red heart"]
LABELS = ("food", "flags", "faces", "hearts, all colors")
SCALE_FACTOR = 0.7


def config(kind: str, **conditioning):
    """`kind`: "none", "class", "text", "both" (text by cross-attention, class added to the time embedding), "layout",
    "segmentation", "low_res", "inpainting" or "hybrid" (text and a semantic map)."""
    c = defaults.diffusion()
    sequence = {"both": "text", "hybrid": "text", "text": "text", "layout": "layout"}.get(kind, "none")
    concat = {"hybrid": "segmentation"}.get(kind, kind if kind in conditions.MAPS else "none")
    text = sequence != "none"
    with c.unlocked():
        c.data.update(source="memory", image_size=16)
        c.first_stage.model.update(
            ch=32, ch_mult=(1, 1), num_res_blocks=0, attn_type="none", norm_groups=8, resolution=16)
        c.model.update(
            image_size=8, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(),
            norm_groups=8, num_heads=2, use_spatial_transformer=text, context_dim=16 if text else 0)
        c.conditioning.update(
            crossattn=sequence, concat=concat, label=kind in ("class", "both"), num_classes=len(LABELS), width=16)
        c.conditioning.layout.update(
            num_classes=4, vocab_size=64, max_objects=2, max_length=8, flags="none", layers=1, heads=2, head_dim=8)
        c.conditioning.segmentation.num_classes = 5
        c.conditioning.low_res.factor = 2
        c.model.in_channels = 4 + sizes.map_channels(c)
        c.conditioning.text.update(vocab_size=60, max_length=8, layers=1, heads=2, head_dim=8)
        c.conditioning.update(conditioning)
        c.diffusion.timesteps = 20
        c.sampling.update(steps=3, guidance_scale=2.0 if text or kind == "class" else 1.0)
    return c


def random_params(networks: models.Models, c, seed: int = 0) -> dict:
    """Every leaf random, those of zero-initialized layers too, so that the output depends on all inputs."""
    key = jax.random.key(0)
    shapes = dict(jax.eval_shape(lambda: stage2.create_state(
        key, models=networks, tx=optax.identity(), config=c)).params)
    shapes["first_stage"] = jax.eval_shape(networks.first_stage.init, key, jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise, name = rng.standard_normal(leaf.shape, np.float32), path[-1].key
        if name == "kernel":
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return noise if name == "embedding" else (name == "scale") + np.float32(0.1) * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


def model(kind: str, seed: int = 0, **conditioning) -> LatentDiffusion:
    c = config(kind, **conditioning)
    networks = models.build(c)
    return LatentDiffusion(
        config=c, models=networks, schedule=schedule_lib.from_config(c.diffusion),
        params=random_params(networks, c, seed), scale_factor=SCALE_FACTOR,
        vocabulary=conditions.train_vocabulary(CAPTIONS, 60) if c.conditioning.crossattn == "text" else None,
        label_names=LABELS if c.conditioning.label else (), object_names=LABELS if kind == "layout" else (), step=7)


def constant_pixels(kind: str = "none", eps: float = 0.0, channel_mult: tuple[int, ...] = (1,)) -> LatentDiffusion:
    """A model of pixels (factor 1) whose UNet predicts `eps` everywhere; scale factor 0.5."""
    c = config(kind)
    with c.unlocked():
        c.first_stage.model.kind = "identity"
        c.model.update(in_channels=3, out_channels=3, channel_mult=channel_mult)
        c.data.image_size = 8
    networks = models.build(c)
    z, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(networks.unet.init, jax.random.key(0), z, t, label=t if kind == "class" else None)
    unet = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes["params"])
    unet["out_2"]["bias"] += np.float32(eps)
    return LatentDiffusion(c, networks, schedule_lib.from_config(c.diffusion), {"unet": unet, "first_stage": {}},
                           scale_factor=0.5)


def save(ldm: LatentDiffusion, workdir, *, ema: dict | None = None) -> None:
    """Writes a workdir as training does."""
    params = {name: tree for name, tree in ldm.params.items() if name != "first_stage"}
    (workdir / "config.json").write_text(config_lib.to_json(ldm.config))
    if ldm.vocabulary is not None:
        ldm.vocabulary.save(workdir)
    if ldm.label_names:
        conditions.save_labels(workdir / "labels.txt", ldm.label_names)
    if ldm.object_names:
        conditions.save_labels(workdir / "objects.txt", ldm.object_names)
    checkpoint.save_frozen(workdir, {"autoencoder": ldm.params["first_stage"]}, {})
    manager = checkpoint.open_manager(workdir)
    checkpoint.save(manager, ldm.step, {"params": params, "ema": ema or {}}, {"scale_factor": ldm.scale_factor})
    manager.close()

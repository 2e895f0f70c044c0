"""Every kind of condition, by the same checks: it matters, gradients reach its encoder, guidance's null value is what
dropout puts in its place, one device equals two, and samples follow it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from latent_diffusion import conditions, layouts, models, parallel, programs, request
from latent_diffusion import settings as settings_lib
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError
from latent_diffusion.training import diffusion as stage2

KINDS = ("layout", "low_res", "inpainting", "hybrid")  # text and classes: test_diffusion.py; hybrid has a semantic map
BATCH = 8


@functools.cache
def setting(kind: str):
    config = tiny_models.config(kind, dropout=0.0)
    with config.unlocked():
        config.model.update(channel_mult=(1,), num_res_blocks=0)  # conditions enter in each of the three blocks left
    networks = models.build(config)
    params = jax.tree.map(jnp.asarray, tiny_models.random_params(networks, config))
    first_stage = params.pop("first_stage")
    static = dict(models=networks, schedule=schedule_lib.from_config(config.diffusion), config=config)
    return config, static, params, first_stage


def vocabulary():
    return conditions.train_vocabulary(tiny_models.CAPTIONS, 60)


def null(config) -> dict:
    return request.null_conditions(config, vocabulary() if config.conditioning.crossattn == "text" else None)


def batch(kind: str) -> dict:
    rng = np.random.default_rng(0)
    found = {"image": rng.uniform(-1, 1, (BATCH, 16, 16, 3)).astype(np.float32),
             "index": np.arange(40, 40 + BATCH, dtype=np.int32)}
    if kind == "hybrid":
        found["tokens"] = vocabulary().encode([tiny_models.CAPTIONS[i % 5] for i in range(BATCH)], 8)
        found["segmentation"] = rng.integers(0, 5, (BATCH, 16, 16)).astype(np.int32)
    if kind == "layout":
        found["layout"] = rng.integers(0, 60, (BATCH, 8)).astype(np.int32)
    if kind == "low_res":
        found["low_res"] = rng.uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32)
    if kind == "inpainting":
        found["mask"] = (rng.random((BATCH, 16, 16, 1)) < 0.5).astype(np.float32)
    return found


def condition_of(kind: str) -> list[str]:
    return [name for name in batch(kind) if name not in ("image", "index")]


@functools.cache
def compiled_loss(kind: str, devices: int):
    config, static, _, _ = setting(kind)

    def run(params, frozen, examples):
        return parallel.mean_over_devices(jax.value_and_grad(lambda p: stage2.loss_and_metrics(
            p, frozen, examples, jax.random.key(5), scale_factor=jnp.ones(()), train=True, **static)[0])(params))
    return jax.pmap(run, axis_name=parallel.AXIS, in_axes=(None, None, 0), devices=jax.devices()[:devices])


def loss_and_gradients(kind: str, examples: dict, devices: int = 1):
    config, _, params, first_stage = setting(kind)
    cut = {name: x.reshape(devices, BATCH // devices, *x.shape[1:]) for name, x in examples.items()}
    found = compiled_loss(kind, devices)(params, {"first_stage": first_stage, "null": null(config)}, cut)
    return jax.tree.map(lambda x: np.asarray(x[0]), jax.block_until_ready(found))


@pytest.mark.parametrize("kind", KINDS)
def test_condition_matters_and_trains_its_encoder(kind):
    examples = batch(kind)
    loss, gradients = loss_and_gradients(kind, examples)
    for name in condition_of(kind):
        swapped, _ = loss_and_gradients(kind, {**examples, name: np.roll(examples[name], 1, axis=0)})
        assert abs(loss - swapped) > 1e-4, name
    for path, gradient in jax.tree.leaves_with_path(gradients.get("conditioner", {})):
        assert np.abs(gradient).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_equals_two(kind):
    one, two = (loss_and_gradients(kind, batch(kind), devices) for devices in (1, 2))
    for (path, x), y in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(y, x, rtol=2e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", ["layout", "hybrid"])
def test_dropping_is_the_null_condition_and_keeps_maps(kind):
    config, examples = tiny_models.config(kind, dropout=0.5), jax.tree.map(jnp.asarray, batch(kind))
    dropped = stage2.drop_conditions(examples, null(config), jax.random.key(1), config.conditioning)
    assert set(dropped) == set(condition_of(kind)) - {"segmentation"}
    for name, x in dropped.items():
        is_null = np.asarray([np.array_equal(row, null(config)[name]) for row in x])
        kept = np.asarray([np.array_equal(*rows) for rows in zip(x, examples[name], strict=True)])
        assert np.all(is_null | kept) and is_null.any() and kept.any()


# --- sampling --------------------------------------------------------------------------------------------------------


def given(kind: str, size: int = 16) -> dict:
    """Conditions for four pictures, as a user gives them."""
    rng = np.random.default_rng(2)
    found = {}
    if kind == "layout":
        found["layouts"] = [layouts.Objects(np.array([i]), np.array([[0.1 * i, 0.2, 0.3, 0.4]])) for i in range(4)]
    if kind in ("segmentation", "hybrid"):
        found["segmentation"] = rng.integers(0, 5, (4, size, size))
    if kind == "low_res":
        found["low_res"] = rng.integers(0, 256, (4, size // 2, size // 2, 3), np.uint8)
    if kind == "inpainting":
        found["image"] = rng.integers(0, 256, (4, size, size, 3), np.uint8)
        found["mask"] = rng.random((4, size, size)) < 0.5
    if kind == "hybrid":
        found["prompts"] = tiny_models.CAPTIONS[:4]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_their_condition_whatever_the_batch(kind):
    side = 24 if kind == "low_res" else 16  # pictures are as large as their condition asks
    model, asked = tiny_models.model(kind), given(kind, side)
    four = model.sample(**asked, batch_size=4)
    assert four.images.shape == (4, side, side, 3)
    if kind == "inpainting":
        np.testing.assert_allclose(model.sample(**asked, batch_size=2).latents, four.latents, atol=1e-4)
    for name in asked:
        other = model.sample(**{**asked, name: list(reversed(asked[name])) if name in ("layouts", "prompts") else
                                np.asarray(asked[name])[::-1]}, batch_size=4)
        assert np.abs(other.latents - four.latents).max() > 1e-3, name


def test_each_patch_of_a_tiled_layout_sees_its_own_crop():
    model = tiny_models.model("layout")
    objects = layouts.Objects(np.array([1, 2]), np.array([[0.1, 0.1, 0.3, 0.3], [0.6, 0.5, 0.3, 0.4]]))
    asked = dict(size=(16, 32), tile=16, overlap=0)
    crops = settings_lib.patches(model.config, settings_lib.resolve(model.config, **asked))
    assert crops == [(0, 0, 0.5, 1), (0.5, 0, 0.5, 1)]
    tokens = model.conditions(None, None, 1, [objects], crops)["layout"]
    for i, row in enumerate(tokens[0]):
        seen, crop = layouts.from_tokens(row, model.config.conditioning.layout)
        assert seen.labels.tolist() == [i + 1]
        np.testing.assert_allclose(crop, crops[i], atol=0.1)  # a grid of 8 x 8

    context = jax.jit(model.models.conditioner.apply)({"params": model.params["conditioner"]}, jnp.asarray(tokens[0]))
    z, t = jax.random.normal(jax.random.key(0), (1, 8, 16, 4)), jnp.array([5])
    predict = jax.jit(functools.partial(programs.predict, model.models), static_argnames="tile")
    predict = functools.partial(predict, model.params)
    whole = predict(z, t, {"context": context[None]}, tile=programs.Tile(side=8, overlap=0, factor=2))
    halves = [predict(half, t, {"context": context[i : i + 1]}) for i, half in enumerate(jnp.split(z, 2, axis=2))]
    np.testing.assert_allclose(whole, jnp.concatenate(halves, axis=2), atol=1e-5)

    model.config.sampling.steps = 1
    latents = model.sample(layouts=objects, **asked, guidance_scale=2.0).latents
    swapped = layouts.Objects(objects.labels[::-1], objects.boxes)
    other = model.sample(layouts=swapped, **asked, guidance_scale=2.0).latents
    assert latents.shape == (1, 8, 16, 4) and np.abs(latents - other).max() > 1e-3


def test_known_pixels_are_kept_exactly_and_an_empty_mask_returns_the_picture():
    model, asked = tiny_models.model("inpainting"), given("inpainting")
    pictures = model.sample(**asked).images
    np.testing.assert_array_equal(pictures[~asked["mask"]], asked["image"][~asked["mask"]])
    assert np.mean(pictures[asked["mask"]] != asked["image"][asked["mask"]]) > 0.9
    nothing = model.sample(image=asked["image"], mask=np.zeros((16, 16), np.uint8)).images
    np.testing.assert_array_equal(nothing, asked["image"])


def test_white_is_painted():
    model, asked = tiny_models.model("inpainting"), given("inpainting")
    white = model.sample(image=asked["image"], mask=asked["mask"].astype(np.uint8) * 255).images
    np.testing.assert_array_equal(white, model.sample(**asked).images)


def test_guidance_keeps_the_map_and_scale_one_is_no_guidance():
    model, asked = tiny_models.model("hybrid"), given("hybrid")
    plain = dict(asked) | {"guidance_scale": 1.0}
    guided = model.sample(**plain)
    model.config.sampling.guidance_scale = 1.0  # leaves the unconditional pass out
    np.testing.assert_allclose(model.sample(**asked).latents, guided.latents, atol=1e-4)


def test_concat_of_inpainting_is_the_mode_of_the_masked_picture_and_the_small_mask():
    config, static, params, first_stage = setting("inpainting")
    examples = jax.tree.map(jnp.asarray, batch("inpainting"))
    found = stage2.condition_map(static["models"], params, first_stage, examples, config.conditioning)["concat"]
    masked = jnp.where(examples["mask"] > 0, -1.0, examples["image"])
    posterior = static["models"].first_stage.apply({"params": first_stage}, masked, method="encode")
    np.testing.assert_allclose(found[..., :4], posterior.mode(), atol=1e-6)
    np.testing.assert_array_equal(found[..., 4:], 2 * examples["mask"][:, ::2, ::2] - 1)


@pytest.mark.parametrize("kind,asked,message", [
    ("none", {"low_res": np.zeros((8, 8, 3), np.uint8)}, "takes no low_res"),
    ("low_res", {}, "needs low_res"),
    ("inpainting", {"image": np.zeros((16, 16, 3), np.uint8)}, "mask is missing"),
    ("inpainting", {"image": np.zeros((16, 16, 3), np.uint8), "mask": np.zeros((8, 8))}, "8x8 pixels, the picture 16x"),
    ("low_res", {"low_res": np.zeros((8, 8, 1), np.uint8)}, "3 channels"),
    ("low_res", {"low_res": np.zeros((8, 8, 3), np.uint8), "size": (32, 32)}, "leave size out"),
    ("segmentation", {"segmentation": np.full((16, 16), 7)}, "class numbers 7, but this model has 0 to 4"),
    ("class", {"layouts": []}, "takes no layouts"),
])
def test_mistakes_are_found_at_the_call(kind, asked, message):
    with pytest.raises(UserError, match=message):
        tiny_models.model(kind).sample_batches(**asked)

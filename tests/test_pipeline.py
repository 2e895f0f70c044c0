"""LatentDiffusion: closed forms, the same pictures however they are batched, no recompilation, mistakes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion import config as config_lib
from latent_diffusion import defaults, drawing, parallel, pipeline, programs, request
from latent_diffusion import settings as settings_lib
from latent_diffusion.diffusion import samplers
from latent_diffusion.errors import UserError
from tests import tiny_models

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def both():
    return tiny_models.model("both")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, both):
    path = tmp_path_factory.mktemp("both")
    tiny_models.save(both, path)
    return path


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_ddim_of_a_network_that_predicts_no_noise_is_a_multiple_of_the_initial_noise():
    """eps = 0 makes every DDIM step z_prev = alpha_prev / alpha z_t (Song et al. 2021, eq. 12), so that all steps
    together give z_0 = z_T / alpha(T-1), whatever their number."""
    model, seed, n = tiny_models.constant_pixels(), 5, 3
    samples = model.sample(num_samples=n, steps=4, sampler="ddim", seed=seed)

    fold, key = jax.random.fold_in, jax.random.key(seed)
    noise = np.stack([jax.random.normal(fold(fold(key, k), 0), (8, 8, 3)) for k in range(n)])
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 20) ** 2
    expected = noise / np.sqrt(np.prod(1 - betas))
    np.testing.assert_allclose(samples.latents, expected, rtol=2e-6, atol=2e-6)
    pixels = np.clip(np.floor((expected / 0.5 + 1) * 127.5 + 0.5), 0, 255)  # scale_factor 0.5
    assert np.abs(samples.images - pixels).max() <= 1 and (samples.images == pixels).mean() > 0.999


def test_guidance_moves_away_from_the_null_condition(both):
    """One DDIM step from T-1: z_0 = (z_T - sigma eps) / alpha with eps = e_null + s (e_y - e_null)."""
    s, prompts, labels = 3.0, ["red apple", "red heart"], [0, 3]
    got = both.sample(prompts, labels, steps=1, sampler="ddim", guidance_scale=s, seed=1, size=(8, 20))

    z_T = samplers.initial_noise(jax.random.key(1), jnp.arange(2), (2, 4, 10, 4))
    e_y = both.denoise(z_T, 19, both.conditions(prompts, labels, 2))
    e_null = both.denoise(z_T, 19)
    acp = np.prod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 20) ** 2)
    expected = (z_T - np.sqrt(1 - acp) * (e_null + s * (e_y - e_null))) / np.sqrt(acp)
    assert np.abs(e_y - e_null).max() > 1e-2
    np.testing.assert_allclose(got.latents, expected, atol=1e-5)
    expected_images = np.clip(np.floor((np.asarray(both.decode(expected)) + 1) * 127.5 + 0.5), 0, 255)
    assert got.images.shape == (2, 8, 20, 3)
    assert np.abs(got.images - expected_images).max() <= 1


def test_scale_one_is_the_same_with_and_without_the_unconditional_pass(both):
    config = both.config.copy_and_resolve_references()
    with config.unlocked():
        config.sampling.guidance_scale = 1.0
    unguided = dataclasses.replace(both, config=config)
    assert not settings_lib.resolve(config).guided and settings_lib.resolve(config, guidance_scale=1.0).guided
    ours = unguided.sample(["red apple"], num_samples=2)
    theirs = both.sample(["red apple"], num_samples=2, guidance_scale=1.0)
    np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-5)


def test_unconditional_batches_are_never_doubled(both):
    assert not settings_lib.resolve(tiny_models.config("none"), guidance_scale=1.0).guided
    no_condition = both.sample(num_samples=2, guidance_scale=5.0)
    np.testing.assert_array_equal(no_condition.latents, both.sample(num_samples=2).latents)


def test_encode_is_the_scaled_mode_and_decode_undoes_the_scale(both):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    first = {"params": both.params["first_stage"]}
    network = both.models.first_stage
    mean = jax.jit(lambda p, x: network.apply(p, x, method="encode").mean)(first, x)
    np.testing.assert_allclose(both.encode(x), tiny_models.SCALE_FACTOR * mean, atol=1e-6)
    decoded = jax.jit(lambda p, z: network.apply(p, z, method="decode"))(first, mean)
    np.testing.assert_allclose(both.decode(tiny_models.SCALE_FACTOR * mean), decoded, atol=1e-5)


# --- the same pictures -----------------------------------------------------------------------------------------------


def assert_same_pictures(ours, theirs):
    """Equal in 99.9 % of the pixels, and by at most one level elsewhere: XLA orders sums by the size of the batch."""
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference == 0).mean() > 0.999


def test_batch_size_does_not_matter(both):
    asked = dict(prompts=["red apple", "flag of japan"], labels=[0, 1], num_samples=5, eta=1.0, seed=2**32 - 1)
    whole = both.sample(**asked, batch_size=5)
    pieces = both.sample(**asked, batch_size=2)  # the last batch has one picture
    assert whole.images.shape == (5, 16, 16, 3) and whole.latents.shape == (5, 8, 8, 4)
    assert_same_pictures(whole.images, pieces.images)
    np.testing.assert_allclose(whole.latents, pieces.latents, atol=1e-5)
    assert np.abs(whole.latents[0] - whole.latents[2]).max() > 0.1, "two pictures of one prompt are equal"


def test_number_of_devices_does_not_matter(both, workdir, tmp_path):
    others = 2 if jax.local_device_count() == 1 else 1
    program = f"""
import numpy as np
import jax
from latent_diffusion.pipeline import LatentDiffusion
assert jax.local_device_count() == {others}
model = LatentDiffusion.from_workdir({str(workdir)!r})
samples = model.sample("red apple", num_samples=3, batch_size=2, eta=1.0, seed=4)
np.savez({str(tmp_path / "there.npz")!r}, images=samples.images, latents=samples.latents)
"""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={others}", "NPROC": "16", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=180)
    there = np.load(tmp_path / "there.npz")
    here = both.sample("red apple", num_samples=3, batch_size=2, eta=1.0, seed=4)
    assert there["images"].shape == (3, 16, 16, 3)
    assert_same_pictures(here.images, there["images"])
    np.testing.assert_allclose(here.latents, there["latents"], atol=1e-5)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch):
    programs.compiled.cache_clear()
    calls, original = [], samplers.trajectory
    monkeypatch.setattr(samplers, "trajectory", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


def test_only_shapes_method_and_steps_recompile(traces):
    model = tiny_models.constant_pixels()
    model.sample(num_samples=2, steps=2)
    model.sample(num_samples=4, batch_size=2, steps=2, eta=0.7, seed=9)
    # Networks built again, as training does for each of its grids, and other weights.
    other = tiny_models.constant_pixels()
    other = dataclasses.replace(other, params=jax.tree.map(lambda x: x + 0.01, other.params), scale_factor=0.6)
    other.sample(num_samples=2, steps=2)
    assert len(traces) == 1
    model.sample(num_samples=2, steps=3)
    assert len(traces) == 2


def test_guidance_scale_does_not_recompile(traces):
    model = tiny_models.constant_pixels("class")
    for scale in (1.0, 2.0, 7.5):
        model.sample(labels=[1], steps=1, guidance_scale=scale)
    assert len(traces) == 1


def test_weights_are_arguments_of_the_program(both):
    program = drawing.program(both, settings_lib.resolve(both.config), drawing.Job())
    numbers = ("scale_factor", "eta", "temperature", "rescale")
    shared = {"params": both.params, "null": both.conditions(None, None, 1), "key": jax.random.key(0),
              **{name: np.float32(1) for name in numbers}}
    batch = {"index": np.arange(2, dtype=np.int32), "guidance_scale": np.full(2, 2.0, np.float32),
             **both.conditions(["red apple"], [1], 2)}
    z_T = np.zeros((2, *program.latent_shape), np.float32)
    closed = jax.make_jaxpr(lambda s, z, b: programs.draw(s, z, b, program=program))(shared, z_T, batch)
    assert sum(np.size(constant) for constant in closed.consts) < 1000


# --- conditions ------------------------------------------------------------------------------------------------------


def test_missing_conditions_are_null_and_given_ones_are_repeated_in_turn(both):
    arrays = both.conditions(["red apple", "flag of japan"], None, 3)
    expected = both.vocabulary.encode(["red apple", "flag of japan", "red apple"], 8)
    np.testing.assert_array_equal(arrays["tokens"], expected)
    np.testing.assert_array_equal(arrays["label"], [4, 4, 4])  # four classes: the fifth row is the null class
    arrays = both.conditions(None, [2], 2)
    np.testing.assert_array_equal(arrays["tokens"], both.vocabulary.encode(["", ""], 8))
    np.testing.assert_array_equal(arrays["label"], [2, 2])


def test_prompts_and_labels_are_paired():
    config = tiny_models.config("both")
    assert request.resolve_conditions(config, ["a", "b"], "3", tiny_models.LABELS) == (["a", "b"], [3, 3])
    assert request.resolve_conditions(config, " a ", ["flags", 0], tiny_models.LABELS) == (["a", "a"], [1, 0])
    assert request.resolve_conditions(config, None, "Hearts, all colors", tiny_models.LABELS) == (None, [3])
    assert request.resolve_conditions(config, None, np.arange(4)) == (None, [0, 1, 2, 3])
    names = ["0", "1", "10", "2"]  # of folders: texts are names, numbers are not
    assert request.resolve_conditions(config, None, ["10", 2, "2"], names) == (None, [2, 2, 3])


@pytest.mark.parametrize("kind, prompts, labels, options, message", [
    ("class", ["a"], None, {}, "takes no prompts"),
    ("none", ["a"], None, {}, "takes no prompts"),
    ("text", None, [1], {}, "takes no labels"),
    ("text", [" "], None, {}, "empty prompt"),
    ("text", [], None, {}, "empty prompt"),
    ("class", None, ["fod"], {}, "unknown label 'fod' \\(perhaps 'food'\\); choose from: 0 food, 1 flags"),
    ("class", None, [4], {}, "label 4: this model has the classes 0 to 3"),
    ("class", None, [-1], {}, "label -1: this model has the classes 0 to 3"),
    ("class", None, "4", {}, "unknown label '4'"),
    ("text", ["\udcff heart"], None, {}, "is not UTF-8 text"),
    ("class", None, [], {}, "no label given"),
    ("both", ["a", "b"], [1, 2, 3], {}, "2 prompts and 3 labels"),
    ("text", None, None, {"dropout": 0.0}, "cannot do without prompts"),
])
def test_impossible_conditions(kind, prompts, labels, options, message):
    with pytest.raises(UserError, match=message):
        request.resolve_conditions(tiny_models.config(kind, **options), prompts, labels, tiny_models.LABELS)


@pytest.mark.parametrize("kind, options, settings, message", [
    ("none", {}, {"sampler": "magic"}, "sampler: unknown value 'magic'; choose from ddim, ddpm"),
    ("none", {}, {"steps": 0}, "steps=0 must lie between 1 and 20"),
    ("none", {}, {"steps": 21}, "steps=21 must lie between 1 and 20"),
    ("none", {}, {"eta": -1.0}, "eta=-1.0"),
    ("none", {}, {"eta": float("nan")}, "eta=nan"),
    ("class", {}, {"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ("class", {"dropout": 0.0}, {"guidance_scale": 2.0}, "without conditioning dropout"),
    ("none", {}, {"seed": -1}, "seed=-1"),
    ("none", {}, {"size": (17, 30)}, r"size=17,30: .* multiples of 2 .* the nearest size is 16,30"),
    ("none", {}, {"size": (0, 16)}, "the nearest size is 2,16"),
])
def test_impossible_settings(kind, options, settings, message):
    with pytest.raises(UserError, match=message):
        settings_lib.resolve(tiny_models.config(kind, **options), **settings)


@pytest.mark.parametrize("numbers", [{"num_samples": 0}, {"batch_size": 0}])
def test_impossible_numbers(numbers):
    with pytest.raises(UserError, match="must be 1 or more"):
        tiny_models.constant_pixels().sample_batches(**numbers)


def test_latents_that_are_not_finite():
    model = tiny_models.constant_pixels()
    model.params["unet"]["out_2"]["bias"][0] = np.nan
    with pytest.raises(UserError, match="latents of picture 0 are not finite"):
        model.sample(num_samples=1, steps=2)


# --- workdirs --------------------------------------------------------------------------------------------------------


def test_from_workdir_gives_the_same_pictures(both, workdir):
    read = pipeline.LatentDiffusion.from_workdir(workdir)
    assert (read.step, read.scale_factor, read.label_names) == (7, tiny_models.SCALE_FACTOR, tiny_models.LABELS)
    ours, theirs = (model.sample("red heart", num_samples=2) for model in (both, read))
    np.testing.assert_array_equal(ours.latents, theirs.latents)


def test_averaged_weights_are_used_where_there_are_any(tmp_path, both):
    averaged = jax.tree.map(lambda x: x + 1, both.params["unet"])
    tiny_models.save(both, tmp_path, ema={"unet": averaged})
    read = parallel.to_host(pipeline.LatentDiffusion.from_workdir(tmp_path, step=7).params)
    jax.tree.map(np.testing.assert_array_equal, read["unet"], averaged)
    jax.tree.map(np.testing.assert_array_equal, read["conditioner"], both.params["conditioner"])


def test_workdirs_that_cannot_be_used(tmp_path, workdir):
    def message(path, **arguments):
        with pytest.raises(UserError) as caught:
            pipeline.LatentDiffusion.from_workdir(path, **arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "has no config.json" in message(tmp_path)
    assert "no checkpoint of step 3; there are 7" in message(workdir, step=3)
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_models.config("none")))
    assert "no complete checkpoint" in message(tmp_path)
    (tmp_path / "config.json").write_text(config_lib.to_json(defaults.autoencoder()))
    assert "autoencoder (stage 1); give the workdir of a stage-2 run" in message(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in message(tmp_path)


def test_importing_pipeline_is_light():
    heavy = ("grain", "tensorflow_datasets", "clu", "tensorflow", "torch", "tensorboard")
    program = f"import sys, latent_diffusion.pipeline; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert out.stdout.strip() == b"[]"


def test_conditions_that_were_never_alone_are_warned_of(caplog):
    model = tiny_models.model("both", text_dropout=0.1)
    model.sample_batches(labels=[1])
    assert not caplog.records
    model.sample_batches(["red apple"])
    assert "never trained with prompts alone (conditioning.label_dropout=0)" in caplog.text

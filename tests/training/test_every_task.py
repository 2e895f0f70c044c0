"""Every task through the loop: a run that was stopped and resumed is, bit for bit, the run that was not, and its
workdir draws pictures without any other file. Three runs have two conditions each."""

import shutil

import clip_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke_runs

from latent_diffusion import checkpoint, models, pipeline
from latent_diffusion import config as config_lib
from latent_diffusion.errors import UserError
from latent_diffusion.layouts import Objects

SHAPES = np.arange(256).reshape(16, 16) // 64
RUNS = {  # config: its second condition, other settings, what is asked of it
    "ldm_class": ("low_res", dict(low_res=dict(factor=2, degradation="bsrgan_light")),
                  dict(labels=[1], low_res=np.full((8, 8, 3), 9, np.uint8))),
    "ldm_layout": ("segmentation", {}, dict(layouts=Objects(np.array([1]), np.array([[0.1, 0.2, 0.3, 0.4]])),
                                            segmentation=SHAPES)),
    "ldm_text": ("inpainting", {}, dict(prompts=["a red circle"], image=np.full((16, 16, 3), 9, np.uint8),
                                        mask=SHAPES > 1)),
}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A stage-1 workdir whose weights are those of step 0."""
    workdir, config = tmp_path_factory.mktemp("runs") / "stage1", smoke_runs.autoencoder_config()
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(config))
    network, rng = models.build(config).first_stage, np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    manager = checkpoint.open_manager(workdir)
    checkpoint.save(manager, smoke_runs.STEPS, {"params": {"autoencoder": params}, "ema": {}}, {})
    manager.close()
    return workdir


def config_of(name, first_stage, files):
    concat, options, _ = RUNS[name]
    config = smoke_runs.task_config(name, first_stage, conditioning=dict(concat=concat, dropout=0.3))
    with config.unlocked():
        config.conditioning.update(options)
        if name == "ldm_text":
            config.conditioning.text.update(clip_files.write(files))
    return config


@pytest.mark.parametrize("name", [  # classes are resumed in test_loop.py, too
    pytest.param(name, marks=pytest.mark.slow) if name == "ldm_class" else name for name in RUNS])
def test_resume_and_samples(name, first_stage, tmp_path):
    (tmp_path / "files").mkdir()
    config = config_of(name, first_stage, tmp_path / "files")
    assert smoke_runs.run(config, tmp_path / "whole")[0] == 0
    shutil.rmtree(tmp_path / "files")  # what was copied suffices
    again = smoke_runs.cut_back(tmp_path / "whole", tmp_path / "again", 1)
    code, printed = smoke_runs.run(config_lib.from_json((again / "config.json").read_text()), again)
    assert code == 0 and "resuming after step 1" in printed
    smoke_runs.assert_same_checkpoint(again, tmp_path / "whole", 2, ("params", "ema", "optimizer"))
    assert (again / "samples.png").read_bytes() == (tmp_path / "whole" / "samples.png").read_bytes()

    ldm, asked = pipeline.LatentDiffusion.from_workdir(again), RUNS[name][2]
    assert ldm.sample(**asked, num_samples=4, seed=3).images.shape == (4, 16, 16, 3)  # as many as were logged
    if name == "ldm_text":  # the encoder is that of the file, and no step has touched it
        trained = checkpoint.load(again, ("params",))[0]["params"]
        assert "conditioner" not in trained
        table = ldm.params["conditioner"]["embeddings_token_embedding"]["embedding"]
        np.testing.assert_array_equal(
            np.asarray(table).reshape(-1, clip_files.WIDTH),
            clip_files.tensors()["text_model.embeddings.token_embedding.weight"])


@pytest.mark.parametrize("message, text", [
    ("give its weights", dict(weights="")),
    ("needs its tokenizer", dict(vocab="")),
    ("nowhere.safetensors does not exist", dict(weights="nowhere.safetensors")),
    (r"holds no text encoder of CLIP .*: it has no encoder_layers_1/", dict(layers=2)),
    (r"position_embedding.weight is \[8, 32\], but .* ask for \[6, 32\]", dict(max_length=6)),
    ("2 heads of 8 channels, but CLIP needs them to make up conditioning.width=32", dict(head_dim=8)),
])
def test_mistakes_about_the_frozen_encoder(message, text, first_stage, tmp_path):
    config = config_of("ldm_text", first_stage, tmp_path)
    with config.unlocked():
        config.conditioning.text.update(text)
    with pytest.raises(UserError, match=message):
        smoke_runs.run(config, tmp_path / "run")


def test_weights_in_another_format(first_stage, tmp_path):
    config = config_of("ldm_text", first_stage, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02 a pickle")
    with pytest.raises(UserError, match="model.safetensors is damaged, or no file of tensors"):
        smoke_runs.run(config, tmp_path / "run")

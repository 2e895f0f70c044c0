"""A model of latent-diffusion through the command line: into a workdir, pictures of it, a run that goes on from it, and
out again as it was."""

import json
import shutil

import jax
import numpy as np
import pytest
import reference_keys
import reference_models
import smoke_runs
import tiny_runs
import yaml
from reference_keys import encoder

from latent_diffusion import checkpoint, conditions, tensor_files
from latent_diffusion import config as config_lib
from latent_diffusion.errors import UserError
from latent_diffusion.interop import __main__ as interop
from latent_diffusion.interop import compvis_settings as settings
from latent_diffusion.pipeline import LatentDiffusion
from latent_diffusion.training import initial, loop

# Of the pictures that configs draw in memory, "a red circle", every word is there.
VOCABULARY = conditions.train_vocabulary(
    [f"a {color} {shape}" for color in ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
     for shape in ("circle", "square", "triangle", "cross")], 60)
MODEL = reference_models.tiny(
    ("crossattn", "caption", encoder("BERTEmbedder", n_embed=32, n_layer=1, vocab_size=VOCABULARY.size,
                                     max_seq_len=6)),
    unet=reference_models.attending(32, channel_mult=[1], attention_resolutions=[1]), scale_by_std=True)
STEP = 7
SMALL = dict(
    data=dict(source="memory"), optimizer=dict(learning_rate=1e-3, scale_lr=False),
    training=dict(batch_size=4, num_steps=2, log_every=1, image_every=0), sampling=dict(steps=1),
    evaluation=dict(every=0, max_batches=1, num_images=2), checkpoint=dict(every=1, keep=9))


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def command(*words):
    return interop.main([str(word) for word in words])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder, the tensors of model.ckpt in it); beside that, model.yaml and vocab.txt."""
    folder, state = tmp_path_factory.mktemp("files"), reference_models.state_of(MODEL, step=STEP)
    tensor_files.save_tensors(folder / "model.ckpt", state, STEP)
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL))
    VOCABULARY.save(folder)
    return folder, state


def import_arguments(folder, **changed):
    given = {name: folder / file for name, file in (
        ("checkpoint", "model.ckpt"), ("yaml", "model.yaml"), ("vocab", "vocab.txt"))} | changed
    return "import", *(word for name, value in given.items() if value for word in (f"--{name}", value))


@pytest.fixture(scope="module")
def imported(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "imported"
    assert command(*import_arguments(files[0], workdir=workdir)) == 0
    return workdir


def finetune(imported, **sections):
    config = tiny_runs.get_config("finetune", f"from={imported}")
    with config.unlocked():
        for overrides in (SMALL, sections):
            for section, values in overrides.items():
                config[section].update(values)
    return config


def weights_of(state, averaged=True):
    """Three parameters of ours as the file has them: of the UNet, of the conditioner, of the first stage."""
    name = "time_embed.0.weight"
    return {"unet/time_embed_0/kernel": (state["model_ema.diffusion_model" + name.replace(".", "")] if averaged
                                         else state["model.diffusion_model." + name]).T,
            "conditioner/token_emb/embedding": state["cond_stage_model.transformer.token_emb.weight"],
            "first_stage/decoder/conv_out/bias": state["first_stage_model.decoder.conv_out.bias"]}


def leaf(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree)


# --- in, and pictures ------------------------------------------------------------------------------------------------


def test_what_an_import_tells_and_writes(files, tmp_path, capsys):
    assert command(*import_arguments(files[0], workdir=tmp_path / "new")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["component", "parameters", "source", "notes"]
    told = {line[:15].strip(): line for line in lines[1:-1]}
    size = sum(x.size for key, x in files[1].items() if key.startswith("model.diffusion_model."))
    assert f"{size:,}" in told["unet"] and "model_ema.*" in told["unet, averaged"] and "kl" in told["first_stage"]
    assert str(tmp_path / "new") in lines[-1] and f"step {STEP}" in lines[-1]
    record = json.loads((tmp_path / "new" / checkpoint.IMPORTED).read_text())
    assert (record["source"], record["step"]) == (str(files[0] / "model.ckpt"), STEP)
    trees, metadata, step = checkpoint.load(tmp_path / "new", ("params", "ema"))
    assert step == STEP and metadata["scale_factor"] == np.float32(0.7)
    for averaged, tree in ((False, trees["params"]), (True, {**trees["params"], **trees["ema"]})):
        for path, value in weights_of(files[1], averaged).items():
            if not path.startswith("first_stage"):
                np.testing.assert_array_equal(leaf(tree, path), value, path)


def test_pictures_of_the_workdir_are_those_of_the_file(files, imported):
    ldm = LatentDiffusion.from_workdir(imported)
    direct = LatentDiffusion.from_compvis(files[0] / "model.ckpt", files[0] / "model.yaml", vocabulary=VOCABULARY)
    asked = dict(prompts=["a red circle", "a blue cross"], steps=2, guidance_scale=3.0, seed=5)
    one, other = ldm.sample(**asked), direct.sample(**asked)
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.latents, other.latents)
    assert one.images.shape == (2, 16, 16, 3) and one.images.std() > 5 and (one.images[0] != one.images[1]).any()
    assert (ldm.step, direct.step, ldm.scale_factor, direct.scale_factor) == (STEP, STEP, *[np.float32(0.7)] * 2)
    assert ldm.config.sampling.spacing == "reference" and ldm.vocabulary == VOCABULARY
    for path, value in weights_of(files[1]).items():
        np.testing.assert_array_equal(leaf(ldm.params, path), value, path)
    raw = LatentDiffusion.from_compvis(files[0] / "model.ckpt", MODEL, use_ema=False)
    np.testing.assert_array_equal(leaf(raw.params, "unet/time_embed_0/kernel"),
                                  weights_of(files[1], averaged=False)["unet/time_embed_0/kernel"])


def test_a_first_stage_is_no_model_to_draw_from(files):
    with pytest.raises(UserError, match=r"model\.ckpt is a first stage; give a diffusion model"):
        LatentDiffusion.from_compvis(files[0] / "model.ckpt", {"model": reference_models.KL})


# --- out again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_export_of_an_import_is_the_file_again(files, imported, tmp_path, ending, capsys):
    output = tmp_path / "folder" / f"again.{ending}"
    assert command("export", "--workdir", imported, "--format", "compvis", "--output", output) == 0
    told = capsys.readouterr().out
    assert told.startswith("component") and str(output) in told and str(output.with_suffix(".yaml")) in told
    tensors, rest = tensor_files.open_tensors(output)
    assert rest == ({"global_step": STEP} if ending == "ckpt" else {})
    assert sorted(tensors) == sorted(files[1])
    tables = [key for key in files[1] if "." not in key and key != "scale_factor"]
    assert len(tables) == 12
    for key, value in files[1].items():
        found = tensors[key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape), key
        if key in tables:  # of the noise schedule: computed anew
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-10, err_msg=key)
        else:
            assert found.tobytes() == value.tobytes(), key
    described = settings.to_config(settings.read(output.with_suffix(".yaml")))
    expected = settings.to_config(MODEL)
    for section in ("model", "conditioning", "diffusion", "first_stage"):
        assert described[section] == expected[section], section


# --- a run that goes on from it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(imported, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finetuned"
    code, printed = smoke_runs.run(finetune(imported), workdir)
    assert code == 0
    return workdir, printed


def begin(config, workdir):
    """(the first state at random, that with the weights that it begins with, the scale factor of these)."""
    state = tiny_runs.random_state(config)
    beginning = initial.load(config, workdir, jax.eval_shape(lambda: state))
    return state, beginning.put_into(state), beginning.scale_factor


def test_a_run_begins_with_the_averages_of_the_import(files, imported, tmp_path):
    _, state, scale_factor = begin(finetune(imported), tmp_path)
    expected = weights_of(files[1])
    for path in ("unet/time_embed_0/kernel", "conditioner/token_emb/embedding"):
        np.testing.assert_array_equal(leaf(state.params, path), expected[path], path)
    np.testing.assert_array_equal(leaf(state.ema_params, "unet/time_embed_0/kernel"),
                                  expected["unet/time_embed_0/kernel"])
    assert scale_factor == np.float32(0.7)
    assert not np.shares_memory(leaf(state.params, "unet/out_2/bias"), leaf(state.ema_params, "unet/out_2/bias"))


def test_a_run_begins_once(imported, run):
    assert initial.load(finetune(imported), run[0], None) is None  # it has a checkpoint of its own
    assert initial.load(finetune(imported, training=dict(initial="")), run[0].parent / "new", None) is None


def test_parameters_that_are_to_begin_at_random(files, imported, tmp_path):
    config = finetune(imported, training=dict(initial_skip=("conditioner", "unet/time_embed_0")))
    before, state, _ = begin(config, tmp_path)
    for path in ("unet/time_embed_0/kernel", "unet/time_embed_0/bias", "conditioner/token_emb/embedding"):
        np.testing.assert_array_equal(leaf(state.params, path), leaf(before.params, path), path)
    np.testing.assert_array_equal(leaf(state.params, "unet/time_embed_2/bias"),
                                  files[1]["model_ema.diffusion_modeltime_embed2bias"])


def test_parameters_that_do_not_fit(imported, tmp_path):
    config = finetune(imported)
    with config.unlocked():
        config.conditioning.text.vocab_size += 1
        config.diffusion.learn_logvar = True
    shape, wanted = [VOCABULARY.size, 32], [VOCABULARY.size + 1, 32]
    with pytest.raises(UserError, match=rf"has the shape \{shape} of conditioner/token_emb/embedding, which is "
                                        rf"\{wanted} here; .*initial_skip"):
        begin(config, tmp_path)
    with config.unlocked():
        config.training.initial_skip = ("conditioner",)
    with pytest.raises(UserError, match=r"lacks logvar, which is \[20\] here; .*initial_skip=\"\('logvar',\)\""):
        begin(config, tmp_path)
    narrow = finetune(imported, model=dict(num_res_blocks=2))
    with pytest.raises(UserError, match="lacks unet/.*, which is"):
        smoke_runs.run(narrow, tmp_path / "new")
    assert not list((tmp_path / "new").rglob("*"))  # found out before anything is written


def test_a_run_and_its_workdir(files, imported, run):
    workdir, _ = run
    saved, metadata, step = checkpoint.load(workdir, ("params", "ema"))
    assert step == 2 and metadata["scale_factor"] == np.float32(0.7)
    before = weights_of(files[1])
    for path in ("unet/time_embed_0/kernel", "conditioner/token_emb/embedding"):  # Adam moves by its rate at most
        moved = np.abs(leaf(saved["params"], path) - before[path]).max()
        assert 1e-7 < moved < 2 * 1e-3 * 1.2, path  # less where gradients are as small as its epsilon
    frozen = checkpoint.load_frozen(workdir)[0]["autoencoder"]
    np.testing.assert_array_equal(leaf(frozen, "decoder/conv_out/bias"),
                                  before["first_stage/decoder/conv_out/bias"])
    assert not (workdir / checkpoint.IMPORTED).exists() and (workdir / "vocab.txt").exists()


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "finish", lambda *_: 0)  # scores and pictures would be compiled again, to show nothing
    again = smoke_runs.cut_back(run[0], tmp_path / "again", 1)
    code, printed = smoke_runs.run(config_lib.from_json((again / "config.json").read_text()), again)
    assert code == 0 and "resuming after step 1" in printed
    smoke_runs.assert_same_checkpoint(again, run[0], 2, ("params", "ema", "optimizer"))


def test_no_run_goes_on_in_an_imported_workdir(imported):
    before = sorted(str(path) for path in imported.rglob("*"))
    with pytest.raises(UserError, match="holds imported weights, which no run goes on in.*finetune.py:from="):
        smoke_runs.run(finetune(imported), imported)
    assert sorted(str(path) for path in imported.rglob("*")) == before


def test_a_run_exports_too(run, tmp_path):
    output = tmp_path / "x.safetensors"
    assert command("export", "--workdir", run[0], "--format", "compvis", "--output", output, "--step", 1) == 0
    tensors, saved = tensor_files.open_tensors(output)[0], checkpoint.load(run[0], ("params", "ema"), 1)[0]
    np.testing.assert_array_equal(tensors["model.diffusion_model.time_embed.0.weight"],
                                  leaf(saved["params"], "unet/time_embed_0/kernel").T)
    np.testing.assert_array_equal(tensors["model_ema.diffusion_modeltime_embed0weight"],
                                  leaf(saved["ema"], "unet/time_embed_0/kernel").T)
    assert tensors["model_ema.num_updates"] == 1 and tensors["scale_factor"] == np.float32(0.7)


@pytest.mark.parametrize("argument, message", [
    ("", "from= is not a workdir"), ("from=nowhere", "from=nowhere is not a workdir: it has no config.json"),
])
def test_a_config_of_no_workdir(argument, message):
    with pytest.raises(UserError, match=message):
        tiny_runs.get_config("finetune", argument)


def test_weights_of_the_other_stage(imported, tmp_path):
    config = smoke_runs.autoencoder_config(training=dict(initial=str(imported)))
    with pytest.raises(UserError, match="holds stage 'diffusion', this is 'autoencoder'"):
        initial.load(config, tmp_path, None)
    config = smoke_runs.autoencoder_config(training=dict(initial=str(tmp_path)))
    with pytest.raises(UserError, match="is not a workdir: it has no config.json"):
        initial.load(config, tmp_path / "run", None)


# --- mistakes, each one line -----------------------------------------------------------------------------------------


def mistake(capsys, *words):
    """What is said of it; nothing is printed otherwise."""
    capsys.readouterr()
    assert command(*words) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("latent_diffusion.interop: error: ")
    assert len(told.err.splitlines()) == 1
    return told.err


def test_mistakes_of_imports(files, imported, tmp_path, capsys):
    folder, new = files[0], tmp_path / "new"
    (tmp_path / "short.txt").write_text("\n".join(VOCABULARY.tokens[:-1]) + "\n")
    (tmp_path / "hostile.ckpt").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    description = json.loads(json.dumps(MODEL))
    description["model"]["params"]["unet_config"]["params"]["model_channels"] = 64
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(description))
    for changed, needle in (
        (dict(workdir=imported), f"--workdir {imported} is not empty; give another"),
        (dict(vocab=None), "a text model needs its tokenizer: give bert-base-uncased's vocab.txt with --vocab"),
        (dict(vocab=tmp_path / "none.txt"), f"no vocabulary at {tmp_path / 'none.txt'}"),
        (dict(vocab=tmp_path / "short.txt"), f"--vocab has {VOCABULARY.size - 1} entries, but the model's text "
                                             f"encoder has {VOCABULARY.size}"),
        (dict(yaml=tmp_path / "none.yaml"), f"{tmp_path / 'none.yaml'} does not exist"),
        (dict(yaml=folder / "vocab.txt"), "vocab.txt is no yaml file"),
        (dict(yaml=None), "needs its description"),
        (dict(yaml=tmp_path / "wide.yaml"), "has the shape"),
        (dict(checkpoint=tmp_path / "none.ckpt"), f"{tmp_path / 'none.ckpt'} does not exist"),
        (dict(checkpoint=folder / "model.yaml"), "neither a safetensors file nor one that torch.save wrote"),
        (dict(checkpoint=tmp_path / "hostile.ckpt"), "asks for os.system"),
    ):
        assert needle in mistake(capsys, *import_arguments(folder, **{"workdir": new} | changed))
        assert not new.exists(), changed


def test_mistakes_of_exports(imported, run, tmp_path, capsys):
    def told(workdir, output, *more):
        return mistake(capsys, "export", "--workdir", workdir, "--format", "compvis", "--output", output, *more)

    (tmp_path / "there.ckpt").write_text("mine")
    (tmp_path / "described.yaml").write_text("mine")
    assert f"--output {tmp_path / 'there.ckpt'} exists already" in told(imported, tmp_path / "there.ckpt")
    assert f"--output {tmp_path / 'described.yaml'} exists already" in told(imported, tmp_path / "described.ckpt")
    assert "ends with .safetensors, .ckpt, .pt or .pth" in told(imported, tmp_path / "x.npz")
    assert "is not a workdir of a training run" in told(tmp_path, tmp_path / "x.ckpt")
    assert f"no checkpoint of step 9; there are {STEP}" in told(imported, tmp_path / "x.ckpt", "--step", 9)
    narrow = shutil.copytree(imported, tmp_path / "narrow")
    config = config_lib.from_json((narrow / "config.json").read_text())
    with config.unlocked():
        config.model.norm_groups = 8
    (narrow / "config.json").write_text(config_lib.to_json(config))
    assert "norm_groups=8, but latent-diffusion always has 32" in told(narrow, tmp_path / "x.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["described.yaml", "narrow", "there.ckpt"]
    assert (tmp_path / "there.ckpt").read_text() == "mine"


@pytest.mark.parametrize("words", [(), ("import",), ("convert",), ("import", "--checkpoint", "x", "--surprise", "y")])
def test_mistakes_of_the_command_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) == 1 and error.startswith("python -m latent_diffusion")


def test_a_first_stage_and_its_losses_come_back(tmp_path, capsys):
    description = {"model": reference_models.AUTOENCODERS["kl"]}
    options = reference_models.LOSS["kl"]
    state = reference_models.draw(reference_keys.first_stage(description["model"]["params"]) | reference_keys.losses(
        64, options["disc_num_layers"], "batch", True))
    tensor_files.save_tensors(tmp_path / "ae.ckpt", state, 7)
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(description))
    workdir, output = tmp_path / "workdir", tmp_path / "out.ckpt"
    arguments = ("--checkpoint", tmp_path / "ae.ckpt", "--yaml", tmp_path / "ae.yaml", "--workdir", workdir)
    assert command("import", *arguments) == 0
    assert command("export", "--workdir", workdir, "--format", "compvis", "--output", output) == 0
    found, _ = tensor_files.open_tensors(output)
    assert set(found) == set(state)
    others = ("perceptual_loss", "num_batches")  # the package's own LPIPS; a counter
    for key in (key for key in state if not any(part in key for part in others)):
        np.testing.assert_array_equal(found[key], state[key], err_msg=key)
    assert "logvar" in capsys.readouterr().out


def test_what_has_no_averages_is_described_without(files, tmp_path):
    folder, state = files
    raw, output = {key: value for key, value in state.items() if "model_ema" not in key}, tmp_path / "out.ckpt"
    tensor_files.save_tensors(tmp_path / "raw.ckpt", raw)
    assert command(*import_arguments(folder, checkpoint=tmp_path / "raw.ckpt", workdir=tmp_path / "workdir")) == 0
    assert command("export", "--workdir", tmp_path / "workdir", "--format", "compvis", "--output", output) == 0
    assert yaml.safe_load(output.with_suffix(".yaml").read_text())["model"]["params"]["use_ema"] is False
    assert set(tensor_files.open_tensors(output)[0]) == set(raw)

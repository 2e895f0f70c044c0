"""Models of latent-diffusion in and out again: every number is where it belongs, and comes back as it was. Keys and
shapes are those of reference_keys.py, which knows nothing of the package's own tables."""

import copy
import functools
from unittest import mock

import jax
import numpy as np
import pytest
import reference_keys as reference
from reference_models import AUTOENCODERS, LOSS, MODELS, VQ, draw, state_of

from latent_diffusion.errors import UserError
from latent_diffusion.interop import compvis, parts
from latent_diffusion.interop import compvis_settings as settings
from latent_diffusion.interop.compvis_description import to_description


@pytest.fixture(scope="module", autouse=True)
def _each_network_is_traced_once():
    """Shapes come from tracing the networks, a second each time; here the same few models are read again and again."""
    of_diffusion, of_autoencoder, found = parts.of_diffusion, parts.of_autoencoder, {}

    def remembered(function, config, **options):
        relevant = {"model": config.model, "loss": config.training.get("loss"), "conditioning": config.conditioning,
                    "first_stage": config.first_stage.get("model"), "logvar": config.diffusion.get("learn_logvar")}
        key = function.__name__, str(relevant), str(options)
        if key not in found:
            found[key] = function(config, **options)
        return found[key]

    with mock.patch.object(parts, "of_diffusion", functools.partial(remembered, of_diffusion)), \
            mock.patch.object(parts, "of_autoencoder", functools.partial(remembered, of_autoencoder)):
        yield


@pytest.fixture(scope="module")
def read():
    """`compvis.read_model` of each of MODELS, once."""
    found = {}

    def of(name):
        if name not in found:
            state = state_of(MODELS[name])
            found[name] = state, compvis.read_model(MODELS[name], state)
        return found[name]

    return of


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    tables = set(reference.schedule(MODELS["pixels"]["model"]["params"]))
    for key, value in expected.items():
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key
        if key in tables:  # computed anew there, by other formulas perhaps
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-10, err_msg=key)
        else:
            np.testing.assert_array_equal(found[key], value, key)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_in_goes_out_again(name, read):
    state, imported = read(name)
    assert "unknown" not in {row.name for row in imported.report}, imported.report
    leaves = jax.tree.leaves((imported.params, imported.ema_params))
    assert all(leaf.dtype == np.float32 for leaf in leaves)
    assert_same(compvis.export_model(imported.config, imported.params, imported.ema_params, step=7), state)


@pytest.mark.parametrize("name", MODELS)
def test_descriptions_come_back(name):
    config = settings.to_config(MODELS[name])
    assert settings.to_config(to_description(config)) == config


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_first_stages_come_in_and_go_out_again(name):
    description = {"model": AUTOENCODERS[name]}
    params, kl = description["model"]["params"], name != "vq"
    shapes = reference.first_stage(params)
    if params.get("use_ema"):
        shapes |= {f"model_ema.{key.replace('.', '')}": shape for key, shape in shapes.items()}
        shapes |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    if name in LOSS:
        loss = LOSS[name]
        shapes |= reference.losses(loss.get("disc_ndf", 64), loss.get("disc_num_layers", 3),
                                   "actnorm" if loss.get("use_actnorm") else "batch", kl)
    state = draw(shapes)
    if name in LOSS:  # the constants of LPIPS
        layer = "loss.perceptual_loss.scaling_layer."
        state |= {layer + "shift": np.float32([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1),
                  layer + "scale": np.float32([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)}
    if params.get("use_ema"):
        state["model_ema.decay"] = np.array(0.9999, np.float32)
    imported = compvis.read_model(description, state)
    assert "unknown" not in {row.name for row in imported.report}, imported.report
    config = imported.config
    assert settings.to_config(to_description(config)) == config
    assert bool(imported.ema_params) == bool(params.get("use_ema"))
    if name == "kl":
        assert imported.params["logvar"] == state["loss.logvar"]
    assert_same(compvis.export_model(config, imported.params, imported.ema_params, step=1), state)


def test_a_first_stage_out_of_a_diffusion_model(read):
    state, imported = read("class")
    config, params = compvis.import_model({"model": VQ}, state)
    assert config.stage == "autoencoder"
    jax.tree.map(np.testing.assert_array_equal, params["autoencoder"], imported.params["first_stage"])
    assert_same(compvis.export_model(config, params),
                {key.removeprefix("first_stage_model."): value for key, value in state.items()
                 if key.startswith("first_stage_model.")})


# --- where numbers go ------------------------------------------------------------------------------------------------


def test_axes(read):
    """Torch's convolutions are (out, in, h, w), its linear layers (out, in); ours are (h, w, in, out) and (in, out)."""
    state, imported = read("unconditional")
    unet = imported.params["unet"]
    theirs = state["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    np.testing.assert_array_equal(unet["input_blocks_1_0"]["in_layers_2"]["kernel"], np.einsum("oihw->hwio", theirs))
    theirs = state["model.diffusion_model.time_embed.0.weight"]
    np.testing.assert_array_equal(unet["time_embed_0"]["kernel"], theirs.T)
    theirs = state["model.diffusion_model.middle_block.1.qkv.weight"]
    np.testing.assert_array_equal(unet["middle_block_1"]["qkv"]["kernel"].reshape(64, 192), theirs[:, :, 0].T)


def test_averages_or_the_weights_as_trained(read):
    state, imported = read("unconditional")
    key = "input_blocks.0.0.bias"
    for use_ema, name in ((True, "model_ema.diffusion_model" + key.replace(".", "")),
                          (False, "model.diffusion_model." + key)):
        config, params = compvis.import_model(MODELS["unconditional"], state, use_ema=use_ema)
        np.testing.assert_array_equal(params["unet"]["input_blocks_0_0"]["bias"], state[name])
    plain = {key: value for key, value in state.items() if not key.startswith("model_ema")}
    config, params = compvis.import_model(MODELS["unconditional"], plain)
    np.testing.assert_array_equal(params["unet"]["input_blocks_0_0"]["bias"], state["model.diffusion_model." + key])


@pytest.mark.parametrize("name, factor", [("unconditional", 0.7), ("text", 0.18215), ("class", 1.0)])
def test_scale_factor_of_the_file_or_the_description(read, name, factor):
    first = read(name)[1].config.first_stage
    assert first.scale_factor == pytest.approx(factor, rel=1e-7) and first.scale_by_std == (name == "unconditional")


def test_half_precision_is_widened():
    state = {key: value.astype(np.float16) if value.dtype == np.float32 and key not in ("betas", "scale_factor")
             else value for key, value in state_of(MODELS["unconditional"]).items()}
    _, params = compvis.import_model(MODELS["unconditional"], state, use_ema=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    key = "model.diffusion_model.out.2.bias"
    np.testing.assert_array_equal(params["unet"]["out_2"]["bias"], state[key].astype(np.float32))


def test_a_file_of_half_precision_alone():
    state = {key: value.astype(np.float16) if value.dtype == np.float32 else value
             for key, value in state_of(MODELS["unconditional"]).items()}
    config, _ = compvis.import_model(MODELS["unconditional"], state)
    assert config.first_stage.scale_factor == float(state["scale_factor"])


def test_of_two_conditions_the_sequence_alone_has_weights():
    masked = copy.deepcopy(MODELS["class"])
    masked["model"]["params"]["conditioning_key"] = "hybrid"
    masked["model"]["params"]["unet_config"]["params"]["in_channels"] = 7
    state = state_of(MODELS["class"])
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state[key] = np.random.default_rng(1).normal(size=(32, 7, 3, 3)).astype(np.float32)
    averaged = "model_ema.diffusion_modelinput_blocks00weight"
    state[averaged] = state[key] + 1
    imported = compvis.read_model(masked, state)
    assert (imported.config.conditioning.crossattn, imported.config.conditioning.concat) == ("class", "inpainting")
    out = compvis.export_model(imported.config, imported.params, imported.ema_params)
    assert set(out) == set(state)


@pytest.mark.parametrize("rows, classes, null", [(1001, 1000, True), (1000, 1000, False), (11, 11, False)])
def test_a_class_table_of_1001_rows_has_no_class_as_its_last(rows, classes, null):
    description = copy.deepcopy(MODELS["class"])
    description["model"]["params"]["cond_stage_config"]["params"]["n_classes"] = rows
    options = settings.to_config(description).conditioning
    assert (options.num_classes, options.null_class, options.dropout > 0) == (classes, null, null)


def test_other_forms_of_a_description():
    whole = MODELS["class"]
    config = settings.to_config(whole)
    assert settings.to_config(whole["model"]) == config  # without "model:"
    other = copy.deepcopy(whole)
    other["model"]["params"] |= {"linear_start": "1e-3", "beta_schedule": "linear", "ckpt_path": "x.ckpt"}
    del other["model"]["params"]["conditioning_key"]  # of files older than this key
    other["model"]["params"]["concat_mode"] = False
    other["lightning"] = {"trainer": {"benchmark": True}}
    assert settings.to_config(other) == config


def test_what_is_not_needed_is_known_by_name(read):
    state, _ = read("class")
    more = {"ddim_sigmas": np.zeros(5), "cond_ids": np.zeros(3), "first_stage_model.colorize": np.zeros(1),
            "model.diffusion_model.surprise": np.zeros(2), "lvlb_weights": np.zeros(20)}
    rows = compvis.read_model(MODELS["class"], state | more).report
    assert [row.source for row in rows if row.name == "unknown"] == ["model.diffusion_model.surprise"]
    assert {"tables of a sampler", "noise schedule", "state of the averages"} <= {row.name for row in rows}


# --- mistakes --------------------------------------------------------------------------------------------------------


def refused(call, *needles):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for needle in needles:
        assert needle in message, message


@pytest.mark.parametrize("name, key", [
    ("unconditional", "model.diffusion_model.output_blocks.1.2.out_layers.3.weight"),
    ("unconditional", "model_ema.diffusion_modelinput_blocks10in_layers0weight"),
    ("class", "first_stage_model.quantize.embedding.weight"), ("class", "cond_stage_model.embedding.weight"),
    ("class", "logvar"), ("text", "cond_stage_model.transformer.attn_layers.layers.3.1.net.2.bias"),
    ("clip", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
])
def test_a_key_that_is_missing_or_has_another_shape(read, name, key):
    state, _ = read(name)
    refused(lambda: compvis.read_model(MODELS[name], {k: v for k, v in state.items() if k != key}), f"lack {key},")
    if name != "clip":
        first, *others = state[key].shape
        wrong = state | {key: np.zeros((first + 1, *others), np.float32)}
        refused(lambda: compvis.read_model(MODELS[name], wrong), f"{key} has the shape {[first + 1, *others]}",
                f"makes it {[first, *others]}")


def test_a_scale_factor_that_is_missing(read):
    state = {key: value for key, value in read("unconditional")[0].items() if key != "scale_factor"}
    refused(lambda: compvis.read_model(MODELS["unconditional"], state), "lack scale_factor", "scale_by_std")


@pytest.mark.parametrize("key, value", [("linear_end", 0.03), ("timesteps", 30), ("beta_schedule", "cosine")])
def test_another_noise_schedule(read, key, value):
    description = copy.deepcopy(MODELS["pixels"])
    description["model"]["params"][key] = value
    refused(lambda: compvis.read_model(description, read("pixels")[0]), "noise schedule of 20 steps", key)


def test_a_condition_of_a_first_stage_of_its_own(read):
    key = "cond_stage_model.encoder.conv_in.bias"
    state = read("inpainting")[0]
    refused(lambda: compvis.read_model(MODELS["inpainting"], state | {key: state[key] + 1}), key, "is not equal")


def test_clip_of_another_width(read):
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state = read("clip")[0] | {key: np.zeros((40, 32), np.float32)}
    refused(lambda: compvis.read_model(MODELS["clip"], state), "width 32", "context_dim is 64")


UNET, COND = ("unet_config", "params"), ("cond_stage_config",)


@pytest.mark.parametrize("name, path, value, needle", [
    ("class", ("target",), "ldm.models.diffusion.ddpm.Unheard", "model.target=ldm.models.diffusion.ddpm.Unheard"),
    ("class", ("unet_config", "target"), "x.UNetLegacy", "unet_config.target: UNetLegacy"),
    ("class", ("first_stage_config", "target"), "x.GumbelVQ", "first_stage_config.params.target: GumbelVQ"),
    ("class", (*COND, "target"), "x.Exotic", "cond_stage_config.target: Exotic"),
    ("semantic", (*COND, "target"), "x.ClassEmbedder", "ClassEmbedder is not known here for concatenation"),
    ("class", (*UNET, "dims"), 3, "unet_config.params.dims=3"),
    ("class", (*UNET, "n_embed"), 100, "unet_config.params.n_embed=100"),
    ("class", (*UNET, "novelty"), 1, "unet_config.params.novelty"),
    ("class", (*UNET, "model_channels"), None, "unet_config.params.model_channels is missing"),
    ("class", ("given_betas",), [0.1], "model.params.given_betas"),
    ("class", ("conditioning_key",), "film", "conditioning_key='film'"),
    ("class", ("first_stage_config", "params", "remap"), "x.npy", "remap=x.npy"),
    ("class", ("first_stage_config", "params", "embed_dim"), None, "embed_dim is missing"),
    ("class", ("first_stage_config", "params", "ddconfig", "give_pre_end"), True, "ddconfig.give_pre_end"),
    ("class", ("first_stage_config", "params", "ddconfig", "double_z"), True, "double_z=True does not go with VQModel"),
    ("class", ("first_stage_config",), None, "model.params.first_stage_config is missing"),
    ("class", ("unet_config",), None, "model.params.unet_config is missing"),
    ("class", COND, None, "model.params.cond_stage_config is missing"),
    ("semantic", (*COND, "params", "n_stages"), 3, "n_stages=3"),
    ("semantic", (*COND, "params", "multiplier"), 0.25, "multiplier 0.5"),
    ("semantic", (*COND, "params", "out_channels"), None, "out_channels is missing"),
    ("semantic", (*UNET, "in_channels"), 9, "unet_config.params.in_channels=9"),
])
def test_a_description_that_cannot_be_done(name, path, value, needle):
    description = copy.deepcopy(MODELS[name])
    node = description["model"] if path == ("target",) else description["model"]["params"]
    *parents, last = path
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    refused(lambda: settings.to_config(description), needle)


def test_descriptions_that_are_none(tmp_path):
    for text, needle in ((": : :", "is no yaml file"), ("[1, 2]", "describes no model"), ("a: 1", "has no target")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=needle):
            settings.to_config(settings.read(tmp_path / "x.yaml"))
    refused(lambda: settings.read(tmp_path), "is a folder")
    refused(lambda: settings.read(tmp_path / "none.yaml"), "does not exist")


@pytest.mark.parametrize("section, values, needle", [
    ("model", dict(norm_groups=8), "model.norm_groups=8"),
    ("diffusion", dict(parameterization="v"), "diffusion.parameterization='v'"),
    ("conditioning", dict(label=True), "conditioning.label beside another condition"),
])
def test_what_latent_diffusion_does_not_have(section, values, needle):
    config = settings.to_config(MODELS["class"])
    with config.unlocked():
        config[section].update(values)
    refused(lambda: to_description(config), needle)


def test_parameters_that_do_not_fit_the_config(read):
    _, imported = read("class")
    params = dict(imported.params)
    params["conditioner"] = {"embedding": {"embedding": np.zeros((10, 32), np.float32)}}
    refused(lambda: compvis.export_model(imported.config, params), "embedding", "[10, 32]", "[11, 32]")
    params["conditioner"] = {"table": np.zeros((11, 32), np.float32)}
    refused(lambda: compvis.export_model(imported.config, params), "conditioner are not those of the config")


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4, 5)])
def test_a_kernel_with_another_number_of_axes(shape):
    key, state = "model.diffusion_model.out.2.weight", state_of(MODELS["pixels"])
    with pytest.raises(UserError, match=f"{key} has the shape"):
        compvis.read_model(MODELS["pixels"], state | {key: np.zeros(shape, np.float32)})


def test_a_table_and_a_factor_that_are_none():
    state = state_of(MODELS["unconditional"])
    for key, value in (("betas", np.float32(3)), ("scale_factor", np.ones(2, np.float32))):
        with pytest.raises(UserError, match=key):
            compvis.read_model(MODELS["unconditional"], state | {key: np.asarray(value)})


@pytest.mark.parametrize("key, value", [("timesteps", "many"), ("image_size", "big")])
def test_values_of_the_wrong_type_in_a_description(key, value):
    description = copy.deepcopy(MODELS["class"])
    description["model"]["params"][key] = value
    with pytest.raises(UserError, match=key):
        settings.to_config(description)

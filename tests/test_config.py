"""The config grammar and its errors."""

import pathlib

import program_files
import pytest

from latent_diffusion import config as config_lib
from latent_diffusion.diffusion import grids, samplers
from latent_diffusion.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "finetune")  # that one needs a workdir


def load(name: str, argument: str = ""):
    module = program_files.load(CONFIGS / f"{name}.py")
    return module if argument is None else module.get_config(argument)


def variants(name: str) -> list[str]:
    return list(load(name, None).VARIANTS)


@pytest.mark.parametrize("name,variant", [(name, variant) for name in FILES for variant in variants(name)])
def test_every_variant_and_modifier_resolves(name, variant):
    for argument in (variant, f"{variant},smoke", f"smoke,{variant}", f"{variant},emoji", f"{variant},emoji,smoke"):
        config = load(name, argument)
        assert config.is_locked
    assert load(name, f"{variant},smoke") == load(name, f"smoke,{variant}")


@pytest.mark.parametrize("name", FILES)
def test_smoke_configs_are_valid(name):
    config = load(name, "smoke")
    if config.stage == "autoencoder":
        config_lib.validate(config, num_devices=2)


def test_all_files_have_the_same_sections():
    sections = {name: set(load(name).keys()) for name in FILES}
    assert all(found == sections["autoencoder_kl"] for found in sections.values()), sections


def test_typed_arguments():
    config = load("autoencoder_kl", "f8,size=128,folder=/some/where")
    assert (config.data.image_size, config.data.source, config.data.path) == (128, "folder", "/some/where")
    grey = load("autoencoder_kl", "f8,channels=1")
    assert (grey.data.channels, grey.model.in_channels, grey.model.out_channels) == (1, 1, 1)


@pytest.mark.parametrize("argument,words", [
    ("f5", ["unknown variant 'f5'", "f4, f8, f16, f32, f2, f16_c8, f32_c16, f1, imagenet, ", ", emoji, small, smoke"]),
    ("f4,f8", ["f4 and f8 are both variants"]),
    ("size=big", ["size='big' is not of type int"]),
    ("sise=3", ["unknown argument 'sise=3'", "size=..."]),
])
def test_bad_tokens_name_the_choices(argument, words):
    with pytest.raises(UserError) as error:
        load("autoencoder_kl", argument)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_validate_lists_all_mistakes_at_once():
    config = load("autoencoder_kl", "f8")
    with config.unlocked():
        config.data.image_size = 100
        config.data.crop = "middle"
        config.training.batch_size = 13
        config.training.loss.pixel = "l3"
        config.optimizer.learning_rate = 0.0
    with pytest.raises(UserError) as error:
        config_lib.validate(config, num_devices=2)
    for part in ("data.image_size=100 is not a multiple of the downsampling factor 8", "the nearest is 96",
                 "data.crop='middle' is not one of 'center', 'random'",
                 "training.batch_size=13 does not divide over 2 devices", "use a multiple of 4",
                 "training.loss.pixel='l3'", "optimizer.learning_rate=0.0 must be above 0", "data.name is empty"):
        assert part in str(error.value), part


def test_validate_stage_2_sizes_that_do_not_fit():
    config = load("ldm_text", "smoke")
    with config.unlocked():
        config.first_stage.model.update(load("autoencoder_kl", "f4,smoke").model)
        config.model.update(image_size=8, in_channels=3, out_channels=4, channel_mult=(1, 2, 2, 2, 2, 2, 2))
        config.conditioning.width = 16
        config.sampling.steps = 1001
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    for part in ("model.out_channels=4 but the first stage has 3 latent channels", "downsampling",
                 "model.context_dim=32", "sampling.steps=1001 exceeds", "model.image_size=8"):
        assert part in str(error.value), part


def test_json_round_trip():
    for name in FILES:
        config = load(name)
        assert config_lib.from_json(config_lib.to_json(config)) == config


def test_check_same_names_the_keys_and_lets_run_length_change():
    ours, theirs = load("autoencoder_kl", "f4"), load("autoencoder_kl", "f8")
    with pytest.raises(UserError, match="model.ch_mult") as error:
        config_lib.check_same(ours, theirs, "somewhere")
    assert "model.embed_dim (4 there, 3 here)" in str(error.value)
    longer = load("autoencoder_kl", "f4")
    with longer.unlocked():
        longer.training.num_steps *= 2
        longer.sampling.steps = 3
    config_lib.check_same(longer, ours, "somewhere")


def test_samplers_and_spacings_that_there_are():
    assert set(config_lib.CHOICES["sampling.sampler"]) == set(samplers.METHODS)
    assert set(config_lib.CHOICES["sampling.spacing"]) == set(grids.SPACINGS)

"""train.py as a user calls it: each mistake is one clear line and exit code 2, before anything is compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import program_files
import pytest
import smoke_runs
from absl import flags
from PIL import Image

from latent_diffusion import checkpoint
from latent_diffusion import config as config_lib
from latent_diffusion.training import loop

ROOT = Path(__file__).parents[1]
STAGE1, STAGE2 = "configs/autoencoder_kl.py:smoke", "configs/ldm_text.py:smoke"
train = program_files.load("train.py")

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "compile" in event else None)


def forget_flags():
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    for name in ("config", "workdir", "coordinator", "num_processes", "process_id", "debug"):
        flags.FLAGS[name].unparse()


@pytest.fixture
def call(monkeypatch, capsys):
    """``call("--workdir", ...) -> (exit code, stdout, stderr)``, in this process."""
    monkeypatch.chdir(ROOT)
    def function(*arguments):
        forget_flags()
        argv = ["train.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        code = train.main(argv)
        return code, *capsys.readouterr()
    yield function
    forget_flags()


@pytest.fixture
def refused(call, monkeypatch):
    """``refused(part of the message, arguments...)``: that mistake is found, in one line, and nothing is compiled."""
    monkeypatch.setattr(loop, "STAGES", {})
    def function(message, *arguments):
        COMPILED.clear()
        code, out, error = call(*arguments)
        assert code == 2 and out == "" and not COMPILED
        assert error.startswith("train.py: error: ") and error.count("\n") == 1, error
        for part in [message] if isinstance(message, str) else message:
            assert part in error
    return function


def stage1_workdir(path, *, saved_at=4, num_steps=4):
    """A stage-1 workdir as a run leaves it, but for weights of a real model."""
    config = smoke_runs.autoencoder_config(training=dict(num_steps=num_steps))
    path.mkdir(parents=True)
    (path / "config.json").write_text(config_lib.to_json(config))
    if saved_at is not None:
        manager = checkpoint.open_manager(path)
        params = {"autoencoder": {"w": np.ones(3, np.float32)}}
        checkpoint.save(manager, saved_at, {"params": params}, {"step": saved_at})
        manager.close()
    return path


def pictures(path, number, *, size=20):
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path / f"{i:03d}.png")
    return path


# --- flags and config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message, arguments", [
    (["--config is missing", "--workdir DIR"], []),
    ("--workdir is missing", ["--config", STAGE1]),
    (["no config file configs/nothing.py", "configs/autoencoder_kl.py"], ["--config", "configs/nothing.py:f8"]),
    (["unknown variant 'f5'", "choose from f4, f8, f16, f32"], ["--config", "configs/autoencoder_kl.py:f5"]),
    ("f4 and f8 are both variants", ["--config=configs/autoencoder_kl.py:f4,f8"]),
    ("size='x' is not of type int", ["--config", STAGE1 + ",size=x"]),
    (["unknown key --config.model.bogus", "config.model has", "ch_mult"],
     ["--config", STAGE1, "--config.model.bogus=1"]),
    ("did you mean num_res_blocks?", ["--config", STAGE1, "--config.model.num_res_block=1"]),
    (["unknown key --config.modle.ch", "did you mean model?"], ["--config", STAGE1, "--config.modle.ch=8"]),
    ("config.model.ch has no parts", ["--config", STAGE1, "--config.model.ch.x=8"]),
    ("batch_size=many: invalid literal for int", ["--config", STAGE1, "--config.training.batch_size=many"]),
    ("batch_size=1.5: invalid literal for int", ["--config", STAGE1, "--config.training.batch_size=1.5"]),
    ("flip=perhaps", ["--config", STAGE1, "--config.data.flip=perhaps"]),
    ("`1` is not a dict", ["--config", STAGE1, "--config.model=1"]),
    (["Unknown command line flag 'wrkdir'", "workdir"], ["--config", STAGE1, "--wrkdir=x"]),
    ("unexpected argument 'x'", ["--config", STAGE1, "x"]),
    ("Missing value for flag --workdir", ["--config", STAGE1, "--workdir"]),
    ("several processes need a coordinator", ["--config", STAGE1, "--workdir=x", "--num_processes=2"]),
    ("must be given together", ["--config", STAGE1, "--workdir=x", "--coordinator=localhost:1", "--process_id=1"]),
], ids=lambda value: value if isinstance(value, str) else None)
def test_flags(refused, message, arguments):
    refused(message, *arguments)


@pytest.mark.parametrize("message, values", [
    (["training.batch_size=7 does not divide over 2 devices", "multiple of 2"], ["training.batch_size=7"]),
    ("multiple of 4", ["training.accumulate=2", "training.batch_size=6"]),
    (["data.source='web' is not one of 'tfds'", "model.kind='vae'", "must be above 0"],
     ["data.source=web", "model.kind=vae", "training.num_steps=0"]),  # all at once
    (["data.image_size=33 is not a multiple", "nearest is 32"], ["data.image_size=33"]),
    ("data.path is empty", ["data.source=folder"]),
    ("data.name is empty", ["data.source=tfds"]),
])
def test_config_values(refused, tmp_path, message, values):
    refused(message, "--config", STAGE1, "--workdir", tmp_path / "new", *[f"--config.{value}" for value in values])
    assert not (tmp_path / "new").exists()


def test_mistake_in_a_config_file_of_the_users(refused, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(argument=''):\n    return nothing\n")
    refused("mine.py: NameError: name 'nothing' is not defined; --debug shows where", "--config", tmp_path / "mine.py")


def test_debug_shows_the_traceback(call):
    with pytest.raises(train.UserError):
        call("--debug")


def test_help(call):
    code, out, _ = call("--help")
    assert code == 0 and "--workdir" in out and "configs/NAME.py" in out


# --- data ------------------------------------------------------------------------------------------------------------


def folder(path, *more):
    return "--config", f"configs/autoencoder_kl.py:smoke,folder={path}", *more


def test_folders(refused, tmp_path):
    workdir = ("--workdir", tmp_path / "new")
    refused("nowhere': no such folder", *folder(tmp_path / "nowhere"), *workdir)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    refused(f"no images in {tmp_path / 'texts'}", *folder(tmp_path / "texts"), *workdir)
    few = pictures(tmp_path / "few", 7)
    refused(["fewer than one batch (training.batch_size=8)", str(few)], *folder(few), *workdir)
    refused("set data.holdout above 0", *folder(few, "--config.data.holdout=0.0"), *workdir)
    assert not (tmp_path / "new").exists()


def test_corrupt_images(refused, call, tmp_path, monkeypatch, caplog):
    """Named; left out and counted by option."""
    path = pictures(tmp_path / "some", 20)
    content = (path / "007.png").read_bytes()
    (path / "007.png").write_bytes(content[: len(content) // 2])
    refused([str(path / "007.png"), "data.on_corrupt=skip"], *folder(path), "--workdir", tmp_path / "new")

    opened = {}
    def stage(config, path, splits, vocabulary):
        opened.update(splits)
        raise train.UserError("far enough")
    monkeypatch.setattr(loop, "STAGES", {"autoencoder": stage})
    _, _, error = call(*folder(path, "--config.data.on_corrupt=skip"), "--workdir", tmp_path / "new")
    assert "far enough" in error and "skipping 1 corrupt images of" in caplog.text and "007.png" in caplog.text
    assert sum(len(split.source) for split in opened.values()) == 19


def tfds_set(*more):
    return ("--config", STAGE1, "--config.data.source=tfds", *more)


def test_tfds_sets(refused, tmp_path):
    workdir, data_dir = ("--workdir", tmp_path / "new"), f"--config.data.data_dir={tmp_path}"
    refused(["knows no such set", "similar: cifar10"], *tfds_set("--config.data.name=cifr10"), *workdir)
    refused(["cifar10 is not prepared", "download_and_prepare(file_format='array_record')"],
            *tfds_set("--config.data.name=cifar10", data_dir), *workdir)
    refused([f"needs a manual download into {tmp_path}/downloads/manual", "ILSVRC2012_img_train.tar"],
            *tfds_set("--config.data.name=imagenet2012", data_dir), *workdir)


def test_tfds_set_prepared_as_tfrecord(refused, tmp_path):
    """What TFDS writes unless told otherwise has no random access."""
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder("mnist", data_dir=str(tmp_path))
    folder = Path(builder.data_path)
    info = {"name": "mnist", "version": str(builder.version), "fileFormat": "tfrecord", "splits": [
        {"name": name, "shardLengths": ["16"], "numBytes": "10",
         "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"} for name in ("train", "test")]}
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(builder.info.features.to_json()))
    refused(["is prepared as tfrecord, which has no random access", "download_and_prepare(file_format='array_record')"],
            *tfds_set("--config.data.name=mnist", f"--config.data.data_dir={tmp_path}"),
            "--workdir", tmp_path / "new")


def test_conditions_that_the_data_lacks(refused, tmp_path):
    first = f"--config.first_stage.workdir={stage1_workdir(tmp_path / 'first')}"
    path = pictures(tmp_path / "plain", 30)
    common = ("--config", f"{STAGE2},folder={path}", first, "--workdir", tmp_path / "new")
    refused(["needs captions", "captions.jsonl"], *common)
    refused("needs labels", *common, "--config.conditioning.crossattn=class")


# --- workdirs --------------------------------------------------------------------------------------------------------


def stage2(workdir, *more):
    return "--config", STAGE2, f"--config.first_stage.workdir={workdir}", *more


def test_first_stage_workdirs(refused, tmp_path):
    new = ("--workdir", tmp_path / "new")
    refused("first_stage.workdir is empty", "--config", STAGE2, *new)
    refused("nowhere does not exist", *stage2(tmp_path / "nowhere"), *new)
    refused("has no config.json", *stage2(pictures(tmp_path / "pictures", 1)), *new)
    refused("has no complete checkpoint", *stage2(stage1_workdir(tmp_path / "young", saved_at=None)), *new)
    killed = stage1_workdir(tmp_path / "killed", saved_at=None)
    (killed / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    refused("has no complete checkpoint", *stage2(killed), *new)
    second = stage1_workdir(tmp_path / "second")
    (second / "config.json").write_text(config_lib.to_json(smoke_runs.diffusion_config(tmp_path)))
    refused("holds a run of stage 'diffusion', not an autoencoder", *stage2(second), *new)
    damaged = stage1_workdir(tmp_path / "damaged")
    (damaged / "config.json").write_text('{"stage": "auto')
    refused("config.json cannot be read", *stage2(damaged), *new)
    assert not (tmp_path / "new").exists()


def test_first_stage_short_of_its_last_step_is_used(refused, tmp_path, caplog):
    short = stage1_workdir(tmp_path / "short", saved_at=3, num_steps=9)
    refused("must be above 0", *stage2(short),
                    "--config.training.log_every=0", "--workdir", tmp_path / "new")
    assert f"first_stage.workdir={short} stopped at step 3 of 9; using step 3" in caplog.text


def test_workdir_with_another_config(refused, tmp_path):
    """Every key that differs is named, and nothing is overwritten."""
    workdir = stage1_workdir(tmp_path / "first")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    keys = ["data.image_size (16 there, 32 here)", "optimizer.learning_rate (0.001 there"]
    refused(["holds a run with another config", *keys], "--config", STAGE1, "--workdir", workdir)
    refused(["holds a run of stage 'autoencoder'", "workdir of its own"], *stage2(workdir), "--workdir", workdir)
    (workdir / "config.json").rename(workdir / "lost.json")
    refused("holds checkpoints but no config.json", "--config", STAGE1, "--workdir", workdir)
    (workdir / "lost.json").rename(workdir / "config.json")
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    untrained = stage1_workdir(tmp_path / "untrained", saved_at=None)
    refused("nothing has been saved there yet", "--config", STAGE1, "--workdir", untrained)


def test_workdir_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot be used", "--config", STAGE1, "--workdir", tmp_path / "file" / "new")


def test_cache_of_random_variants(refused, tmp_path):
    refused(["first_stage.cache cannot hold random variants", "data.crop='center'", "data.background='white'"],
            *stage2(stage1_workdir(tmp_path / "first"), "--config.data.crop=random", "--config.data.background=random",
                    f"--config.first_stage.cache={tmp_path / 'cache'}"), "--workdir", tmp_path / "new")


# --- as a program ----------------------------------------------------------------------------------------------------


def test_program_ends_with_2_and_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "train.py", "--config", STAGE1, "--config.training.batch_size=1000", "--workdir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "the set of drawn shapes has 64 images, fewer than one batch (training.batch_size=1000)" in result.stderr


@pytest.mark.slow
def test_program_trains_both_stages(tmp_path):
    """The two commands of the README, in small; from another folder, with paths relative to it."""
    for folder in ("configs", "latent_diffusion"):
        os.symlink(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "train.py", tmp_path)
    small = ["--config.data.image_size=16", "--config.training.num_steps=2"]
    first = ["--config", STAGE1, "--config.model.ch=8", "--config.model.norm_groups=4", "--workdir", "ae"]
    second = [*stage2("ae", "--config.model.channel_mult=(1,)", "--config.sampling.steps=1"), "--workdir", "ldm"]
    for arguments in (first, second):
        result = subprocess.run([sys.executable, "train.py", *arguments, *small], cwd=tmp_path, capture_output=True,
                                text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        assert result.returncode == 0, result.stderr
    assert "held-out loss" in result.stdout and (tmp_path / "ldm" / "samples.png").exists()
    _, origin = checkpoint.load_frozen(tmp_path / "ldm")
    assert origin["source"] == str(tmp_path / "ae")

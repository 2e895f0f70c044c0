"""Whole runs of both stages: what they write, exact resume, a workdir that needs no other, the latents cache."""

import contextlib
import functools
import json
import logging
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke_runs
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latent_diffusion import checkpoint, pipeline
from latent_diffusion import config as config_lib
from latent_diffusion.errors import UserError
from latent_diffusion.training import loop, progress

ITEMS = ("params", "ema", "optimizer")


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A finished stage-1 run: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "stage1"
    code, printed = smoke_runs.run(smoke_runs.autoencoder_config(), workdir)
    assert code == 0
    return workdir, printed


@pytest.fixture(scope="module")
def stage2(stage1, tmp_path_factory):
    """A finished stage-2 run whose first stage is gone."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(stage1[0], root / "gone")
    config = smoke_runs.diffusion_config(root / "gone", training=dict(image_every=2), evaluation=dict(every=2))
    code, printed = smoke_runs.run(config, root / "stage2")
    assert code == 0
    shutil.rmtree(root / "gone")
    return root / "stage2", printed


@pytest.fixture(params=["stage1", "stage2"])
def finished(request):
    """(name, workdir, printed, config as the user would give it again)."""
    workdir, printed = request.getfixturevalue(request.param)
    config = config_lib.from_json((workdir / "config.json").read_text())
    return request.param, workdir, printed, config


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_files_of_a_run(finished):
    name, workdir, _, _ = finished
    there = {path.name for path in workdir.iterdir() if not path.name.startswith("events.")}
    common = {"checkpoints", "config.json", "labels.txt", "evaluation.json"}
    assert there == common | ({"reconstructions.png"} if name == "stage1" else {"samples.png", "frozen", "vocab.txt"})
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    trees, metadata, step = checkpoint.load(workdir, ITEMS)
    assert step == 4 and metadata["data"] == {"next_index": 4}
    assert config_lib.from_json(metadata["config"]) == config_lib.from_json((workdir / "config.json").read_text())
    if name == "stage1":
        assert {"disc_params", "disc_stats", "disc_opt_state", "opt_state", "step"} == set(trees["optimizer"])
        assert set(trees["ema"]) == {"autoencoder"}
        frozen_of_nothing = checkpoint.has_frozen(workdir)
        assert not frozen_of_nothing
    else:
        assert set(trees["params"]) == {"unet", "conditioner"} and set(trees["ema"]) == {"unet"}
        _, origin = checkpoint.load_frozen(workdir)
        assert origin["step"] == 4 and origin["source"].endswith("/gone") and len(origin["digest"]) == 64


def test_pictures(finished):
    """Four pictures of 16 pixels with two pixels between: originals and reconstructions alternate."""
    name, workdir, _, config = finished
    file = workdir / ("reconstructions.png" if name == "stage1" else "samples.png")
    image = Image.open(file)
    rows = 2 if name == "stage1" else 1
    assert image.size == (4 * 18 - 2, rows * 18 - 2) and image.text["step"] == "4"
    if name == "stage1":
        from latent_diffusion.data import shapes
        held_out = shapes.Shapes(config.data.num_examples, 16, 16)
        np.testing.assert_array_equal(np.asarray(image)[:16, 36:52], held_out[1]["image"])


def test_tensorboard(finished):
    name, workdir, _, config = finished
    [file] = [path for path in workdir.iterdir() if path.name.startswith("events.")]
    events = EventAccumulator(str(file)).Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    wanted = {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait_share"}
    wanted |= {"adaptive_weight", "disc_loss", "latent_std", "latent_mean"} if name == "stage1" else {"loss_simple"}
    for tag in wanted:
        assert scalars[f"train/{tag}"] == [1, 2, 3, 4], tag
    assert scalars["eval/psnr" if name == "stage1" else "eval/loss_simple"] == ([4] if name == "stage1" else [2, 4])
    assert events.Tags()["images"] == ["reconstructions" if name == "stage1" else "samples"]
    text = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["training"]["batch_size"] == config.training.batch_size
    table = events.Tensors("parameters")[0].tensor_proto.string_val[0].decode()
    assert "conv_out/kernel" in table if name == "stage1" else "unet/out_2/kernel" in table
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    expected = [1e-3] * 4 if name == "stage1" else [0.0, 0.5e-3, 1e-3, 1e-3]  # two steps of warm-up from 0
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_what_is_printed(stage1, stage2):
    assert "held-out PSNR" in stage1[1] and "reconstructions in" in stage1[1] and "latents' std" in stage1[1]
    assert "64 images, 16 held out" in stage1[1] and "effective learning rate 0.001" in stage1[1]
    assert "/gone, step 4, as copied into" in stage2[1] and "latents scaled by" in stage2[1]
    assert "step 2: held-out loss" in stage2[1] and "step 4: held-out loss" in stage2[1]
    assert "samples in" in stage2[1]


def test_discriminator_statistics_are_in_the_checkpoint(stage1):
    trees, _, _ = checkpoint.load(stage1[0], ("optimizer",), 4)
    before, _, _ = checkpoint.load(stage1[0], ("optimizer",), 2)
    stats = [checkpoint._flatten(tree["optimizer"]["disc_stats"]) for tree in (before, trees)]
    assert stats[0] and all(np.abs(stats[1][path] - leaf).max() > 0 for path, leaf in stats[0].items())


def test_stage_2_takes_the_averages(stage1, stage2):
    averages, _, _ = checkpoint.load(stage1[0], ("ema",), 4)
    trees, origin = checkpoint.load_frozen(stage2[0])
    assert origin["digest"] == checkpoint.digest(averages["ema"]) == checkpoint.digest(trees)


def test_scale_factor_is_measured_on_the_training_latents(stage2):
    """1 / std of posterior samples; against the posteriors of the whole set, unaugmented, to the sampling error."""
    workdir, _ = stage2
    ldm = pipeline.LatentDiffusion.from_workdir(workdir)
    from latent_diffusion.data import shapes, transforms
    x = transforms.to_float(np.stack([shapes.Shapes(0, 64, 16)[i]["image"] for i in range(64)]))
    encode = jax.jit(functools.partial(ldm.models.first_stage.apply, method="encode"))
    posterior = encode({"params": ldm.params["first_stage"]}, x)
    variance = float(np.var(posterior.mean) + np.mean(np.square(posterior.std)))
    assert ldm.scale_factor == pytest.approx(variance**-0.5, rel=0.1)


# --- going on --------------------------------------------------------------------------------------------------------


def test_resume_is_exact(finished, tmp_path):
    """Two steps and two more are four: weights, averages, optimizer, statistics, data order and augmentation."""
    name, workdir, _, config = finished
    again = smoke_runs.cut_back(workdir, tmp_path / "again", 2)
    code, printed = smoke_runs.run(config, again)
    assert code == 0 and "resuming after step 2" in printed
    smoke_runs.assert_same_checkpoint(again, workdir, 4, ITEMS)
    ours, theirs = (json.loads((path / loop.FINAL).read_text()) for path in (again, workdir))
    assert ours == theirs
    picture = "reconstructions.png" if name == "stage1" else "samples.png"
    assert (again / picture).read_bytes() == (workdir / picture).read_bytes()


def test_finished_run_has_nothing_to_do(finished, monkeypatch):
    _, workdir, _, config = finished
    monkeypatch.setattr(loop, "STAGES", {})
    code, printed = smoke_runs.run(config, workdir)
    assert code == 0 and "trained to step 4 of 4" in printed and "nothing to do" in printed


def test_unfinished_end_is_made_up_for(stage1, tmp_path):
    """A run stopped after its last checkpoint, before the final scores and pictures."""
    workdir = smoke_runs.cut_back(stage1[0], tmp_path / "again", 4)
    (workdir / "reconstructions.png").unlink()
    code, printed = smoke_runs.run(smoke_runs.autoencoder_config(), workdir)
    assert code == 0 and "held-out PSNR" in printed and (workdir / "reconstructions.png").exists()


def test_more_steps(stage1, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(stage1[0], workdir)
    config = smoke_runs.autoencoder_config(training=dict(num_steps=5))
    code, printed = smoke_runs.run(config, workdir)
    assert code == 0 and "resuming after step 4" in printed and checkpoint.latest_step(workdir) == 5
    assert json.loads((workdir / loop.FINAL).read_text())["step"] == 5
    assert config_lib.from_json((workdir / "config.json").read_text()).training.num_steps == 5


def test_workdir_needs_no_other(stage2):
    """Stage 1's folder is gone."""
    ldm = pipeline.LatentDiffusion.from_workdir(stage2[0])
    assert ldm.sample(["a red circle"], num_samples=4, steps=2).images.shape == (4, 16, 16, 3)  # as many as were logged


def test_own_copy_of_the_first_stage_wins(stage1, stage2, tmp_path, caplog):
    """Another first_stage.workdir changes nothing in a run that has begun, and is said to change nothing."""
    config = smoke_runs.diffusion_config(stage1[0], training=dict(image_every=2), evaluation=dict(every=2))
    with caplog.at_level(logging.WARNING):
        code, _ = smoke_runs.run(config, stage2[0])
    assert code == 0
    assert "goes on with its own copy" in caplog.text and f"{stage1[0]} is not read" in caplog.text


def test_first_stage_short_of_its_last_step(stage1, tmp_path, caplog):
    workdir = smoke_runs.cut_back(stage1[0], tmp_path / "short", 2)
    config = smoke_runs.diffusion_config(workdir)
    from latent_diffusion.training import first_stage
    with config.unlocked(), caplog.at_level(logging.WARNING):
        first_stage.complete_config(config, tmp_path / "new")
    assert "stopped at step 2 of 4; using step 2" in caplog.text
    assert config.model.in_channels == 3 and config.model.image_size == 8


# --- latents cache ---------------------------------------------------------------------------------------------------


def test_cached_latents(stage1, tmp_path):
    """A run on cached latents, here with first moments in bfloat16, resumes exactly; and a cache of anything else is
    refused by name."""
    def config(workdir=stage1[0], **data):
        return smoke_runs.unconditional_config(
            workdir, data=data, optimizer=dict(moment_dtype="bfloat16"),
            first_stage=dict(cache=str(tmp_path / "cache")))

    code, _ = smoke_runs.run(config(), tmp_path / "run")
    assert code == 0
    again = smoke_runs.cut_back(tmp_path / "run", tmp_path / "again", 2)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    code, _ = smoke_runs.run(config(), again)
    assert code == 0
    smoke_runs.assert_same_checkpoint(again, tmp_path / "run", 4, ITEMS)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}

    with pytest.raises(UserError, match="was made with data.num_examples=64, not 32"):
        smoke_runs.run(config(num_examples=32), tmp_path / "other")
    earlier = smoke_runs.cut_back(stage1[0], tmp_path / "earlier", 2)
    with pytest.raises(UserError, match="was made by another first stage"):
        smoke_runs.run(config(earlier), tmp_path / "another")


# --- what stops a run ------------------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(stage1, tmp_path, monkeypatch):
    """One line; and no checkpoint of the ruins takes the place of a good one."""
    workdir, take = smoke_runs.cut_back(stage1[0], tmp_path / "again", 2), loop.timed_next
    def broken(stream):
        batch, seconds = take(stream)
        return {**batch, "image": batch["image"] * np.nan}, seconds
    monkeypatch.setattr(loop, "timed_next", broken)
    with pytest.raises(UserError, match=r"loss is nan at step 3 \(gradient norm nan\): lower optimizer.learning_rate"):
        smoke_runs.run(smoke_runs.autoencoder_config(), workdir)
    rarely = smoke_runs.autoencoder_config(training=dict(log_every=1000), checkpoint=dict(every=1))
    loop.check_workdir(rarely, workdir)  # the same run
    monkeypatch.setattr(loop, "report", lambda *_: None)
    with pytest.raises(UserError, match="loss is nan at step 3"):
        smoke_runs.run(rarely, workdir)
    assert checkpoint.latest_step(workdir) == 2


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_meter_averages_between_reports():
    meter = loop.Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": jnp.float32(value)}, 0.5, 8)
    window = meter.take(3, 0.25)
    assert [float(values["loss"]) for values in window.values] == [1, 2, 6]
    assert window.speed["images_per_second"] * 1.5 == pytest.approx(window.speed["data_wait_share"] * 24)
    assert not meter.take(4, 0.25).values

    class Bar:
        def set_postfix(self, **values):
            self.shown = values

    class Writer:
        def write_scalars(self, step, scalars):
            self.written = step, scalars

    bar, writer = Bar(), Writer()
    loop.report(loop.Window(3, [{"loss": np.float32(x), "grad_norm": np.float32(1)} for x in (1, 2, 6)], 0.25,
                            window.speed), bar, writer, None)
    assert bar.shown["loss"] == "3"
    assert writer.written[0] == 3 and writer.written[1]["train/loss"] == 3 and (
        writer.written[1]["train/learning_rate"] == 0.25)


def test_bar_without_a_terminal_is_a_few_lines(capsys):
    with progress.bar(1000, 0, "training") as bar:
        for step in range(1000):
            bar.update()
            if step == 500:
                progress.say("half of it")
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "half of it\n" and "\r" not in said.err and len(lines) <= 3
    assert "1000/1000" in lines[-1] and "ETA" in lines[-1]


def test_bar_on_a_terminal_without_a_width_is_lines_too(monkeypatch):
    screen, terminal = os.openpty()  # 0 columns
    with os.fdopen(terminal, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with progress.bar(2, 0, "training") as bar:
            bar.update(2)
    shown = b""
    with contextlib.suppress(OSError):  # the end of what a closed terminal showed
        while True:
            shown += os.read(screen, 10_000)
    os.close(screen)
    assert b"2/2" in shown and b"ETA" in shown


def test_warnings_are_lines(capsys):
    logger = logging.Logger("ours")
    logger.addHandler(progress.LogHandler())
    logger.warning("step %d", 3)
    assert capsys.readouterr().err == "warning: step 3\n"

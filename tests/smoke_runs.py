"""Whole runs of both stages on a few drawn shapes, through the same loop as train.py, for the tests of it."""

import contextlib
import io
import shutil

import numpy as np
import tiny_runs

from latent_diffusion import checkpoint
from latent_diffusion.training import loop

STEPS = 4
DATA = dict(image_size=16, flip=True, crop="random", min_crop_scale=0.5)  # so that a resumed run must augment alike
UNET = dict(channel_mult=(1,), num_res_blocks=0)  # one block up, where the skip connection is, and two in the middle


def autoencoder_config(**sections):
    """Stage 1 whose discriminator takes part from step 2 on, after a resume at step 2 and before."""
    return _with("autoencoder_kl", dict(
        data=DATA, model=dict(ch=8, norm_groups=4, num_res_blocks=0, dropout=0.1),
        optimizer=dict(learning_rate=1e-3, scale_lr=False), ema=dict(decay=0.9),
        training=dict(num_steps=STEPS, log_every=1, loss=dict(disc_start=1)),
        checkpoint=dict(every=2, keep=9)), sections)


def diffusion_config(workdir, **sections):
    """Stage 2, text and class, on the latents of a stage-1 workdir."""
    return _with("ldm_text", dict(
        data=DATA, first_stage=dict(workdir=str(workdir)),
        model=UNET | dict(attention_resolutions=(1,), dropout=0.1),
        conditioning=dict(label=True, label_dropout=0.1), diffusion=dict(timesteps=20),
        optimizer=dict(learning_rate=1e-3, warmup_steps=2), sampling=dict(steps=2),
        training=dict(num_steps=STEPS, log_every=1), checkpoint=dict(every=2, keep=9)), sections)


def unconditional_config(workdir, **sections):
    """Stage 2 without conditions, on unaugmented images but for their mirror images."""
    return _with("ldm_unconditional", dict(
        data=dict(image_size=16, flip=True), first_stage=dict(workdir=str(workdir)),
        model=UNET | dict(attention_resolutions=()), diffusion=dict(timesteps=20), sampling=dict(steps=2),
        optimizer=dict(learning_rate=1e-3, scale_lr=False, warmup_steps=0), training=dict(num_steps=STEPS),
        checkpoint=dict(every=2, keep=9)), sections)


def task_config(name, workdir, **sections):
    """Two steps of stage 2 of any task, with checkpoints after both."""
    return _with(name, dict(
        data=DATA, first_stage=dict(workdir=str(workdir)),
        model=UNET | dict(attention_resolutions=(1,), dropout=0.1), diffusion=dict(timesteps=20),
        optimizer=dict(learning_rate=1e-3, scale_lr=False, warmup_steps=0),
        training=dict(num_steps=2, log_every=1), sampling=dict(steps=1), evaluation=dict(max_batches=1),
        checkpoint=dict(every=1, keep=9)), sections)


def _with(name, base, sections):
    config = tiny_runs.get_config(name, "smoke")
    with config.unlocked():
        for overrides in (base, sections):
            for section, values in overrides.items():
                config[section].update(values)
    return config


def run(config, workdir):
    """(exit code, what was printed) of a run through the loop."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        code = loop.run(config, str(workdir))
    return code, printed.getvalue()


def cut_back(workdir, copy, step):
    """A copy of a workdir as it was after `step`: later checkpoints and the final scores are missing."""
    shutil.copytree(workdir, copy)
    for folder in (copy / checkpoint.CHECKPOINTS).iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    (copy / loop.FINAL).unlink()
    return copy


def assert_same_checkpoint(one, other, step, items):
    """Equal bit for bit: every leaf of every item."""
    ours, metadata, _ = checkpoint.load(one, items, step)
    theirs, other_metadata, _ = checkpoint.load(other, items, step)
    ours, theirs = checkpoint._flatten(ours), checkpoint._flatten(theirs)
    assert list(ours) == list(theirs) and len(ours) > 20
    for path, leaf in ours.items():
        assert leaf.tobytes() == theirs[path].tobytes(), f"{path} differs by {np.abs(leaf - theirs[path]).max()}"
    assert metadata == other_metadata

"""The scores beside logged pictures, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from latent_diffusion.training import previews


def flat(*values, size=8):
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def test_super_resolution_is_compared_with_bicubic_enlargement():
    original, samples = flat(100, 200), flat(110, 201)
    scores = previews.scores({"low_res": flat(120, 180, size=2)}, samples, original)
    mean = (10 * math.log10(255**2 / 10**2) + 10 * math.log10(255**2 / 1)) / 2
    assert scores == pytest.approx({"PSNR": mean, "PSNR of bicubic": 10 * math.log10(255**2 / 20**2)})


def test_inpainting_is_compared_with_the_mean_of_what_is_known():
    original = flat(100)
    original[:, :2] = 140  # a quarter, which is hidden and filled with 100
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, :2] = 1
    scores = previews.scores({"image": original, "mask": mask}, original, original)
    assert scores == pytest.approx({"PSNR": 100.0, "PSNR of mean-fill": 10 * math.log10(255**2 / (40**2 / 4))})


def test_other_tasks_have_none():
    assert previews.scores({"segmentation": np.zeros((1, 8, 8), int)}, flat(1), flat(1)) == {}

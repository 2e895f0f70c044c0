"""The loop's host runs ahead of the devices, and not too far."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import smoke_runs

from latent_diffusion.training import loop


class Metric:
    """A scalar of a step, which has ended for the host once it is waited for or read."""

    def __init__(self, step, ended):
        self.step, self.ended = step, ended

    def block_until_ready(self):
        self.ended.add(self.step)
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.array(1, dtype or np.float32)

    def copy_to_host_async(self):
        """Waits for nothing."""


@pytest.mark.parametrize("most", [loop.MAX_STEPS_IN_FLIGHT, 4])
def test_steps_in_flight(monkeypatch, tmp_path, most):
    """From its start on, step n has n - most steps behind it that have ended: neither fewer, or batches and programs
    would pile up, nor more, or the devices would wait for the host; reports of every step change nothing."""
    config = smoke_runs.autoencoder_config(
        training=dict(num_steps=9, log_every=1, image_every=0), evaluation=dict(every=0), checkpoint=dict(every=100))
    ended, in_flight, saved = set(), [], []

    def step(state, frozen, batch, key):
        number = len(in_flight) + 1
        in_flight.append(number - len(ended))
        assert ended == set(range(1, len(ended) + 1))
        return state, {name: Metric(number, ended) for name in ("loss", "grad_norm")}

    run = SimpleNamespace(step=step, frozen={}, data=SimpleNamespace(
        train=lambda start: itertools.repeat({"x": np.zeros(2)}), splits={"train": SimpleNamespace(source=())}))
    monkeypatch.setattr(loop, "MAX_STEPS_IN_FLIGHT", most)
    monkeypatch.setattr(loop, "restore_or_start", lambda *_: (None, 0))
    monkeypatch.setattr(loop, "describe", lambda *_: None)
    monkeypatch.setattr(loop, "save", lambda manager, step, *_: saved.append((step, len(ended))))
    monkeypatch.setattr(loop, "finish", lambda *_: 0)
    assert loop.train(run, config, tmp_path, None, None, []) == 0
    assert in_flight == [min(number, most) for number in range(1, 10)]
    assert saved == [(9, 9)]

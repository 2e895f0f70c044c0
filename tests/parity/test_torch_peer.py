"""The script that times us beside PyTorch runs: its check of equal networks, and every way that it times."""

import re
import sys

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import torch_peer  # noqa: E402

SMALL = dict(channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,))


@pytest.fixture(autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("flags", [("--model=churches",), ("--model=cin", "--bfloat16")])
def test_both_sides_are_timed(capsys, monkeypatch, mode, flags):
    """In float32 and bfloat16, without and with a context."""
    monkeypatch.setattr(torch_peer, "MODELS", {name: model | SMALL for name, model in torch_peer.MODELS.items()})
    command = ["--channels=32", "--size=8", "--batch=2", "--steps=1", "--rounds=1", f"--mode={mode}", *flags]
    monkeypatch.setattr(sys, "argv", ["torch_peer.py", *command])
    torch_peer.main()
    said = capsys.readouterr().out
    ratio = r"ratio ours / the best of theirs \(theirs(, channels_last)?\): [\d.]+, of the medians [\d.]+ "
    assert re.search(ratio, said) and said.count("first call") == 3


def test_what_torch_cannot_compile_is_left_out(capsys):
    def fail():
        raise RuntimeError("no compiler\nmore of it")

    torch_peer.compare({"ours": lambda: None, "theirs": lambda: None, "theirs, compiled": fail}, rounds=2)
    said = capsys.readouterr().out
    assert "theirs, compiled: left out, no compiler\n" in said and "the best of theirs (theirs): " in said
    with pytest.raises(RuntimeError, match="no compiler"):
        torch_peer.compare({"ours": fail, "theirs": lambda: None}, rounds=1)

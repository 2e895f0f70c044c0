"""Shares of a profile: from a program and a trace written by hand, and from those of a real one."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from latent_diffusion.benchmark import profile
from latent_diffusion.models.attention import attention
from latent_diffusion.models.convolution import convolve
from latent_diffusion.models.winograd import winograd

PROGRAM = """
%fused_computation.1 (p: f32[4]) -> f32[4] {
  ROOT %convolution.5 = f32[4,8]{1,0} convolution(%p, %q), metadata={op_name="jit(f)/out_2/conv_general_dilated"}
}

ENTRY %main.9 (a: f32[4]) -> f32[4] {
  %fusion.1 = f32[4,8]{1,0} fusion(%a), kind=kCustom, calls=%fused_computation.1
  %dot.2 = f32[4,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/jvp(UNet)/attn1/attention/dot_general"}
  %dot.3 = f32[4,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/transpose(jvp(UNet))/emb_layers_1/dot_general"}
  %reduce.4 = f32[4]{0} reduce(%a, %c), metadata={op_name="jit(f)/UNet/in_layers_0/reduce_sum"}
  %add.5 = f32[4]{0} add(%a, %c), metadata={op_name="jit(f)/optimizer/add"}
  %all-reduce.6 = f32[4]{0} all-reduce(%a), metadata={op_name="jit(f)/psum"}
  ROOT %while.7 = f32[4]{0} while(%a), condition=%c, body=%b
}
"""


def test_kinds_of_work(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "today"
    folder.mkdir(parents=True)
    times = {"fusion.1": 40, "dot.2": 20, "dot.3": 10, "reduce.4": 5, "add.5": 15, "all-reduce.6": 10, "while.7": 99}
    events = [{"ph": "X", "dur": time, "name": "thunk", "args": {"hlo_op": name}} for name, time in times.items()]
    events += [{"ph": "X", "dur": 1000, "name": "something else"}, {"ph": "M", "name": "dot.2"}]
    (folder / "machine.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert profile.by_kind(tmp_path, PROGRAM) == pytest.approx({
        "convolutions": 0.4, "attention": 0.2, "optimizer and EMA": 0.15, "products": 0.1, "exchange": 0.1,
        "norms": 0.05})


@pytest.mark.parametrize("kind, function, shapes", [
    ("attention", lambda q: attention(q, q, q), [(1, 64, 2, 8)]),
    ("convolutions", winograd, [(1, 16, 16, 16), (3, 3, 16, 16)]),
    ("convolutions", lambda x, kernel: convolve(x, kernel, (1, 1), [(1, 1), (1, 1)]), [(1, 8, 8, 16), (3, 3, 16, 64)]),
])
def test_a_real_trace(tmp_path, kind, function, shapes):
    inputs = [jnp.ones(shape) for shape in shapes]
    compiled = jax.jit(lambda *inputs: function(*inputs)).lower(*inputs).compile()
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(compiled(*inputs))
    shares = profile.by_kind(tmp_path, compiled.as_text())
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[kind] > 0.5

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
  %add.8 = f32[4]{0} add(%a, %c), metadata={op_name="jit(f)/ema/add"}
  %all-reduce.6 = f32[4]{0} all-reduce(%a), metadata={op_name="jit(f)/psum"}
  ROOT %while.7 = f32[4]{0} while(%a), condition=%c, body=%b
}
"""


ACCELERATED = """
%fused_computation.1 (p: bf16[4]) -> bf16[4] {
  %convolution.5 = bf16[4,8]{1,0:T(8,128)(2,1)} convolution(%p, %q), metadata={op_name="jit(f)/emb_layers/dot_general"}
  ROOT %add.6 = bf16[4,8]{1,0:T(8,128)(2,1)} add(%convolution.5, %r), metadata={op_name="jit(f)/out_layers_0/add"}
}

%fused_computation.2 (p: bf16[4]) -> bf16[4] {
  ROOT %fusion.7 = bf16[4,8]{1,0} fusion(%p), kind=kOutput, calls=%fused_computation.3
}

%fused_computation.3 (p: bf16[4]) -> bf16[4] {
  ROOT %convolution.8 = bf16[4,8]{1,0} convolution(%p, %q), metadata={op_name="jit(f)/in_layers_2/conv_general_dilated"}
}

ENTRY %main.9 (a: bf16[4]) -> bf16[4] {
  %fusion.1 = bf16[4,8]{1,0} fusion(%a), kind=kOutput, calls=%fused_computation.1, metadata={op_name="jit(f)/norm/mul"}
  %fusion.2 = bf16[4,8]{1,0} fusion(%a), kind=kOutput, calls=%fused_computation.2, metadata={op_name="jit(f)/norm/mul"}
  %convolution.3 = bf16[4,8]{1,0} convolution(%a, %b), metadata={op_name="jit(f)/attn1/attention/dot_general"}
  %convolution.4 = bf16[4,8]{1,0} convolution(%a, %b), metadata={op_name="jit(f)/a_name_of_no_kind"}
  %call.5 = bf16[4,8]{1,0} call(%a), to_apply=%command_buffer
  ROOT %while.7 = bf16[4]{0} while(%a), condition=%c, body=%b
}
"""


def write(folder, events):
    folder = folder / "plugins" / "profile" / "today"
    folder.mkdir(parents=True)
    (folder / "machine.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


def device_lines(device, *lines):
    """Events that name a device as process 7, its lines as threads 1, 2, ..., and the host as process 8."""
    return [{"ph": "M", "pid": 7, "name": "process_name", "args": {"name": f"/device:{device}:0"}},
            {"ph": "M", "pid": 8, "name": "process_name", "args": {"name": "/host:CPU"}},
            *({"ph": "M", "pid": 7, "tid": i, "name": "thread_name", "args": {"name": line}}
              for i, line in enumerate(lines, 1))]


def event(name, time, *, pid=7, tid=1, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "dur": time, "name": name, "args": args}


def test_kinds_of_work(tmp_path):
    times = {"fusion.1": 40, "dot.2": 20, "dot.3": 8, "reduce.4": 5, "add.5": 15, "all-reduce.6": 10, "while.7": 99,
             "add.8": 2}
    events = [{"ph": "X", "dur": time, "name": "thunk", "args": {"hlo_op": name}} for name, time in times.items()]
    events += [{"ph": "X", "dur": 1000, "name": "something else"}, {"ph": "M", "name": "dot.2"}]
    write(tmp_path, events)
    assert profile.by_kind(tmp_path, PROGRAM) == pytest.approx({
        "convolutions": 0.4, "attention": 0.2, "optimizer": 0.15, "products": 0.08, "exchange": 0.1, "norms": 0.05,
        "EMA": 0.02})


def test_a_tpu_names_its_events_like_operations_and_makes_convolutions_of_products(tmp_path):
    events = device_lines("TPU", "XLA Ops", "XLA Modules", "Async XLA Ops")
    events += [event(name, time, tf_op="x", hlo_category="y") for name, time in (
        ("fusion.1", 40), ("fusion.2", 30), ("convolution.3", 20), ("convolution.4", 10), ("while.7", 1000))]
    events += [event("fusion.1", 1000, tid=2), event("fusion.1", 1000, tid=3), event("fusion.1", 1000, pid=8)]
    write(tmp_path, events)
    assert profile.by_kind(tmp_path, ACCELERATED) == pytest.approx(
        {"products": 0.4, "convolutions": 0.4, "attention": 0.2})


def test_operations_of_a_gpu_are_those_of_its_streams(tmp_path):
    events = device_lines("GPU", "Stream #13(Compute)", "XLA Ops")
    events += [event("sm90_xmma", 30, hlo_op="fusion.2"), event("sm90_xmma", 10, hlo_op="convolution.3"),
               event("MemcpyH2D", 39), event("fusion.1", 1000, tid=2, hlo_op="fusion.1"),
               event("cuLaunchKernel", 1000, pid=8, hlo_op="fusion.2")]
    write(tmp_path, events)
    assert profile.by_kind(tmp_path, ACCELERATED) == pytest.approx({"convolutions": 0.75, "attention": 0.25})


@pytest.mark.parametrize("hidden", [event("sm90_xmma", 61), event("sm90_xmma", 61, hlo_op="call.5")])
def test_a_trace_that_hides_operations_is_said_to_with_a_cure(tmp_path, caplog, hidden):
    write(tmp_path, [*device_lines("GPU", "Stream #13(Compute)"), event("x", 39, hlo_op="fusion.1"), hidden])
    assert profile.by_kind(tmp_path, ACCELERATED) == {}
    (record,) = caplog.records
    assert "only 39 % of the time" in record.message and "XLA_FLAGS=--xla_gpu_enable_command_buffer=" in record.message


def test_a_trace_without_operations_is_said_to_be_one(tmp_path, caplog):
    write(tmp_path, [*device_lines("TPU", "XLA Ops"), event("another_program.1", 5)])
    assert profile.by_kind(tmp_path, ACCELERATED) == {}
    (record,) = caplog.records
    assert "only 0 % of the time" in record.message and "xla_gpu" not in record.message


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

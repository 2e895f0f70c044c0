"""The benchmark as a user runs it, on smoke configs."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import traverse_util

from latent_diffusion import command_line, images
from latent_diffusion import config as config_lib
from latent_diffusion.benchmark import __main__ as benchmark
from latent_diffusion.benchmark import measure, report, work, workloads


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _flags_are_those_of_one_test():
    if not benchmark.FLAGS.is_parsed():
        benchmark.FLAGS.mark_as_parsed()
    for name in benchmark.FLAGS:
        benchmark.FLAGS[name].unparse()


def completed(name):
    return benchmark.completed(config_lib.load(name))[0]


def run(capsys, *flags):
    """(exit code, what was written), from the root of the repository."""
    code = benchmark.main(["benchmark", *flags])
    return code, capsys.readouterr()


def test_rows_of_a_comparison_are_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "COMPARED", {
        "latents": "configs/ldm_unconditional.py:smoke", "pixels": "configs/pixel_diffusion.py:smoke"})
    monkeypatch.setattr(benchmark, "PAIRS", (("latents", "pixels"),))
    code, said = run(capsys, "--compare=pixel", "--warmup=1", "--measured=3", "--batch_size=2", f"--output={tmp_path}")
    assert code == 0, said.err
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["latents", "pixels"]
    assert found["environment"]["devices"] == 2
    for row in found["rows"]:
        assert row["images_per_second"] == pytest.approx(3 * row["batch_size"] / row["seconds"])
        assert row["step_seconds"] <= row["step_p95_seconds"] <= row["seconds"]
        # Of equal gradients (biases of two layers whose outputs are added) the compiler sends one.
        assert row["collective_bytes"] == pytest.approx(4 * row["parameters"], rel=0.01)
        assert row["collectives"] == 1
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    ratio = re.search(r"latents is ([\d.]+) times as fast as pixels \(model FLOPs: ([\d.]+)\)", said.out)
    flops = [row["model_flops"] for row in found["rows"]]
    assert float(ratio[2]) == pytest.approx(flops[1] / flops[0], abs=0.06)


@pytest.mark.parametrize("flags, message", [
    ([], "give --config FILE:TOKEN,... or --compare pixel"),
    (["--config=configs/ldm_class.py:nothing"], "unknown variant 'nothing'"),
    (["--config=configs/autoencoder_kl.py:smoke", "--mode=sample"], "--mode sample needs a config of stage 2"),
    (["--config=configs/ldm_class.py:smoke", "--sweep=batch", "--values=2,x"], "--values: 'x' is not a whole number"),
    (["--config=configs/ldm_class.py:smoke", "--sweep=batch", "--batch_size=2"], "both say it; leave one out"),
    (["--config=configs/ldm_class.py:smoke", "--sweep=steps"], "--sweep steps needs --mode sample"),
    (["--config=configs/ldm_semantic.py", "--sweep=f"], "unknown variant 'ldm1'"),
    (["--sweep=f", "--values=4,5"], "unknown variant 'ldm5'"),
    (["--config=configs/ldm_class.py:smoke", "--measured=0"], "0 is not a positive integer"),
    (["--config=configs/ldm_unconditional.py:smoke", "--mode=sample", "--guidance=2"], "nothing to guide"),
    (["--config=configs/ldm_class.py:smoke", "--profile=/dev/null/x"], "--profile /dev/null/x cannot be used"),
    (["--config=configs/ldm_class.py:cin256_v2", "--mode=loader"], "imagenet2012"),
    (["--config=configs/ldm_class.py:smoke", "--output=/dev/null/x"], "--output /dev/null/x cannot be used"),
    (["--config=configs/ldm_class.py:smoke", "--mode=sample", "--steps=2000"], "must lie between 1 and 1000"),
    (["--config=configs/ldm_class.py:smoke", "--batch_size=3"], "training.batch_size=3 does not divide over 2 devices"),
])
def test_mistakes_are_one_line(capsys, flags, message):
    code, said = run(capsys, *flags)
    assert code == 2 and message in said.err and said.err.count("\n") == 1


def test_rows_of_a_comparison_have_the_steps_of_the_sweep(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "COMPARED", {"latents": "configs/ldm_unconditional.py:smoke"})
    code, said = run(capsys, "--compare=pixel", "--mode=sample", "--sweep=steps", "--values=2,4", "--batch_size=2",
                     "--warmup=0", "--measured=1", f"--output={tmp_path}")
    assert code == 0, said.err
    two, four = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert (two["name"], two["value"], four["value"]) == ("latents, steps 2", 2, 4)
    config = completed("configs/ldm_unconditional.py:smoke")
    assert four["model_flops"] - two["model_flops"] == 2 * 2 * work.of(config).unet  # pictures, steps more


@pytest.mark.parametrize("flags, model, names", [
    (["--values=1,8"], "configs/ldm_unconditional.py",
     ["configs/ldm_unconditional.py:ldm1", "configs/ldm_unconditional.py:ldm8"]),
    (["--config=configs/ldm_class.py"], "configs/ldm_class.py",
     [f"configs/ldm_class.py:ldm{f}" for f in (1, 2, 4, 8, 16, 32)]),
    (["--config=configs/ldm_class.py:ldm4,smoke", "--values=2"], "configs/ldm_class.py:smoke",
     ["configs/ldm_class.py:ldm2,smoke"]),
])
def test_the_sweep_of_f_takes_the_variants_of_a_file(flags, model, names):
    command_line.parse(["benchmark", "--sweep=f", *flags], benchmark._CONFIG, benchmark.FLAGS)
    jobs = benchmark.jobs()
    assert [name for name, _, _ in jobs] == names
    for name, config, more in jobs:
        assert config.to_dict() == config_lib.load(name).to_dict() and more["model"] == model
        assert f"ldm{more['value']}" in name


def test_overrides_are_not_lost_in_a_sweep_of_f(capsys, monkeypatch):
    flags = ["--config=configs/ldm_class.py", "--sweep=f", "--config.data.image_size=64"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])  # where ml_collections looks for overrides
    code, said = run(capsys, *flags)
    assert code == 2 and "--config.data.image_size would be lost: --sweep f takes" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("key, flag", [("sampling.steps", "--steps"), ("sampling.guidance_scale", "--guidance")])
def test_what_a_comparison_sets_is_not_lost(capsys, monkeypatch, key, flag):
    flags = ["--config=configs/ldm_class.py:smoke", "--compare=pixel", "--mode=sample", f"--config.{key}=20"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    code, said = run(capsys, *flags)
    assert code == 2 and f"--config.{key} would be lost" in said.err and said.err.endswith(f"by {flag}\n")
    assert said.err.count("\n") == 1


def fail_at_first(monkeypatch, error):
    """The first row fails, all others have the same result."""
    result, errors = measure.loader(iter(range(9)), 4, warmup=0, steps=1), [error]

    def measured(*_, **__):
        if errors:
            raise errors.pop()
        return result

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(benchmark, "workload", lambda *_: None)


def test_an_error_of_one_row_leaves_the_others(capsys, monkeypatch):
    fail_at_first(monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: a kernel failed" + 50 * " at" + "\nmore of it"))
    flags = ["--config=configs/ldm_class.py:smoke", "--sweep=batch", "--values=2,4"]
    code, said = run(capsys, *flags)
    titles, failed, whole = said.out.splitlines()
    assert code == 0 and "INTERNAL: a kernel failed at at" in failed and "more of it" not in failed
    assert len(failed.split("INTERNAL")[1]) < 200 and titles.count("img/s") == 2 and "batch 4 " in whole
    assert "Traceback" not in said.err and "\nconfigs/ldm_class.py:smoke, batch 4: compiling\n" in said.err


def test_an_error_is_raised_where_debug_asks_for_it(monkeypatch):
    fail_at_first(monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: a kernel failed"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        benchmark.main(["benchmark", "--config=configs/ldm_class.py:smoke", "--debug"])


def test_out_of_memory_is_said_with_the_batch(capsys, monkeypatch):
    fail_at_first(monkeypatch, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying"))
    code, said = run(capsys, "--config=configs/ldm_class.py:smoke", "--batch_size=6")
    assert code == 2 and said.err.endswith("benchmark: error: out of memory with a batch of 6\n")


def test_environment_has_what_the_compiler_was_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    found = report.environment()
    assert found["XLA_FLAGS"] == "--xla_something" and "LIBTPU_INIT_ARGS" not in found
    assert found["platform_version"] == "cpu" and {"flax", "optax"} <= set(found)


def test_neither_data_stack_nor_clu_is_imported():
    code = ("import sys, latent_diffusion.benchmark.__main__; "
            "print([m for m in ('grain', 'tensorflow_datasets', 'tensorflow', 'clu', 'torch') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_what_does_not_change_is_computed_before_the_samplers_loop():
    """Keys and values of the context, and kernels in the compute type: the loop is given no kernel of either, and no
    kernel in float32. Read off what is traced, because not every compiler moves it."""
    guided = tiny_models.config("text")
    with guided.unlocked():
        guided.sampling.guidance_scale, guided.model.dtype = 2.0, "bfloat16"
    found = workloads.sample(guided, 2, steps=3)
    params = found.arguments[0]["params"]["unet"]
    kernels = {path: x for path, x in traverse_util.flatten_dict(params).items() if path[-1] == "kernel"}
    of_context = {x.shape for path, x in kernels.items() if path[-3:-1] in {("attn2", "to_k"), ("attn2", "to_v")}}
    others = {x.shape for path, x in kernels.items() if "time_embed" not in path[0] and "attn2" not in path}
    assert of_context and not of_context & others

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                    yield from equations(getattr(value, "jaxpr", value))

    every = [*equations(jax.make_jaxpr(found.call)(*found.arguments).jaxpr)]
    (loop,) = [equation for equation in every if equation.primitive.name == "scan"]
    given = {(x.aval.shape, x.aval.dtype.name) for x in loop.invars}
    assert {(shape, "bfloat16") for shape in others} <= given
    assert not {(shape, "float32") for shape in others} & given
    assert not of_context & {shape for shape, _ in given}


@pytest.mark.parametrize("kind, make", [
    ("none", lambda config: workloads.code(config, 2, decode=False)),
    ("none", lambda config: workloads.code(config, 2, decode=True)),
    ("layout", lambda config: workloads.sample(config, 2, steps=2)),
    ("inpainting", lambda config: workloads.sample(config, 2, steps=2)),
])
def test_every_mode_runs(kind, make):
    result = measure.measure(make(tiny_models.config(kind)), warmup=1, steps=2)
    assert result.images_per_second > 0 and result.model_flops > 0 and result.memory_bytes > 0


@pytest.mark.parametrize("name", ["autoencoder_vq.py:smoke", "ldm_semantic.py:smoke"])
def test_training_steps_have_the_right_arguments(name):
    found = workloads.train(completed(f"configs/{name}"), 2, cached=False)
    state, metrics = jax.eval_shape(found.call, *found.arguments)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, found.arguments[0])
    assert "loss" in metrics


def test_time_waiting_for_data_is_measured():
    found = measure.loader(iter(range(10)), 4, warmup=2, steps=5)
    assert found.batch_size == 4 and found.wait_share == 1.0


def test_a_loader_is_timed_beyond_what_it_reads_ahead(capsys, tmp_path, monkeypatch):
    for i in range(4):
        images.save_png(tmp_path / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    asked, original = {}, measure.loader
    monkeypatch.setattr(measure, "loader", lambda *arguments, **steps: asked.update(steps) or original(
        *arguments, **steps))
    code, said = run(capsys, f"--config=configs/ldm_unconditional.py:smoke,folder={tmp_path}", "--mode=loader",
                     "--batch_size=2", "--warmup=1", "--measured=3")
    assert code == 0, said.err
    assert asked == {"warmup": 8, "steps": 8}  # twice the threads
    titles, row = (re.split(r"\s{2,}", line.strip()) for line in said.out.splitlines())
    shown = dict(zip(titles, row[1:], strict=True))
    assert shown["params"] == shown["TFLOP/s"] == "-" and float(shown["img/s"]) > 0


def test_what_a_loader_reads_ahead():
    from latent_diffusion.benchmark import loading

    config = config_lib.load("configs/ldm_unconditional.py:smoke")
    with config.unlocked():
        for threads, workers, number in ((3, 0, 6), (0, 0, 2), (3, 2, 16)):
            config.data.update(dict(threads=threads, workers=workers))
            assert loading.read_ahead(config) == number


def test_work_of_a_step():
    config = completed("configs/ldm_inpainting.py:smoke")
    found = work.of(config)
    assert work.of_step(config, found, cached=True) == 3 * found.unet + found.encoder
    assert work.of_step(config, found, cached=False) == 3 * found.unet + 2 * found.encoder
    assert work.of_sample(config, found, calls=50, guided=True) == 100 * found.unet + found.encoder + found.decoder


def test_table_shows_what_failed():
    text = report.table([{"name": "big", "error": "out of memory with a batch of 64"}])
    assert "big" in text and "out of memory with a batch of 64" in text

"""Measures throughput.

    python -m latent_diffusion.benchmark --config configs/ldm_class.py:cin256_v2 --batch_size 64 --dtype bfloat16
    python -m latent_diffusion.benchmark --config configs/ldm_class.py:cin256_v2 --mode sample --steps 50 --guidance 1.5
    python -m latent_diffusion.benchmark --compare pixel --batch_size 16 --output results
    python -m latent_diffusion.benchmark --compare pixel --narrow 32 --size 64 --batch_size 2   # on a CPU
    python -m latent_diffusion.benchmark --config configs/ldm_class.py:ldm4 --sweep batch --values 8,16,32

Inputs and weights are random, the latents cached (--online encodes pictures in each step), and the first stage is that
with which the config was published. Ten steps to warm up, fifty measured, one wait at the end; compiling is timed by
itself.
docs/benchmarks.md explains the columns and has results.
"""

import dataclasses
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from latent_diffusion import command_line, parallel, sizes
from latent_diffusion import config as config_lib
from latent_diffusion.benchmark import measure, report, workloads
from latent_diffusion.errors import UserError

COMPARED = {  # name: config; latent diffusion beside diffusion on pixels (paper Figures 6 and 7, Table 18)
    "LDM-4 ImageNet": "configs/ldm_class.py:cin256_v2",
    "LDM-8 ImageNet": "configs/ldm_class.py:cin256",
    "ADM ImageNet, pixels": "configs/pixel_diffusion.py:adm256",
    "LDM-4 CelebA": "configs/ldm_unconditional.py:celebahq256",
    "LDM-1 CelebA, pixels": "configs/pixel_diffusion.py:ldm1_celebahq256",
}
PAIRS = (("LDM-4 ImageNet", "ADM ImageNet, pixels"), ("LDM-8 ImageNet", "ADM ImageNet, pixels"),
         ("LDM-4 CelebA", "LDM-1 CelebA, pixels"))
SWEEPS = {"batch": "8,16,32,64,128", "f": "1,2,4,8,16,32", "resolution": "256,512,1024", "steps": "10,20,50,100,200"}
CLASSES = 1000  # of ImageNet; what a config does not say because the data does

FLAGS = flags.FlagValues()  # of this program alone
OWN = dict(flag_values=FLAGS)
_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:TOKEN,... of either stage", lock_config=True, **OWN)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "encode", "decode", "loader"], "What to time.", **OWN)
_COMPARE = flags.DEFINE_enum("compare", None, ["pixel"], "Latent diffusion beside diffusion on pixels.", **OWN)
_SWEEP = flags.DEFINE_enum("sweep", None, list(SWEEPS), "One row for each of --values.", **OWN)
_VALUES = flags.DEFINE_list("values", [], "Of the sweep.", **OWN)
_BATCH = flags.DEFINE_integer("batch_size", 0, "Over all devices; 0 = the config's.", **OWN)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type; default: the config's.", **OWN)
_REMAT = flags.DEFINE_enum("remat", None, ["none", "dots", "full"], "Recomputation; default: the config's.", **OWN)
_NARROW = flags.DEFINE_integer("narrow", 0, "Channels of the first level, for machines that hold no more.", **OWN)
_SIZE = flags.DEFINE_integer("size", 0, "Pixels.", **OWN)
_ONLINE = flags.DEFINE_bool("online", False, "Encode pictures in each step, instead of cached latents.", **OWN)
_DATA = flags.DEFINE_bool("data", False, "Train on the config's data, read as in training.", **OWN)
_SAMPLER = flags.DEFINE_string("sampler", None, "Of --mode sample.", **OWN)
_STEPS = flags.DEFINE_integer("steps", None, "Of the sampler.", **OWN)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale.", **OWN)
_WARMUP = flags.DEFINE_integer("warmup", 10, "Steps before the clock starts (sample: 1 unless given).", **OWN)
_MEASURED = flags.DEFINE_integer("measured", 50, "Steps on the clock (sample: 5 unless given).", **OWN)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for benchmark.json and benchmark.png.", **OWN)
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a trace of three steps (TensorBoard, Perfetto).", **OWN)
_DEBUG = flags.DEFINE_bool("debug", False, "Show where a mistake was found.", **OWN)


def completed(config: Any) -> Any:
    """A config with the sizes that training would take from data and first stage, and what the flags change."""
    config = config_lib.from_json(config_lib.to_json(config)).unlock()
    config.data.image_size = _SIZE.value or config.data.image_size
    config.training.batch_size = _BATCH.value or config.training.batch_size
    if config.stage == "diffusion":
        first, options = config.first_stage, config.conditioning
        if first.model.kind != "identity":
            if not first.config:
                raise UserError("--config.first_stage.config is empty: name the first stage, as in "
                                "--config.first_stage.config=configs/autoencoder_kl.py:f8")
            first.model = config_lib.load(first.config).model
        options.num_classes = options.num_classes or CLASSES
        options.segmentation.num_classes = options.segmentation.num_classes or CLASSES
        options.layout.num_classes = options.layout.num_classes or 1  # changes no shape
        if _SIZE.value:
            config.model.image_size = 0
        sizes.complete(config)
        first.model.dtype = _DTYPE.value or first.model.dtype
        config.model.model_channels = _NARROW.value or config.model.model_channels
    elif _NARROW.value:
        config.model.ch = _NARROW.value
    config.model.dtype = _DTYPE.value or config.model.dtype
    config.model.remat = _REMAT.value or config.model.remat
    config.data.name, config.data.path = config.data.name or "-", config.data.path or "-"
    config_lib.validate(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    return config


def workload(config: Any) -> workloads.Workload:
    """What --mode asks for."""
    batch_size = config.training.batch_size
    if config.stage == "autoencoder" and _MODE.value == "sample":
        raise UserError("--mode sample needs a config of stage 2")
    if _MODE.value == "sample":
        return workloads.sample(config, batch_size, steps=_STEPS.value, sampler=_SAMPLER.value,
                                guidance_scale=_GUIDANCE.value)
    if _MODE.value in ("encode", "decode"):
        return workloads.code(config, batch_size, decode=_MODE.value == "decode")
    cached = config.stage == "diffusion" and not _ONLINE.value and not _DATA.value
    found = workloads.train(config, batch_size, cached=cached)
    return workloads.on_data(found, _stream(config)) if _DATA.value else found


def _stream(config: Any) -> Any:
    from latent_diffusion.benchmark import loading  # needs the input pipeline, which nothing else here does

    return loading.stream(config)


def row_of(name: str, config: Any, **more: Any) -> dict[str, Any]:
    """Measures one row. What does not fit into memory is said in its place."""
    logging.info("%s: compiling", name)
    long = _MODE.value == "sample"
    steps = dict(warmup=1 if long and not FLAGS["warmup"].present else _WARMUP.value,
                 steps=5 if long and not FLAGS["measured"].present else _MEASURED.value)
    more = {"name": name, "model": name, "devices": jax.device_count(), **more}
    try:
        config = completed(config)
        if _MODE.value == "loader":
            return more | dataclasses.asdict(measure.loader(_stream(config), config.training.batch_size, **steps))
        folder = epath.Path(_PROFILE.value) / re.sub(r"\W+", "_", name) if _PROFILE.value else ""
        return more | dataclasses.asdict(measure.measure(workload(config), profile=str(folder), **steps))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return more | {"error": f"out of memory with a batch of {config.training.batch_size}"}


def rows() -> list[dict[str, Any]]:
    """All rows that the flags ask for, each printed as soon as it is there."""
    named = {} if not _CONFIG.value else {FLAGS["config"].config_filename or "config": _CONFIG.value}
    if _COMPARE.value:
        named |= {name: config_lib.load(spec) for name, spec in COMPARED.items()}
    if not named:
        raise UserError("give --config FILE:TOKEN,... or --compare pixel; --help shows commands")
    jobs = [(name, name, config, {}) for name, config in named.items()]
    if _SWEEP.value:
        values = _values()
        jobs = [(f"{name}, {_SWEEP.value} {value}", name, config, {"value": value, "sweep": _SWEEP.value})
                for name, config in named.items() for value in values]
    found = []
    for name, model, config, more in jobs:
        config = swept(config, more["value"]) if more else config
        found.append(row_of(name, config, **{"model": model} | more))
        print(report.table(found[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return found


def _values() -> list[int]:
    given = _VALUES.value or SWEEPS[_SWEEP.value].split(",")
    if wrong := [value for value in given if not value.isdecimal() or not int(value)]:
        raise UserError(f"--values: {wrong[0]!r} is not a whole number above 0")
    return [int(value) for value in given]


def swept(config: Any, value: int) -> Any:
    """The config with one value of the sweep."""
    config = config_lib.from_json(config_lib.to_json(config)).unlock()
    if _SWEEP.value == "f":
        return config_lib.load(f"configs/ldm_unconditional.py:ldm{value}")
    if _SWEEP.value == "batch":
        config.training.batch_size = value
    if _SWEEP.value == "resolution":
        config.data.image_size = value
        if config.stage == "diffusion":
            config.model.image_size = 0
    if _SWEEP.value == "steps":
        config.sampling.steps = value
    return config


def _folder() -> epath.Path | None:
    """That of the results, made before anything is measured."""
    if not _OUTPUT.value:
        return None
    folder = epath.Path(_OUTPUT.value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be used: {error.strerror or error}") from error
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags, measures, prints the table, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(__doc__ + FLAGS.get_help())
        return 0
    try:
        command_line.parse(argv, _CONFIG, FLAGS)
        parallel.initialize()
        folder = _folder()
        found = rows()
        print(report.table(found))
        for row in found:
            if row.get("shares"):
                print(f"{row['name']}: " + ", ".join(f"{kind} {100 * x:.0f} %" for kind, x in row["shares"].items()))
        if _COMPARE.value:
            print(report.ratios(found, PAIRS))
        if folder and parallel.is_first_process():
            command = shlex.join(["python", "-m", "latent_diffusion.benchmark", *argv[1:]])
            report.write(folder / "benchmark.json", found, command)
            report.figure(folder / "benchmark.png", found, f"{_MODE.value}, {report.environment()['device']}")
        return 0
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"benchmark: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

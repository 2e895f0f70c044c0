"""Measures throughput.

    python -m latent_diffusion.benchmark --config configs/ldm_class.py:cin256_v2 --batch_size 64 --dtype bfloat16
    python -m latent_diffusion.benchmark --config configs/ldm_class.py:cin256_v2 --mode sample --steps 50 --guidance 1.5
    python -m latent_diffusion.benchmark --compare pixel --batch_size 16 --output results
    python -m latent_diffusion.benchmark --compare pixel --narrow 32 --size 64 --batch_size 2   # on a CPU
    python -m latent_diffusion.benchmark --config configs/ldm_class.py:ldm4 --sweep batch --values 8,16,32

Inputs and weights are random, the latents cached (--online encodes pictures in each step), and the first stage is that
with which the config was published. Ten steps to warm up, fifty measured; the host waits for each step once the next is
under way, as training does. Compiling is timed by itself.
docs/benchmarks.md explains the columns and has results.
"""

import dataclasses
import logging
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from latent_diffusion import command_line, parallel, sizes
from latent_diffusion import config as config_lib
from latent_diffusion.benchmark import measure, report, workloads
from latent_diffusion.errors import UserError

log = logging.getLogger("latent_diffusion.benchmark")
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
F_SWEPT = "configs/ldm_unconditional.py"  # whose variants ldm1, ldm2, ... --sweep f takes (paper Table 14)
STEPS = 50  # of the samplers in a comparison
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
_NARROW = flags.DEFINE_integer("narrow", 0, "Channels of the first level of all networks, for small machines.", **OWN)
_SIZE = flags.DEFINE_integer("size", 0, "Pixels.", **OWN)
_ONLINE = flags.DEFINE_bool("online", False, "Encode pictures in each step, instead of cached latents.", **OWN)
_DATA = flags.DEFINE_bool("data", False, "Train on the config's data, read as in training.", **OWN)
_SAMPLER = flags.DEFINE_string("sampler", None, "Of --mode sample.", **OWN)
_STEPS = flags.DEFINE_integer("steps", None, "Of the sampler (default: the config's; 50 in a comparison).", **OWN)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale (default: the config's; 1 in a comparison).", **OWN)
_WARMUP = flags.DEFINE_integer("warmup", 10, "Steps before the clock starts (sample: 1 unless given).", lower_bound=0,
                               **OWN)
_MEASURED = flags.DEFINE_integer("measured", 50, "Steps on the clock (sample: 5 unless given).", lower_bound=1, **OWN)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for benchmark.json and benchmark.png.", **OWN)
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a trace of three steps (TensorBoard, Perfetto).", **OWN)
_DEBUG = flags.DEFINE_bool("debug", False, "Show where a mistake was found.", **OWN)


def completed(config: Any) -> tuple[Any, Iterator[dict] | None]:
    """A config with the sizes that training would take from data and first stage, and what the flags change; and the
    stream of its data, where that is read. Raises UserError: what does not fit."""
    config, reads = copied(config), _DATA.value or _MODE.value == "loader"
    config.data.image_size = _SIZE.value or config.data.image_size
    config.training.batch_size = _BATCH.value or config.training.batch_size
    stream = _loading().open_stream(config) if reads else None
    if config.stage == "diffusion":
        _complete_stage2(config)
    elif _NARROW.value:
        config.model.ch = _NARROW.value
    config.model.dtype = _DTYPE.value or config.model.dtype
    config.model.remat = _REMAT.value or config.model.remat
    if not reads:
        config.data.name, config.data.path = config.data.name or "-", config.data.path or "-"
    config_lib.validate(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    return config, stream


def copied(config: Any) -> Any:
    """The same, to be changed."""
    return config_lib.from_json(config_lib.to_json(config)).unlock()


def _loading() -> Any:
    from latent_diffusion.benchmark import loading  # needs the input pipeline, which nothing else here does

    return loading


def _complete_stage2(config: Any) -> None:
    first, options = config.first_stage, config.conditioning
    if first.workdir:
        first.model = _loading().first_stage_model(first.workdir)
    elif first.model.kind != "identity":
        if not first.config:
            raise UserError("--config.first_stage.config is empty: name the first stage, as in "
                            "--config.first_stage.config=configs/autoencoder_kl.py:f8")
        found = config_lib.load(first.config)
        if found.stage != "autoencoder":
            raise UserError(f"first_stage.config={first.config} is no autoencoder")
        first.model = found.model
    options.num_classes = options.num_classes or CLASSES
    options.segmentation.num_classes = options.segmentation.num_classes or CLASSES
    options.layout.num_classes = options.layout.num_classes or 1  # changes no shape
    if _SIZE.value:
        config.model.image_size = 0
    sizes.complete(config)
    first.model.dtype = _DTYPE.value or first.model.dtype
    first.model.ch = _NARROW.value or first.model.ch
    config.model.model_channels = _NARROW.value or config.model.model_channels
    if _GUIDANCE.value is not None:
        config.sampling.guidance_scale = _GUIDANCE.value


def is_cached(config: Any) -> bool:
    """Whether training steps get latents: where training may have a cache, unless the flags say otherwise."""
    options = config.conditioning
    possible = config.stage == "diffusion" and options.concat == "none" and options.crossattn != "layout"
    return possible and not _ONLINE.value and not _DATA.value


def workload(config: Any, stream: Iterator[dict] | None) -> workloads.Workload:
    """What --mode asks for."""
    batch_size = config.training.batch_size
    if _MODE.value == "sample":
        return workloads.sample(config, batch_size, steps=_STEPS.value, sampler=_SAMPLER.value)
    if _MODE.value in ("encode", "decode"):
        return workloads.code(config, batch_size, decode=_MODE.value == "decode")
    found = workloads.train(config, batch_size, cached=is_cached(config))
    return workloads.on_data(found, stream) if stream else found


def row_of(name: str, config: Any, **more: Any) -> dict[str, Any]:
    """Measures one row. What does not fit, into memory or else, is said in its place, and so is what fails on the
    device, unless --debug asks where."""
    long = _MODE.value == "sample"
    steps = dict(warmup=1 if long and not FLAGS["warmup"].present else _WARMUP.value,
                 steps=5 if long and not FLAGS["measured"].present else _MEASURED.value)
    more = {"name": name, "model": name, "devices": jax.device_count(), **more}
    try:
        config, stream = completed(config)
        if _MODE.value == "loader":
            log.info("%s: reading", name)
            least = _loading().read_ahead(config)  # fewer would measure how fast what has been read is handed out
            steps = {name: max(number, least) for name, number in steps.items()}
            return more | dataclasses.asdict(measure.loader(stream, config.training.batch_size, **steps))
        if _MODE.value == "train":
            more["cached"] = is_cached(config)
        folder = epath.Path(_PROFILE.value) / re.sub(r"\W+", "_", name) if _PROFILE.value else ""
        if folder and jax.process_count() > 1:
            folder /= f"process{jax.process_index()}"
        found = workload(config, stream)
        log.info("%s: compiling", name)
        return more | dataclasses.asdict(measure.measure(found, profile=str(folder), **steps))
    except UserError as error:
        return more | {"error": " ".join(str(error).split())}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return more | {"error": f"out of memory with a batch of {config.training.batch_size}"}
        if _DEBUG.value:
            raise
        return more | {"error": textwrap.shorten((str(error).strip() or repr(error)).splitlines()[0], 200)}


def jobs() -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, config, what its row says beside) of all rows that the flags ask for."""
    if _COMPARE.value and _SWEEP.value == "f":
        raise UserError("--sweep f compares models of its own; leave --compare out")
    for sweep, flag in (("batch", _BATCH), ("resolution", _SIZE), ("steps", _STEPS)):
        if _SWEEP.value == sweep and FLAGS[flag.name].present:
            raise UserError(f"--{flag.name} and --sweep {sweep} both say it; leave one out")
    if _SWEEP.value == "steps" and _MODE.value != "sample":
        raise UserError("--sweep steps needs --mode sample")
    if _SWEEP.value == "f":
        return _jobs_over_f()
    named = {} if not _CONFIG.value else {FLAGS["config"].config_filename or "config": _CONFIG.value}
    if _COMPARE.value:
        _refuse_what_a_comparison_sets()
        named |= {name: config_lib.load(spec) for name, spec in COMPARED.items()}
        named = {name: compared(config) for name, config in named.items()}
    if not named:
        raise UserError("give --config FILE:TOKEN,... or --compare pixel; --help shows commands")
    if _MODE.value == "sample" and any(config.stage == "autoencoder" for config in named.values()):
        raise UserError("--mode sample needs a config of stage 2")
    if not _SWEEP.value:
        return [(name, config, {}) for name, config in named.items()]
    return [(f"{name}, {_SWEEP.value} {value}", swept(config, value),
             {"model": name, "value": value, "sweep": _SWEEP.value})
            for name, config in named.items() for value in _values()]


def _refuse_what_a_comparison_sets() -> None:
    given = FLAGS["config"].override_values if _CONFIG.value else {}
    for key, flag in (("sampling.steps", _STEPS), ("sampling.guidance_scale", _GUIDANCE)):
        if key in given:
            raise UserError(f"--config.{key} would be lost: all rows of a comparison have the same; say it to all of "
                            f"them by --{flag.name}")


def _jobs_over_f() -> list[tuple[str, Any, dict[str, Any]]]:
    """The variants ldm1, ldm2, ... of the config's file, each with what else is said after its colon (smoke, ...)."""
    flag = FLAGS["config"]
    if _CONFIG.value and flag.override_values:
        raise UserError(f"--config.{next(iter(flag.override_values))} would be lost: --sweep f takes the variants "
                        "ldm1, ldm2, ... as they are; leave one of the two out")
    file, _, tokens = (flag.config_filename if _CONFIG.value else F_SWEPT).partition(":")
    kept = [token for token in tokens.split(",") if token and not re.fullmatch(r"ldm\d+", token)]
    specs = {value: f"{file}:{','.join([f'ldm{value}', *kept])}" for value in _values()}
    model = f"{file}:{','.join(kept)}" if kept else file
    return [(spec, config_lib.load(spec), {"model": model, "value": value, "sweep": "f"})
            for value, spec in specs.items()]


def rows() -> list[dict[str, Any]]:
    """All rows, each of several printed as soon as it is there. Raises UserError where none could be measured."""
    asked, found = jobs(), []
    for name, config, more in asked:
        found.append(row_of(name, config, **more))
        if len(asked) > 1:
            log.info("%s", report.table(found[-1:]).splitlines()[-1])
    if all("error" in row for row in found):
        raise UserError(found[0]["error"])
    return found


def _values() -> list[int]:
    given = _VALUES.value or SWEEPS[_SWEEP.value].split(",")
    if wrong := [value for value in given if not value.isdecimal() or not int(value)]:
        raise UserError(f"--values: {wrong[0]!r} is not a whole number above 0")
    return [int(value) for value in given]


def compared(config: Any) -> Any:
    """The config with what all rows of a comparison sample with, unless flags or a sweep say otherwise."""
    config = copied(config)
    if config.stage == "diffusion":
        config.sampling.update(dict(guidance_scale=1.0, steps=STEPS))
    return config


def swept(config: Any, value: int) -> Any:
    """The config with one value of the sweep."""
    config = copied(config)
    if _SWEEP.value == "batch":
        config.training.batch_size = value
    if _SWEEP.value == "resolution":
        config.data.image_size = value
        if config.stage == "diffusion":
            config.model.image_size = 0
    if _SWEEP.value == "steps":
        config.sampling.steps = value
    return config


def claim(flag: flags.FlagHolder) -> epath.Path | None:
    """The folder of a flag, made before anything is measured; None if it is not given."""
    if not flag.value:
        return None
    try:
        (folder := epath.Path(flag.value)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag.name} {flag.value} cannot be used: {error.strerror or error}") from error
    return folder


def show(found: Sequence[dict[str, Any]], folder: epath.Path | None, command: str) -> None:
    """Prints the results, and writes them if there is a folder."""
    print(report.table(found))
    for row in found:
        if row.get("shares"):
            print(f"{row['name']}: " + ", ".join(f"{kind} {100 * x:.0f} %" for kind, x in row["shares"].items()))
    if _COMPARE.value:
        print(report.ratios(found, PAIRS))
    if folder:
        report.write(folder / "benchmark.json", found, command)
        report.figure(folder / "benchmark.png", found, f"{_MODE.value}, {report.environment()['device']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags, measures, prints the table, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(__doc__ + FLAGS.get_help())
        return 0
    cached = jax.config.jax_enable_compilation_cache
    try:
        command_line.parse(argv, _CONFIG, FLAGS)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)  # an import set one up
        logging.getLogger("latent_diffusion").setLevel(logging.INFO)
        jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured
        parallel.initialize()
        folder, _ = claim(_OUTPUT), claim(_PROFILE)
        found = rows()
        if parallel.is_first_process():
            show(found, folder, shlex.join(["python", "-m", "latent_diffusion.benchmark", *argv[1:]]))
        return 0
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"benchmark: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


if __name__ == "__main__":
    sys.exit(main())

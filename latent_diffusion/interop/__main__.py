"""Weights in and out.

    python -m latent_diffusion.interop import --checkpoint model.ckpt --yaml config.yaml --workdir DIR
    python -m latent_diffusion.interop import --checkpoint FOLDER --workdir DIR
    python -m latent_diffusion.interop export --workdir DIR --format compvis --output model.ckpt
    python -m latent_diffusion.interop export --workdir DIR --format diffusers --output FOLDER

`import` makes an ordinary workdir of a model of CompVis latent-diffusion (a .ckpt, .pt or .safetensors file with its
yaml file) or of a pipeline of diffusers (its folder). `sample.py` draws from it, and training goes on from it with
configs/finetune.py. `export` writes a model that was trained here, or imported, for either. Nothing in a file is
executed.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

import yaml
from etils import epath
from ml_collections import ConfigDict

from latent_diffusion import conditions, tensor_files
from latent_diffusion.errors import UserError
from latent_diffusion.interop import compvis, compvis_description, compvis_settings, diffusers, workdirs


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, details = __doc__.split("\n", 1)
    parser = Parser("python -m latent_diffusion.interop", description=summary, epilog=details,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    add = commands.add_parser("import", help="weights -> a workdir").add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a file of weights, or the folder of a diffusers pipeline")
    add("--yaml", metavar="FILE", help="of a file: the model's description, the reference's config.yaml")
    add("--workdir", required=True, metavar="DIR", help="the workdir that is made; must be empty")
    add("--vocab", metavar="PATH", help="a text model's tokenizer: BERT's vocab.txt, or CLIP's folder or .txt.gz file; "
        "a folder of diffusers brings its own")
    add = commands.add_parser("export", help="a workdir -> weights").add_argument
    add("--workdir", required=True, metavar="DIR", help="of a training run, or imported")
    add("--format", required=True, choices=tuple(EXPORTS), help="whose")
    add("--output", required=True, metavar="PATH",
        help="compvis: a .ckpt, .pt or .safetensors file, with a yaml file beside it; diffusers: a folder")
    add("--step", type=int, help="which checkpoint (default: the latest)")
    return parser.parse_args(argv)


# --- in --------------------------------------------------------------------------------------------------------------


def import_(args: argparse.Namespace) -> None:
    source = epath.Path(args.checkpoint).expanduser()
    read = _read_diffusers if (source / diffusers.INDEX).exists() else _read_compvis
    imported, tokenizer, step = read(source, args)
    workdirs.write(imported, args.workdir, source=str(source.resolve()), step=step, tokenizer=tokenizer)
    print_table(imported.report)
    print(f"written to {args.workdir}, step {step}")


Read = tuple[compvis.Imported, conditions.Tokenizer | None, int]  # with the step


def _read_diffusers(source: epath.Path, args: argparse.Namespace) -> Read:
    config = diffusers.read_config(source)
    tokenizer = _tokenizer(config, args.vocab) or diffusers.tokenizer(source, config)
    workdirs.check(config, args.workdir, tokenizer)
    return diffusers.read_model(source), tokenizer, 0


def _read_compvis(source: epath.Path, args: argparse.Namespace) -> Read:
    if source.is_dir():
        raise UserError(f"--checkpoint {source} is a folder without {diffusers.INDEX}, so no pipeline of diffusers")
    if args.yaml is None:
        raise UserError(f"--checkpoint {source} needs its description, the yaml file that came with it: give --yaml")
    described = compvis_settings.read(args.yaml)
    config = compvis_settings.to_config(described)  # mistakes are said before gigabytes are read
    tokenizer = _tokenizer(config, args.vocab)
    clip = config.conditioning.get("crossattn") == "text" and config.conditioning.text.kind == "clip"
    workdirs.check(config, args.workdir, tokenizer, measured=not clip)
    tensors, rest = tensor_files.open_tensors(source)
    step = rest.get("global_step", 0)
    return compvis.read_model(described, tensors), tokenizer, step if isinstance(step, int) and step >= 0 else 0


def _tokenizer(config: ConfigDict, path: str | None) -> conditions.Tokenizer | None:
    if path and config.conditioning.get("crossattn") != "text":
        raise UserError(f"--vocab {path}: this model takes no text")
    return conditions.TOKENIZERS[config.conditioning.text.kind](path) if path else None


# --- out -------------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    trained = workdirs.read(args.workdir, args.step)
    print_table(EXPORTS[args.format](trained, epath.Path(args.output).expanduser()))


def export_compvis(trained: workdirs.Trained, output: epath.Path) -> list[compvis.Component]:
    described = output.with_suffix(".yaml")
    tensor_files.check_ending(output)
    for file in (output, described):
        if file.exists():
            raise UserError(f"--output {file} exists already; give another")
    loss = "discriminator" in trained.params
    description = compvis_description.to_description(trained.config, averaged=bool(trained.ema_params), with_loss=loss)
    state = compvis.export_model(trained.config, trained.params, trained.ema_params, step=trained.step)
    output.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.save_tensors(output, state, trained.step)
    described.write_text(yaml.safe_dump(description, sort_keys=False))
    averaged = {f"{name}, averaged": tree for name, tree in trained.ema_params.items()}
    written = {name: tree for name, tree in trained.params.items()
               if name != "logvar" or "logvar" in state or "loss.logvar" in state}
    return [*workdirs.components({**written, **averaged}, str(output)),
            compvis.Component("description", 0, str(described))]


def export_diffusers(trained: workdirs.Trained, output: epath.Path) -> list[compvis.Component]:
    params = {**trained.params, **trained.ema_params}  # what is drawn with
    diffusers.export_model(trained.config, params, output, trained.tokenizer)
    return workdirs.components(params, str(output))


EXPORTS = {"compvis": export_compvis, "diffusers": export_diffusers}


def print_table(rows: Iterable[compvis.Component]) -> None:
    """Component, parameters, source, notes."""
    lines = [("component", "parameters", "source", "notes")] + [
        (row.name, f"{row.parameters:,}" if row.parameters else "", row.source, row.notes) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, parameters, *texts in lines:
        cells = [name.ljust(widths[0]), parameters.rjust(widths[1]), *map(str.ljust, texts, widths[2:])]
        print("  ".join(cells).rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", force=True)
    try:
        {"import": import_, "export": export}[args.command](args)
        return 0
    except UserError as error:
        if args.debug:
            raise
        print(f"latent_diffusion.interop: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

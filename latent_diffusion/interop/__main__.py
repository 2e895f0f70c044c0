"""Weights in and out.

    python -m latent_diffusion.interop import --checkpoint model.ckpt --yaml config.yaml --workdir DIR
    python -m latent_diffusion.interop export --workdir DIR --format compvis --output model.ckpt

`import` makes an ordinary workdir of a model of CompVis latent-diffusion (a .ckpt, .pt or .safetensors file with its
yaml file). `sample.py` draws from it, and training goes on from it with configs/finetune.py. `export` writes a model
that was trained here, or imported, as such a file, with its yaml file beside it. Nothing in a file is executed.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

import yaml
from etils import epath

from latent_diffusion import conditions, tensor_files
from latent_diffusion.errors import UserError
from latent_diffusion.interop import compvis, settings, workdirs


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
    add = commands.add_parser("import", help="a file of weights -> a workdir").add_argument
    add("--checkpoint", required=True, metavar="FILE", help="the weights")
    add("--yaml", required=True, metavar="FILE", help="the model's description, the reference's config.yaml")
    add("--workdir", required=True, metavar="DIR", help="the workdir that is made; must be empty")
    add("--vocab", metavar="PATH", help="a text model's tokenizer: BERT's vocab.txt, or CLIP's folder or .txt.gz file")
    add = commands.add_parser("export", help="a workdir -> a file of weights").add_argument
    add("--workdir", required=True, metavar="DIR", help="of a training run of either stage, or imported")
    add("--format", required=True, choices=("compvis",), help="whose")
    add("--output", required=True, metavar="FILE", help=".ckpt, .pt or .safetensors; a yaml file is written beside it")
    add("--step", type=int, help="which checkpoint (default: the latest)")
    return parser.parse_args(argv)


def import_(args: argparse.Namespace) -> None:
    description = settings.read(args.yaml)
    settings.to_config(description)  # a description that cannot be used is said before gigabytes are read
    tensors, rest = tensor_files.open_tensors(args.checkpoint)
    imported = compvis.read_model(description, tensors)
    text = imported.config.conditioning.get("text") if imported.config.conditioning.get("crossattn") == "text" else None
    tokenizer = conditions.TOKENIZERS[text.kind](args.vocab) if text and args.vocab else None
    step = rest.get("global_step", 0)
    workdirs.write(imported, args.workdir, source=str(epath.Path(args.checkpoint).expanduser().resolve()),
                   step=step if isinstance(step, int) and step >= 0 else 0, tokenizer=tokenizer)
    print_table(imported.report)
    print(f"written to {args.workdir}, step {step}")


def export(args: argparse.Namespace) -> None:
    output = epath.Path(args.output).expanduser()
    described = output.with_suffix(".yaml")
    for file in (output, described):
        if file.exists():
            raise UserError(f"--output {file} exists already; give another")
    trained = workdirs.read(args.workdir, args.step)
    description = settings.to_description(trained.config)
    state = compvis.export_model(trained.config, trained.params, trained.ema_params, step=trained.step)
    output.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.save_tensors(output, state, trained.step)
    described.write_text(yaml.safe_dump(description, sort_keys=False))
    print_table(workdirs.components(trained.config, trained.params, str(output)))
    print(f"written to {output}, {len(state)} tensors, described in {described}")


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

"""What the documents say exists: commands, flags, config names and keys, files and links. Nothing is trained here."""

import argparse
import functools
import re
import shlex
import sys
from pathlib import Path

import program_files
import pytest
from absl import flags
from ml_collections import config_flags

from latent_diffusion import config as config_lib
from latent_diffusion import defaults, sizes
from latent_diffusion.benchmark import __main__ as benchmark
from latent_diffusion.interop import __main__ as interop

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCSTRINGS = [ROOT / "sample.py", ROOT / "latent_diffusion/interop/__main__.py",  # they show commands too
              ROOT / "latent_diffusion/benchmark/__main__.py",
              *sorted((ROOT / "configs").glob("*.py"))]
STAND_INS = re.compile(r"\b[A-Z]{2,}\b")  # DIR, SET, AE: for the reader to replace


def commands(path: Path) -> list[str]:
    """The shell commands of a document: lines of code blocks, or indented ones, that start with a program we know."""
    text = re.sub(r"\\+\n\s*", " ", path.read_text())
    return [line.split(" #")[0].strip().removesuffix("`") for line in text.splitlines()
            if re.match(r"\s*`?(python ((train|sample)\.py|-m latent_diffusion)|make |pip install|tensorboard )", line)]


def documented(program: str) -> list[pytest.param]:
    found = [(path, line) for path in [*DOCUMENTS, *DOCSTRINGS] for line in commands(path)]
    return [pytest.param(line, id=f"{path.name}:{line[:90]}") for path, line in found if line.startswith(program)]


def train_config(arguments: list[str]):
    """The config of a train.py command line, with all other flags parsed as train.py defines them."""
    names = re.findall(r'= flags\.DEFINE_(\w+)\("(\w+)"', (ROOT / "train.py").read_text())
    argv, values = ["train.py", *arguments], flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    for kind, name in names:
        getattr(flags, f"DEFINE_{kind}")(name, None, "", flag_values=values)
    assert {"workdir", "coordinator", "process_id"} <= {name for _, name in names}
    rest = values(argv)
    assert rest == ["train.py"], f"not a flag: {rest[1:]}"
    assert values["workdir"].value, "--workdir is missing"
    return config.value


@pytest.mark.parametrize("line", documented("python train.py"))
def test_train_commands_name_configs_that_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = line.split(" && ")[0]
    if "configs/NAME.py" in line or "configs/X.py" in line:
        pytest.skip("shows the grammar")
    if "configs/finetune.py" in line:
        pytest.skip("needs a workdir")
    config = train_config(shlex.split(line)[2:])
    with config.unlocked():
        if config.stage == "diffusion":
            assert config.first_stage.workdir or config.first_stage.model.kind == "identity"
            fill_sizes(config)
        config.data.name = config.data.name or "set"
    config_lib.validate(config)


def fill_sizes(config) -> None:
    """What `first_stage.complete_config` does, with the first stage that the config names."""
    if config.first_stage.model.kind != "identity":
        config.first_stage.model = config_lib.load(config.first_stage.config).model
        config.first_stage.model.update(in_channels=config.data.channels, out_channels=config.data.channels)
    sizes.complete(config)


@pytest.mark.parametrize("line", documented("python sample.py"))
def test_sample_commands_parse(line):
    program = program_files.load("sample.py")
    parsed = program.parse(shlex.split(line)[2:] + (["--workdir", "DIR"] if "--help" in line else []))
    assert isinstance(parsed, argparse.Namespace)


@pytest.mark.parametrize("line", documented("python -m latent_diffusion.benchmark"))
def test_benchmark_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(line)[2:]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    for name in benchmark.FLAGS:
        benchmark.FLAGS[name].unparse()
    assert benchmark.FLAGS(argv) == argv[:1]
    assert benchmark.FLAGS["config"].value or benchmark.FLAGS["compare"].value


@pytest.mark.parametrize("line", documented("python -m latent_diffusion.interop"))
def test_interop_commands_parse(line):
    assert interop.parse(shlex.split(line)[3:]).command in ("import", "export")


@pytest.mark.parametrize("line", documented("make") + documented("pip install"))
def test_make_targets_and_requirements_exist(line):
    makefile = (ROOT / "Makefile").read_text()
    for part in line.split(" && "):
        words = shlex.split(part)
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), part
        for flag, name in zip(words, words[1:], strict=False):
            if flag == "-r":
                assert (ROOT / name).exists(), part


# --- keys ------------------------------------------------------------------------------------------------------------


@functools.cache
def flat_defaults() -> tuple[dict, dict]:
    return tuple(config_lib.flatten(make()) for make in (defaults.autoencoder, defaults.diffusion))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_config_keys_in_the_text_exist(path):
    known = {key for flat in flat_defaults() for key in flat}
    sections = {key.split(".")[0] for key in known if "." in key}
    text = path.read_text()
    mentioned = set(re.findall(r"--config\.([\w.]+)=", text)) - {"section.key", "x.y"}
    for words in re.findall(r"`([^`\n]+)`", text):
        mentioned |= {key for key in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]\w*)+)", words)
                      if key.split(".")[0] in sections and not key.endswith((".py", ".md", ".ckpt", ".yaml"))}
    unknown = {key for key in mentioned if key not in known and not any(k.startswith(key + ".") for k in known)}
    assert not unknown


def test_table_of_keys_is_complete_and_right():
    table = {}
    for line in (ROOT / "docs" / "configs.md").read_text().splitlines():
        if row := re.match(r"\| `([\w.]+)` \| (`.*`) \| ([12]?) ?\| ", line):
            table[row[1]] = ([eval(value) for value in re.findall(r"`([^`]+)`", row[2])], row[3])
    first, second = ({key: value for key, value in flat.items() if not key.startswith("first_stage.model.")}
                     for flat in flat_defaults())
    assert set(table) == {*first, *second}
    for key, (values, stage) in table.items():
        if key.split(".")[0] == "model" and stage:  # one name in two networks: the table of its own stage
            assert values == [(first if stage == "1" else second).get(key)] or key in {*first} & {*second}, key
        else:
            both = [flat[key] for flat in (first, second) if key in flat]
            wanted = both if stage == "" and len(set(map(repr, both))) > 1 else [both[-1 if stage == "2" else 0]]
            assert values == wanted, key


def test_modifiers_arguments_and_variants_in_the_text_exist():
    modules = {path: program_files.load(path) for path in sorted((ROOT / "configs").glob("*.py"))}
    readme, table = DOCUMENTS[0].read_text(), (ROOT / "docs" / "configs.md").read_text()
    for path, module in modules.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `configs/{path.name}`"))
        assert re.findall(r"`([^`]+)`", row)[1:] == list(module.VARIANTS)
        if path.stem == "finetune":  # it needs a workdir
            continue
        for word in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[:3]:
            assert module.get_config(word).is_locked  # a modifier
    arguments = {name for module in modules.values() for name in module.ARGUMENTS}
    assert set(re.findall(r"^\| `(\w+)=\w+` \|", table, re.MULTILINE)) == arguments


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http", "#")):
            file, _, anchor = target.partition("#")
            assert (path.parent / file).exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", (path.parent / file).read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_files_named_in_the_layout_exist():
    for path in (ROOT / "README.md", ROOT / "docs" / "architecture.md"):
        layout = next(block for block in path.read_text().split("```")[1::2] if "\nlatent_diffusion/\n" in block)
        for line in layout.strip().splitlines():
            names = re.split(r"\s{2,}", line.strip())[0]
            inside = "latent_diffusion" if line.startswith("  ") else ""
            for name in names.replace(",", "").split() if "{" not in names else ():
                assert (ROOT / inside / name).exists() or (ROOT / name).exists(), name

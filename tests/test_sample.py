"""sample.py as a user calls it: the files it writes, and one clear line for every mistake."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion import asked, checkpoint, conditions, defaults, images, pipeline, programs
from latent_diffusion import config as config_lib
from tests import program_files, tiny_models

ROOT = Path(__file__).parents[1]
sample = program_files.load("sample.py")
pytestmark = pytest.mark.usefixtures("compile_cache_of_the_tests")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Stage-2 workdirs by kind of conditioning, one of stage 1 and two without a checkpoint."""
    root = tmp_path_factory.mktemp("workdirs")
    for kind in ("none", "class", "both"):
        (root / kind).mkdir()
        tiny_models.save(tiny_models.model(kind), root / kind)
    (root / "inpainting").mkdir()
    tiny_models.save(tiny_models.model("inpainting"), root / "inpainting")
    kinds = {kind: tiny_models.config(kind) for kind in ("text", "layout", "segmentation", "low_res")}
    for name, config in {"stage1": defaults.autoencoder(), "untrained": tiny_models.config("none"), **kinds}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(config_lib.to_json(config))
    conditions.save_labels(root / "layout" / "objects.txt", tiny_models.LABELS)
    Image.new("L", (16, 16), 9).save(root / "nines.png")
    Image.new("RGB", (16, 16)).save(root / "black.png")
    Image.new("L", (8, 8), 255).save(root / "white8.png")
    Image.new("RGB", (7, 8)).save(root / "odd.png")
    (root / "boxes.json").write_text('[{"label": "flag", "box": [0.1, 0.1, 0.5, 0.5]}]')
    (root / "outside.json").write_text('[{"label": "flags", "box": [0.1, 0.1, 1.5, 0.5]}]')
    return root


def test_prompts_in_titled_parts(workdirs, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# Seen in training\nred apple\nflag of japan\n\n# Held out\ngreen heart\n")
    out = tmp_path / "out"
    arguments = ["--workdir", str(workdirs / "both"), "--prompts_file", str(prompts), "--labels", "hearts, all colors",
                 "--num_samples", "4", "--seed", "3", "--batch_size", "2", "--output", str(out)]
    assert sample.main(arguments) == 0
    names = [f"{i:06d}.png" for i in range(4)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "samples.npz", "samples.png"]

    expected = pipeline.LatentDiffusion.from_workdir(workdirs / "both").sample(
        ["red apple", "flag of japan", "green heart"], [3], num_samples=4, seed=3, batch_size=2)
    written = np.stack([np.asarray(Image.open(out / name)) for name in names])
    np.testing.assert_array_equal(written, expected.images)
    stored = np.load(out / "samples.npz")
    np.testing.assert_array_equal(stored["arr_0"], written)
    np.testing.assert_array_equal(stored["arr_1"], [3, 3, 3, 3])

    text = Image.open(out / names[3]).text
    assert text.pop("request") and text == {
        "Software": "latent_diffusion", "prompt": "red apple", "label": "3", "label_name": "hearts, all colors",
        "workdir": str(workdirs / "both"), "step": "7", "seed": "3", "sampler": "ddim", "steps": "3",
        "spacing": "clean", "guidance_scale": "2.0", "eta": "0.0", "size": "16,16", "index": "3"}
    parts = asked.plan(sample.parse(arguments), tiny_models.config("both"))
    assert parts["titles"] == ["Seen in training", "Seen in training", "Held out"]
    printed = capsys.readouterr().out
    assert "4 pictures" in printed and str(out / "samples.png") in printed


def test_another_compute_type(workdirs, tmp_path):
    """bfloat16 has 8 bits: pictures are near those of float32, and not the same; the weights are."""
    arguments = ["--workdir", str(workdirs / "both"), "--prompt", "red apple", "--labels", "3", "--num_samples", "2"]
    assert sample.main([*arguments, "--dtype", "bfloat16", "--output", str(tmp_path)]) == 0
    written = [Image.open(tmp_path / f"{i:06d}.png") for i in range(2)]
    assert written[0].text["dtype"] == "bfloat16"
    exact = pipeline.LatentDiffusion.from_workdir(workdirs / "both")
    half = exact.computing_in("bfloat16")
    assert half.params is exact.params and exact.models.unet.dtype == "float32"
    both = [model.sample(["red apple"], [3], num_samples=2) for model in (exact, half)]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in written]), both[1].images)
    error, size = both[1].latents - both[0].latents, np.linalg.norm(both[0].latents)
    assert 0 < np.linalg.norm(error) < 2e-2 * size
    assert sample.main(["--from_png", str(tmp_path / "000001.png"), "--output", str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again" / "000001.png")), both[1].images[1])
    with pytest.raises(sample.UserError, match="float32, bfloat16"):
        exact.computing_in("float16")


def test_what_is_transparent_in_a_mask_is_known(tmp_path):
    layer = np.zeros((4, 4, 4), np.uint8)
    layer[1, 1] = 255  # what an editor saves: white where one painted, nothing elsewhere
    Image.fromarray(layer).save(tmp_path / "mask.png")
    mask = asked.read_picture(str(tmp_path / "mask.png"), "mask", 3)
    np.testing.assert_array_equal(mask, layer[..., 3])


def test_unconditional_defaults(workdirs, tmp_path):
    out = tmp_path / "out"
    assert sample.main(["--workdir", str(workdirs / "none"), "--steps", "1", "--no-npz", "--output", str(out)]) == 0
    assert len(list(out.iterdir())) == 16 + 1 and not (out / "samples.npz").exists()
    assert "label" not in Image.open(out / "000015.png").text


def test_every_class_by_default(workdirs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for mine in ("mine.txt", "000008.png"):
        (out / mine).write_text("old")
    (out / "samples.npz").write_text("old")
    images.save_png(out / "000007.png", np.zeros((4, 4, 3), np.uint8), {"Software": "latent_diffusion"})
    images.save_png(out / "100000009.png", np.zeros((4, 4, 3), np.uint8))
    assert sample.main(["--workdir", str(workdirs / "class"), "--num_samples", "6", "--steps", "1", "--guidance_scale",
                        "1", "--output", str(out), "--overwrite"]) == 0
    np.testing.assert_array_equal(np.load(out / "samples.npz")["arr_1"], [0, 1, 2, 3, 0, 1])
    assert Image.open(out / "000005.png").text["label_name"] == "flags"
    assert not (out / "000007.png").exists(), "pictures of an earlier run lie among the new ones"
    assert (out / "100000009.png").exists() and (out / "000008.png").exists(), "these are the user's"
    assert (out / "mine.txt").read_text() == "old"


MISTAKES = [
    ("none", ["--sampler", "magic"], "sampler: unknown value 'magic'; choose from ddim, ddpm"),
    ("none", ["--steps", "0"], "steps=0 must lie between 1 and 20"),
    ("none", ["--steps", "21"], "steps=21 must lie between 1 and 20"),
    ("none", ["--steps", "x"], "argument --steps: invalid int value: 'x'"),
    ("none", ["--size", "17,30"], "the nearest size is 16,30"),
    ("none", ["--size", "big"], "argument --size: 'big' is not H,W"),
    ("none", ["--prompt", "a"], "takes no prompts; it takes no condition"),
    ("class", ["--prompt", "a"], "takes no prompts; it takes labels"),
    ("none", ["--labels", "1"], "takes no labels"),
    ("text", ["--labels", "1"], "takes no labels; it takes prompts"),
    ("class", ["--labels", "1,9"], "unknown label '9'; choose from: 0 food, 1 flags"),
    ("class", ["--labels", ""], "unknown label ''"),
    ("text", ["--prompt", " "], "empty prompt"),
    ("text", ["--prompts_file", "nowhere.txt"], "--prompts_file nowhere.txt does not exist"),
    ("text", ["--prompt", "a", "--prompt", "b", "--num_samples", "1"], "--num_samples 1 is less than the 2 conditions"),
    ("none", ["--num_samples", "0"], "--num_samples 0 must be 1 or more"),
    ("none", ["--batch_size", "0"], "--batch_size 0 must be 1 or more"),
    ("none", ["--columns", "0"], "--columns 0 must be 1 or more"),
    ("none", ["--seed", "-1"], "seed=-1 must lie between 0 and"),
    ("none", ["--step", "5"], "no checkpoint of step 5; there are 7"),
    ("none", ["--bogus"], "unrecognized arguments: --bogus"),
    ("class", ["--layout", "{root}/boxes.json"], "takes no layouts"),
    ("layout", ["--layout", "nowhere.json"], "layout nowhere.json does not exist"),
    ("layout", ["--layout", "{root}/boxes.json"], "object 0: unknown label 'flag' (perhaps 'flags')"),
    ("layout", ["--layout", "{root}/outside.json"], "object 0: box [0.1, 0.1, 1.5, 0.5] must have 0 <= left"),
    ("layout", ["--layout", "{root}/nines.png"], "nines.png is not UTF-8"),
    ("segmentation", [], "this model needs segmentation"),
    ("segmentation", ["--segmentation", "{root}/nines.png"], "has the class numbers 9, but this model has 0 to 4"),
    ("segmentation", ["--segmentation", "{root}/black.png"], "must be a grey or palette image"),
    ("low_res", ["--low_res", "nowhere.png"], "--low_res nowhere.png does not exist"),
    ("low_res", ["--low_res", "{root}/boxes.json"], "boxes.json is no image that can be read"),
    ("low_res", ["--low_res", "{root}/odd.png", "--low_res", "{root}/black.png"], "must have the same size"),
    ("inpainting", ["--image", "{root}/black.png"], "needs image and mask; mask is missing"),
    ("inpainting", ["--image", "{root}/black.png", "--mask", "{root}/white8.png"], "8x8 pixels, the picture 16x16"),
    ("none", ["--tile", "6"], "tile=6,6: height and width must be multiples of 4"),
    ("none", ["--overlap", "4"], "give tile as well"),
    ("none", ["--tile", "8", "--overlap", "8"], "overlap=8 must be a multiple of 2 from 0 to 6, less than tile"),
    ("nowhere", [], "does not exist"),
    ("stage1", [], "holds an autoencoder (stage 1); give the workdir of a stage-2 run"),
    ("untrained", [], "holds no complete checkpoint"),
    (".", [], "has no config.json"),
]


@pytest.mark.parametrize("kind, arguments, message", MISTAKES)
def test_mistakes_are_one_line(workdirs, tmp_path, capsys, monkeypatch, kind, arguments, message):
    monkeypatch.setattr(programs, "compiled", None)  # nothing is compiled before a mistake is found
    arguments = [argument.replace("{root}", str(workdirs)) for argument in arguments]
    try:
        code = sample.main(["--workdir", str(workdirs / kind), "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as caught:
        code = caught.code
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert message in said.err and said.err.startswith("sample.py: error: ") and said.err.count("\n") == 1


def test_inpainting_from_files(workdirs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 256, (24, 16, 3), np.uint8), (rng.random((24, 16)) < 0.5)
    images.save_png(tmp_path / "picture.png", picture)
    images.save_png(tmp_path / "mask.png", mask[..., None].astype(np.uint8) * 255)
    assert sample.main(["--workdir", str(workdirs / "inpainting"), "--image", str(tmp_path / "picture.png"), "--mask",
                        str(tmp_path / "mask.png"), "--num_samples", "2", "--output", str(tmp_path / "out")]) == 0
    for name in ("000000.png", "000001.png"):
        drawn = np.asarray(Image.open(tmp_path / "out" / name))
        np.testing.assert_array_equal(drawn[~mask], picture[~mask])
    grid = Image.open(tmp_path / "out" / "samples.png")
    assert grid.width > 2 * 2 * 16  # two samples, each beside its condition
    assert "2 pictures" in (said := capsys.readouterr().out) and "peak memory" in said


def test_tiles_of_the_whole_picture_change_nothing(workdirs, tmp_path):
    model = pipeline.LatentDiffusion.from_workdir(workdirs / "none")
    whole, one = model.sample(num_samples=1), model.sample(num_samples=1, tile=16)
    np.testing.assert_array_equal(one.images, whole.images)
    many = model.sample(num_samples=1, size=(32, 24), tile=16, overlap=8)
    assert many.images.shape == (1, 32, 24, 3) and np.isfinite(many.latents).all()


def test_output_with_other_files_is_refused(workdirs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert sample.main(["--workdir", str(workdirs / "none"), "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} is not empty (it holds notes.txt)" in capsys.readouterr().err
    assert sample.main(["--workdir", str(workdirs / "none"), "--output", str(tmp_path / "notes.txt")]) == 2
    assert "cannot be used" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_latents_that_are_not_finite(tmp_path, capsys):
    ldm = tiny_models.model("none")
    ldm.params["unet"]["out_2"]["bias"][0] = np.nan
    tiny_models.save(ldm, tmp_path)
    assert sample.main(["--workdir", str(tmp_path), "--steps", "1", "--num_samples", "16"]) == 2
    assert "latents of picture 0 are not finite" in capsys.readouterr().err.splitlines()[-1]


def test_debug_shows_where(workdirs):
    with pytest.raises(sample.UserError):
        sample.main(["--workdir", str(workdirs / "stage1"), "--debug"])


def test_damaged_checkpoint_is_one_line(tmp_path, capsys):
    tiny_models.save(tiny_models.model("none"), tmp_path)
    for path in (tmp_path / checkpoint.CHECKPOINTS / "7" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert sample.main(["--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupt_ends_at_once_with_130(workdirs, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), "--workdir", str(workdirs / "none"), "--steps", "20", "--sampler",
         "ddpm", "--num_samples", "100000", "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background inherits "ignore"
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"interrupted" in error and b"Traceback" not in error

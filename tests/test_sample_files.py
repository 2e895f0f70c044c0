"""sample.py over several calls: pictures made again, runs that go on, tables of prompts, the way there, talk."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from latent_diffusion import asked, images, programs, request
from tests import program_files, tiny_models

sample = program_files.load("sample.py")
pytestmark = pytest.mark.usefixtures("compile_cache_of_the_tests")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("both")
    tiny_models.save(tiny_models.model("both"), path)
    return path


def pixels(path):
    return np.asarray(Image.open(path))


def draw(workdir, output, *arguments):
    return sample.main(["--workdir", str(workdir), "--output", str(output), "--batch_size", "2", *arguments])


def refused(capsys, workdir, output, *arguments):
    assert draw(workdir, output, *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sample.py: error: ")
    return said


ASKED = ("--prompt", "red apple", "--prompt", "flag of japan", "--labels", "0,1", "--negative_prompt", "red heart",
         "--eta", "0.5", "--seed", "3", "--guidance_scale", "2,3", "--variation", "0.25", "--variation_seed", "8")


def test_a_picture_is_made_again_from_its_file(workdir, tmp_path, capsys):
    assert draw(workdir, tmp_path / "one", *ASKED, "--num_samples", "4") == 0
    again = ["--from_png", str(tmp_path / "one" / "000003.png"), "--batch_size", "2"]
    assert sample.main([*again, "--output", str(tmp_path / "two")]) == 0
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["000003.png"]
    np.testing.assert_array_equal(pixels(tmp_path / "two" / "000003.png"), pixels(tmp_path / "one" / "000003.png"))
    text = Image.open(tmp_path / "two" / "000003.png").text
    assert json.loads(text["request"]) == json.loads(Image.open(tmp_path / "one" / "000003.png").text["request"])
    assert (text["prompt"], text["negative_prompt"], text["guidance_scale"]) == ("flag of japan", "red heart", "3.0")

    assert sample.main([*again, "--seed", "4", "--output", str(tmp_path / "three")]) == 0  # flags win
    assert (pixels(tmp_path / "three" / "000003.png") != pixels(tmp_path / "one" / "000003.png")).any()
    assert sample.main(["--from_png", str(tmp_path / "one" / "samples.png")]) == 2
    assert "does not say how" in capsys.readouterr().err


def test_a_stopped_run_goes_on(workdir, tmp_path, capsys):
    out = tmp_path / "out"
    assert draw(workdir, out, *ASKED, "--num_samples", "4") == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("000001.png", "000002.png", "samples.png", "samples.npz"):
        (out / name).unlink()
    kept = (out / "000003.png").stat().st_mtime_ns
    assert "is not empty" in refused(capsys, workdir, out, *ASKED, "--num_samples", "4")
    assert draw(workdir, out, *ASKED, "--num_samples", "4", "--resume") == 0
    assert "2 of 4 pictures are there already" in capsys.readouterr().out
    assert (out / "000003.png").stat().st_mtime_ns == kept
    for name in ("000001.png", "000002.png", "samples.png"):
        np.testing.assert_array_equal(pixels(out / name), pixels(io.BytesIO(first[name])))
    np.testing.assert_array_equal(np.load(out / "samples.npz")["arr_0"][2], pixels(out / "000002.png"))

    assert "differs in steps" in refused(capsys, workdir, out, *ASKED, "--num_samples", "4", "--resume", "--steps", "2")
    (out / "000001.png").write_bytes(first["000001.png"][:-60])  # cut off while it was written
    assert draw(workdir, out, *ASKED, "--num_samples", "4", "--resume") == 0
    assert "3 of 4 pictures are there already" in capsys.readouterr().out
    np.testing.assert_array_equal(pixels(out / "000001.png"), pixels(io.BytesIO(first["000001.png"])))
    assert not list(out.glob("unfinished-*"))
    (out / "000001.png").write_bytes(b"no picture of ours")
    assert "damaged" in refused(capsys, workdir, out, *ASKED, "--num_samples", "4", "--resume")
    assert draw(workdir, out, *ASKED, "--num_samples", "4", "--overwrite", "--no-npz") == 0


def test_tables_of_prompts(workdir, tmp_path, capsys):
    table = tmp_path / "prompts.csv"
    table.write_text('prompt,label,guidance_scale\n"red apple",0,2\n"flag of japan",flags,3\n')
    assert draw(workdir, tmp_path / "out", "--prompts_file", str(table), "--samples_per_label", "2") == 0
    about = [Image.open(tmp_path / "out" / f"{k:06d}.png").text for k in range(4)]
    assert [text["prompt"] for text in about] == ["red apple", "red apple", "flag of japan", "flag of japan"]
    assert [text["label"] for text in about] == ["0", "0", "1", "1"]
    for text, message in (("prompt,colour\na,b\n", "unknown column 'colour'; a header names some of prompt, label"),
                          ("prompt,label\na,\n", "line 2: label is empty"), ("prompt\n", "no rows"),
                          ("prompt\na\nb, c\n", "row 2: more cells than the header has columns; put quotes")):
        table.write_text(text)
        assert message in refused(capsys, workdir, tmp_path / "no", "--prompts_file", str(table))
    table.write_text("label\n0\nflags\n")
    assert "leave --labels out" in refused(
        capsys, workdir, tmp_path / "no", "--prompts_file", str(table), "--labels", "1")
    assert draw(workdir, tmp_path / "labels", "--prompts_file", str(table)) == 0
    about = [Image.open(tmp_path / "labels" / f"{k:06d}.png").text for k in range(2)]
    assert [text["label_name"] for text in about] == ["food", "flags"]
    assert not (tmp_path / "labels" / "000002.png").exists()


@pytest.mark.parametrize("arguments, number", [
    ("--samples_per_label 4", 4), ("", 16), ("--prompt x", 1), ("--prompt x --guidance_scale 1,2,4", 3),
    ("--prompt x --guidance_scale 1,2 --samples_per_label 2", 4), ("--prompt x --prompt y --samples_per_label 3", 6),
    ("--image a.png --image b.png --mask mask.png --samples_per_label 2", 4)])
def test_how_many(workdir, tmp_path, monkeypatch, arguments, number):
    monkeypatch.chdir(tmp_path)
    for name, channels in (("a.png", 3), ("b.png", 3), ("mask.png", 1)):
        images.save_png(tmp_path / name, np.full((16, 16, channels), 255, np.uint8))
    args = sample.parse(["--workdir", str(workdir), *arguments.split()])
    assert asked.plan(args, request.read_config(workdir))["number"] == number


def test_guidance_scales_belong_to_their_conditions(workdir, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,label,guidance_scale\nred apple,0,2\nflag of japan,1,3\n")
    assert draw(workdir, tmp_path / "out", "--prompts_file", str(table), "--samples_per_label", "2") == 0
    scales = [Image.open(tmp_path / "out" / f"{k:06d}.png").text["guidance_scale"] for k in range(4)]
    assert scales == ["2.0", "2.0", "3.0", "3.0"]


def test_the_way_is_shown(workdir, tmp_path, capsys):
    assert draw(workdir, tmp_path, "--prompt", "red apple", "--num_samples", "2", "--progressive", "3", "--animate",
                "gif", "--progress", "--verbose") == 0
    strip, animation = Image.open(tmp_path / "progressive.png"), Image.open(tmp_path / "samples.gif")
    assert strip.width > 2.5 * strip.height / 2 and animation.n_frames == 3 and animation.info["loop"] == 0
    said = capsys.readouterr()
    assert "progressive.png" in said.out and "compiled" in said.err and "step" in said.err


def test_talk_keeps_the_program(workdir, tmp_path, monkeypatch, capsys):
    programs.compiled.cache_clear()
    programs.TRACES.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("flag of japan\n\n"))
    asked = ("--prompt", "red apple", "--num_samples", "2", "--interactive")
    assert draw(workdir, tmp_path, *asked) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\nred heart\n\n"))
    assert draw(workdir, tmp_path, *asked, "--resume") == 0  # and overwrites nothing
    assert programs.TRACES["draw"] == 1
    about = [Image.open(tmp_path / f"{k:06d}.png").text for k in range(6)]
    assert [text["prompt"] for text in about] == ["red apple"] * 2 + ["flag of japan"] * 2 + ["red heart"] * 2
    assert "prompt > " in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--strength", "0.5"], "strength needs an image"),
    (["--outpaint", "1,2,3"], "not 4 numbers"),
    (["--outpaint", "2,2,2,2"], "--outpaint extends an --image"),
    (["--interpolate", "3"], "give that, and not --variation"),
    (["--variation", "0.5"], "must be given together"),
    (["--guidance_scale", "a"], "could not convert"),
    (["--guidance_interval", "3,1"], "low < high"),
    (["--quantize_x0"], "VQ first stage"),
    (["--temperature", "-1"], "temperature=-1.0 must be a finite number, 0 or above"),
    (["--spacing", "odd"], "choose from clean"),
    (["--progressive", "4"], "--progressive 4 is more than the 3 steps"),
    (["--samples_per_label", "0"], "--samples_per_label 0 must be 1 or more"),
])
def test_mistakes(workdir, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(programs, "compiled", None)
    try:
        code = draw(workdir, tmp_path / "out", *arguments)
    except SystemExit as caught:
        code = caught.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

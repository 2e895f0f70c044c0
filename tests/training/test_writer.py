"""The event files are read back with TensorBoard's own reader."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from latent_diffusion.training import writer as writer_lib


@pytest.fixture
def without_tensorflow(monkeypatch):
    monkeypatch.setattr(writer_lib, "_open_backend", writer_lib._EventFiles)


def read(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def picture(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def test_scalars_of_every_kind(without_tensorflow, tmp_path):
    with writer_lib.create_writer(tmp_path / "logs") as writer:
        values = [0.5, np.float32(0.25), np.array([2]), True, float("nan")]
        for step, value in enumerate(values, start=1):
            writer.write_scalars(step, {"loss": value, "train/lr": 1e-4})
    events = read(tmp_path / "logs").Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal([event.value for event in events], [0.5, 0.25, 2.0, 1.0, np.nan])
    assert read(tmp_path / "logs").Scalars("train/lr")[0].value == pytest.approx(1e-4, rel=1e-6)


def test_a_vector_is_not_a_scalar(without_tensorflow, tmp_path):
    with writer_lib.create_writer(tmp_path) as writer, pytest.raises(ValueError, match="'loss' has shape"):
        writer.write_scalars(1, {"loss": np.zeros(2)})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_comes_back_pixel_by_pixel(without_tensorflow, tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 7, channels), np.uint8)
    with writer_lib.create_writer(tmp_path) as writer:
        writer.write_images(3, {"uint8": image, "float": image / 255.0})
    accumulator = read(tmp_path)
    for tag in ("uint8", "float"):
        (event,) = accumulator.Images(tag)
        assert (event.step, event.height, event.width) == (3, 5, 7)
        np.testing.assert_array_equal(picture(event.encoded_image_string).reshape(5, 7, channels), image[0])


def test_grid_places_pictures_row_by_row(without_tensorflow, tmp_path):
    images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    with writer_lib.create_writer(tmp_path) as writer:
        writer.write_images(0, {"samples": images})
    grid = picture(read(tmp_path).Images("samples")[0].encoded_image_string)
    assert grid.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)  # 2 rows of 3, 2 pixels between
    np.testing.assert_array_equal(grid[0, [0, 8, 16], 0], [0, 10, 20])
    np.testing.assert_array_equal(grid[6, [0, 8, 16], 0], [30, 40, 255])
    assert (grid[4:6] == 255).all() and (grid[:, 6:8] == 255).all()


def test_grid_clips_floats_and_refuses_other_shapes():
    values = np.array([-1.0, 0.0, 0.5, 2.0, np.nan], np.float32).reshape(1, 1, 5, 1)
    np.testing.assert_array_equal(writer_lib.image_grid(values)[0, :, 0], [0, 0, 128, 255, 0])
    for shape in [(4, 4, 3), (0, 4, 4, 3), (1, 4, 4, 2)]:
        with pytest.raises(ValueError, match="N, H, W, C"):
            writer_lib.image_grid(np.zeros(shape))


def test_texts_and_hparams(without_tensorflow, tmp_path):
    config = {"seed": np.int64(1), "model": {"ch": 32, "ch_mult": (1, 2), "tanh": False, "norm": None}, "name": "kl"}
    with writer_lib.create_writer(tmp_path) as writer:
        writer.write_texts(0, {"note": "**hello**"})
        writer.write_hparams(config)
    accumulator = read(tmp_path)
    assert accumulator.Tensors("note")[0].tensor_proto.string_val[0] == b"**hello**"
    assert set(accumulator.PluginTagToContent("text")) == {"note", "config"}
    text = accumulator.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["model"]["ch_mult"] == [1, 2]
    content = accumulator.SummaryMetadata(hparams_metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["model.ch"].number_value == 32
    assert hparams["model.ch_mult"].string_value == "(1, 2)"
    assert hparams["model.tanh"].bool_value is False and hparams["name"].string_value == "kl"


def test_remote_folder_gets_a_copy_at_each_flush(without_tensorflow, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_lib, "_is_remote", lambda path: True)
    remote = tmp_path / "bucket" / "logs"
    writer = writer_lib.create_writer(remote)
    writer.write_scalars(1, {"loss": 1.0})
    assert not remote.exists()
    writer.flush()
    assert [event.step for event in read(remote).Scalars("loss")] == [1]
    writer.write_scalars(2, {"loss": 2.0})
    writer.close()
    assert [event.step for event in read(remote).Scalars("loss")] == [1, 2]
    assert len(list(remote.iterdir())) == 1


def test_clu_writes_the_same_tags_where_tensorflow_is_installed(tmp_path):
    pytest.importorskip("tensorflow")
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    with writer_lib.create_writer(tmp_path) as writer:
        writer.write_scalars(2, {"loss": np.bool_(True)})
        writer.write_images(2, {"samples": images})
        writer.write_hparams({"model": {"ch": 32}})
    accumulator = read(tmp_path)
    (event,) = accumulator.Tensors("loss")
    assert (event.step, np.frombuffer(event.tensor_proto.tensor_content, np.float32)) == (2, 1.0)
    _, _, *encoded = accumulator.Tensors("samples")[0].tensor_proto.string_val
    np.testing.assert_array_equal(picture(encoded[0]), writer_lib.image_grid(images))
    assert "config" in accumulator.PluginTagToContent("text")

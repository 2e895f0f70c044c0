"""Files that torch.save wrote, and those written here: the numbers come out as they went in, and of what else a file
asks for nothing ever happens."""

import builtins
import io
import os
import pickle
import re
import subprocess
import sys
import typing
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch_files
from tensor_values import FLOATS, OF_EVERY_TYPE, RNG, assert_same, refused
from torch_files import FORMATS, Call, Storage, Tensor, stand_in, tensor, write_legacy, write_zip

from latent_diffusion import tensor_files
from latent_diffusion.errors import UserError


@pytest.fixture(params=list(FORMATS))
def write(request):
    return FORMATS[request.param]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_every_type(tmp_path, write):
    tree = {name: tensor(value) for name, value in OF_EVERY_TYPE.items()}
    tensors, rest = tensor_files.open_tensors(write(tmp_path / "model.pt", tree))
    assert_same(tensors, OF_EVERY_TYPE)
    assert rest == {} and not any(value.flags.writeable for value in tensors.values() if value.size)


def test_views_of_one_storage(tmp_path, write):
    numbers = np.arange(24, dtype=np.float32)
    shared = Storage(numbers)
    tensors, _ = tensor_files.open_tensors(write(tmp_path / "model.pt", {
        "whole": Tensor(shared, (24,), (1,)), "transposed": Tensor(shared, (6, 4), (1, 6)),
        "part": Tensor(shared, (2, 3), (12, 4), offset=1), "expanded": Tensor(shared, (5, 2), (0, 1), offset=3),
        "last": Tensor(shared, (), (), offset=23), "older": Tensor(shared, (2,), (1,), function="_rebuild_tensor",
                                                                    more=())}))
    assert_same(tensors, {
        "whole": numbers, "transposed": numbers.reshape(4, 6).T, "part": np.float32([[1, 5, 9], [13, 17, 21]]),
        "expanded": np.tile(np.float32([3, 4]), (5, 1)), "last": np.float32(23), "older": np.float32([0, 1])})
    assert np.shares_memory(tensors["whole"], tensors["transposed"])


def test_parameters_and_typed_tensors(tmp_path):
    raw = Storage(np.frombuffer(np.arange(6, dtype=np.uint16).tobytes(), np.uint8), "UntypedStorage")
    typed = Tensor(raw, (2, 2), (2, 1), 2, "_rebuild_tensor_v3", (False, OrderedDict(), stand_in("torch", "uint16")))
    parameter = Call(stand_in("torch._utils", "_rebuild_parameter"), tensor(FLOATS), True, OrderedDict())
    tensors, _ = tensor_files.open_tensors(write_zip(tmp_path / "x.pt", {"typed": typed, "parameter": parameter}))
    assert_same(tensors, {"typed": np.array([[2, 3], [4, 5]], np.uint16), "parameter": FLOATS})


def test_a_checkpoint_of_a_training_program(tmp_path, write):
    """Settings and callbacks beside the weights are objects of packages that are not here, nor needed."""
    hyper = Call(stand_in("omegaconf.dictconfig", "DictConfig"), state={"_content": {"a": [1]}}, entries={"lr": 1e-4})
    callback = Call(stand_in("pytorch_lightning.callbacks", "Checkpoint"), "path", items=[1, 2, 3])
    state = OrderedDict(weight=tensor(FLOATS), betas=tensor(np.arange(3.0)), note="no tensor")
    tree = {"epoch": 3, "global_step": 1234, "state_dict": state, "lr": 0.5, "version": "1.4.2", "done": True,
            "optimizer_states": [{"state": {0: {"exp_avg": tensor(FLOATS)}}}], "callbacks": [callback],
            "hyper_parameters": hyper, "torch": Call(stand_in("torch", "Size"), (1, 2)),
            "place": Call(stand_in("torch", "device"), "cuda", 0)}
    before = set(sys.modules)
    tensors, rest = tensor_files.open_tensors(write(tmp_path / "last.ckpt", tree))
    assert_same(tensors, {"weight": FLOATS, "betas": np.arange(3.0)})
    assert rest == {"epoch": 3, "global_step": 1234, "lr": 0.5, "version": "1.4.2", "done": True}
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & {"omegaconf", "pytorch_lightning", "torch"}


def test_numbers_of_numpy_beside_tensors(tmp_path):
    tree = {"state_dict": {"w": tensor(FLOATS)}, "step": np.int64(5), "loss": np.float32(0.5)}
    path = write_zip(tmp_path / "x.pt", tree, protocol=4)
    assert tensor_files.open_tensors(path)[1] == {"step": 5, "loss": 0.5}


@pytest.mark.parametrize("name", list(OF_EVERY_TYPE))
def test_numbers_of_a_big_endian_machine(tmp_path, name):
    value = OF_EVERY_TYPE[name]
    backwards = np.frombuffer(value.tobytes(), np.uint8).reshape(-1, value.itemsize)[:, ::-1]
    swapped = Storage(backwards, torch_files.KINDS[value.dtype.name], value.size)
    one = Tensor(swapped, value.shape, tensor(value).call[1][3])
    assert_same(tensor_files.open_tensors(write_zip(tmp_path / "x.pt", {"x": one}, byteorder="big"))[0], {"x": value})


def test_archives_without_byteorder_and_of_another_root(tmp_path):
    path = write_zip(tmp_path / "x.bin", {"x": tensor(FLOATS)}, byteorder="", root="model_best")
    assert_same(tensor_files.open_tensors(str(path))[0], {"x": FLOATS})


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "safetensors"])
def test_what_is_saved_is_read_again(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    given = OF_EVERY_TYPE | {"transposed": FLOATS.T, "reversed": FLOATS[::-1], "long, ünusual.name" * 20: FLOATS[0],
                             "spread": np.broadcast_to(np.float32(3), (4, 5))}
    tensor_files.save_tensors(path, given, step=300_000)
    tensors, rest = tensor_files.open_tensors(path)
    assert_same(tensors, given)
    assert rest == ({} if ending == "safetensors" else {"global_step": 300_000})


def test_what_is_saved_are_pickles_of_protocol_two_that_name_little(tmp_path):
    tensor_files.save_tensors(tmp_path / "x.ckpt", {"a": FLOATS, "b": FLOATS.astype(np.float16)})
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        program = archive.read("archive/data.pkl")
        assert archive.read("archive/data/0") == FLOATS.tobytes()
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert program[:2] == b"\x80\x02" and b"\x93" not in program
    assert set(re.findall(rb"c(collections\n\w+|torch[\w.]*\n\w+)\n", program)) == {
        b"collections\nOrderedDict", b"torch\nFloatStorage", b"torch\nHalfStorage", b"torch._utils\n_rebuild_tensor_v2"}


def test_another_ending(tmp_path):
    with pytest.raises(UserError, match=r"x\.npz: a file of weights ends with \.safetensors, \.ckpt, \.pt or \.pth"):
        tensor_files.save_tensors(tmp_path / "x.npz", {})
    assert not list(tmp_path.iterdir())


# --- what is refused -------------------------------------------------------------------------------------------------


HARM = {
    os.system: ("touch MARKER",), os.mkdir: ("MARKER",),
    builtins.eval: ("open('MARKER', 'w')",), builtins.exec: ("open('MARKER', 'w')",),
    builtins.getattr: ("text", "upper"), stand_in("torch", "load"): ("MARKER",),
    stand_in("torch._utils", "_rebuild_wrapper_subclass"): ("MARKER",), np.save: ("MARKER", 1),
    stand_in("torch.hub", "load"): ("MARKER",), stand_in("omegaconf_evil", "run"): ("MARKER",),
}


def harm(function, marker):
    return Call(function, *(text.replace("MARKER", str(marker)) if isinstance(text, str) else text
                            for text in HARM[function]))


@pytest.mark.parametrize("function", HARM, ids=lambda function: f"{function.__module__}.{function.__name__}")
@pytest.mark.parametrize("place", ["value", "state_dict", "argument"])
def test_a_file_that_would_run_something(tmp_path, write, function, place):
    marker = tmp_path / "ran"
    call = harm(function, marker)
    tree = {"value": {"w": tensor(FLOATS), "x": call}, "state_dict": {"state_dict": {"w": tensor(FLOATS)}, "x": call},
            "argument": {"w": Call(stand_in("torch._utils", "_rebuild_parameter"), tensor(FLOATS), call)}}[place]
    module = {"builtins": "__builtin__"}.get(function.__module__, function.__module__)  # its name in protocol 2
    refused(write(tmp_path / "model.ckpt", tree), f"asks for {module}.{function.__name__},", "was not read")
    assert not marker.exists()


def test_harm_is_really_in_these_files(tmp_path):
    """The same payloads do run where pickles are trusted, so that the test above can fail."""
    for number, function in enumerate((os.system, os.mkdir, builtins.eval, builtins.exec)):
        marker = tmp_path / f"ran{number}"
        pickle.loads(torch_files.pickled(harm(function, marker), {}))
        assert marker.exists()


def test_harm_within_what_is_skipped(tmp_path, write):
    marker = tmp_path / "ran"
    skipped = stand_in("pytorch_lightning", "Trainer")
    for tree in (Call(skipped, harm(os.system, marker)), Call(skipped, state=harm(os.system, marker)),
                 Call(skipped, items=[harm(os.system, marker)])):
        refused(write(tmp_path / "x.pt", {"w": tensor(FLOATS), "x": tree}), f"{os.system.__module__}.system")
    assert not marker.exists()


W = b"X\x01\x00\x00\x00w"  # the text "w"
PROGRAMS = {  # instructions that no writer of tensors uses
    "GLOBAL": (b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.", "os.system"),
    "INST": (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "os.system"),
    "OBJ": (b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\nX\x04\x00\x00\x00true\x85\x81.", "subprocess.Popen"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system"),
    "dotted": (b"\x80\x04\x8c\x05torch\x8c\x0cnn.os.system\x93\x8c\x04true\x85R.", "torch.nn.os.system"),
    "within OrderedDict": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "OrderedDict.__init__"),
    "EXT1": (b"\x80\x02}" + W + b"\x82\x01s.", "extension"),
    "EXT2": (b"\x80\x02}" + W + b"\x83\x01\x00s.", "extension"),
    "EXT4": (b"\x80\x02}" + W + b"\x84\x01\x00\x00\x00s.", "extension"),
    "BUILD of a class": (b"\x80\x02ccollections\nOrderedDict\nN}" + W + b"K\x01s\x86b.", ""),
    "no dict": (b"\x80\x02]K\x01a.", "list"),
    "a number": (b"\x80\x02K\x01.", "int"),
    "nothing on the stack": (b"\x80\x02R.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "empty": (b"\x80\x02}.", "no tensors"),
    "only plain values": (b"\x80\x02}" + W + b"K\x01s.", "no tensors"),
    "an unknown protocol": (b"\x80\x63}.", "protocol"),
    "a name out of the memo": (b"\x80\x02h\x05.", "damaged"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_made_by_hand(tmp_path, write, name):
    program, needle = PROGRAMS[name]
    refused(write(tmp_path / "model.pt", None, program=program), needle)


@pytest.mark.parametrize("pid, needle", [
    (b"K\x07", "no tensor's storage"),  # a number
    (b"X\x04\x00\x00\x00evil", "no tensor's storage"),
    (b"(X\x06\x00\x00\x00moduleX\x01\x00\x00\x00aX\x01\x00\x00\x00bX\x01\x00\x00\x00cK\x01t", "no tensor's storage"),
    (b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01t",
     "no tensor's storage"),  # no type
    (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\xff\xff\xff\xfft",
     "impossible length"),
    (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuNt", "impossible length"),
    (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01K\x02t", "view"),
])
def test_references_that_are_no_storage(tmp_path, write, pid, needle):
    refused(write(tmp_path / "model.pt", None, program=b"\x80\x02}" + W + pid + b"Qs."), needle)


def test_a_storage_that_the_archive_lacks_or_that_lies_outside(tmp_path):
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x0b\x00\x00\x00../data.pklX\x03\x00\x00\x00cpuK\x01t"
    refused(write_zip(tmp_path / "a.pt", None, program=b"\x80\x02}" + W + pid + b"Qs."), "lacks data/../data.pkl")
    path = write_zip(tmp_path / "b.pt", {"x": tensor(FLOATS)},
                     change=lambda entries: {name: entries[name] for name in entries if "/data/" not in name})
    refused(path, "lacks data/0")


@pytest.mark.parametrize("size, stride, offset", [
    ((4,), (1,), 1), ((2, 2), (3, 1), 0), ((1,), (1,), 4), ((2**62,), (1,), 0), ((2, 2**62), (2**62, 1), 0),
    ((2,), (2**62,), 0),
])
def test_tensors_that_do_not_fit_their_storage(tmp_path, write, size, stride, offset):
    bad = Tensor(Storage(np.zeros(4, np.float32)), size, stride, offset)
    refused(write(tmp_path / "model.pt", {"x": bad}), "does not fit", "4 numbers")


@pytest.mark.parametrize("size, stride, offset", [
    ((4,), (-1,), 3), ((-1,), (1,), 0), ((2,), (1,), -1), ((2, 2), (1,), 0), ((0, -1), (1, 1), 0),
])
def test_impossible_tensors(tmp_path, write, size, stride, offset):
    bad = Tensor(Storage(np.zeros(4, np.float32)), size, stride, offset)
    refused(write(tmp_path / "model.pt", {"x": bad}), "impossible")


@pytest.mark.parametrize("size, stride", [(("a",), (1,)), (None, (1,)), ((2,), 7)])
def test_sizes_that_are_none(tmp_path, write, size, stride):
    one = Tensor(Storage(np.zeros(4, np.float32)), (), ())
    one.call = one.call[0], (one.call[1][0], 0, size, stride)
    refused(write(tmp_path / "model.pt", {"x": one}), "damaged")


def test_storages_of_the_wrong_length(tmp_path):
    wrong = Tensor(Storage(np.zeros(3, np.float32), count=4), (2,), (1,))
    refused(write_zip(tmp_path / "a.pt", {"x": wrong}), "'0'", "12 bytes instead of 16")
    refused(write_legacy(tmp_path / "b.pt", {"x": tensor(np.zeros(3))}, lengths={"0": 4}), "'0'", "4 numbers", "3")
    refused(write_legacy(tmp_path / "c.pt", {"x": wrong}, lengths={"0": 4}), "'0'", "cut")
    refused(write_legacy(tmp_path / "d.pt", {"x": tensor(np.zeros(3))}, keys=["0", "1"]), "not those of its tensors")
    refused(write_legacy(tmp_path / "e.pt", {"x": tensor(np.zeros(3))}, keys=[]), "not those of its tensors")
    refused(write_legacy(tmp_path / "f.pt", {"x": tensor(np.zeros(3))}, keys={"0": 1}), "not those of its tensors")


def test_the_older_format_begins_with_its_magic_number(tmp_path):
    tree = {"x": tensor(FLOATS)}
    refused(write_legacy(tmp_path / "a.pt", tree, magic=12345), "magic number")
    refused(write_legacy(tmp_path / "b.pt", tree, protocol=1002), "1002")
    (tmp_path / "c.pt").write_bytes(pickle.dumps({"x": [1.0]}, 2))  # an ordinary pickle
    refused(tmp_path / "c.pt", "magic number")


def test_archives_that_torch_save_did_not_write(tmp_path):
    tree = {"x": tensor(FLOATS)}

    def renamed(entries):
        return {name.replace("data.pkl", "other.pkl"): data for name, data in entries.items()}

    refused(write_zip(tmp_path / "a.pt", tree, change=renamed), "without data.pkl")
    for name in ("data.pkl", "byteorder", "data/0"):
        refused(write_zip(tmp_path / "b.pt", tree, compressed=name), f"{name} is compressed")
    inner = io.BytesIO()
    write_zip(inner, tree)
    refused(write_zip(tmp_path / "c.pt", None, program=inner.getvalue()), "damaged")  # an archive in place of a pickle
    twice = write_zip(tmp_path / "d.pt", tree,
                      change=lambda entries: entries | {"other/data.pkl": entries["archive/data.pkl"]})
    refused(twice, "data.pkl")
    (tmp_path / "e.pt").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive
    refused(tmp_path / "e.pt", "neither")


@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.8, 0.99])
def test_cut_files(tmp_path, write, part):
    tree = {f"layer{i}": tensor(RNG.standard_normal((8, 8))) for i in range(20)}
    data = write(tmp_path / "whole.pt", tree).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * part)])
    refused(tmp_path / "cut.pt")


def test_bytes_changed_at_random_are_read_or_refused(tmp_path, write):
    """Nothing but a UserError, whatever is wrong: 200 files with four bytes changed in each."""
    data = bytearray(write(tmp_path / "x.pt", {"x": tensor(FLOATS), "y": tensor(np.arange(5))}).read_bytes())
    rng, outcomes = np.random.default_rng(1), set()
    for _ in range(200):
        changed = data.copy()
        for place in rng.integers(16, len(data), 4):
            changed[place] = rng.integers(256)
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            tensors, _ = tensor_files.open_tensors(tmp_path / "changed.pt")
            [np.array(value) for value in tensors.values() if value.size < 1000]
            outcomes.add("read")
        except UserError as error:
            assert str(tmp_path / "changed.pt") in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("data", [
    b"", b"x", b"cos\nsystem\n(S'true'\ntR.", pickle.dumps({"x": 1}, 0), b"<!DOCTYPE html>\n<html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x93NUMPY\x01\x00", b"\x1f\x8b" + bytes(30),
    bytes(100), b"PK", b"\x89PNG\r\n\x1a\n" + bytes(10),
])
def test_other_files(tmp_path, data):
    (tmp_path / "model.ckpt").write_bytes(data)
    refused(tmp_path / "model.ckpt", "neither a safetensors file nor one that torch.save wrote")


def test_no_file(tmp_path):
    refused(tmp_path, "is no file")
    refused(tmp_path / "nowhere.ckpt", "does not exist")


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_program_cannot_set_the_state_of_a_storage(tmp_path, byteorder):
    """BUILD on the array of a storage would free the numbers that tensors still look at: in a process of its own."""
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\xe8\x03tQq\x000"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x00K\x00M\xe8\x03\x85K\x01\x85tR"
    build = b"h\x00(K\x01K\x02\x85ctorch\nfloat32\n\x89C\x08" + bytes(8) + b"tb0"
    path = write_zip(tmp_path / "x.pt", None, program=b"\x80\x04" + pid + b"}X\x01\x00\x00\x00w" + view + b"s" + build
                     + b".", byteorder=byteorder,
                     change=lambda entries: entries | {"archive/data/0": np.ones(1000, np.float32).tobytes()})
    code = f"""
from latent_diffusion import tensor_files
from latent_diffusion.errors import UserError
import numpy as np
try:
    tensors = tensor_files.open_tensors({str(path)!r})[0]
    junk = [np.full(1000, 7, np.float32) for _ in range(50)]
    assert tensors["w"].sum() == 0, tensors["w"][:4]
except UserError:
    print("refused")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr[-300:]


def test_numbers_of_numpy_in_the_protocol_that_torch_has(tmp_path):
    tree = {"state_dict": {"w": tensor(np.ones(2, np.float32))}, "step": np.int64(5), "loss": np.float32(0.5)}
    assert tensor_files.open_tensors(write_zip(tmp_path / "x.pt", tree))[1] == {"step": 5, "loss": 0.5}


def test_names_with_line_breaks_or_control_characters(tmp_path):
    name = b"sys\ntem\x1b[31m"
    path = write_zip(tmp_path / "x.pt", None, program=b"\x80\x04\x8c\x02os\x8c" + bytes([len(name)]) + name + b"\x93.")
    with pytest.raises(UserError) as caught:
        tensor_files.open_tensors(path)
    assert str(caught.value).isprintable()


def test_a_type_that_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match="uint16"):
        tensor_files.save_tensors(tmp_path / "x.ckpt", {"x": np.zeros(2, np.uint16)})
    assert not (tmp_path / "x.ckpt").exists()


def _nested(tuples):
    """A dict whose key is a tuple in a tuple in a tuple ..."""
    return b"\x80\x02}" + b")" + b"\x85" * tuples + b"K\x01s."


def _doubled(times):
    """A dict whose key is a tuple of twice the same tuple of twice ...: hashed in 2^times steps."""
    return b"\x80\x02})" + b"".join(b"q\x01h\x01\x86" for _ in range(times)) + b"K\x01s."


@pytest.mark.parametrize("program, needle", [
    (_nested(1_000_000), "nests tuples too deeply"), (_doubled(45), "nests tuples too deeply"),
    (b"\x80\x02}r" + (100_000_000).to_bytes(4, "little") + b".", "asks for too much memory"),
])
def test_programs_that_would_take_all_memory_or_time(tmp_path, program, needle):
    refused(write_zip(tmp_path / "x.pt", None, program=program), needle)


def test_settings_of_omegaconf_as_it_pickles_them(tmp_path):
    config = Call(stand_in("omegaconf.dictconfig", "DictConfig"), Call(dict), Call(defaultdict), typing.Any)
    tree = {"state_dict": {"w": tensor(np.ones(2, np.float32))}, "hyper_parameters": config}
    tensors, _ = tensor_files.open_tensors(write_zip(tmp_path / "x.pt", tree))
    assert_same(tensors, {"w": np.ones(2, np.float32)})

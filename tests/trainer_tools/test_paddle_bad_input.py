"""Paddle programs that are none, or not whole: refused by name, and nothing is written."""

import pickle
import shutil
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle_programs import refused
from places import GOLDEN

from cube.errors import BadData
from trainer_tools.programs import paddle
from trainer_tools.programs.program import Rules, decide
from trainer_tools.prune_program import prune


def test_a_program_without_lookups_is_refused_and_the_command_exits_1(model, command):
    done = command("prune-program", model("331-conv"))
    assert done.returncode == 1
    assert "conv.pdmodel: found no lookup to cut, expected one; a dense program is served as it is" in done.stderr


class Explosive:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.json", b'{"base_code":{"magic":"pir","trainable":false},"program":{}}',
         "a program of Paddle 3's PIR, expected a ProgramDesc: .*FLAGS_enable_pir_api=0"),
        ("model.pdmodel", b'{"base_code":{"magic":"pir"}}', "JSON .*PIR.*expected a ProgramDesc"),
        ("model.pdparams", None, "a pickle, which is not opened"),
        ("model.pt", None, r"model.pt: found a pickle, which is not opened, expected a torch.export archive"),
        ("model.pth", b"zip", r"model.pth: found a zip archive of TorchScript or torch.save.*torch.export.save"),
        ("model.onnx", b"\x08\x07", "2 bytes, an ONNX program without an op"),
        ("notes.txt", b"hello", "found notes.txt, expected a torch.export program"),
        ("__model__", b"", "0 bytes, a ProgramDesc without an op"),
        ("__model__", b"no protobuf at all", "bytes that are no ProgramDesc"),
    ],
)  # fmt: skip
def test_what_is_no_program_we_read_is_refused_with_what_to_do(tmp_path, file, content, message):
    place = tmp_path / "m"
    place.mkdir()
    if content == b"zip":
        with zipfile.ZipFile(place / file, "w") as archive:
            archive.writestr("model/code/__torch__.py", "boom")
    else:
        (place / file).write_bytes(content if content is not None else pickle.dumps(Explosive(tmp_path / "bomb")))
    refused(place, tmp_path, message)
    assert not (tmp_path / "bomb").exists()


def test_no_directory_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(BadData, match="nowhere: found No such file or directory, expected a file or a directory"):
        prune(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "found an empty directory, expected a torch.export program")


def test_parameters_that_are_missing_or_not_the_programs_are_refused_by_name(model, tmp_path):
    place = model("185-lod")
    table = (place / "SparseFeatFactors").read_bytes()
    (place / "fc_0.b_0").rename(place / "moved")
    refused(
        place, tmp_path, r"185-lod/fc_0.b_0: found no such file, expected the file of parameter 'fc_0.b_0', FP32 \[8\]"
    )
    (place / "moved").rename(place / "fc_0.b_0")
    for content, message in (
        (table[:-1], "SparseFeatFactors'\\): found 16015 bytes of elements, expected 16016"),
        (table + b"x", "found 1 bytes after the parameter"),
        (b"\1" + table[1:], "found 1, expected 0, the version"),
        (b"", "found the end of the file"),
        (table[:20] + b"\xff" * 20, "no TensorDesc"),
        (
            (place / "fc_0.w_0").read_bytes(),
            r"found FP32 \[17, 8\], expected parameter 'SparseFeatFactors'.*\[1001, 4\]",
        ),
    ):
        (place / "SparseFeatFactors").write_bytes(content)
        refused(place, tmp_path, message)
    for name in list(place.iterdir()):
        if name.name != "__model__":
            name.unlink()
    refused(place, tmp_path, "found no other file, expected the parameters: __params__, or a file each")


def test_combined_parameters_that_are_not_the_programs_are_refused(model, tmp_path):
    place = model("331-ctr")
    file = place / "ctr.pdiparams"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-4], "bytes of elements, expected"),
        (whole[: len(whole) - paddle.load(place).parameters["fc_1.w_0"].data], "expected"),
        (whole + b"\0", "1 bytes after 5 parameters"),
        (whole[paddle.load(place).parameters["fc_0.b_0"].start :], "expected parameter 'SparseFeatFactors'"),
    ):
        file.write_bytes(content)
        refused(place, tmp_path, message)
    file.unlink()
    refused(place, tmp_path, "expected the parameters: ctr.pdiparams")


@pytest.mark.parametrize("file", ["331-ctr/ctr.pdmodel", "185-lod/__model__"])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_program_is_refused_or_still_a_program(tmp_path_factory, file, data):
    """Bytes flipped, cut or put in: BadData, or whatever else the bytes now say, but no other error."""
    name, _, file = file.partition("/")
    place = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    shutil.copytree(GOLDEN / f"paddle-{name}", place, dirs_exist_ok=True)
    raw = bytearray((place / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.sampled_from([0, 1, 1, 40]))] = data.draw(st.binary(max_size=2))
    (place / file).write_bytes(raw)
    try:
        program = paddle.load(place).serving()
        program.cut([c.lookup for c in decide(program, Rules()) if c.is_cut]).inputs()
    except BadData:
        pass

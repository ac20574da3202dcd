"""Which format a directory's program has, from names and first bytes; nothing is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cube.errors import BadData
from trainer_tools.manifest import SIGNATURE_FILE
from trainer_tools.programs import paddle_desc
from trainer_tools.programs.paddle import MODEL_FILES

Format = Literal["torch.export", "paddle", "onnx"]
# The first that one of the names has. A file may be called `model` for other reasons.
_SIGNS: tuple[tuple[Format, Callable[[str], bool]], ...] = (
    ("paddle", lambda name: name == "__model__" or name.endswith(".pdmodel")),
    ("torch.export", lambda name: name == SIGNATURE_FILE or name.endswith(".pt2")),
    ("onnx", lambda name: name.endswith(".onnx")),
    ("paddle", lambda name: name in MODEL_FILES),
)
_TORCH_RECIPE = "a torch.export archive: torch.export.save(torch.export.export(model, example_inputs), 'program.pt2')"
_FORMATS = "a torch.export program (*.pt2), a Paddle program (__model__ or *.pdmodel) or an ONNX program (*.onnx)"
_HEAD = 4096


def format_of(place: Path) -> Format:
    """The format of the program in a directory, or in a file that is named.

    Raises BadData for one we do not read, saying how to export it.
    """
    try:
        files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
        names = [path.name for path in files]
        for form, is_its in _SIGNS:
            if any(map(is_its, names)):
                return form
        for path in files:
            _refuse_known(path)
    except OSError as error:
        raise BadData(str(place), error.strerror, f"a file or a directory: {_FORMATS}") from error
    raise BadData(str(place), ", ".join(names) or "an empty directory", _FORMATS)


def _refuse_known(path: Path) -> None:
    """Raise BadData for a file that is a program or a part of one in a form we do not read."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if path.suffix == ".json" and b'"pir"' in head:
        raise BadData(str(path), "a program of Paddle 3's PIR", paddle_desc.RECIPE)
    if path.suffix in (".pdparams", ".pdopt"):
        raise BadData(str(path), "parameters alone, as a pickle, which is not opened", paddle_desc.RECIPE)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        if head[:2] == b"PK":
            kind = "a zip archive of TorchScript or torch.save"
        elif head[:1] == b"\x80":
            kind = "a pickle"
        else:
            kind = "a file that is no torch.export archive"
        raise BadData(str(path), f"{kind}, which is not opened", _TORCH_RECIPE)

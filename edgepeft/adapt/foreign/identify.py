"""Which layout an adapter has, by what lies there and by its first bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgepeft.adapt.foreign import Foreign, gguf, mlx, onnx_adapter, peft, some
from edgepeft.artifact import tensor_header
from edgepeft.errors import ArtifactError

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
FILES: dict[str, Callable[[Path], Foreign]] = {  # in a folder, the first of these that is there
    peft.TENSORS: peft.read,
    mlx.TENSORS: mlx.read,
    peft.PICKLE: peft.unread_pickle,
}
SUFFIXES = (".gguf", ".onnx_adapter", ".safetensors")


def open_adapter(path: Path) -> Foreign:
    """Read an adapter of any known layout: a folder or a file.

    Raises ArtifactError that says what was found where none of them fits, or what is damaged.
    """
    if path.is_dir():
        path = _file_in(path)
    elif not path.exists():
        raise ArtifactError(f"{path}: no such file or folder. Give an adapter's folder or file.")
    return _reader(path)(path)


def _file_in(folder: Path) -> Path:
    """Return an adapter's file in a folder: an adapter's, a bundle's with one adapter, or what a build left."""
    for name in (*FILES,):
        if (folder / name).is_file():
            return folder / name
    if (folder / "run.json").exists():
        places = [folder / "adapter" / peft.TENSORS]
    else:
        places = sorted((folder / "adapters").glob(f"*/{peft.TENSORS}"))
        places = places or sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(places) == 1 and places[0].is_file():
        return places[0]
    if places:
        names = some([(p.parent if p.name == peft.TENSORS else p).relative_to(folder).as_posix() for p in places], 8)
        raise ArtifactError(f"{folder}: expected one adapter, found {len(places)} ({names}). Name one of them.")
    found = some(sorted(path.name for path in folder.iterdir())) or "nothing"
    wanted = ", ".join((*FILES, *(f"*{suffix}" for suffix in SUFFIXES)))
    raise ArtifactError(f"{folder}: no adapter in it: expected one of {wanted}; found {found}.")


def _reader(path: Path) -> Callable[[Path], Foreign]:
    """Return what reads a file, by its first bytes."""
    with open(path, "rb") as stream:
        start = stream.read(9)
    if start[:4] == gguf.MAGIC:
        return gguf.read
    if start[4:8] == onnx_adapter.MAGIC:
        return onnx_adapter.read
    if start.startswith(PICKLES) and not _is_safetensors(path, start):
        return peft.unread_pickle
    if path.suffix in (".gguf", ".onnx_adapter"):
        raise ArtifactError(
            f"{path}: expected {path.suffix[1:]}, found other first bytes: {start[:8]!r}. Copy it again."
        )
    names = tensor_header(path)[0]
    return mlx.read if any(mlx.TENSOR.match(name) for name in names) else peft.read


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Tell whether a file begins with the length of a JSON header, which may begin as a pickle does (640 is 80 02)."""
    return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= path.stat().st_size

"""Files that are whole or absent: atomic writes, digests, tensors on disk, and the run folder.

A stage writes into a staging folder beside its final place; the folder is renamed when all of it is on disk, and only
then recorded in `run.json` with the key of what it was made from and the digest of every file. So a build that dies
anywhere leaves earlier stages usable and no half-written one, and the next build knows what still holds.

Tensors are safetensors files (https://github.com/huggingface/safetensors), read here with numpy alone since the device
runtime may need nothing more: 8 bytes little-endian header length, JSON header, raw data.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1",
    "BOOL": "|b1",
}  # fmt: skip
ALIGNMENT_BYTES = 64


def cache_dir() -> Path:
    """Return the folder for things that can be made again (models, toolchain output, the emulator)."""
    root = os.environ.get("EDGEPEFT_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "edgepeft"
    )
    return Path(root)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file that may be asked for again: it is read anew only when size or time changed."""
    stat = path.stat()
    return _digest_once(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest_once(path: str, size_bytes: int, mtime_ns: int) -> str:
    return sha256_file(Path(path))


def key_of(value: Any) -> str:
    """Return a digest of any JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return {relative path: SHA-256} of every file below a folder, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}


def _sync(path: Path) -> None:
    """Push a file or folder to the disk, so that a rename after it cannot outrun it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises ArtifactError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing. Run the stage that writes it again.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}). Remove it and run the stage that writes it.") from None


@contextlib.contextmanager
def staging(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final`, replacing what was there, only if the block ends without an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if not path.is_symlink():
                _sync(path)
        _swap(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, final: Path) -> None:
    """Put a folder in the place of another; the old one goes away only after the new one stands."""
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old.tmp")
    if final.exists() and _exchange(new, final):
        old = new
    else:
        if final.exists():
            os.replace(final, old)
        os.replace(new, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step (Linux's renameat2); False where the system or its disk cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# --- tensors -----------------------------------------------------------------------------------------------------

AGAIN = "Copy or make it again."


def tensor_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Return (tensor entries, metadata, offset of the data in bytes) of a safetensors file, checked by its size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, 100 << 20):
                raise ValueError(f"the header should take {length} bytes of {size}")
            header = json.loads(stream.read(length))
        meta = dict(header.pop("__metadata__", {}))
        for name, entry in header.items():
            if not _describes_tensor(entry):
                raise ArtifactError(f"{path}: tensor {name}: not described as safetensors do: {entry!r:.120}. {AGAIN}")
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"expected {8 + length + end} bytes, found {size}")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: truncated or not a safetensors file: {error}. {AGAIN}") from None
    return header, meta, 8 + length


def _describes_tensor(entry: Any) -> bool:
    """Tell whether an entry of a header has a type, sizes, and a place of as many bytes as they take."""
    try:
        (start, end), shape, kind = entry["data_offsets"], list(entry["shape"]), entry["dtype"]
    except (KeyError, TypeError, ValueError):
        return False
    numbers = [*shape, start, end]
    if not isinstance(kind, str) or {*map(type, numbers)} != {int} or min(numbers) < 0:
        return False
    width = 2 if kind == "BF16" else int(DTYPES[kind][2:]) if kind in DTYPES else None
    return width is None or end - start == width * math.prod(shape)


def read_tensor(path: Path, entry: Mapping[str, Any], base_bytes: int) -> np.ndarray:
    """Map one tensor of a safetensors file; bfloat16 is widened to float32."""
    import numpy as np

    start, end = entry["data_offsets"]
    kind = "<u2" if entry["dtype"] == "BF16" else DTYPES.get(entry["dtype"])
    if kind is None:
        raise ArtifactError(f"{path}: dtype {entry['dtype']} is not supported; known are BF16, {', '.join(DTYPES)}.")
    shape = tuple(entry["shape"])
    if end == start:
        return np.zeros(shape, np.dtype(kind))
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=base_bytes + start, shape=(end - start,))
    if entry["dtype"] == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.asarray(raw.view(kind)).reshape(shape)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map every tensor of a safetensors file: {name: array}. Raises ArtifactError when the file is damaged."""
    header, _, base = tensor_header(path)
    return {name: read_tensor(path, entry, base) for name, entry in header.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all: big dtypes first, data aligned to 64 bytes, order by name."""
    import numpy as np

    names = {np.dtype(kind): tag for tag, kind in DTYPES.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        array = arrays[name]
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(tensors[name].shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT_BYTES)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                stream.write(arrays[name].tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the run folder ----------------------------------------------------------------------------------------------

VERSION = 1
RECORD = {"key": str, "files": dict, "summary": dict}


def _records(path: Path) -> dict[str, dict[str, Any]]:
    """Return what run.json says was done, {stage folder: record}; nothing where there is none.

    Raises ArtifactError for a file that no build of this version left.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        problem = _record_problem(value)
    except ValueError as error:
        problem = f"no JSON ({error})"
    if problem:
        raise ArtifactError(
            f"{path}: expected edgepeft's record of a build, found {problem}. Give another --output, or remove "
            f"{path.parent} if a build made it."
        )
    return value["stages"]


def _record_problem(value: Any) -> str | None:
    """Say what is wrong with the value of a run.json, or nothing."""
    if not isinstance(value, dict) or not isinstance(value.get("stages"), dict):
        return f"{type(value).__name__} without a table of stages"
    if value.get("version") != VERSION:
        return f"version {value.get('version')!r}, not {VERSION}"
    for name, record in value["stages"].items():
        if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in RECORD.items()):
            return f"stage {name!r} without its {', '.join(RECORD)}"
    return None


class Run:
    """One output folder and the record of the stages that were done in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = _records(folder / "run.json")
        self.key = ""

    def path(self, stage_folder: str) -> Path:
        """Return where a stage's folder lies once it is done."""
        return self.folder / stage_folder

    def work(self, name: str, key: str) -> Path:
        """Return a folder that outlives an interrupted stage, for checkpoints; one with another key is removed."""
        place = self._work(name)
        marker = place / "key"
        if place.exists() and (not marker.exists() or marker.read_text() != key):
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True)
        write_bytes(marker, key.encode())
        return place

    def clear(self, name: str) -> None:
        """Remove what `work` kept for a stage, which is done."""
        shutil.rmtree(self._work(name), ignore_errors=True)

    def _work(self, name: str) -> Path:
        return self.folder / f".{name}.work"

    def holds(self, folder: str, key: str) -> bool:
        """Tell whether a stage was done with this key and none of its files changed since."""
        record = self.records.get(folder)
        return record is not None and record["key"] == key and digests(self.path(folder)) == record["files"]

    def make(self, folder: str, key: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Make a stage's folder by calling write(staging folder), put it in place and record it."""
        with staging(self.path(folder)) as place:
            summary = write(place)
            files = digests(place)
        self.records[folder] = {"key": key, "files": files, "summary": summary}
        write_json(self.folder / "run.json", {"version": VERSION, "stages": self.records})
        return summary

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second build; sweep what a killed one left.

        Raises ArtifactError when it is taken, or holds what no build put there: stages replace whole folders.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in self.folder.iterdir() if not path.name.startswith((".lock", ".run.json."))]
        if foreign and not (self.folder / "run.json").exists():
            raise ArtifactError(
                f"{self.folder}: expected a new or empty folder, or one that a build made; found {len(foreign)} other "
                f"entries ({', '.join(sorted(foreign)[:3])}). Give another --output."
            )
        with open(self.folder / ".lock", "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ArtifactError(f"{self.folder}: another build works here. Wait for it or take --output.") from None
            if not (self.folder / "run.json").exists():
                write_json(self.folder / "run.json", {"version": VERSION, "stages": {}})
            for left in self.folder.glob(".*.tmp"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield

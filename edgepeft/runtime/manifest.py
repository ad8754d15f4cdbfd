"""The bundle's manifest: what the folder is, and the proof that it is still that.

`manifest.json` names every file with its size and SHA-256, and carries under "digest" the SHA-256 of its own text with
that digest put to zeros. So a flipped byte anywhere, the manifest included, is refused before a model is made of it.

    check     sizes   digests                        when
    "full"    all     all                            the default up to FULL_CHECK_BYTES (about 0.7 ms a MB)
    "quick"   all     manifest, files of <= 1 MiB    the default above that

Adapters may be dropped into `adapters/` later; they are not in the manifest, but name the digest of their base and the
format of its weights, and both are compared when they are used. Nothing else outside the manifest is ever opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edgepeft import OP_ABI
from edgepeft.artifact import sha256_file, write_bytes
from edgepeft.errors import ArtifactError, unknown

SCHEMA = 1
NAME = "manifest.json"
FULL_CHECK_BYTES = 64 << 20
SMALL_FILE_BYTES = 1 << 20
CHECKS = ("auto", "full", "quick")
PARTS = {  # of a bundle: the first whose beginnings a path has
    "weights": ("model.",),
    "adapters": ("adapters/",),
    "tokenizer": ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "spiece", "chat_template"),
    "libraries": ("lib/",),
    "page": ("index.html", "edgepeft.", "sw.js", "web/"),
    "documents": ("",),
}
AGAIN = "Copy or build the bundle again."
_ZEROS = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checked manifest; `values` is the JSON, `checked` is "full" or "quick"."""

    folder: Path
    values: dict[str, Any]
    checked: str

    def __getitem__(self, key: str) -> Any:
        try:
            return self.values[key]
        except KeyError:
            raise ArtifactError(f"{self.folder / NAME}: has no {key!r}. {AGAIN}") from None

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Return {path below the bundle: {"bytes", "sha256"}}."""
        return self["files"]


def seal(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of manifest.json: the values and the digest of their text."""
    text = json.dumps({**values, "schema": SCHEMA, "abi": OP_ABI, "digest": _ZEROS}, indent=2, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(f'"digest": "{_ZEROS}"', f'"digest": "{digest}"', 1).encode()


def write(folder: Path, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write manifest.json: the values, and size and digest of the files `names` as they are now."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    write_bytes(folder / NAME, seal({**values, "files": files, "sizes_bytes": part_sizes(files)}))


def part_sizes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the bytes of each part of a bundle (PARTS) that there is, and their total."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, entry in files.items():
        sizes[next(part for part, starts in PARTS.items() if name.startswith(starts))] += entry["bytes"]
    return {**{part: size for part, size in sizes.items() if size}, "total": sum(sizes.values())}


def unseal(path: Path) -> dict[str, Any]:
    """Read manifest.json. Raises ArtifactError when the folder is no bundle or the text was changed."""
    try:
        raw = path.read_bytes()
    except OSError:
        raise ArtifactError(_no_bundle(path.parent)) from None
    found = _DIGEST.search(raw)
    blank = raw if found is None else raw[: found.start(1)] + _ZEROS.encode() + raw[found.end(1) :]
    if found is None or hashlib.sha256(blank).hexdigest() != found[1].decode():
        raise ArtifactError(f"{path}: changed since the bundle was made (its own digest does not match). {AGAIN}")
    values = json.loads(raw)
    if values["schema"] != SCHEMA:
        raise ArtifactError(f"{path}: schema {values['schema']}, this edgepeft reads {SCHEMA}. Use matching versions.")
    if values["abi"] != OP_ABI:
        raise ArtifactError(f"{path}: made for op ABI {values['abi']}, this edgepeft needs {OP_ABI}. {AGAIN}")
    return values


def _no_bundle(folder: Path) -> str:
    """Say why a folder is no bundle, and which one may have been meant."""
    if not folder.is_dir():
        return f"{folder}: no such folder; expected a bundle, the folder that `edgepeft build` writes."
    if (folder / "bundle" / NAME).exists():
        return f"{folder}: a build's output folder, not a bundle. Take {folder / 'bundle'}."
    return f"{folder}: not a bundle, it has no {NAME}. Make one with `edgepeft build`; it is OUTPUT/bundle."


def _problems(folder: Path, files: Mapping[str, Mapping[str, Any]], full: bool) -> Iterator[str]:
    """Yield what is wrong with the files of a bundle, one sentence each."""
    for name, entry in sorted(files.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield f"{name} lies outside the bundle"
        elif not (folder / name).is_file():
            yield f"{name} is missing"
        elif (size := (folder / name).stat().st_size) != entry["bytes"]:
            yield f"{name} has {size} bytes, expected {entry['bytes']}"
        elif (full or size <= SMALL_FILE_BYTES) and (found := sha256_file(folder / name)) != entry["sha256"]:
            yield f"{name} was changed: SHA-256 {found[:16]}…, expected {entry['sha256'][:16]}…"


def check_bundle(folder: Path | str, check: str = "auto") -> Manifest:
    """Check a bundle's files against its manifest and return it.

    Raises ArtifactError, naming every file that is missing or changed. See the module for what `check` covers.
    """
    if check not in CHECKS:
        raise ArtifactError(unknown("check", check, CHECKS))
    folder = Path(folder)
    values = unseal(folder / NAME)
    files = values["files"]
    full = check == "full" or (check == "auto" and sum(f["bytes"] for f in files.values()) <= FULL_CHECK_BYTES)
    problems = list(_problems(folder, files, full))
    if problems:
        raise ArtifactError(f"{folder}: " + "; ".join(problems) + f". {AGAIN}")
    return Manifest(folder, values, "full" if full else "quick")

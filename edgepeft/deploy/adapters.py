"""Adapters of a bundle: `edgepeft adapters list|show|add|remove`.

    folder of any origin ─► is it of this base? ─► device form ─► [wider graph] ─► smoke run ─► manifest ─► in place

A change is made in a copy beside the bundle whose unchanged files are links, and the two folders change places in one
step: whoever opens the bundle meets the one before or the one after, and a model that runs keeps what it mapped. Before
that the copy is loaded by the device runtime, and an adapter that changes nothing is refused.

Where an adapter came from stays with it, in about.json. Listing, removing and adding what an export wrote work without
torch and onnx; `deploy.widen` needs onnx.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgepeft import runtime
from edgepeft.artifact import read_json, read_tensors, staging, tensor_header, write_json
from edgepeft.console import say, table
from edgepeft.deploy.adapter_source import (
    ABOUT,
    BASE_KEY,
    FORMAT_KEY,
    PREFIX,
    SETTINGS,
    columns,
    find,
    folders,
    proof,
    tensor_file,
    tensor_shapes,
    write_device,
    write_labels,
)  # fmt: skip
from edgepeft.errors import ArtifactError, ConfigError, VerifyError, all_of, unknown
from edgepeft.runtime import adapters as ad
from edgepeft.runtime import manifest as mf
from edgepeft.runtime import prompts, webgpu

OWN = "base.safetensors"  # the base's own of what adapters replace
ONNX_ADAPTER = "adapter.onnx_adapter"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
COMMON_NAMES = ("adapter", "adapters", "bundle", "default", "edgepeft-out", "export", "output", "checkpoint")
TEXTS = ("turn the kitchen lights off", "How much is it?", "A longer text, of several words, with a number: 42.")
LOGITS: dict[str, Callable[[Any, str], Any]] = {
    "text-classification": lambda model, name: model.logits(TEXTS, name),
    "text-generation": lambda model, name: model.logits(model.tokens.ids(TEXTS[0]), name),
}


# --- what is there -------------------------------------------------------------------------------------------------


def entries(bundle: Path) -> list[dict[str, Any]]:
    """Return what is known of each adapter of a bundle, the default one first."""
    manifest = mf.check_bundle(bundle)
    return [_entry(manifest, name, folder) for name, folder in folders(manifest).items()]


def _entry(manifest: mf.Manifest, name: str, folder: Path) -> dict[str, Any]:
    about = read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
    settings = read_json(folder / SETTINGS)
    default = name == ad.DEFAULT
    method = about.get("method") or (manifest.values.get("method") if default else None)
    return {
        "name": name, "default": default, "method": method or str(settings.get("peft_type", "")).lower(),
        "rank": max(module_ranks(folder).values(), default=0), "prompt_tokens": columns(folder),
        "labels": len(_labels(manifest, folder)), "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "trained_on": about.get("data") or settings.get("base_model_name_or_path") or "",
    }  # fmt: skip


def _labels(manifest: mf.Manifest, folder: Path) -> tuple[str, ...]:
    return ad.read_labels(folder, list(manifest.values.get("labels", ())))


def size_text(entry: Mapping[str, Any]) -> str:
    """Return an adapter's method and size in words."""
    tokens = entry["prompt_tokens"]
    parts = [entry["method"], f"{tokens} prompt tokens" if tokens else f"rank {entry['rank']}"]
    return ", ".join([*parts, f"{entry['bytes'] / 1e6:.2f} MB"])


def module_ranks(folder: Path) -> dict[str, int]:
    """Return {module: rank} of an adapter's folder in a bundle."""
    shapes = tensor_shapes(folder)
    ending = f".{ad.DOWN}"
    return {n.removesuffix(ending).removeprefix(PREFIX): s[0] for n, s in shapes.items() if n.endswith(ending)}


def details(bundle: Path, name: str) -> dict[str, Any]:
    """Return all that is known of one adapter. Raises ArtifactError for a name that is not there."""
    manifest = mf.check_bundle(bundle)
    folder = _folder(manifest, name)
    metadata = tensor_header(tensor_file(folder))[1]
    own = f"adapters/{name}/"
    sealed = any(path.startswith(own) for path in manifest.files)
    shapes = tensor_shapes(folder)
    about = read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
    return {
        **_entry(manifest, name, folder), "labels": list(_labels(manifest, folder)),
        "base": metadata.get(BASE_KEY), "format": metadata.get(FORMAT_KEY), "in_manifest": sealed,
        "ranks": module_ranks(folder),
        "others": {n.removeprefix(PREFIX): list(s) for n, s in shapes.items() if not n.endswith((ad.DOWN, ad.UP))},
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}, "about": about,
    }  # fmt: skip


def _folder(manifest: mf.Manifest, name: str) -> Path:
    found = folders(manifest)
    if name not in found:
        raise ArtifactError(f"{manifest.folder}: {unknown('adapter', name, found)}")
    return found[name]


# --- changing a bundle ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changing(bundle: Path) -> Iterator[tuple[Path, mf.Manifest]]:
    """Yield a copy of a bundle, and its manifest, that takes its place when the block ends without an error.

    Raises ArtifactError when another change is under way, or the bundle is damaged.
    """
    folder = bundle.resolve()
    mf.unseal(folder / mf.NAME)  # says so where it is no bundle
    with _locked(folder):
        manifest = mf.check_bundle(folder, "full")
        for ending in ("tmp", "old.tmp"):  # of this bundle, and of none whose name begins alike
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 32}.{ending}"):
                shutil.rmtree(left, ignore_errors=True)
        inside = Path.cwd().is_relative_to(folder)
        with staging(folder) as place:
            shutil.copytree(folder, place, dirs_exist_ok=True, symlinks=True, copy_function=_link)
            yield place, manifest
        if inside:
            say(f'the folder you are in was replaced as a whole; go to the new one with: cd "{folder}"')


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against a second change."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(f"{folder}: another change of it is under way. Wait for it.") from None
        if os.fstat(handle).st_ino != folder.stat().st_ino:
            raise ArtifactError(f"{folder}: was changed a moment ago. Try again.")
        yield
    finally:
        os.close(handle)


def _link(source: str, dest: str) -> None:
    """Put a file in a second place, without a copy where the file system can."""
    try:
        os.link(source, dest, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, dest)


def _reseal(place: Path, manifest: mf.Manifest, name: str) -> None:
    """Write the manifest anew: the files it named that are still there, and those of one adapter."""
    own = {path.relative_to(place).as_posix() for path in (place / "adapters" / name).glob("*")}
    own |= {"adapters/" + OWN} if (place / "adapters" / OWN).exists() else set()
    kept = {path for path in manifest.files if (place / path).exists()}
    mf.write(place, manifest.values, sorted(kept | own))


def remove(bundle: Path, name: str) -> None:
    """Take an adapter out of a bundle. Raises ArtifactError for the default one, which the graph itself holds."""
    with changing(bundle) as (place, manifest):
        _folder(manifest, name)
        if name == ad.DEFAULT:
            others = [other for other in ad.adapter_folders(place) if other != name]
            instead = f" Another one is taken by name, as --adapter {others[0]}." if others else ""
            raise ArtifactError(
                f"{bundle}: {name!r} is what the graph holds when no adapter is named, so it stays. Build again with "
                f"another one to ship without it.{instead}"
            )
        shutil.rmtree(place / "adapters" / name)
        _reseal(place, manifest, name)


def add(
    bundle: Path, folder: Path, name: str | None = None, replace: bool = False, base: Path | None = None,
    trust_base: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Put an adapter into a bundle and return what is known of it there.

    folder: what a build left, its adapter, an adapter of another bundle, or a PEFT folder. base: the model that one was
    trained on.  trust_base: believe that it was this one. Raises ArtifactError when it does not belong to this bundle,
    VerifyError when it does nothing, ConfigError for a name that cannot be or is taken. The bundle is as it was then.
    """
    name = _name(name, folder)
    with changing(bundle) as (place, manifest):
        there = folders(manifest)
        if name in there and (name == ad.DEFAULT or not replace):
            how = (
                "the graph holds it: give another --name" if name == ad.DEFAULT else "give --replace or another --name"
            )
            raise ConfigError(f"{bundle}: has an adapter {name!r} already; {how}.")
        source, before = find(folder), _load(place)
        places = ad.slots(before.session)
        new = place / "adapters" / name
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        known_by, *_ = all_of(
            lambda: proof(source, manifest, base, trust_base),
            lambda: write_device(source, new, manifest, places),
            lambda: write_labels(source, new, manifest),
        )
        write_json(new / ABOUT, {**source.about, "base": known_by})
        _widen(place, new, {*places, *prompts.pasts(before.session)})
        _for_gpus(place)
        _reseal(place, manifest, name)
        model = _load(place)
        smoke(model, new)
        if "decoder" in manifest.values and not model.prompt(name):
            from edgepeft.export.genai import write_onnx_adapter

            write_onnx_adapter(model.feeds(name), new / ONNX_ADAPTER)
            _reseal(place, manifest, name)
        return _entry(manifest, name, new)


def _load(place: Path) -> Any:
    return runtime.load(place, threads=1, check="quick")


def _name(name: str | None, folder: Path) -> str:
    """Return the name an adapter gets: the one given, or its folder's where that says something."""
    found = name or folder.resolve().name
    if name is None and found in COMMON_NAMES:
        raise ConfigError(f"{folder}: give the adapter a name: --name NAME.")
    if not NAME.fullmatch(found) or found in (ad.BASE, "base"):
        raise ConfigError(
            f"--name {found!r}: expected letters, digits, '.', '_' or '-', and neither 'none' nor 'base'."
        )
    return found


# --- making sure of it ---------------------------------------------------------------------------------------------


def _widen(place: Path, folder: Path, places: Collection[str]) -> None:
    """Give the graph the inputs that an adapter needs and it lacks. Raises ArtifactError without the onnx package."""
    wanted = {name: shape for name, shape in tensor_shapes(folder).items() if name not in places}
    if not wanted:
        return
    names = ", ".join(sorted(name.removeprefix(PREFIX) for name in wanted)[:3])
    try:
        from edgepeft.deploy.widen import widen
    except ImportError:
        raise ArtifactError(
            f"{folder.name}: changes {len(wanted)} tensors that the graph has no inputs for ({names}, ...). Making "
            "them takes the package onnx: add it on the machine that built the bundle (pip install 'edgepeft[build]')."
        ) from None
    widen(place, wanted)
    say(f"{len(wanted)} inputs were added to model.onnx ({names}{', ...' if len(wanted) > 3 else ''})")


def _for_gpus(place: Path) -> None:
    """Let the graph for GPUs have room for all adapters that are there, where there is one."""
    if not (place / webgpu.FILE).exists():
        return
    try:
        from edgepeft.export.webgpu import write
    except ImportError:
        say("the graph for GPUs stays as it is, for the ranks it has: making room takes edgepeft[build]")
        return
    write(place)


def smoke(model: Any, folder: Path) -> None:
    """Run an adapter of a loaded bundle. Raises VerifyError unless its outputs are finite and not the base's."""
    name, logits = folder.name, LOGITS[model.manifest["task"]]
    found = logits(model, name)
    if not np.isfinite(found).all():
        raise VerifyError(f"{name}: gives logits that are not finite. Train it again.")
    if np.array_equal(found, logits(model, model.off(name))):
        tensors = read_tensors(tensor_file(folder))
        zero = [n.removeprefix(PREFIX) for n, array in tensors.items() if not array.any()]
        why = f"zero are {len(zero)} of {len(tensors)} tensors: {', '.join(zero[:4])}" if zero else "it is too small"
        raise VerifyError(f"{name}: loads fine and does nothing: its logits are the base's ({why}). Train it again.")


# --- the commands --------------------------------------------------------------------------------------------------


def list_cli(bundle: Path, as_json: bool) -> None:
    """Print the adapters of a bundle."""
    found = entries(bundle)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    blanks: dict[str, dict[Any, str]] = {"default": {False: "", True: "*"}, "rank": {0: ""}, "prompt_tokens": {0: ""}}
    rows = [{key: blanks.get(key, {}).get(value, value) for key, value in entry.items()} for entry in found]
    click.echo(table([{key.replace("_", " "): value for key, value in row.items()} for row in rows]))


def show_cli(bundle: Path, name: str, as_json: bool) -> None:
    """Print all that is known of one adapter."""
    found = details(bundle, name)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        if key not in ("ranks", "others", "about"):
            text = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else str(value)
            click.echo(f"{key.replace('_', ' '):<12}{text}")
    for key, value in found["about"].items():
        click.echo(f"{key:<12}{json.dumps(value) if isinstance(value, (dict, list)) else value}")
    click.echo(table([{"module": module, "rank": rank} for module, rank in found["ranks"].items()]))
    if found["others"]:
        click.echo(table([{"tensor": name, "shape": str(shape)} for name, shape in found["others"].items()]))

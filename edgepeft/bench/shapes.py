"""Published shapes of language models with random weights, built and measured: speed does not depend on the values.

    python -m edgepeft.bench.shapes smollm2-135m qwen2.5-0.5b llama-3.2-1b --threads 1 2 --peers

Each becomes a Hugging Face folder (float16, seeded), then by the real stages a bundle with a random adapter of rank 16
on every linear; training and verification are left out, as there is nothing to learn or to compare. With --peers
llama.cpp (Q4_0) and ONNX Runtime GenAI (int4) get files of the same shape and take turns with ours, see
`edgepeft.bench.turns`; --llama-python and --genai-python name interpreters that have them. What is made stays in the
cache. The table lays all beside this machine's limit, see `edgepeft.bench.beside`.

What --json names keeps all figures, each shape's as soon as it was measured: a later call adds to it, and its table
shows both. So a long run can be made in pieces: a call for each shape and number of threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import Run, cache_dir, read_json, write_json
from edgepeft.backbone.families import FAMILIES
from edgepeft.config import Config
from edgepeft.console import progress, say
from edgepeft.deploy.compile import sources_digest
from edgepeft.errors import ArtifactError, EdgePeftError, unknown

CONTEXT, RANK = 2048, 16
WEIGHT, ADAPTER = 0.02, 0.02  # standard deviations
COMMON: dict[str, Any] = {
    "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "torch_dtype": "float16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 100000.0,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "rope_theta": 1000000.0,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip


# --- making one ----------------------------------------------------------------------------------------------------


def bundle(shape: str, tag: str = "i4b32", activation: str = "int8") -> Path:
    """Return a shape's bundle from the cache, made at its first use."""
    from edgepeft.deploy.bundle import bundle as collect
    from edgepeft.export.stage import export
    from edgepeft.quant.stage import quantize

    place = cache_dir() / "shapes" / f"{shape}-{tag}-{activation}"
    config = Config(
        model=str(place / "model"), task="text-generation", format=tag, activation=activation, rank=RANK,
        context=CONTEXT, target="host", output=str(place),
    )  # fmt: skip
    run, made = Run(place), f"{shape} {sources_digest()}"  # for other operators only the weights are kept
    if run.holds("bundle", made):
        return run.path("bundle")
    if not run.holds("quantized", shape):
        write_model(place / "model", SHAPES[shape])
        run.make("quantized", shape, lambda out: quantize(config, run, out))
        shutil.rmtree(place / "model")
    run.make("adapter", shape, lambda out: write_adapter(config, run, out))
    run.make("export", made, lambda out: export(config, run, out))
    run.make("verify", made, lambda out: _unverified(out))
    run.make("bundle", made, lambda out: collect(config, run, out))
    return run.path("bundle")


def write_model(folder: Path, settings: dict[str, Any]) -> None:
    """Write a model folder of random weights, a file for each layer, and a tokenizer of bytes."""
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {**COMMON, **settings}
    settings["architectures"] = [f"{settings['model_type'].capitalize()}ForCausalLM"]
    family = FAMILIES[settings["model_type"]]
    write_json(folder / "config.json", settings)
    kinds, shapes, where = family.tensors(settings), family.shapes(settings), {}
    for number, names in enumerate(progress(list(_files(kinds)), "random weights", None)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: _random(name, shapes[name], kinds[name]) for name in names}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    _write_tokenizer(folder)


def _files(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names of the tensors of each layer, and of the rest."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.split(".")[2] if name.startswith("model.layers.") else "", []).append(name)
    yield from layers.values()


def _random(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    seed = np.frombuffer(name.encode(), np.uint8)
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(WEIGHT)
    return (values + np.float32(kind == "norm")).astype(np.float16)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def write_adapter(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write a random adapter on every linear, as training leaves one."""
    from edgepeft.adapt import peft_files

    about = read_json(run.path("quantized") / "quantized.json")
    linears = {part["name"]: part["shape"] for part in about["layers"] + about["kept"] if part["kind"] == "linear"}
    peft_files.write(out, peft_settings(linears), adapter_tensors(linears), about["base_digest"], about["format"])
    write_json(out / "training.json", {"labels": [], "config": dataclasses.asdict(config)})
    return {}


def adapter_tensors(linears: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return random matrices A [RANK, K] and B [N, RANK] under PEFT's names, for {module: (N, K)}."""
    tensors, rng = {}, np.random.default_rng(0)
    for module, (n, k) in linears.items():
        for side, shape in (("A", (RANK, k)), ("B", (n, RANK))):
            values = rng.standard_normal(shape, np.float32) * np.float32(ADAPTER)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    return tensors


def peft_settings(linears: Iterable[str]) -> dict[str, Any]:
    """Return the adapter_config.json of an adapter on these modules."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "base_model_name_or_path": "random", "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }  # fmt: skip


def _unverified(out: Path) -> dict[str, Any]:
    write_json(out / "report.json", {"checks": {}, "note": "random weights: nothing to verify"})
    return {}


# --- the peers' files ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program to measure beside ours: the module that must be there, and what to say when it is not."""

    module: str
    package: str


PEERS = {
    "llama": Peer("llama_cpp", "llama-cpp-python and gguf"),
    "genai": Peer("onnxruntime_genai", "onnxruntime-genai"),
}


def peer_missing(name: str, python: str) -> str:
    """Say what keeps a peer from being measured by an interpreter, or return ""."""
    peer = PEERS[name]
    try:
        done = subprocess.run([python, "-c", f"import {peer.module}"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{name}: {python} cannot be run ({error.strerror}), so it is left out."
    if done.returncode:
        return f"{name}: {python} has no {peer.package} (--{name}-python PATH names one that has), so it is left out."
    return ""


def peer_files(name: str, shape: str, python: str) -> Path:
    """Return the folder of a peer's files of a shape, made at its first use. Raises EdgePeftError with its words."""
    place = cache_dir() / "shapes" / f"{shape}-{name}"
    if (place / ".complete").exists():
        return place
    source = cache_dir() / "shapes" / f"{shape}-source"
    about = {**_about(shape), "folder": str(place), "model": str(source / "model"), "adapter": str(source / "adapter")}
    if name == "genai" and not (source / ".complete").exists():
        write_model(source / "model", SHAPES[shape])
        _write_peft(source / "adapter", about["linears"], about["tensors"])
        (source / ".complete").touch()
    say(f"{shape}: files for {name}")
    command = [python, str(Path(__file__).parent / "peers" / f"{name}.py"), "make", json.dumps(about)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EdgePeftError(f"{name}: its files of {shape} could not be made:\n{done.stderr[-2000:]}")
    shutil.rmtree(source, ignore_errors=True)
    (place / ".complete").touch()
    return place


def _about(shape: str) -> dict[str, Any]:
    """Return what the peers must know of a shape."""
    settings = {**COMMON, **SHAPES[shape]}
    family = FAMILIES[settings["model_type"]]
    shapes, kinds = family.shapes(settings), family.tensors(settings)
    linears = [name for name, kind in kinds.items() if kind == "linear" and name.startswith("model.layers.")]
    return {
        "settings": settings, "tensors": {name: list(shapes[name]) for name in kinds}, "linears": linears,
        "rank": RANK, "context": CONTEXT, "layers": settings["num_hidden_layers"],
    }  # fmt: skip


def _write_peft(out: Path, linears: Sequence[str], shapes: dict[str, Any]) -> None:
    """Write a random adapter as PEFT reads it."""
    from edgepeft.artifact import write_tensors

    modules = {name.removesuffix(".weight"): shapes[name] for name in linears}
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / "adapter_model.safetensors", adapter_tensors(modules), {"format": "pt"})
    write_json(out / "adapter_config.json", peft_settings(modules))


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    shape: str, threads: int, pythons: Mapping[str, str], tag: str, activation: str, seconds: float,
    prompts: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of a shape: rows of ours and of the peers in `pythons`, and the limit they stand against.

    prompts: tokens of a prompt, the most first, of which the first that fits into the time is taken.
    """
    from edgepeft.bench import beside, turns

    folder = bundle(shape, tag, activation)
    about = {"threads": threads, "context": CONTEXT}
    programs = [turns.ours(folder, threads)]
    programs += [turns.script(name, peer_files(name, shape, python), about, python) for name, python in pythons.items()]
    before = beside.limits(folder, _about(shape), threads)
    rows = turns.measure(programs, seconds, prompts)
    limit = beside.higher(before, beside.limits(folder, _about(shape), threads))
    return {"shape": shape, "threads": threads, "limit": limit, "rows": rows}


def _pythons(asked: argparse.Namespace) -> dict[str, str]:
    """Return {peer: interpreter} of the peers that are there; say which are not."""
    if not asked.peers:
        return {}
    found = {name: getattr(asked, f"{name}_python") for name in PEERS}
    reasons = {name: peer_missing(name, python) for name, python in found.items()}
    for reason in filter(None, reasons.values()):
        print(reason)
    return {name: python for name, python in found.items() if not reasons[name]}


def main(argv: Sequence[str] | None = None) -> int:
    """Build and measure shapes; print one table and what is to be known about it."""
    from edgepeft.bench import beside
    from edgepeft.bench.measure import machine

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}  [default: all]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--format", default="i4b32")
    parser.add_argument("--activation", default="int8")
    parser.add_argument("--peers", action="store_true", help="measure llama.cpp and ONNX Runtime GenAI too")
    for name, peer in PEERS.items():
        parser.add_argument(f"--{name}-python", default=sys.executable, metavar="PATH", help=f"has {peer.package}")
    parser.add_argument("--seconds", type=float, default=90.0, help="of timing, for a shape and a number of threads")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="long, whatever the time  [default: what fits]")
    parser.add_argument("--make", action="store_true", help="only make what is not in the cache yet")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them here")
    asked = parser.parse_args(argv)
    if strange := [shape for shape in asked.shapes if shape not in SHAPES]:
        parser.error(unknown("shape", strange[0], SHAPES))
    try:
        host = machine()
        results = _earlier(asked.json, host["cpu"])
        for result in _results(asked, _pythons(asked)):
            others = [one for one in results if _place(one) != _place(result)]
            results = sorted([*others, result], key=_place)
            if asked.json:
                write_json(asked.json, {"machine": host, "results": results})
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if results:
        print(beside.text(host, results))
        if asked.plot:
            beside.draw(results, asked.plot)
    return 0


def _place(result: Mapping[str, Any]) -> tuple[int, int]:
    """Return where a result stands in the table."""
    return list(SHAPES).index(result["shape"]), result["threads"]


def _earlier(file: Path | None, cpu: str) -> list[dict[str, Any]]:
    """Return the results that a file holds, if there is one. Raises ArtifactError for those of another processor."""
    if file is None or not file.exists():
        return []
    found = read_json(file)
    if found["machine"]["cpu"] != cpu:
        raise ArtifactError(f"{file}: measured on {found['machine']['cpu']}, this is {cpu}. Give another --json.")
    return found["results"]


def _results(asked: argparse.Namespace, pythons: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Make all files, then measure shape by shape."""
    shapes = asked.shapes or list(SHAPES)
    for shape in shapes:
        bundle(shape, asked.format, asked.activation)
        for name, python in pythons.items():
            peer_files(name, shape, python)
    for shape, threads in itertools.product([] if asked.make else shapes, asked.threads):
        say(f"{shape}, {threads} threads")
        prompts = [asked.prompt] if asked.prompt else ()
        yield measure(shape, threads, pythons, asked.format, asked.activation, asked.seconds, prompts)


if __name__ == "__main__":
    sys.exit(main())

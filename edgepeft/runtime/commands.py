"""`edgepeft run`: what is asked goes to the task of the bundle, and what does not fit that task is refused.

A language model answers each text, one prompt a line where they come from a file. Where the bundle has a chat template
a text is what a user says to it; `raw` gives it as it is, to be continued.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.console import say
from edgepeft.errors import ConfigError, DataError
from edgepeft.runtime.manifest import NAME, unseal
from edgepeft.runtime.session import DEVICES, KV_CACHES, check_threads, known_task, load
from edgepeft.runtime.tasks import inputs, run_cli
from edgepeft.runtime.vulkan import PRECISIONS

if TYPE_CHECKING:
    from edgepeft.runtime.generate import Generator

SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed",
)  # fmt: skip
OPTIONS = {  # what each task takes beside the texts, --json, --adapter and --threads
    "text-classification": ("top_k",),
    "text-generation": ("prompt", "system", "raw", "stream", "kv_cache", *SAMPLING),
}


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given at all."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def task_of(bundle: Path | str) -> str:
    """Return the task of a bundle, by its manifest alone."""
    return known_task(bundle, unseal(Path(bundle) / NAME)["task"])


def check_options(bundle: Path | str, task: str, options: Sequence[str]) -> None:
    """Raise ConfigError for options that are for bundles of another task."""
    flags = {name: f"--{name.replace('_', '-')}" for name in (*options, *OPTIONS[task])}
    if odd := [flags[name] for name in options if name not in OPTIONS[task]]:
        fit = ", ".join(flags[name] for name in OPTIONS[task])
        raise ConfigError(f"{', '.join(odd)}: not for {bundle}, whose task is {task}. It takes {fit}.")


def run(
    bundle: Path | str,
    texts: Sequence[str] = (),
    file: Path | str | None = None,
    as_json: bool = False,
    adapter: str | None = None,
    threads: int = 0,
    device: str = DEVICES[0],
    precision: str = PRECISIONS[0],
    **options: Any,
) -> int:
    """Classify or answer texts with a bundle, as its task is, and return how many there were."""
    check_threads(threads)
    task, asked = task_of(bundle), given(options)
    check_options(bundle, task, list(asked))
    command = run_cli if task == "text-classification" else write_cli
    return command(
        bundle, texts, file, as_json, adapter=adapter, threads=threads, device=device, precision=precision, **asked
    )


def as_prompt(model: Generator, text: str, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    """Return what to ask a model for a text: messages where it has a chat template, unless `raw`."""
    if raw or not model.template:
        if system is not None:
            why = "with --raw" if raw else "as this bundle has no chat template"
            raise ConfigError(f"--system: cannot be used {why}; write it into the prompt.")
        return text
    asked = [{"role": "system", "content": system}] if system is not None else []
    return [*asked, {"role": "user", "content": text}]


def _prompts(prompt: str | None, texts: Sequence[str], file: Path | str | None) -> Iterator[list[str]]:
    if prompt is None:
        yield from inputs(texts, file)
    elif texts or file is not None:
        raise DataError("prompts come from one place: --prompt TEXT, texts as arguments, or --file FILE.")
    else:
        yield [prompt]


def _answer(model: Generator, text: str, asked: Any, as_json: bool, stream: bool, options: dict[str, Any]) -> None:
    """Write the answer to one prompt to standard output."""
    found = model.generate(asked, stream=stream, **options)
    if stream:
        for piece in found:
            print(piece, end="", flush=True)
        print(flush=True)
        found = found.answer
    elif not as_json:
        print(found.text, flush=True)
    if as_json:
        print(json.dumps({"prompt": text, **found.as_dict()}, ensure_ascii=False), flush=True)
    elif found.note and found.finish == "length":
        say(f"note: {found.note}")


def write_cli(
    bundle: Path | str,
    texts: Sequence[str] = (),
    file: Path | str | None = None,
    as_json: bool = False,
    adapter: str | None = None,
    threads: int = 0,
    library: str = "auto",
    prompt: str | None = None,
    system: str | None = None,
    raw: bool = False,
    stream: bool | None = None,
    kv_cache: str = KV_CACHES[0],
    device: str = DEVICES[0],
    precision: str = PRECISIONS[0],
    **options: Any,
) -> int:
    """Answer prompts with a language model and write the answers to standard output; return how many there were.

    Answers come piece by piece unless `stream` is False; JSON comes an answer a line.
    """
    if stream and as_json:
        raise ConfigError("--stream: an answer as JSON comes whole; leave one of --stream and --json out.")
    count = 0
    prompts = _prompts(prompt, texts, file)
    first = next(prompts, [])  # a mistake is said before a model is loaded
    kind = {"kv_cache": kv_cache, "device": device, "precision": precision}
    model: Generator = load(bundle, threads=threads, library=library, **kind)
    if adapter is not None:
        model.use(adapter)
    try:
        for text in (*first, *(text for chunk in prompts for text in chunk)):
            _answer(
                model, text, as_prompt(model, text, system, raw), as_json, not as_json and stream is not False, options
            )
            count += 1
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped.")
        raise SystemExit(130) from None
    return count

"""`edgepeft chat`: a conversation with a language model, at a terminal or through a pipe.

A line is what the user says, one that begins with a slash is a command. Ctrl-C ends the answer that is being written
and keeps what there is of it, Ctrl-D ends the conversation. What was said so far is in the model's cache, so only what
is new is read for an answer; another adapter has to read it all once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.console import say
from edgepeft.errors import ConfigError, EdgePeftError, unknown
from edgepeft.runtime.commands import check_options, given, task_of
from edgepeft.runtime.session import DEVICES, KV_CACHES, check_threads, load
from edgepeft.runtime.vulkan import PRECISIONS

if TYPE_CHECKING:
    from edgepeft.runtime.generate import Generator

HELP = """/reset          forget what was said
/adapter NAME   answer with another adapter from now on; "none" is the base model
/quit           end, as Ctrl-D does; Ctrl-C ends only the answer that is being written"""


@contextlib.contextmanager
def stopping(event: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set an event instead of raising; the second one raises."""

    def stop(*_: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation:
    """What was said, and the commands about it. `options` go to `Generator.generate`."""

    def __init__(self, model: Generator, system: str | None, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._opening)
        self.over = False

    def hear(self, line: str) -> None:
        """Answer a line, or do what it commands. What is wrong with it is said, and changes nothing."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._answer(line)
        except EdgePeftError as error:
            say(f"error: {error}")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands = {"/reset": self._reset, "/adapter": self._adapter, "/quit": self._quit, "/help": self._help}
        if name not in commands:
            raise ConfigError(unknown("command", name, commands))
        commands[name](rest.strip())

    def _reset(self, _: str) -> None:
        self.messages = list(self._opening)

    def _adapter(self, name: str) -> None:
        if name:
            self._model.use(name)
        say(f"adapter: {self._model.adapter} of {', '.join([*self._model.adapters, 'none'])}")

    def _quit(self, _: str) -> None:
        self.over = True

    def _help(self, _: str) -> None:
        say(HELP)

    def _answer(self, line: str) -> None:
        """Write the answer to a line as it comes, and remember both."""
        asked = [*self.messages, {"role": "user", "content": line}]
        enough = threading.Event()
        with stopping(enough):
            stream = self._model.chat(asked, stream=True, cancel=enough, **self._options)
            for piece in stream:
                print(piece, end="", flush=True)
            print(flush=True)
        answer = stream.answer
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        if answer.note and answer.finish == "length":
            say(f"note: {answer.note}. /reset makes room.")


def lines() -> Iterator[str]:
    """Yield what the user says: with editing and history at a terminal, line by line through a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends the conversation.")


def _terminated(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def chat_cli(
    bundle: Path | str,
    system: str | None = None,
    adapter: str | None = None,
    threads: int = 0,
    library: str = "auto",
    kv_cache: str | None = None,
    device: str = DEVICES[0],
    precision: str = PRECISIONS[0],
    **options: Any,
) -> None:
    """Talk with a language model until the user ends it.

    Raises ConfigError for a bundle of another task and ArtifactError for one without a chat template.
    """
    check_threads(threads)
    if (task := task_of(bundle)) != "text-generation":
        raise ConfigError(f"{bundle}: its task is {task}; only a text-generation bundle can chat. Use edgepeft run.")
    asked = given(options)
    check_options(bundle, task, list(asked))
    kind = {"kv_cache": kv_cache or KV_CACHES[0], "device": device, "precision": precision}
    model: Generator = load(bundle, threads=threads, library=library, **kind)
    model.use(adapter or model.adapter)
    talk = Conversation(model, system, asked)
    model.encode([*talk.messages, {"role": "user", "content": "?"}])  # no template, no jinja2: said at once
    signal.signal(signal.SIGTERM, _terminated)  # it ends everything, where Ctrl-C ends an answer
    if sys.stdin.isatty():
        say(f"{model.manifest['name']}, adapter {model.adapter}. /help lists the commands.")
    for line in lines():
        talk.hear(line)
        if talk.over:
            return

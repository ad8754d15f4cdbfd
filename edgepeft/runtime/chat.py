"""From messages to the text a model was taught to answer: its chat template, rendered as transformers renders it.

    [{"role": "user", "content": "Hello"}] ──► <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n

The template is `chat_template.jinja`, or `chat_template` in tokenizer_config.json: one text, or several with names of
which "default" is taken. It is a program that came with a model, so it runs in jinja2's sandbox, sees plain JSON values
only, and jinja2 itself (an optional package) is imported when the first message is rendered.

Left out: templates by another name, and functions as tools (give their JSON schemas). Text of a message that spells a
special token becomes that token, as in transformers.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import read_json
from edgepeft.errors import ArtifactError, ConfigError, DataError
from edgepeft.runtime.library import version_tuple
from edgepeft.runtime.tokens import is_unicode

JINJA = "3.1.6"  # older sandboxes are known to leak
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def template_of(folder: Path) -> str | None:
    """Return the text of a folder's chat template, or None where it has none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = _settings(folder).get("chat_template")
    if isinstance(found, list):
        found = {row["name"]: row["template"] for row in found}.get("default")
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the strings of a folder's special tokens by the names that templates use."""
    path = folder / "special_tokens_map.json"
    found = {**(read_json(path) if path.exists() else {}), **_settings(folder)}
    words = {name: found[name] for name in TOKENS if found.get(name) is not None}
    return {name: word["content"] if isinstance(word, Mapping) else word for name, word in words.items()}


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as plain JSON values of their own. Raises DataError with the place of what is none."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages: expected a list of {{'role': 'user', 'content': ...}}, found {messages!r:.80}.")
    for place, message in enumerate(messages):
        known = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not known or not {"content", "tool_calls"} & set(message):
            raise DataError(f"message {place}: expected {{'role': ..., 'content': ...}}, found {message!r:.80}.")
        if isinstance(message.get("content"), str) and not is_unicode(message["content"]):
            raise DataError(f"message {place}: not valid Unicode (half of a surrogate pair).")
    try:
        plain = json.loads(json.dumps(list(map(dict, messages)), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(f"messages: expected values that JSON has: {error}.") from None
    return [{key: value for key, value in message.items() if value is not None} for message in plain]


class ChatTemplate:
    """The chat template of a folder, compiled when it is first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._text = template_of(folder)
        self._special = special_tokens(folder) if self._text is not None else {}
        self._compiled: Any = None

    def __bool__(self) -> bool:
        return self._text is not None

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """Return the text that asks for the next answer; `options` are names that the template may read.

        Raises DataError for messages that are none or that the template refuses, ArtifactError where there is no
        template or it is damaged, ConfigError where jinja2 is missing.
        """
        if self._text is None:
            raise ArtifactError(
                f"{self._folder}: has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json). Give plain prompts instead of messages (--raw)."
            )
        plain = check_messages(messages)
        names = {"tools": None, "documents": None, "add_generation_prompt": True, **self._special, **(options or {})}
        template = self._compile()
        try:
            return template.render(messages=plain, **names)
        except Exception as error:  # a template is a program: it may raise anything
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{self._folder}: the chat template refuses these messages: {what}") from None

    def _compile(self) -> Any:
        if self._compiled is None:
            environment = _environment()
            try:
                self._compiled = environment.from_string(self._text)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise ArtifactError(f"{self._folder}: the chat template cannot be read: {what}") from None
        return self._compiled


# --- jinja2 --------------------------------------------------------------------------------------------------------


def _import_jinja() -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        found = None
    else:
        found = jinja2.__version__
    if found is None or version_tuple(found) < version_tuple(JINJA):
        raise ConfigError(
            f"this model's chat template needs jinja2 {JINJA} or newer, found {found or 'none'}. "
            f"pip install 'jinja2>={JINJA}', or give plain prompts instead of messages (--raw)."
        )
    return jinja2


def _environment() -> Any:
    """Return the sandbox: transformers' settings, filters and functions."""
    jinja2 = _import_jinja()
    extension: Any = jinja2.ext.Extension

    class Generation(extension):
        """Lets `{% generation %}`, which marks what is trained on, stand for what is in it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse(jinja2.TemplateError), strftime_now=_now)
    environment.globals["namespace"] = _namespace(jinja2)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False):
    """Return JSON with nothing in it changed for HTML, which is what jinja2's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _refuse(kind: type[Exception]) -> Any:
    def raise_exception(message: str) -> None:
        raise kind(message)

    return raise_exception


def _namespace(jinja2: Any) -> Any:
    """Return jinja2's namespace, less names with an underscore in front, which are Python's own."""

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **values: Any) -> None:
            for name in dict(*args[1:], **values):
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(*args, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    return Namespace

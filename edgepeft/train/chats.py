"""Texts to learn to write: rows in three forms, and which of their tokens the loss is taken on.

| form | columns | trained |
|---|---|---|
| conversations | messages: [{"role", "content"}, ...] | the turns of the assistant and the token that ends each |
| prompts | prompt, completion | the completion and the end of text |
| texts | text (--text-column) | all of it; a text longer than a row goes on in the next |

Sources and splits are those of labelled texts (`data`); a test split is optional. A conversation is written by the
model's own chat template. Where that marks the answers ({% generation %}) the mark is taken; else an answer is what the
template writes for the turns up to it, less what it writes as the prompt for one, and a template whose answers do not
begin with that prompt is refused, since the device could never ask as it was trained. Some templates write earlier
turns otherwise than the last one (without its thoughts, say): then each answer is an example with the turns before it,
as the device will meet it.

Text is tokenized whole where the tokens of its beginning stay the same when more follows, as they do after the end of a
word; elsewhere each part by itself, as the device does. A template that asks for the date is always given the same, so
that equal data give equal bytes.

Left out: loss on other roles, tools and images, preferences.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.console import say
from edgepeft.errors import DataError, unknown
from edgepeft.runtime.tokens import is_unicode
from edgepeft.train.data import SHIPPED, Splits, assignment, decoded, kind_of, listed, raise_all, read_tables
from edgepeft.train.read import Table

if TYPE_CHECKING:
    from edgepeft.config import Config

ROLES = ("system", "developer", "user", "assistant", "tool")
IGNORED = -100
VALIDATION_SHARE = 0.1
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands before a template in place of the clock; the day is the one that Llama's templates take where there is none.
NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}{{ '' }}"

Row = tuple[str, Any]  # place, what the form's checker made of it
Tokens = tuple[list[int], list[bool]]  # ids, and which are trained


class Refused(Exception):  # noqa: N818 - not an error by itself: all of a split are told together
    """A row cannot be used, for the reason given."""


@dataclasses.dataclass(frozen=True)
class Chats:
    """M checked rows of one form, in file order."""

    source: Path
    form: str
    rows: tuple[Row, ...]
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, tokenizer: Any, limit: int, name: str | None = None) -> list[dict[str, Any]]:
        """Return rows of token ids and labels (IGNORED where no loss is taken), at most `limit` long.

        A row may become several, or none when it has no trained token. What was cut is told when the split has a name.
        Raises DataError that lists all rows the chat template refuses, and when nothing is left.
        """
        written = self._tokens(tokenizer, limit)
        kept = [[example for tokens in found if (example := _example(tokens, limit))] for found in written]
        long = [any(any(trained[limit:]) for _, trained in found) for found in written]
        cut = sum(bool(examples) and more for examples, more in zip(kept, long, strict=True))
        self._tell(name, cut, sum(not examples for examples in kept), limit)
        if self.rows and not any(kept):
            raise DataError(
                f"{self.source}: none of {len(self)} {self.form} has anything to learn within its first {limit} "
                "tokens. Give a larger --max-length, or shorter ones."
            )
        return [example for examples in kept for example in examples]

    def _tokens(self, tokenizer: Any, limit: int) -> list[list[Tokens]]:
        """Return the tokens of every row, uncut. Raises DataError that lists all rows that cannot be written."""
        if self.form == "conversations" and not tokenizer.chat_template:
            raise DataError(
                f"{self.source}: holds conversations, and the model has no chat template to write them with. Take a "
                "model tuned for chats, put its chat_template.jinja into the model folder, or give prompt and "
                "completion."
            )
        bad: dict[str, list[str]] = {}
        written = []
        for place, content in self.rows:
            try:
                written.append(FORMS[self.form].tokens(tokenizer, content, limit))
            except Refused as reason:
                bad.setdefault(str(reason), []).append(place)
        raise_all([f"{self.source}: {listed(places)}: {reason}" for reason, places in bad.items()])
        return written

    def _tell(self, name: str | None, cut: int, lost: int, limit: int) -> None:
        count = f"of {len(self)} {self.form}"
        if name and cut:
            say(
                f"  {name}: {cut} {count} are longer than {limit} tokens and were cut; the ends of their answers are "
                "lost (--max-length)"
            )
        if name and lost:
            say(f"  {name}: {lost} {count} have no answer within {limit} tokens and were left out (--max-length)")


def _example(tokens: Tokens, limit: int) -> dict[str, Any] | None:
    """Return a row of ids and labels, or nothing when no token of it is trained. The first one has no predecessor."""
    ids, trained = tokens[0][:limit], tokens[1][:limit]
    labels = [IGNORED, *(i if t else IGNORED for i, t in zip(ids[1:], trained[1:], strict=True))]
    return {"input_ids": ids, "labels": labels[: len(ids)]} if any(label != IGNORED for label in labels) else None


def chat_splits(config: Config) -> Splits[Chats]:
    """Read, check and split conversations, prompts or texts; a validation split that is missing is cut from train.

    Raises DataError that lists all problems: where, what was expected, what was found, what to do.
    """
    if config.data == SHIPPED:
        raise DataError(
            f"{SHIPPED}: holds texts and labels, nothing to learn to write. Give --data with messages, prompt and "
            "completion, or text."
        )
    problems: list[str] = []
    tables = read_tables(config)
    parts = {name: _checked(table, config, problems) for name, table in tables.items()}
    raise_all(problems)
    if "validation" not in parts:
        parts = {**parts, **_cut(parts["train"], config)}
    _warn(parts)
    nothing = Chats(parts["train"].source, parts["train"].form, ())
    return Splits(parts["train"], parts["validation"], parts.get("test", nothing), ())


def _cut(whole: Chats, config: Config) -> dict[str, Chats]:
    """Cut the validation split from train, by a hash of seed and content; equal rows stay on one side."""
    keys = [_key(content) for _, content in whole.rows]
    where = assignment([("", key, "") for key in keys], {"validation": VALIDATION_SHARE}, config.seed)
    chosen = {
        name: tuple(row for row, key in zip(whole.rows, keys, strict=True) if where[key] == name)
        for name in ("train", "validation")
    }
    if not chosen["validation"]:
        raise DataError(
            f"{whole.source}: {len(whole)} {whole.form}, {len(set(keys))} of them different, are too few to cut "
            "validation from train. Add some or give a validation file."
        )
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in chosen.items())
    say(f"  no validation split in {config.data}: cut with seed {config.seed} ({sizes})")
    return {name: dataclasses.replace(whole, rows=rows) for name, rows in chosen.items()}


def _key(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)


def _warn(parts: dict[str, Chats]) -> None:
    train = {_key(content) for _, content in parts["train"].rows}
    for name in ("validation", "test"):
        rows = parts[name].rows if name in parts else ()
        if leaked := sum(_key(content) in train for _, content in rows):
            say(f"  note: {leaked} of {len(rows)} {name} rows are in train as well; its figures look better.")


# --- checking ----------------------------------------------------------------------------------------------------


def _checked(table: Table, config: Config, problems: list[str]) -> Chats:
    """Return the checked rows of a table; add what is wrong to `problems`."""
    wanted = {name: form.columns or (config.text_column,) for name, form in FORMS.items()}
    form = next((name for name, columns in wanted.items() if set(columns) <= set(table.columns)), "")
    if not table.rows:
        problems.append(f"{table.source}: no rows; expected {_either(wanted)}. Add some or leave the file out.")
    elif not form:
        problems.append(_no_form(table, wanted))
    bad: dict[str, list[str]] = {}
    rows = []
    for place, values in table.rows if form else ():
        try:
            rows.append((place, FORMS[form].check([decoded(values.get(name)) for name in wanted[form]], wanted[form])))
        except Refused as reason:
            bad.setdefault(str(reason), []).append(place)
    problems += [f"{table.source}: {listed(places)}: {reason}" for reason, places in bad.items()]
    return Chats(table.source, form, tuple(rows))


def _either(wanted: dict[str, tuple[str, ...]]) -> str:
    return ", or ".join(" and ".join(map(repr, columns)) for columns in wanted.values())


def _no_form(table: Table, wanted: dict[str, tuple[str, ...]]) -> str:
    names = [name for columns in wanted.values() for name in columns]
    close = [near for name in names for near in difflib.get_close_matches(name, table.columns, n=1, cutoff=0.7)]
    hint = f" Rename {close[0]!r}." if close else ""
    found = ", ".join(map(repr, table.columns)) or "none"
    return f"{table.source}: expected columns {_either(wanted)}; found {found}.{hint}"


def _text(value: Any, what: str) -> str:
    """Return a value that is text, or say what it is."""
    if not isinstance(value, str):
        found = "nothing" if value is None else kind_of(value)
        raise Refused(f"expected text as {what}, found {found}. Save it as text.")
    if not is_unicode(value):
        raise Refused(f"{what} is not valid Unicode (half of a surrogate pair). Mend or remove these rows.")
    return value


def _filled(value: Any, what: str) -> str:
    if not _text(value, what).strip():
        raise Refused(f"{what} is empty. Fill in or remove these rows.")
    return value


def _check_texts(values: Sequence[Any], names: Sequence[str]) -> list[str]:
    return [_filled(value, repr(name)) for value, name in zip(values, names, strict=True)]


def _check_messages(values: Sequence[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the turns of a conversation, without the keys that hold nothing; a CSV field holds them as JSON."""
    (turns,) = values
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise Refused(f"expected a JSON list of turns in {names[0]!r}, found other text. Write JSON.") from None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Refused(f"expected a list of turns with role and content in {names[0]!r}, found {_brief(turns)}.")
    checked = [_turn(turn) for turn in turns]
    roles = [turn["role"] for turn in checked]
    if "assistant" not in roles:
        raise Refused("no turn of the assistant: there is nothing to learn. Add its answer or remove these rows.")
    if not set(roles[: roles.index("assistant")]) - {"system", "developer"}:
        raise Refused("the assistant speaks first: there is nothing it answers. Put a turn of the user before it.")
    return checked


def _brief(value: Any) -> str:
    return f"{value!r:.40}" if value is None or value == [] else kind_of(value)


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    held = {name: value for name, value in turn.items() if value is not None}
    if missing := {"role", "content"} - set(held):
        found = ", ".join(sorted(map(str, held))) or "nothing"
        raise Refused(
            f"expected turns with role and content, found one without {' and '.join(sorted(missing))} ({found})."
        )
    if held["role"] not in ROLES:
        raise Refused(unknown("role", held["role"], ROLES))
    check = _filled if held["role"] == "assistant" else _text
    check(held["content"], f"the content of a turn of the {held['role']}")
    return held


# --- tokens ------------------------------------------------------------------------------------------------------


def _of_text(tokenizer: Any, content: Sequence[str], limit: int) -> list[Tokens]:
    """Return the rows of a text: it goes on in the next where one is full."""
    ids = [*beginning(tokenizer), *_ids(tokenizer, content), *_end(tokenizer)]
    return [(part, [True] * len(part)) for i in range(0, len(ids), limit) if (part := ids[i : i + limit])]


def _of_prompt(tokenizer: Any, content: Sequence[str], limit: int) -> list[Tokens]:
    """Return a prompt and its completion as one row."""
    ids, places = _parts(tokenizer, content)
    start, end = beginning(tokenizer), _end(tokenizer)
    asked = len(start) + places[0]
    return [([*start, *ids, *end], [False] * asked + [True] * (len(ids) - places[0] + len(end)))]


def beginning(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text."""
    return [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _ids(tokenizer: Any, parts: Sequence[str]) -> list[int]:
    """Return the tokens of each part by itself, one after the other, with nothing around them."""
    encoded = tokenizer(list(parts), add_special_tokens=False, verbose=False)["input_ids"]
    return list(itertools.chain.from_iterable(encoded))


def _parts(tokenizer: Any, parts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the tokens of a text in parts, and how many of them each part and those before it take."""
    begun = list(itertools.accumulate(parts))
    encoded = tokenizer(begun, add_special_tokens=False, verbose=False)["input_ids"]
    if any(encoded[-1][: len(ids)] != ids for ids in encoded):
        encoded = [_ids(tokenizer, parts[: i + 1]) for i in range(len(parts))]
    return encoded[-1], [len(ids) for ids in encoded]


def _of_conversation(tokenizer: Any, turns: Sequence[dict[str, Any]], limit: int) -> list[Tokens]:
    """Return a conversation as one row, or as one for each answer where its template needs that."""
    if GENERATION.search(tokenizer.get_chat_template()):
        return [_marked(tokenizer, turns)]
    answers = [_answer(tokenizer, turns[:i], turns[i]) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    whole = _write(tokenizer, turns)
    if all(whole.startswith(asked + answer) for asked, answer in answers):
        ends = [place for asked, answer in answers for place in (len(asked), len(asked) + len(answer))]
        return [_answered(tokenizer, [whole[i:j] for i, j in itertools.pairwise([0, *ends, len(whole)])])]
    return [_answered(tokenizer, answer) for answer in answers]


def _marked(tokenizer: Any, turns: Sequence[dict[str, Any]]) -> Tokens:
    """Return a conversation whose template marks the answers itself."""
    found = _render(tokenizer, turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    trained = [bool(mark) for mark in found["assistant_masks"]]
    if not any(trained):
        raise Refused("the chat template marks no token of the assistant with {% generation %}. Mend the template.")
    return list(found["input_ids"]), trained


def _write(tokenizer: Any, turns: Sequence[dict[str, Any]], **options: Any) -> str:
    return _render(tokenizer, turns, tokenize=False, **options)


def _render(tokenizer: Any, turns: Sequence[dict[str, Any]], **options: Any) -> Any:
    """Apply the chat template. Raises Refused with its words."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(turns), chat_template=NO_CLOCK + tokenizer.get_chat_template(), **options
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:200].rstrip(".")
        raise Refused(
            f"the model's chat template refuses it: {words}. Change the turns or take another model."
        ) from None


def _answer(tokenizer: Any, before: Sequence[dict[str, Any]], turn: dict[str, Any]) -> tuple[str, str]:
    """Return what the template writes to ask for an answer, and what it adds for the answer."""
    asked = _write(tokenizer, before, add_generation_prompt=True)
    answered = _write(tokenizer, [*before, turn])
    if not answered.startswith(asked):
        same = next((i for i, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(answered))
        raise Refused(
            f"the model's chat template asks for an answer with {asked[same:][:40]!r} where it writes "
            f"{answered[same:][:40]!r} when there is one, so the device would ask otherwise than was trained. Give "
            "prompt and completion instead."
        )
    return asked, answered[len(asked) :]


def _answered(tokenizer: Any, parts: Sequence[str]) -> Tokens:
    """Return text of which every second part is an answer, without what the template puts after an answer's end."""
    ids, ends = _parts(tokenizer, parts)
    trained = [False] * len(ids)
    special = set(tokenizer.added_tokens_decoder)
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        stop = end
        while stop > start and ids[stop - 1] not in special and not tokenizer.decode(ids[stop - 1 : stop]).strip():
            stop -= 1
        end = stop if stop > start and ids[stop - 1] in special else end
        trained[start:end] = [True] * (end - start)
    return ids, trained


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of rows: its columns, and how values become content and content becomes tokens.

    check(values, column names) -> content, or Refused.  tokens(tokenizer, content, limit) -> rows, or Refused.
    """

    columns: tuple[str, ...]
    check: Callable[[Sequence[Any], Sequence[str]], Any]
    tokens: Callable[[Any, Any, int], list[Tokens]]


# By name, in the order in which columns are looked for; no columns: the one that --text-column names.
FORMS = {
    "conversations": Form(("messages",), _check_messages, _of_conversation),
    "prompts": Form(("prompt", "completion"), _check_texts, _of_prompt),
    "texts": Form((), _check_texts, _of_text),
}

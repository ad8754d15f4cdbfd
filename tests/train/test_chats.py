"""Conversations, prompts and texts: which tokens are trained, to the token, and every way rows can be wrong."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from builders import CHAT_TEMPLATE, conversations, write_chat_tokenizer, write_rows

from edgepeft.config import Config
from edgepeft.errors import DataError
from edgepeft.train.chats import IGNORED, Chats
from edgepeft.train.data import load_splits

SYSTEM = {"role": "system", "content": "be the lamp"}
TURNS = [
    {"role": "user", "content": "on in the hall?"},
    {"role": "assistant", "content": "hall = on"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "the end\n"},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (  # no generation prompt, as Llama 2 and Mistral have it
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
THINKING = (  # thoughts before the last answer alone, as Qwen3 has it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREFILLED = (  # asks with an opened thought that answers do not have, as DeepSeek R1 does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
    + CHAT_TEMPLATE
)
DATED = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE


def tokenizer(folder: Path, template: str | None = CHAT_TEMPLATE, bos: bool = False) -> Any:
    """Return the byte-level tokenizer of the tests, with a token that begins every text where asked for."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    write_chat_tokenizer(folder, template)
    made = AutoTokenizer.from_pretrained(folder)
    if bos:
        made.bos_token = "<|im_start|>"
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", made.bos_token_id)]
        )
    return made


def split(form: str, *rows: Any) -> Chats:
    return Chats(Path("x.jsonl"), form, tuple((f"line {i}", row) for i, row in enumerate(rows, 1)))


def spans(tokenizer: Any, example: dict[str, list[int]]) -> list[str]:
    """Return the stretches of trained tokens as text; every label has to be the token itself."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    found = []
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        ids = [token for token, label in group if not trained or token == label]
        found += [tokenizer.decode(ids)] if trained else []
    return found


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, [["hall = on<|im_end|>", "the end\n<|im_end|>"]]),
        (MARKED, [["hall = on<|im_end|>", "the end\n<|im_end|>"]]),
        (BRACKETS, [[" hall = on<|im_end|>", " the end\n<|im_end|>"]]),
        (THINKING, [["<think></think>hall = on<|im_end|>"], ["<think></think>the end\n<|im_end|>"]]),
        (DATED, [["hall = on<|im_end|>", "the end\n<|im_end|>"]]),
    ],
    ids=["prefixes", "marked", "no prompt", "other earlier turns", "dated"],
)
def test_the_answers_of_a_conversation_are_trained(tmp_path: Path, template: str, expected: list[list[str]]) -> None:
    made = tokenizer(tmp_path, template)
    examples = split("conversations", TURNS).encode(made, 200)
    assert [spans(made, example) for example in examples] == expected
    written = [made.apply_chat_template(TURNS[:n], tokenize=False) for n in ((4,) if len(expected) == 1 else (2, 4))]
    if template != DATED:
        assert [made.decode(example["input_ids"]) for example in examples] == written
    else:
        assert made.decode(examples[0]["input_ids"]).startswith("26 Jul 2024 ")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("form", "row", "whole", "trained"),
    [
        ("prompts", ["lamp on?", " the lamp"], "lamp on? the lamp<|im_end|>", [" the lamp<|im_end|>"]),
        ("prompts", ["say i", "n the"], "say in the<|im_end|>", ["n the<|im_end|>"]),
        ("texts", ["the lamp"], "the lamp<|im_end|>", None),
    ],
)
def test_prompts_and_texts_end_where_the_text_ends(
    tmp_path: Path, bos: bool, form: str, row: list[str], whole: str, trained: list[str] | None
) -> None:
    made = tokenizer(tmp_path, bos=bos)
    (example,) = split(form, row).encode(made, 64)
    begin = "<|im_start|>" * bos
    assert made.decode(example["input_ids"]) == begin + whole
    assert spans(made, example) == (trained or [whole if bos else made.decode(example["input_ids"][1:])])
    asked = made(row[0])["input_ids"]
    assert example["input_ids"][: len(asked)] == asked, "the device asks with other tokens"


def test_what_does_not_fit_is_cut_and_told(tmp_path: Path, capsys: Any) -> None:
    made = tokenizer(tmp_path)
    rows = [["on", "lamp" * 20], ["on " * 30, "lamp"], ["on", "lamp"]]
    examples = split("prompts", *rows).encode(made, 24, "train")
    told = capsys.readouterr().err
    assert [len(example["input_ids"]) for example in examples] == [24, 7]
    assert "train: 1 of 3 prompts are longer than 24 tokens and were cut; the ends of their answers are lost" in told
    assert "train: 1 of 3 prompts have no answer within 24 tokens and were left out" in told
    assert split("prompts", rows[2]).encode(made, 24) == examples[1:]
    assert capsys.readouterr().err == "", "nothing is told of a split without a name"
    pieces = split("texts", ["lamp" * 20]).encode(made, 24)
    assert made.decode([i for piece in pieces for i in piece["input_ids"]]) == "lamp" * 20 + "<|im_end|>"
    assert [piece["labels"][0] for piece in pieces] == [IGNORED] * 4
    with pytest.raises(DataError, match="none of 1 prompts has anything to learn within its first 24 tokens"):
        split("prompts", rows[1]).encode(made, 24)


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (None, TURNS, "no chat template"),
        (PREFILLED, TURNS, "2 rows (line 1, line 2): the model's chat template asks for an answer with '<think>'"),
        (STRICT, [SYSTEM, *TURNS], "2 rows (line 1, line 2): the model's chat template refuses it: no system here"),
        (
            MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"),
            TURNS[2:3],
            "marks",
        ),
    ],
    ids=["missing", "another prompt", "refuses", "marks nothing"],
)
def test_a_template_that_cannot_serve_is_named(tmp_path: Path, template: str | None, turns: list, said: str) -> None:
    with pytest.raises(DataError) as caught:
        split("conversations", turns, turns).encode(tokenizer(tmp_path, template), 200)
    assert said in str(caught.value)
    assert "x.jsonl" in str(caught.value)


# --- sources -----------------------------------------------------------------------------------------------------


def chat_config(path: Path, **changes: Any) -> Config:
    return Config(data=str(path), task="text-generation", **changes)


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(path, [{"messages": json.dumps(row["messages"])} for row in rows])


SOURCES = {
    "jsonl": lambda p, rows: write_rows(p / "a.jsonl", rows),
    "parquet": lambda p, rows: write_rows(p / "a.parquet", rows),
    "csv": lambda p, rows: as_csv(p / "a.csv", rows),
    "dataset": lambda p, rows: saved(p / "saved", rows),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_conversations(tmp_path: Path, kind: str) -> None:
    rows = conversations(60)
    splits = load_splits(chat_config(SOURCES[kind](tmp_path, rows)))
    found = [content for part in (splits.train, splits.validation) for _, content in part.rows]
    assert sorted(map(str, found)) == sorted(str(row["messages"]) for row in rows)
    assert (len(splits.test), splits.labels, splits.train.form) == (0, (), "conversations")
    assert 3 <= len(splits.validation) <= 10
    mirrored = load_splits(chat_config(write_rows(tmp_path / "b.jsonl", rows[::-1])))
    assert {str(content) for _, content in mirrored.validation.rows} == {
        str(content) for _, content in splits.validation.rows
    }
    assert not {str(c) for _, c in splits.validation.rows} & {str(c) for _, c in splits.train.rows}


def test_splits_may_have_forms_of_their_own(tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path / "train.csv", [{"prompt": "a", "completion": str(i)} for i in range(4)])
    write_rows(tmp_path / "valid.jsonl", [{"body": "some text"}])
    write_rows(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "1"}, {"prompt": "a", "completion": "9"}])
    splits = load_splits(chat_config(tmp_path, text_column="body"))
    parts = (splits.train, splits.validation, splits.test)
    assert [(part.form, len(part)) for part in parts] == [("prompts", 4), ("texts", 1), ("prompts", 2)]
    assert "1 of 2 test rows are in train as well" in capsys.readouterr().err


def line(*turns: tuple[Any, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


GOOD = line(("user", "on"), ("assistant", "done"))
FAULTS = {
    "no rows": ("", ["no rows", "'messages', or 'prompt' and 'completion', or 'text'"]),
    "other columns": ('{"mesages": []}\n', ["found 'mesages'", "Rename 'mesages'"]),
    "half a form": ('{"prompt": "a"}\n', ["expected columns", "found 'prompt'"]),
    "unknown role": (GOOD + line(("human", "on"), ("gpt", "x")), ["1 row (line 2): unknown role 'human'", "user"]),
    "other keys": (
        GOOD + '{"messages": [{"from": "a", "value": "b"}]}\n',
        ["line 2", "without content and role", "value"],
    ),
    "no list": (GOOD + '{"messages": 3}\n', ["line 2", "expected a list of turns", "int"]),
    "no turns": (GOOD + '{"messages": []}\n', ["line 2", "found []"]),
    "missing": (GOOD + '{"text": "x"}\n', ["line 2", "found None"]),
    "no answer": (GOOD + line(("user", "on")), ["line 2", "no turn of the assistant"]),
    "empty answer": (GOOD + 2 * line(("user", "on"), ("assistant", " ")), ["2 rows (line 2, line 3)", "is empty"]),
    "assistant first": (GOOD + line(("system", "s"), ("assistant", "a")), ["line 2", "assistant speaks first"]),
    "parts": (GOOD + line(("user", [{"type": "text"}]), ("assistant", "a")), ["line 2", "of the user, found list"]),
    "half an emoji": (GOOD + line(("user", "\ud83d"), ("assistant", "a")), ["line 2", "not valid Unicode"]),
    "no JSON": (GOOD + '{"messages": "hello"}\n', ["line 2", "expected a JSON list"]),
    "number": ('{"prompt": "a", "completion": 3}\n', ["line 1", "expected text as 'completion', found int"]),
    "empty prompt": ('{"prompt": "", "completion": "x"}\n', ["line 1", "'prompt' is empty"]),
    "null": ('{"prompt": "a", "completion": null}\n', ["line 1", "found nothing"]),
    "empty text": ('{"text": " "}\n', ["line 1", "'text' is empty"]),
    "too few": (GOOD * 3, ["too few to cut validation"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_row_is_named_with_its_place(tmp_path: Path, fault: str) -> None:
    content, expected = FAULTS[fault]
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        load_splits(chat_config(tmp_path / "a.jsonl"))
    assert [part for part in expected if part not in str(caught.value)] == []
    assert "a.jsonl" in str(caught.value)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD + line(("user", "on")) + line(("robot", "on")))
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError) as caught:
        load_splits(chat_config(tmp_path))
    assert len(str(caught.value).splitlines()) == 3


def test_the_shipped_texts_are_nothing_to_learn_to_write() -> None:
    with pytest.raises(DataError, match="Give --data with messages"):
        load_splits(Config(task="text-generation"))

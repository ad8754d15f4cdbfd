"""Texts in a browser: tokens and chat templates are those of Python, on many texts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgepeft.errors import DataError
from edgepeft.runtime.chat import ChatTemplate
from edgepeft.runtime.tokens import Tokens
from tests.deploy import tokenizers_made as made
from tests.runtime import test_chat as chats

TOKENS = """(async () => {
  const { Tokens } = await import("/web/tokens.js");
  const tokens = new Tokens(await (await fetch("/made/tokenizer.json", { cache: "no-store" })).json(), %s);
  const texts = await (await fetch("/made/texts.json", { cache: "no-store" })).json();
  return texts.map((text) => [tokens.encode(text), tokens.ids(text), tokens.text(tokens.ids(text))]);
})()"""
PIECES = """(async () => {
  const { Tokens, Decoding } = await import("/web/tokens.js");
  const tokens = new Tokens(await (await fetch("/made/tokenizer.json", { cache: "no-store" })).json(), null);
  const texts = await (await fetch("/made/texts.json", { cache: "no-store" })).json();
  return texts.map((text) => {
    const decoding = new Decoding(tokens);
    return tokens.ids(text).map((id) => decoding.push(id)).join("") + decoding.flush();
  });
})()"""
RENDER = """(async () => {
  const { chatTemplate } = await import("/web/chat.js");
  const get = async (name) => (await fetch("/made/" + name, { cache: "no-store" })).arrayBuffer();
  const read = async (name) => new Uint8Array(await get(name));
  const files = {
    has: () => true,
    read: async ([name]) => ({ [name]: await read(name) }),
    json: async (name) => JSON.parse(new TextDecoder().decode(await read(name))),
  };
  const render = await chatTemplate(files);
  return %s.map(([messages, options]) => {
    try { return render(messages, options); } catch (error) { return "refused: " + error.message.split(": ").at(-1); }
  });
})()"""


@pytest.fixture
def place(bundles: Any) -> Any:
    """A folder that is served beside a bundle, as /made."""
    folder = bundles("classifier").folder / "made"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("kind", made.KINDS)
def test_tokens_are_those_of_python(place, pages, kind: str) -> None:
    made.KINDS[kind]().save(str(place / "tokenizer.json"))
    texts = [text for text in made.texts() if text]
    (place / "texts.json").write_text(json.dumps(texts))
    page = pages("classifier", "wasm")
    for longest in (None, 12):
        tokens = Tokens(place / "tokenizer.json", longest)
        found = page.run(TOKENS % json.dumps(longest))
        for text, row in zip(texts, found, strict=True):
            ids = tokens.ids(text)
            whole = tokens.encode([text])[0].ids
            assert row[0] == whole, text
            if longest is None:
                assert row[1:] == [ids, tokens.text(ids)], text
    assert page.run(PIECES) == [row[2] for row in page.run(TOKENS % "null")]


# @huggingface/jinja writes "false" for False, and drops what a loop wrote in the round that ends by {% break %}.
TEMPLATES = {name: text.removesuffix("{{ inner is defined }}") for name, text in chats.TEMPLATES.items()}
del TEMPLATES["loops"]


def _rendered(template: ChatTemplate, talk: Any, options: Any) -> str:
    try:
        return template.render(talk, options)
    except DataError as error:
        return "refused: " + str(error).rsplit(": ", 1)[-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_write_what_python_does(place, pages, name: str) -> None:
    template = ChatTemplate(chats.write(place, TEMPLATES[name]))
    (place / "special_tokens_map.json").write_text("{}")
    talks = [chats.TALK, chats.TALK[:1], [*chats.SYSTEM, *chats.TALK], chats.TALK[:2]]
    cases = [(talk, options) for talk in talks for options in ({}, {"enable_thinking": False}, {"tools": chats.TOOLS})]
    found = pages("classifier", "wasm").run(RENDER % json.dumps(cases))
    assert found == [_rendered(template, *case) for case in cases]

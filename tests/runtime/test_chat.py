from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from builders import CHAT_TEMPLATE, write_chat_tokenizer

from edgepeft.errors import ArtifactError, ConfigError, DataError
from edgepeft.runtime.chat import ChatTemplate

TALK = [
    {"role": "user", "content": 'Hello <there> & "you" ü'},
    {"role": "assistant", "content": "  Hi!\n"},
    {"role": "user", "content": "Again"},
]
SYSTEM = [{"role": "system", "content": "Be short."}]
TOOLS = [{"type": "function", "function": {"name": "light", "description": "<on> & 'off' ü"}}]
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "default-system": """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is
 false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}""",
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system_message + eos_token }}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "generation": """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}{% set inner = 1 %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
        <{{ message.role }}>{{ message.content }}
    {% endif %}
{% endfor %}{{ inner is defined }}""",
    "loops": """{% set ns = namespace(found=0) %}{% for message in messages %}
{% if message.role == 'assistant' %}{% continue %}{% endif %}
{% set ns.found = ns.found + 1 %}{{ message.content }}{% if ns.found > 1 %}{% break %}{% endif %}
{% endfor %}{{ ns.found }}{{ {'a': '<ü>'} | tojson }}""",
}


def write(folder: Path, template: str | None, **settings: object) -> Path:
    """Write a tokenizer with a chat template and the special tokens of Llama's relatives."""
    write_chat_tokenizer(folder, template)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|im_start|>", **settings}))
    return folder


def as_transformers(folder: Path, messages: list, **options: object) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [TALK, TALK[:1], [*SYSTEM, *TALK], TALK[:2]])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"tools": TOOLS}])
def test_prompts_are_those_of_transformers(tmp_path: Path, name: str, messages: list, options: dict) -> None:
    folder = write(tmp_path, TEMPLATES[name])
    template = ChatTemplate(folder)
    try:
        expected = as_transformers(folder, messages, **options)
    except Exception as error:  # it refuses, and so must we, in the template's words
        with pytest.raises(DataError, match=str(error)):
            template.render(messages, options)
    else:
        assert template.render(messages, options) == expected
        assert template.render([{**m, "tool_calls": None} for m in messages], options) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": CHAT_TEMPLATE},
        {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]},
        {
            "chat_template": "{{ eos_token }}{{ bos_token }}",
            "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        },
    ],
)
def test_a_template_may_stand_in_the_configuration(tmp_path: Path, settings: dict) -> None:
    folder = write(tmp_path, None, **settings)
    expected = as_transformers(folder, TALK)
    assert ChatTemplate(folder).render(TALK) == expected


def test_the_file_wins_over_the_configuration(tmp_path: Path) -> None:
    folder = write(tmp_path, "{{ messages[0].content }}", chat_template="other")
    assert ChatTemplate(folder).render(TALK[2:]) == "Again"


@pytest.mark.parametrize("settings", [{}, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_no_template_is_said(tmp_path: Path, settings: dict) -> None:
    template = ChatTemplate(write(tmp_path, None, **settings))
    assert not template
    with pytest.raises(ArtifactError, match="has no chat template"):
        template.render(TALK)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_templates_are_kept_in_the_sandbox(tmp_path: Path, attack: str) -> None:
    with pytest.raises(DataError, match=r"SecurityError|unsafe|UndefinedError"):
        ChatTemplate(write(tmp_path, attack)).render(TALK)


def test_a_damaged_template_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: TemplateSyntaxError"):
        ChatTemplate(write(tmp_path, "{% for %}")).render(TALK)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "expected a list"),
        ([{"content": "x"}], "message 0: expected"),
        ([{"role": "user"}], "message 0: expected"),
        ([TALK[0], "hello"], "message 1: expected"),
        ([{"role": "user", "content": "\ud800"}], "message 0: not valid Unicode"),
        ([{"role": "user", "content": {1, 2}}], "values that JSON has"),
        ([{"role": "user", "content": float("nan")}], "values that JSON has"),
        ([{"role": "assistant", "tool_calls": []}], "the chat template refuses"),
    ],
)
def test_messages_that_are_none_are_refused(tmp_path: Path, messages: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ChatTemplate(write(tmp_path, "{{ messages[0].content + '' }}")).render(messages)


@pytest.mark.parametrize("version", [None, "3.0.3"])
def test_a_missing_jinja_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    template = ChatTemplate(write(tmp_path, CHAT_TEMPLATE))
    if version is None:
        monkeypatch.setitem(sys.modules, "jinja2", None)
    else:
        monkeypatch.setattr("jinja2.__version__", version)
    with pytest.raises(ConfigError, match=rf"needs jinja2 .* found {version or 'none'}.*pip install"):
        template.render(TALK)

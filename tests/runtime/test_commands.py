from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepeft.errors import ArtifactError, ConfigError, DataError
from edgepeft.runtime import Generator, load
from edgepeft.runtime.commands import OPTIONS, run
from edgepeft.runtime.conversation import Conversation, chat_cli
from tests.runtime import writer as w

NEW = 8
TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from edgepeft.cli import main
main()
"""
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def model(sealed_writer: Path) -> Generator:
    return load(sealed_writer)


def written(model: Generator, prompt: object, **options: object) -> str:
    return model.generate(prompt, **{"max_new_tokens": NEW, **options}).text


# --- edgepeft run ---


@pytest.mark.parametrize("stream", [None, True, False])
@pytest.mark.parametrize("given", [{"prompt": "Hi"}, {"texts": ["Hi"]}])
def test_run_answers_through_the_chat_template(
    sealed_writer: Path, model: Generator, given: dict, stream: bool | None, capsys: pytest.CaptureFixture
) -> None:
    assert run(sealed_writer, **given, stream=stream, max_new_tokens=NEW, threads=1) == 1
    out, err = capsys.readouterr()
    assert out == written(model, ASKED) + "\n"
    assert "note" not in err


@pytest.mark.parametrize(
    ("options", "prompt", "asked"),
    [
        ({"raw": True}, "Hi", {}),
        ({"adapter": "other"}, ASKED, {"adapter": "other"}),
        ({"system": "Be short"}, [{"role": "system", "content": "Be short"}, *ASKED], {}),
        ({"temperature": 1.0, "seed": 5, "top_k": 9}, ASKED, {"temperature": 1.0, "seed": 5, "top_k": 9}),
        ({"stop": ("a", "e")}, ASKED, {"stop": ["a", "e"]}),
    ],
)
def test_run_takes_what_generate_takes(
    sealed_writer: Path, model: Generator, options: dict, prompt: object, asked: dict, capsys: pytest.CaptureFixture
) -> None:
    run(sealed_writer, prompt="Hi", max_new_tokens=NEW, **options)
    assert capsys.readouterr().out == written(model, prompt, **asked) + "\n"


def test_run_reads_prompts_from_a_file_and_writes_json(
    sealed_writer: Path, model: Generator, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts").write_text("Hi\n\nthere ü\n", encoding="utf-8")
    assert run(sealed_writer, file=tmp_path / "prompts", as_json=True, max_new_tokens=NEW) == 2
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Hi", "there ü"]
    assert rows[0]["text"] == written(model, ASKED)
    assert {"finish", "tokens", "prompt_tokens", "decode_tok_s"} <= set(rows[0])
    assert "skipped 1 blank lines" in err


def test_run_reads_prompts_from_standard_input(
    sealed_writer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi\n"))
    assert run(sealed_writer, ["-"], as_json=True, max_new_tokens=NEW) == 2
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["text"] == second["text"]
    assert second["reused_tokens"] == second["prompt_tokens"] - 1


def test_run_says_what_did_not_fit(sealed_writer: Path, capsys: pytest.CaptureFixture) -> None:
    run(sealed_writer, prompt="Hi", raw=True, max_new_tokens=1000)
    assert f"note: the prompt has 2 of the context's {w.CONTEXT} tokens" in capsys.readouterr().err


def test_run_continues_plain_text_where_there_is_no_template(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundle = w.write_bundle(tmp_path / "bundle", template=None)
    run(bundle, ["Hi"], max_new_tokens=NEW)
    assert capsys.readouterr().out == written(load(bundle), "Hi") + "\n"
    with pytest.raises(ConfigError, match="this bundle has no chat template"):
        run(bundle, ["Hi"], system="Be short")
    with pytest.raises(ArtifactError, match="has no chat template"):
        chat_cli(bundle)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({}, DataError, "no text given"),
        ({"prompt": "a", "texts": ["b"]}, DataError, "one place"),
        ({"prompt": "a", "file": "-"}, DataError, "one place"),
        ({"prompt": "a", "raw": True, "system": "b"}, ConfigError, "--system: cannot be used with --raw"),
        ({"prompt": "a", "as_json": True, "stream": True}, ConfigError, "--stream"),
        ({"prompt": "a", "top_p": 2.0}, ConfigError, "top_p: expected"),
        ({"prompt": "a", "adapter": "none-such"}, ArtifactError, "unknown adapter"),
        ({"prompt": "a" * 500}, DataError, "this model's context has 128"),
        ({"prompt": "a", "threads": -1}, ConfigError, "threads: expected"),
    ],
)
def test_run_refuses(sealed_writer: Path, given: dict, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        run(sealed_writer, **given)


@pytest.mark.parametrize("name", [name for name in OPTIONS["text-generation"] if name != "top_k"])
def test_what_is_for_a_writer_is_refused_by_a_classifier(sealed: Path, name: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{flag}: not for .*text-classification. It takes --top-k"):
        run(sealed, ["play"], **{name: "1"})


def test_run_still_classifies(sealed: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(sealed, ["play"], top_k=2, prompt=None, stop=(), raw=None) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(ConfigError, match="only a text-generation bundle can chat"):
        chat_cli(sealed)


@pytest.mark.parametrize("name", ["run", "chat"])
def test_the_command_line_has_every_option(name: str) -> None:
    from edgepeft.cli import cli

    taken = {option.name for option in cli.commands[name].params}
    wanted = set(OPTIONS["text-generation"]) - ({"prompt", "raw", "stream"} if name == "chat" else set())
    assert wanted <= taken


# --- edgepeft chat ---


def say_to(bundle: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], **options: object) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        chat_cli(bundle, **{"max_new_tokens": NEW, **options})
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_conversation_remembers_until_it_is_reset(
    sealed_writer: Path, model: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    say_to(sealed_writer, monkeypatch, ["Hi", "", "More", "/reset", "Hi", "/quit", "never"], system="S")
    opening = [{"role": "system", "content": "S"}, *ASKED]
    first = written(model, opening)
    second = written(model, [*opening, {"role": "assistant", "content": first}, {"role": "user", "content": "More"}])
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_the_adapter_can_be_changed_within_a_conversation(
    sealed_writer: Path, model: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = ["/adapter", "Hi", "/adapter nobody", "/adapter other", "/reset", "Hi"]
    say_to(sealed_writer, monkeypatch, lines, adapter="third")
    out, err = capsys.readouterr()
    assert out == written(model, ASKED, adapter="third") + "\n" + written(model, ASKED, adapter="other") + "\n"
    assert "adapter: third of default, other, third, none" in err
    assert "unknown adapter 'nobody'" in err


def test_what_is_wrong_with_a_line_changes_nothing(
    sealed_writer: Path, model: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    say_to(sealed_writer, monkeypatch, ["x" * 200, "/rest", "/help", "Hi"])
    out, err = capsys.readouterr()
    assert out == written(model, ASKED) + "\n"
    assert "this model's context has 128" in err
    assert "Did you mean '/reset'" in err
    assert "/quit  " in err


def test_an_answer_that_fills_the_context_says_so(
    sealed_writer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    say_to(sealed_writer, monkeypatch, ["Hi"], max_new_tokens=1000)
    assert "/reset makes room" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_only(
    model: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step, left = Generator._step, [3]

    def interrupted(self: Generator, *arguments: object) -> list:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(Generator, "_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    talk = Conversation(model, None, {"max_new_tokens": 100})
    talk.hear("Hi")
    assert signal.getsignal(signal.SIGINT) is before
    shown = capsys.readouterr().out.removesuffix("\n")
    assert talk.messages == [*ASKED, {"role": "assistant", "content": shown}]
    assert written(model, ASKED, max_new_tokens=100).startswith(shown.rstrip("\ufffd"))
    talk.hear("More")
    assert len(talk.messages) == 4


def test_a_terminal_has_a_history_and_two_ways_out(sealed_writer: Path) -> None:
    """Ctrl-C at the prompt says how to leave, the arrow brings the last line back, Ctrl-D leaves."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", TERMINAL, "chat", str(sealed_writer), "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""
    for keys in (b"Hi\n", b"\x03", b"\x1b[A\n", b"\x04"):
        start = len(shown)
        while not shown[start:].endswith(b"> "):
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 4096)
        time.sleep(0.3)  # Python misses a signal between its prompt and its wait, as no user is fast enough to send
        os.write(ours, keys)
    assert process.wait(60) == 0
    os.close(ours)
    assert shown.count(b"Hi\r\n") == 2
    assert b"Ctrl-D ends the conversation" in shown
    assert b"Traceback" not in shown


@pytest.mark.parametrize("command", ["chat", "run"])
def test_a_signal_to_the_process_ends_it(sealed_writer: Path, command: str) -> None:
    code = (
        "import os, signal, threading\n"
        "from edgepeft.runtime.generate import Generator\n"
        "step = Generator._step\n"
        "def slow(*a):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(*a)\n"
        "Generator._step = slow\n"
        "from edgepeft.cli import main\n"
        "main()\n"
    )
    arguments = [sys.executable, "-c", code, command, str(sealed_writer), *(["Hi"] if command == "run" else [])]
    done = subprocess.run(arguments, input="Hi\n", capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == {"chat": 143, "run": 130}[command], done.stderr
    assert "Traceback" not in done.stderr

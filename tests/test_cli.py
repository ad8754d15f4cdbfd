"""The command line: answers at once, says what is wrong in one text, and offers what the settings offer."""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgepeft import cli, pipeline
from edgepeft.config import Config, flag


def edgepeft(*arguments, **environment):
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "edgepeft", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def chained(error, cause):
    """Return an error that came from another."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("command", [None, *cli.cli.commands])
def test_help_shows_examples_and_every_setting(command):
    text = CliRunner().invoke(cli.cli, [*([command] if command else []), "--help"], terminal_width=200).output
    if command in (None, "build", "run", "chat", "bench", "doctor"):
        assert "Example" in text
    if command in ("build", *(stage.name for stage in pipeline.STAGES)):
        assert all(flag(field.name) in text for field in dataclasses.fields(Config))
        said = " ".join(text.split())
        assert "One of rtn, hqq, gptq, awq, awq-gptq. [default: rtn]" in said
        assert "[default: ]" not in said


@pytest.mark.parametrize(
    "module", ["edgepeft", "edgepeft.cli", "edgepeft.config", "edgepeft.runtime", "edgepeft.deploy.targets"]
)
def test_light_modules_stay_light(module):
    heavy = {"torch", "transformers", "peft", "onnx", "datasets", "matplotlib"}
    heavy |= {"click"} if "runtime" in module else set()
    code = f"import sys; __import__({module!r}); print(sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_and_help_do_not_load_numpy():
    code = "import sys; import edgepeft.cli; edgepeft.config.Config(); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_stage_is_a_command_and_the_targets_are_listed():
    assert {stage.name for stage in pipeline.STAGES} <= set(cli.cli.commands)
    done = edgepeft("targets")
    assert done.returncode == 0
    assert "rpi" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["build", "--format", "i4b3"], 2, "Did you mean 'i4b32'"),
        (["build", "--config", "none.toml"], 2, "no such configuration file"),
        (["build", "--rank", "many"], 2, "not a valid integer"),
        (["build", "--model", "no-such-folder/x", "--output", "OUT"], 1, "no-such-folder"),
        (["build", "--data", "none.csv", "--output", "OUT", "--dry-run"], 1, "none.csv"),
        (["train", "--output", "OUT"], 1, "Run 'edgepeft quantize' first"),
        (["build", "--threads", "100000"], 2, "expected at most"),
        (["run", "no-bundle", "--threads", "100000", "text"], 2, "threads: expected 0 (all cores) to"),
        (["run", "no-bundle", "--threads", "-1", "text"], 2, "threads: expected 0 (all cores) to"),
        (["run", "no-bundle", "text"], 1, "no-bundle"),
        (["merge", "--output", "OUT"], 2, "Give --adapter merged"),
        (["quantize", "--output", "/dev/null"], 1, "/dev/null"),
        (["build", "--learning-rate", "inf"], 2, "expected a finite number"),
        (["bench", "no-bundle"], 1, "no-bundle"),
        (["chat", "no-bundle"], 1, "no-bundle"),
        (["chat", "no-bundle", "--threads", "-1"], 2, "threads: expected 0 (all cores) to"),
        (["run", "no-bundle", "--temperature", "hot", "text"], 2, "not a valid float"),
        (["doctor", "no-adapter"], 1, "no-adapter: no such file or folder"),
        (["biuld"], 2, "No such command"),
    ],
)
def test_a_mistake_gets_one_text_and_a_status(tmp_path, arguments, status, said):
    done = edgepeft(*[str(tmp_path / "out") if word == "OUT" else word for word in arguments], HF_HUB_OFFLINE="1")
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["build", "export"])
def test_a_record_that_no_build_wrote_is_said_by_every_command(tmp_path, command):
    for name in ("run.json", "config.json"):
        (tmp_path / name).write_text("{}")
    done = edgepeft(command, "--output", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "run.json: expected edgepeft's record" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json"]


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (chained(ImportError("initialization failed"), KeyboardInterrupt()), 130, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), 1, "the disk is full, or a limit"),
        (RuntimeError("write failed: No space left on device (os error 28)"), 1, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "goes on from there"),
        (ValueError("a defect"), None, None),
    ],
)
def test_what_leaves_main(monkeypatch, capsys, raised, status, said):
    def stop(**_):
        raise raised

    monkeypatch.setattr(cli, "cli", stop)
    if status is None:
        with pytest.raises(ValueError, match="a defect"):
            cli.main()
        return
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == status
    assert said in capsys.readouterr().err


def test_ctrl_c_waits_for_an_import_to_end(tmp_path):
    """A native library that is stopped while it loads may end the process instead of raising."""
    (tmp_path / "loading.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nloaded = True\n")
    (tmp_path / "program.py").write_text(
        "import signal, sys, time\n"
        "from edgepeft import cli\n"
        "for number in (signal.SIGINT, signal.SIGALRM):\n"
        "    signal.signal(number, cli._interrupt)\n"
        "try:\n"
        "    import loading\n"
        "    time.sleep(20)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped, loaded:', hasattr(sys.modules.get('loading'), 'loaded'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.strip() == "stopped, loaded: True", done.stderr

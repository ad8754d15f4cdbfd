"""The command line: every setting is a flag made from the field that describes it, every stage a command.

Nothing heavy is imported before a command runs, so that `edgepeft --help` answers at once. Errors for the user leave
as one text on standard error and a non-zero exit status: 2 for what was asked, 1 for what went wrong, 130 for Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from edgepeft import __version__
from edgepeft.config import Config, default_text, flag, resolve, settings
from edgepeft.console import say
from edgepeft.errors import ConfigError, EdgePeftError, causes
from edgepeft.ranks import leads

LATER_S = 0.05
# What a failed write says: the system through any library, and torch.save, which hides the system's error.
FULL_DISK = ("No space left on device", "] . unexpected pos")

EXAMPLES = """\b
Examples:
  edgepeft build --target rpi
  edgepeft build --target rpi --model ./my-bert --data tickets.csv --label-column topic
  edgepeft run edgepeft-out/bundle "turn the kitchen lights off"
  edgepeft chat edgepeft-out/bundle
"""


@functools.cache  # every stage has every setting
def _text(field: dataclasses.Field) -> str:
    """Return the help of one field, with what it may be and what it is unless given."""
    choices = field.metadata["choices"]
    known = f" One of {', '.join(choices())}." if choices else ""
    return f"{field.metadata['help']}{known}  [default: {default_text(field) or 'none'}]"


def _option(field: dataclasses.Field) -> Callable:
    """Make the flag of one field; its default is shown, not set, so that a file may set it."""
    kind, text = type(field.default), _text(field)
    if kind is bool:
        return click.option(f"{flag(field.name)}/--no-{flag(field.name)[2:]}", field.name, default=None, help=text)
    return click.option(flag(field.name), field.name, type=kind, default=None, help=text, metavar=kind.__name__.upper())


def _settings(command: Callable) -> Callable:
    """Give a command every field as a flag, and --config."""
    for field in reversed(dataclasses.fields(Config)):
        command = _option(field)(command)
    path = click.Path(path_type=Path)
    return click.option("--config", "config_file", type=path, help="TOML file with these settings.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(__version__, prog_name="edgepeft")
def cli() -> None:
    """Quantize a model, train an adapter on it, and ship both to an ARM board in one verified bundle."""


@cli.command(epilog=EXAMPLES)
@_settings
@click.option("--dry-run", is_flag=True, help="Print the resolved plan with sizes and stop.")
def build(config_file: Path | None, dry_run: bool, **flags: Any) -> None:
    """Run every stage: quantize, train, merge or keep, export, verify, bundle.

    A build that was interrupted continues where it stopped when the same command is given again.
    """
    from edgepeft import pipeline

    config = resolve(config_file, flags)
    if dry_run:
        from edgepeft.plan import plan_text

        click.echo(plan_text(config))
        return
    folder = pipeline.build(config)
    say(f'\nbundle: {folder}\ntry it: edgepeft run {folder} "..."')
    click.echo(folder)


REMEMBERED = "Settings not given are those of the last stage that was done in the --output folder."


def _stage_command(name: str, help_text: str) -> None:
    """Add the command of one stage; settings not given are those the run folder was made with."""

    @_settings
    def command(config_file: Path | None, **flags: Any) -> None:
        from edgepeft import pipeline

        told = settings(config_file, flags)
        saved = pipeline.saved_settings(Path(told.get("output", Config.output)))
        config, stage = Config(**{**saved, **told}), pipeline.stage_named(name)
        if not stage.applies(config):
            raise ConfigError(
                f"{name}: there is nothing to do with --adapter {config.adapter}. Give --adapter merged or auto."
            )
        folder = pipeline.build(config, [stage])
        if leads():
            click.echo(folder)

    command.__doc__ = f"{help_text}\n\n{REMEMBERED}"
    cli.command(name)(command)


_stage_command("quantize", "Pack the frozen backbone into the weight format.")
_stage_command("train", "Train the adapter and the task head on the packed backbone.")
_stage_command("merge", "Fold the adapter into the weights, measure what survives (only with --adapter merged).")
_stage_command("export", "Write the ONNX graph with the fused adapter op.")
_stage_command("verify", "Compare the exported files with the trained model, through the real runtime.")
_stage_command("bundle", "Collect what the device needs into one folder.")


TOP_K = "Choose among the N likeliest tokens  [default: all]."
DEVICE = (
    "Where it runs: webgpu and vulkan are a GPU, for bundles of targets that have one; auto says why it took the CPU."
)
WRITING = (  # how a language model writes: flag, type, help
    ("--max-new-tokens", int, "Longest answer in tokens  [default: 256]."),
    ("--temperature", float, "0 takes the likeliest token, more leaves more to chance  [default: 0]."),
    ("--top-p", float, "Choose among the likeliest tokens that make up this share  [default: 1]."),
    ("--min-p", float, "Leave out tokens below this share of the likeliest one's probability  [default: 0]."),
    ("--repetition-penalty", float, "Above 1: tokens that were there before become less likely  [default: 1]."),
    ("--seed", int, "The same seed gives the same answer again  [default: a new one]."),
)


def _device(command: Callable) -> Callable:
    """Give a command --device and --precision."""
    rounded = "float16 halves keys and values and rounds products; for --device vulkan  [default: float32]."
    command = click.option("--precision", type=click.Choice(["float32", "float16"]), default="float32", help=rounded)(
        command
    )
    devices = click.Choice(["cpu", "webgpu", "vulkan", "auto"])
    return click.option("--device", type=devices, default="cpu", show_default=True, help=DEVICE)(command)


def _writing(top_k: str) -> Callable[[Callable], Callable]:
    """Give a command the flags of WRITING, --stop, and --top-k with a help text of its own."""

    def give(command: Callable) -> Callable:
        stop = "Text that ends the answer and is cut off; may be repeated."
        command = click.option("--stop", multiple=True, metavar="TEXT", help=stop)(command)
        kept = click.Choice(["float32", "int8"])
        memory = "int8 keeps what was read in a quarter of the memory  [default: float32]."
        command = click.option("--kv-cache", type=kept, default=None, help=memory)(command)
        for name, kind, text in reversed((*WRITING[:2], ("--top-k", int, top_k), *WRITING[2:])):
            command = click.option(name, type=kind, default=None, help=text)(command)
        return command

    return give


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("--file", "file", type=click.Path(path_type=Path), help="One text per line; '-' reads standard input.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per text.")
@click.option("--adapter", default=None, help="Adapter to use, or 'none' for the base model.")
@click.option("--threads", type=int, default=0, show_default=True, help="CPU threads; 0 takes all.")
@_device
@click.option("--prompt", default=None, help="Text to answer, which may have several lines.")
@click.option("--system", default=None, help="What the model is told before the text.")
@click.option("--raw", is_flag=True, default=None, help="Continue the text as it is, without the chat template.")
@click.option("--stream/--no-stream", default=None, help="Show the answer while it is written  [default: --stream].")
@_writing("Classification: labels to show per text  [default: 1; all with --json]. Else: " + TOP_K)
def run(bundle: Path, texts: Sequence[str], file: Path | None, as_json: bool, **options: Any) -> None:
    """Classify texts with a bundle, or answer them, as its task is.

    Everything from --prompt on is for a language model.

    \b
    Examples:
      edgepeft run edgepeft-out/bundle "turn the kitchen lights off"
      cat texts.txt | edgepeft run edgepeft-out/bundle --file - --json
      edgepeft run writer/bundle --prompt "Why is the sky blue?" --temperature 0.7 --seed 1
    """
    from edgepeft.runtime import commands

    commands.run(bundle, list(texts), file, as_json, **options)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", default=None, help="What the model is told before the conversation.")
@click.option("--adapter", default=None, help="Adapter to begin with, or 'none' for the base model.")
@click.option("--threads", type=int, default=0, show_default=True, help="CPU threads; 0 takes all.")
@_device
@_writing(TOP_K)
def chat(bundle: Path, **options: Any) -> None:
    """Talk with the language model of a bundle, at the terminal or line by line through a pipe.

    /help lists the commands. Ctrl-C ends an answer, Ctrl-D the conversation.

    \b
    Examples:
      edgepeft chat edgepeft-out/bundle --system "Answer in one sentence."
      printf 'Hello!\nWho are you?\n' | edgepeft chat edgepeft-out/bundle
    """
    from edgepeft.runtime.conversation import chat_cli

    chat_cli(bundle, **options)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--port", type=int, default=8000, show_default=True, help="Where it listens; 0 takes a free one.")
@click.option("--open", "open_it", is_flag=True, help="Open the page in the usual browser.")
def serve(bundle: Path, port: int, open_it: bool) -> None:
    """Show a bundle's page in a browser on this machine; for bundles of --target web.

    \b
    Example:
      edgepeft serve edgepeft-out/bundle --open
    """
    from edgepeft.deploy.serve import serve_cli

    serve_cli(bundle, port, open_it)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--threads", type=int, multiple=True, help="Thread counts to measure; may be repeated.")
@click.option("--baseline", is_flag=True, help="Also measure the same model in float32 (needs the build extra).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def bench(bundle: Path, threads: Sequence[int], baseline: bool, json_file: Path | None) -> None:
    """Measure latency, memory, load time, adapter overhead and swap time of a bundle on this machine.

    \b
    Example:
      edgepeft bench edgepeft-out/bundle --threads 1 --threads 2 --json bench.json
    """
    from edgepeft.bench.measure import bench_cli

    bench_cli(bundle, list(threads), baseline, json_file)


BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@cli.group()
def adapters() -> None:
    """List, show, add and remove the adapters of a bundle; all share its one backbone.

    \b
    Examples:
      edgepeft adapters add edgepeft-out/bundle ./other-out --name support
      edgepeft run edgepeft-out/bundle --adapter support "my order never came"
    """


@adapters.command("list")
@BUNDLE
@JSON
def adapters_list(bundle: Path, as_json: bool) -> None:
    """List the adapters of a bundle."""
    from edgepeft.deploy.adapters import list_cli

    list_cli(bundle, as_json)


@adapters.command("show")
@BUNDLE
@click.argument("name")
@JSON
def adapters_show(bundle: Path, name: str, as_json: bool) -> None:
    """Show all that is known of one adapter."""
    from edgepeft.deploy.adapters import show_cli

    show_cli(bundle, name, as_json)


@adapters.command("add")
@BUNDLE
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", help="Name to take it by  [default: its folder's].")
@click.option("--replace", is_flag=True, help="Put it in the place of the one of that name.")
@click.option("--base", type=click.Path(path_type=Path), help="The model it was trained on, where it names none.")
@click.option("--trust-base", is_flag=True, help="Believe that it was trained on this base, and in another format.")
def adapters_add(bundle: Path, folder: Path, **options: Any) -> None:
    """Put an adapter into a bundle, once it is proved to be of its base and to do something.

    FOLDER is a build's output, its adapter, an adapter of another bundle (adapters/NAME) or a folder that Hugging Face
    PEFT saved. Those of other tools are converted by `edgepeft doctor --convert` first.
    """
    from edgepeft.deploy.adapters import add, size_text

    found = add(bundle, folder, **options)
    say(f"added: {size_text(found)}")
    click.echo(found["name"])


@adapters.command("mix")
@BUNDLE
@click.argument("parts", nargs=-1, required=True, metavar="NAME=WEIGHT...")
@click.option("--name", required=True, help="Name to take the sum by.")
@click.option("--replace", is_flag=True, help="Put it in the place of the one of that name.")
def adapters_mix(bundle: Path, parts: tuple[str, ...], name: str, replace: bool) -> None:
    """Add up adapters of a bundle, each times a weight, as one more adapter of it.

    \b
    Example:
      edgepeft adapters mix edgepeft-out/bundle support=0.7 billing=0.3 --name both
    """
    from edgepeft.deploy.adapters import size_text
    from edgepeft.deploy.mix import mix, parsed

    found = mix(bundle, parsed(parts), name, replace)
    say(f"added: {size_text(found)}")
    click.echo(found["name"])


@adapters.command("remove")
@BUNDLE
@click.argument("name")
def adapters_remove(bundle: Path, name: str) -> None:
    """Take an adapter out of a bundle. The default one stays: the graph holds its values."""
    from edgepeft.deploy.adapters import remove

    remove(bundle, name)
    say(f"removed: {name}")


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
@click.option("--convert", "out", type=click.Path(path_type=Path), help="Write it to this new folder, as PEFT has it.")
def doctor(adapter: Path, base: Path | None, as_json: bool, out: Path | None) -> None:
    """Say what an adapter is and whether it can be used; with a BASE, whether it fits.

    ADAPTER comes from edgepeft, Hugging Face PEFT, MLX, llama.cpp (GGUF) or ONNX Runtime. BASE is a bundle, a build's
    output or a model folder. The exit status is 0 for an adapter that can be used and 1 for one that cannot.

    \b
    Examples:
      edgepeft doctor ./my-lora edgepeft-out/bundle
      edgepeft doctor lora.gguf ./SmolLM2-135M-Instruct --convert ./my-lora
    """
    from edgepeft.adapt.doctor import doctor_cli

    if not doctor_cli(adapter, base, as_json, out):
        sys.exit(1)


@cli.command()
def targets() -> None:
    """List the targets and what each is."""
    from edgepeft.console import table
    from edgepeft.deploy.targets import load_target, target_names

    rows = [load_target(name) for name in target_names()]
    click.echo(table([{"target": row.name, "what": row.description} for row in rows]))


def _no_space(error: BaseException) -> bool:
    """Tell whether an error is a full disk, or a limit of the user's on it, whichever library raised it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in FULL_DISK)


def _stopped() -> NoReturn:
    say("\nstopped. What was done is kept; the same command goes on from there.")
    sys.exit(130)


def _interrupt(_: int, frame: types.FrameType | None) -> None:
    """Stop the command, for Ctrl-C and SIGTERM alike, so that both clean up.

    Not in the middle of an import, which some native libraries answer by ending the process: then a moment later.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, LATER_S)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and turn errors for the user into text and an exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _interrupt)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EdgePeftError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _stopped()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
            _stopped()  # it met a library that was loading, whose import failed of it
        if not any(map(_no_space, causes(error))):
            if isinstance(error, OSError) and error.filename is not None:
                say(f"error: {error.filename}: {error.strerror}. Check the path and what it may hold.")
                sys.exit(1)
            raise
        say(
            f"error: the disk is full, or a limit on it reached ({error}). Nothing half-written was kept; free some "
            "space and run it again."
        )
        sys.exit(1)


if __name__ == "__main__":
    main()

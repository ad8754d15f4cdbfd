"""Debian packages unpacked into a folder, for any architecture and without touching the system's packages.

    state/   an apt state of its own: package lists, debs, an empty list of what is installed

Packages come by name through apt-get, from the system's own sources and keys, with all they depend on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgepeft.artifact import cache_dir
from edgepeft.errors import TargetError

SOURCES = Path("/etc/apt/sources.list.d/debian.sources")


def tell(who: str, text: str) -> None:
    """Say a step of a set-up."""
    print(f"{who}: {text}", file=sys.stderr, flush=True)


def serve(
    who: str,
    arguments: Sequence[str],
    install: Callable[[], object],
    missing: Callable[[], str],
    ready: Callable[[], str],
) -> int:
    """Serve `python -m edgepeft.deploy.<who> install|check`: `missing` says what is not there, `ready` what is."""
    if list(arguments) not in (["install"], ["check"]):
        print(f"usage: python -m edgepeft.deploy.{who} install|check", file=sys.stderr)
        return 2
    try:
        if arguments[0] == "install":
            with alone(cache_dir() / who):
                install()
        if reason := missing():
            raise TargetError(f"{who}: {reason}")
        tell(who, f"ready at {cache_dir() / who}{ready()}")
    except TargetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Set a folder up alone: who comes second waits for the first, and finds it done."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def step(who: str, command: Sequence[str], what: str) -> None:
    """Run one command of a set-up; a failure becomes a TargetError with the end of its output."""
    tell(who, what)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    except FileNotFoundError:
        raise TargetError(f"{who}: {what}: {command[0]} is not there. This set-up needs Debian's tools.") from None
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise TargetError(f"{who}: {what} failed ({done.returncode}): {shlex.join(command)}\n{tail}")


def apt_options(state: Path, architecture: str, backports: bool = False) -> list[str]:
    """Return the options that give apt-get a state of its own, with the system's sources and keys."""
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": _user(),
        "Acquire::Languages": "none",
        "Debug::NoLocking": "1",
        "Dir::State": str(state),
        "Dir::State::status": str(state / "status"),
        "Dir::State::lists": str(state / "lists"),
        "Dir::Cache": str(state),
        "Dir::Cache::archives": str(state / "archives"),
    }
    if SOURCES.exists():  # the distribution alone: other sources may have nothing for this architecture
        own = _with_backports(state) if backports else SOURCES
        settings |= {"Dir::Etc::sourcelist": str(own), "Dir::Etc::sourceparts": "-"}
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def codename() -> str:
    """Return the name of this Debian release, or "" where there is none."""
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else ""


def _with_backports(state: Path) -> Path:
    """Write the system's sources with the backports of its release added; return the file."""
    name = codename()
    text = re.sub(rf"^(Suites:.*\b{name}\b(?!-).*)$", rf"\1 {name}-backports", SOURCES.read_text(), flags=re.MULTILINE)
    own = state / "debian.sources"
    own.write_text(text)
    return own


def fetch(who: str, options: Sequence[str], state: Path, packages: Sequence[str], what: str) -> list[Path]:
    """Fetch packages ("name" or "name/release") with all they depend on; return the debs."""
    archives = state / "archives"
    for deb in archives.glob("*.deb"):
        deb.unlink()
    step(who, ["apt-get", *options, "update"], f"{what}: fetching the package lists")
    release = [word for name in packages if "/" in name for word in ("-t", name.split("/")[1])]
    names = [name.split("/")[0] for name in packages]
    step(who, ["apt-get", *options, *release, "-y", "--download-only", "install", *names], f"{what}: fetching it")
    return sorted(archives.glob("*.deb"))


def unpack(who: str, debs: Sequence[Path], root: Path) -> None:
    """Unpack debs into a folder that holds nothing else."""
    tell(who, f"unpacking {len(debs)} debs")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "root"

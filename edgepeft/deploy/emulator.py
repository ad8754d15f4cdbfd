"""ARM boards without ARM hardware: qemu-user with an arm64 Python and the aarch64 wheels a device would install.

    cache_dir()/emulator/
      apt/            an apt state of its own (package lists, debs), so that the system's is not touched
      root/           the debs, unpacked: libc, Python and what it loads
      cpu/<cpu>/      root/ seen by one CPU: links, and a /proc/cpuinfo of its kind, which ONNX Runtime reads
      wheels/ site/   aarch64 wheels, and each of them unpacked

Everything comes by package name through apt-get and pip. Each step leaves a mark when it is complete, so that setting
up again goes on where it stopped and costs nothing when all is there. An instruction that a CPU lacks ends the guest
with SIGILL, as on the board; instruction counts repeat, emulated seconds mean nothing.

    python -m edgepeft.deploy.emulator install
    python -m edgepeft.deploy.emulator run cortex-a72 BUNDLE --prompt "..."     what `edgepeft run` does, on that CPU
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepeft.artifact import cache_dir
from edgepeft.deploy import debs
from edgepeft.deploy.compile import host_platform, kernel_folder, plugin_library
from edgepeft.errors import TargetError, unknown
from edgepeft.export.ops import MINIMUM_ONNXRUNTIME

QEMU = "qemu-aarch64"
DEBS = ("python3", "libstdc++6")
WHEEL_PLATFORMS = tuple(f"manylinux{tag}_aarch64" for tag in ("_2_28", "_2_27", "_2_17", "2014"))
DEVICE_WHEELS = ("numpy", "tokenizers", "click", "jinja2", "markupsafe")
MARK = 0x45500000  # kMark of kernels/emulation/count.cc
NEWEST = "1.32.0"
SAFE = MINIMUM_ONNXRUNTIME


@dataclasses.dataclass(frozen=True)
class Cpu:
    """One emulated CPU: how qemu calls it, and how Linux describes it in /proc/cpuinfo."""

    qemu: str
    part: str
    features: str


_V8 = "fp asimd evtstrm crc32 cpuid"
_V82 = f"{_V8} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
CPUS = {
    "cortex-a53": Cpu("cortex-a53", "0xd03", _V8),
    "cortex-a72": Cpu("cortex-a72", "0xd08", _V8),
    "cortex-a76": Cpu("cortex-a76", "0xd0b", _V82),
    # without SME, through which ONNX Runtime would go at a twentieth of the speed
    "max": Cpu("max,sme=off", "0xd4f", f"{_V82} i8mm bf16"),
}


def folder() -> Path:
    """Return where the emulator lies."""
    return cache_dir() / "emulator"


@dataclasses.dataclass(frozen=True)
class Emulator:
    """A set-up emulator. Raises TargetError when a guest fails, with the end of what it said."""

    qemu: str
    home: Path

    @property
    def python_version(self) -> str:
        """The guest's Python, for example "3.11"."""
        return _guest_python(self.home / "root").name.removeprefix("python")

    def run(
        self,
        cpu: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 900,
        check: bool = True,
        options: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on an emulated CPU; its environment is `env` and nothing of this process's but the paths."""
        command, variables = self._guest(cpu, argv, env, options)
        try:
            done = subprocess.run(
                command, env=variables, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise TargetError(f"emulated {cpu}: no end after {timeout_s:g} s: {shlex.join(map(str, argv))}") from None
        if check and done.returncode:
            raise TargetError(_failure(cpu, argv, done))
        return done

    def _guest(
        self, cpu: str, argv: Sequence[str], env: Mapping[str, str] | None, options: Sequence[str] = ()
    ) -> tuple[list[str], dict[str, str]]:
        """Return the host's command of a guest program, and the variables it is to see."""
        if cpu not in CPUS:
            raise TargetError(unknown("emulated CPU", cpu, CPUS))
        view = _cpu_view(self.home, cpu)
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "EDGEPEFT_CACHE") if key in os.environ}
        command = [self.qemu, "-cpu", CPUS[cpu].qemu, "-L", str(view), *options, *map(str, argv)]
        return command, {**kept, **(env or {})}

    def python(
        self,
        cpu: str,
        argv: Sequence[str],
        onnxruntime: str = NEWEST,
        paths: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        timeout_s: float = 900,
        check: bool = True,
        options: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run the guest's Python (argv as after `python`: a script, -m module or -c code) with the device's wheels.

        `paths` come first on its import path: give the folder that holds edgepeft. numpy, tokenizers and the asked
        release of ONNX Runtime are there; that release is fetched when it is not.
        """
        program, guest = self._python((f"onnxruntime=={onnxruntime}", "numpy", "tokenizers"), paths)
        return self.run(cpu, [program, *argv], {**guest, **(env or {})}, timeout_s, check, options)

    def _python(self, wheels: Sequence[str], paths: Sequence[Path]) -> tuple[str, dict[str, str]]:
        """Return the guest's Python and the variables by which it finds wheels and `paths`."""
        search = os.pathsep.join(map(str, [*paths, *(_wheel(self.home, name) for name in wheels)]))
        guest = {"PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1"}
        return str(_guest_python(self.home / "root")), guest

    def edgepeft(self, cpu: str, words: Sequence[str], onnxruntime: str = SAFE) -> int:
        """Run this edgepeft's command line on an emulated CPU, on this terminal; return its exit status.

        It has what `pip install edgepeft` brings to a board, and jinja2 for chat templates.
        """
        program, guest = self._python((f"onnxruntime=={onnxruntime}", *DEVICE_WHEELS), [Path(__file__).parents[2]])
        command, variables = self._guest(cpu, [program, "-m", "edgepeft", *words], guest)
        return subprocess.run(command, env=variables, check=False).returncode

    def count_options(self) -> list[str]:
        """Return the qemu options that make a run print "instructions N" on its standard error."""
        return ["-plugin", str(_plugin(self.qemu, self.home)), "-d", "plugin"]


def counted(done: subprocess.CompletedProcess[str]) -> int:
    """Return the instruction count that a run with count_options() printed."""
    found = re.findall(r"^instructions (\d+)$", done.stderr, re.MULTILINE)
    if not found:
        raise TargetError(f"qemu printed no instruction count; it said: {done.stderr[-500:]!r}")
    return int(found[-1])


def marked(done: subprocess.CompletedProcess[str]) -> dict[int, int]:
    """Return {i: instructions up to the guest's mark i} of a run with count_options().

    A guest sets a mark by `os.getpgid(MARK + i)`, which always raises ProcessLookupError.
    """
    lines = re.findall(r"^mark (\d+) instructions (\d+)$", done.stderr, re.MULTILINE)
    return {int(mark): int(count) for mark, count in lines}


# --- is it there? --------------------------------------------------------------------------------------------------


def missing() -> str:
    """Say what keeps the emulator from being used, or return "" when it is set up."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed (Debian package qemu-user)"
    if not (folder() / "root" / ".complete").exists():
        return "no arm64 Python is unpacked; run: python -m edgepeft.deploy.emulator install"
    return ""


def available() -> Emulator | None:
    """Return the emulator when it is set up, else None; missing() then says why."""
    return None if missing() else Emulator(str(shutil.which(QEMU)), folder())


# --- setting it up -------------------------------------------------------------------------------------------------


def install(onnxruntime: Sequence[str] = (NEWEST, SAFE)) -> Emulator:
    """Set the emulator up, or complete it. Raises TargetError naming the step that failed and its output."""
    home = folder()
    if not shutil.which(QEMU):
        _install_qemu()
    _unpack_root(home)
    for requirement in (*(f"onnxruntime=={release}" for release in onnxruntime), "numpy", "tokenizers"):
        _wheel(home, requirement)
    found = available()
    if found is None:
        raise TargetError(f"the emulator is not usable after setting it up: {missing()}")
    return found


_step = functools.partial(debs.step, "emulator")


def _install_qemu() -> None:
    if os.geteuid():
        raise TargetError(f"{QEMU} is not installed. Run: sudo apt-get install --no-install-recommends qemu-user")
    _step(["apt-get", "update"], "updating the package lists")
    _step(["apt-get", "install", "-y", "--no-install-recommends", "qemu-user"], "installing qemu-user")


def _unpack_root(home: Path) -> None:
    """Fetch the arm64 debs with all they depend on and unpack them below root/."""
    root = home / "root"
    if (root / ".complete").exists():
        return
    options = debs.apt_options(home / "apt", "arm64")
    debs.unpack("emulator", debs.fetch("emulator", options, home / "apt", DEBS, "the arm64 Python"), root)
    for name in ("bin", "lib"):  # newer releases leave these links to another package
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    _guest_python(root)
    (root / ".complete").touch()


def _guest_python(root: Path) -> Path:
    found = sorted((root / "usr" / "bin").glob("python3.*[0-9]"))
    if not found:
        raise TargetError(f"{root}: no Python was unpacked. Remove {root.parent} and set the emulator up again.")
    return found[-1]


def _cpu_view(home: Path, cpu: str) -> Path:
    """Return a root folder for one CPU: links into root/, and its own /proc/cpuinfo with this machine's core count."""
    view = home / "cpu" / cpu
    view.mkdir(parents=True, exist_ok=True)
    for name in ("bin", "etc", "lib", "usr"):
        if not (view / name).is_symlink() and (home / "root" / name).exists():
            (view / name).symlink_to(home / "root" / name)
    text = "".join(_cpuinfo(number, CPUS[cpu]) for number in range(os.cpu_count() or 1))
    target = view / "proc" / "cpuinfo"
    if not target.exists() or target.read_text() != text:
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    return view


def _cpuinfo(number: int, cpu: Cpu) -> str:
    lines = {
        "processor": str(number),
        "BogoMIPS": "108.00",
        "Features": cpu.features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": cpu.part,
        "CPU revision": "3",
    }
    return "".join(f"{key}\t: {value}\n" for key, value in lines.items()) + "\n"


def _wheel(home: Path, requirement: str) -> Path:
    """Return the folder of an unpacked aarch64 wheel, fetching it when it is not there."""
    place = home / "site" / requirement.replace("==", "-")
    if (place / ".complete").exists():
        return place
    version = _guest_python(home / "root").name.removeprefix("python")
    wheels = home / "wheels" / requirement.replace("==", "-")
    shutil.rmtree(wheels, ignore_errors=True)
    platforms = [word for name in WHEEL_PLATFORMS for word in ("--platform", name)]
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    fetch += ["--python-version", version, *platforms, "--dest", str(wheels), requirement]
    _step(fetch, f"fetching {requirement} for aarch64, Python {version}")
    shutil.rmtree(place, ignore_errors=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    (place / ".complete").touch()
    return place


@functools.cache
def _plugin(qemu: str, home: Path) -> Path:
    """Build the instruction counter for a plugin version that this qemu takes."""
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.", said)
    version = 1 if found and int(found[1]) < 9 else 2
    source = kernel_folder() / "emulation" / "count.cc"
    return plugin_library(source, home / "count.so", [f"-DEP_PLUGIN_VERSION={version}"])


def _failure(cpu: str, argv: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    """Describe a guest that failed."""
    code = done.returncode
    how = f"exited with {code}"
    if code in (-signal.SIGILL, 128 + signal.SIGILL):
        how = "died with SIGILL: it used an instruction that this CPU does not have"
    elif code < 0:
        how = f"died with {signal.Signals(-code).name}"
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
    return f"emulated {cpu}: {shlex.join(map(str, argv))[:300]} {how}\n{tail}"


USAGE = "usage: python -m edgepeft.deploy.emulator run CPU BUNDLE [options and texts of edgepeft run]"


def main(arguments: Sequence[str]) -> int:
    """Serve `python -m edgepeft.deploy.emulator install|check|run`."""
    if list(arguments[:1]) != ["run"]:
        return debs.serve("emulator", arguments, install, missing, lambda: f" on {host_platform()}: {', '.join(CPUS)}")
    if len(arguments) < 3:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        if reason := missing():
            raise TargetError(f"emulator: {reason}")
        return Emulator(str(shutil.which(QEMU)), folder()).edgepeft(arguments[1], ["run", *arguments[2:]])
    except TargetError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

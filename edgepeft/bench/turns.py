"""Times programs side by side: each is a process of its own, and they are asked in turns.

    prefill   a text of 512 tokens at once; where three rounds of that do not fit into the time, 256 or 128 (it is said)
    decode    16 tokens one by one, behind a prompt of 128

A round asks every process once with the adapter on and once with it off, beginning with another one each time. After a
short try rounds go on until the time is spent, three at least, so a neighbour who comes and goes hits all alike; a
figure is the median. What an adapter costs is the median over rounds. `others_cpus` says how many cores were busy with
anything else while a program was asked (the waiting processes too, should they spin).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.bench.timing import QUIET_CPUS, SHORTEST_S, busy_cpu_s
from edgepeft.errors import EdgePeftError

PREFILLS = (512, 256, 128)
PROMPT, STEPS = 128, 16
TRY = 32
FEWEST, MOST = 3, 40
PREFILL_SHARE = 0.5  # of the time
SETTLE_S = 0.05  # for the threads of who was asked last to fall asleep


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to measure: its command, and the folders and files it reads."""

    name: str
    command: tuple[str, ...]
    files: Path
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Process:
    """A running program. Raises EdgePeftError with its last words when it ends early."""

    def __init__(self, program: Program) -> None:
        _read_all(program.files)
        self.name = program.name
        # A pipe that nobody empties would stop the process.
        self._words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True,
            env={**os.environ, **program.environment},
        )  # fmt: skip
        self.ready = self._answer()

    def ask(self, **question: Any) -> dict[str, float]:
        """Return {"seconds", "cpu_s", "busy_s"} of a question, see `peers.protocol`."""
        time.sleep(SETTLE_S)
        before = busy_cpu_s()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer, after = self._answer(), busy_cpu_s()
        return {**answer, "busy_s": 0.0 if before is None or after is None else after - before}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._words.seek(0)
        raise EdgePeftError(f"{self.name}: the process to measure ended ({code}):\n{self._words.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout, self._words):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()


def _read_all(folder: Path) -> None:
    """Read files once, so that all programs load from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                while stream.read(1 << 24):
                    pass


Key = tuple[str, bool]  # the program, and whether the adapter is on


def _round(processes: Sequence[Process], turn: int, question: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Ask everybody once, from another one on in each turn."""
    candidates = [(process, adapter) for process in processes for adapter in (True, False)]
    at = turn % len(candidates)
    for process, adapter in candidates[at:] + candidates[:at]:
        yield (process.name, adapter), process.ask(adapter=adapter, **question)


def _rounds(processes: Sequence[Process], question: Mapping[str, Any], seconds: float) -> dict[Key, list[Any]]:
    """Ask in rounds until the time is spent."""
    found: dict[Key, list[Any]] = {}
    started = time.perf_counter()
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() - started > seconds:
            break
        for key, answer in _round(processes, turn, question):
            found.setdefault(key, []).append(answer)
    return found


def _prefill_tokens(processes: Sequence[Process], seconds: float, lengths: Sequence[int]) -> int:
    """Return the longest text of which the fewest rounds fit into the time, judged by a short one."""
    tried = dict(_round(processes, 0, {"what": "prefill", "tokens": TRY}))
    each_s = sum(answer["seconds"] for answer in tried.values()) / TRY
    return next((count for count in lengths if FEWEST * count * each_s <= seconds), lengths[-1])


def _figures(what: str, found: Mapping[Key, list[Any]], count: int) -> dict[str, dict[str, Any]]:
    """Return {program: its figures of one kind}."""
    rows: dict[str, dict[str, Any]] = {}
    for (name, adapter), answers in found.items():
        spent = [answer["seconds"] for answer in answers]
        row = rows.setdefault(name, {f"{what}_tokens": count, f"{what}_rounds": len(spent)})
        row[f"{what}_{'on' if adapter else 'off'}_tok_s"] = count / statistics.median(spent)
        wall = sum(spent)
        others = max(0.0, sum(a["busy_s"] - a["cpu_s"] for a in answers)) / wall if wall > SHORTEST_S else 0.0
        row[f"{what}_others_cpus"] = max(row.get(f"{what}_others_cpus", 0.0), round(others, 2))
        row[f"{what}_{'on' if adapter else 'off'}_ms"] = [1000 * second for second in spent]
    for row in rows.values():
        pairs = zip(row[f"{what}_on_ms"], row[f"{what}_off_ms"], strict=True)
        row[f"{what}_cost_pct"] = 100 * (statistics.median(on / off for on, off in pairs) - 1)
    return rows


def measure(
    programs: Sequence[Program], seconds: float, lengths: Sequence[int] = (), prompt: int = PROMPT
) -> list[dict[str, Any]]:
    """Return a row for each program: load_s, anonymous_bytes, version, tokens a second and what the adapter costs.

    It takes about `seconds`, and longer where the fewest rounds do. Raises EdgePeftError when a program fails.
    """
    processes: list[Process] = []
    try:
        for program in programs:
            processes.append(Process(program))
        return _measure(processes, seconds, lengths or PREFILLS, prompt)
    finally:
        for process in processes:
            process.close()


def _measure(processes: Sequence[Process], seconds: float, lengths: Sequence[int], prompt: int) -> list[dict[str, Any]]:
    read_s = PREFILL_SHARE * seconds
    count = _prefill_tokens(processes, read_s, lengths)
    reading = _figures("prefill", _rounds(processes, {"what": "prefill", "tokens": count}, read_s), count)
    question = {"what": "decode", "prompt": prompt, "tokens": STEPS}
    dict(_round(processes, 0, question))  # reads the prompt
    writing = _figures("decode", _rounds(processes, question, seconds - read_s), STEPS)
    rows = [{"who": p.name, **p.ready, **reading[p.name], **writing[p.name]} for p in processes]
    for row in rows:
        row["disturbed"] = max(row["prefill_others_cpus"], row["decode_others_cpus"]) > QUIET_CPUS
    return rows


def script(name: str, folder: Path, about: Mapping[str, Any], python: str = "") -> Program:
    """Return the program of a peer's file in `edgepeft.bench.peers`, run by an interpreter of its own."""
    path = Path(__file__).parent / "peers" / f"{name}.py"
    settings = json.dumps({**about, "folder": str(folder)})
    return Program(name, (python or sys.executable, str(path), "run", settings), folder)


def ours(bundle: Path, threads: int) -> Program:
    """Return the program of a bundle of ours, with this process's import path."""
    settings = json.dumps({"folder": str(bundle), "threads": threads})
    paths = os.pathsep.join(path for path in sys.path if path)
    command = (sys.executable, "-m", "edgepeft.bench.peers.ours", settings)
    return Program("edgepeft", command, bundle, {"PYTHONPATH": paths})

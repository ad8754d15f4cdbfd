from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from edgepeft.bench import beside, limit, profile, shapes, token_instructions, turns
from edgepeft.deploy.emulator import available, missing
from edgepeft.errors import ArtifactError, EdgePeftError
from edgepeft.runtime import load

TINY = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "rope_theta": 10000.0,
}  # fmt: skip
EMULATOR, NO_EMULATOR = available(), missing()  # before the cache is another


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the bundle of a tiny shape; what was compiled is taken from the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", TINY)
        patch.setattr(limit, "STEPS", 1000)
        limit._library()
        patch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield shapes.bundle("tiny")


def test_a_shape_becomes_a_bundle_once_and_is_made_anew_for_other_operators(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (tiny / "manifest.json").stat().st_mtime_ns
    weights = (tiny.parent / "quantized" / "quantized.json").stat().st_mtime_ns
    assert (shapes.bundle("tiny") / "manifest.json").stat().st_mtime_ns == made
    assert not (tiny.parent / "model").exists()
    assert beside.token_bytes(tiny) > load(tiny).manifest["sizes_bytes"]["weights"]
    monkeypatch.setattr(shapes, "sources_digest", lambda: "other")
    assert (shapes.bundle("tiny") / "manifest.json").stat().st_mtime_ns > made
    assert (tiny.parent / "quantized" / "quantized.json").stat().st_mtime_ns == weights


def test_a_run_without_peers_gives_a_table_figures_and_a_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PREFILLS", (64, 32))
    files = tmp_path / "figures.json", tmp_path / "figures.png"
    words = ["tiny", "--seconds", "0", "--json", str(files[0]), "--plot", str(files[1]), "--threads", "2"]
    assert shapes.main(words) == 0
    printed = capsys.readouterr().out
    assert "decode % of limit" in printed
    (result,) = json.loads(files[0].read_text())["results"]
    (row,) = result["rows"]
    assert (result["shape"], result["threads"], row["who"]) == ("tiny", 2, "edgepeft")
    for name in (*(f"{figure}_tok_s" for figure in beside.FIGURES), "load_s"):
        assert row[name] > 0
    assert row["decode_rounds"] == turns.FEWEST
    assert len(row["prefill_on_ms"]) == row["prefill_rounds"]
    assert files[1].read_bytes()[1:4] == b"PNG"


def test_a_later_call_adds_to_the_figures_and_replaces_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = tmp_path / "figures.json", []

    def measure(shape: str, threads: int, *rest: object) -> dict:
        asked.append((shape, threads, rest[-1]))
        rows = [{**ROW, "who": "edgepeft", "version": "1", "prefill_on_tok_s": 1.0, "decode_on_tok_s": len(asked)}]
        rows[0] |= {"prefill_rounds": 3, "decode_rounds": 3}
        return {"shape": shape, "threads": threads, "rows": rows, "limit": LIMIT}

    monkeypatch.setattr(shapes, "measure", measure)
    for threads in ("2", "1", "2"):
        assert shapes.main(["tiny", "--threads", threads, "--prompt", "512", "--json", str(file)]) == 0
    assert asked == [("tiny", 2, [512]), ("tiny", 1, [512]), ("tiny", 2, [512])]
    found = json.loads(file.read_text())
    assert [(one["threads"], one["rows"][0]["decode_on_tok_s"]) for one in found["results"]] == [(1, 2), (2, 3)]
    assert capsys.readouterr().out.splitlines()[-1].startswith("tiny, 2 threads")
    file.write_text(json.dumps({**found, "machine": {**found["machine"], "cpu": "another"}}))
    assert shapes.main(["tiny", "--make", "--json", str(file)]) == ArtifactError.exit_code
    assert "measured on another" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(shapes.PEERS))
def test_a_missing_peer_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bare = f"--{name}-python"
    others = [word for other in shapes.PEERS if other != name for word in (f"--{other}-python", str(tmp_path / "none"))]
    assert shapes.main(["tiny", "--make", "--peers", bare, str(tmp_path / "none"), *others]) == 0
    assert f"{name}: {tmp_path / 'none'} cannot be run" in capsys.readouterr().out
    assert "left out" in shapes.peer_missing("llama", sys._base_executable)  # type: ignore[attr-defined]  # of a venv


def _python(name: str) -> str:
    """Return an interpreter that has a peer, or skip."""
    python = os.environ.get(f"EDGEPEFT_{name.upper()}_PYTHON", sys.executable)
    if reason := shapes.peer_missing(name, python):
        pytest.skip(reason)
    if name == "genai" and python == sys.executable and not importlib.util.find_spec("onnx_ir"):
        pytest.skip("GenAI's builder needs onnx-ir")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", list(shapes.PEERS))
def test_a_peer_is_made_once_and_takes_turns(name: str, tiny: Path) -> None:
    python = _python(name)
    folder = shapes.peer_files(name, "tiny", python)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert shapes.peer_files(name, "tiny", python) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    programs = [turns.ours(tiny, 1), turns.script(name, folder, {"threads": 1, "context": 512}, python)]
    rows = turns.measure(programs, 0, (64,), prompt=16)
    assert [row["who"] for row in rows] == ["edgepeft", name]
    assert all(row["decode_on_tok_s"] > 0 and row["prefill_off_tok_s"] > 0 for row in rows)


def test_a_peer_that_ends_gives_its_words(tmp_path: Path) -> None:
    program = turns.Program("odd", (sys.executable, "-c", "raise SystemExit('out of luck')"), tmp_path)
    with pytest.raises(EdgePeftError, match=r"odd: .*ended \(1\)(?s:.*)out of luck"):
        turns.measure([program], 0)


def test_files_that_cannot_be_made_leave_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    with pytest.raises(EdgePeftError, match="files of tiny could not be made"):
        shapes.peer_files("llama", "tiny", shutil.which("false") or "false")
    assert not (tmp_path / "shapes" / "tiny-llama" / ".complete").exists()


ROW = {
    "disturbed": False, "decode_cost_pct": 10.0, "prefill_cost_pct": 5.0, "anonymous_bytes": 15_000_000, "load_s": 0.1,
    "prefill_tokens": 512, "prefill_off_tok_s": 210.0, "decode_off_tok_s": 55.0,
}  # fmt: skip
LIMIT = {
    "token_bytes": 1, "bandwidth_bytes_s": 1.0, "decode_tok_s": 100.0, "layer_ops": 9e5, "head_ops": 5.12e7,
    "instructions": "amx", "int8_ops_s": {"amx": 1e9, "avx2": 1e8},
}  # fmt: skip


def test_the_table_compares_with_the_best_peer_of_each_column() -> None:
    speeds = {"edgepeft": (200.0, 50.0), "a": (100.0, 20.0), "b": (80.0, 40.0)}
    rows = [{**ROW, "who": who, "prefill_on_tok_s": p, "decode_on_tok_s": d} for who, (p, d) in speeds.items()]
    lines = list(beside.lines({"shape": "s", "threads": 1, "rows": rows, "limit": LIMIT}))
    assert [line["who"] for line in lines] == ["edgepeft", "a", "b", "edgepeft / best peer", "limit, amx"]
    assert beside.higher({"a": 1.0, "b": {"c": 2.0}}, {"a": 3.0, "b": {"c": 1.0}}) == {"a": 3.0, "b": {"c": 2.0}}
    ratio, top = lines[3], lines[4]
    assert (ratio["decode on"], ratio["prefill on"], ratio["decode off"]) == ("1.25x", "2.00x", "1.00x")
    assert (lines[0]["decode % of limit"], lines[0]["prefill % of peak"]) == (50, 20)
    assert (top["decode on"], top["prefill on"]) == (100, 1000)


def test_more_rounds_fit_into_more_time_and_long_prompts_give_way() -> None:
    class Slow:
        name = "slow"

        def ask(self, tokens: int, **_: object) -> dict[str, float]:
            return {"seconds": tokens / 100, "cpu_s": tokens / 100, "busy_s": tokens / 100}

    assert turns._prefill_tokens([Slow()], 2 * 3 * 5.12 + 1, turns.PREFILLS) == 512  # type: ignore[list-item]  # a stand-in
    assert turns._prefill_tokens([Slow()], 2 * 3 * 5.12 - 1, turns.PREFILLS) == 256  # type: ignore[list-item]  # a stand-in
    assert turns._prefill_tokens([Slow()], 0, turns.PREFILLS) == 128  # type: ignore[list-item]  # a stand-in
    (row,) = turns._figures(
        "prefill",
        {
            ("p", True): [{"seconds": 1, "cpu_s": 1, "busy_s": 1.5}] * 3,
            ("p", False): [{"seconds": 0.5, "cpu_s": 0.5, "busy_s": 0.5}] * 3,
        },
        10,
    ).values()
    assert (row["prefill_on_tok_s"], row["prefill_off_tok_s"], row["prefill_cost_pct"]) == (10, 20, 100)
    assert row["prefill_others_cpus"] == 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_the_limits_are_speeds_of_a_machine_by_all_that_kernels_are_written_for(tiny: Path, threads: int) -> None:
    assert 1e8 < limit.read_bandwidth(threads, 1 << 22) < 1e13
    peaks = limit.int8_peaks(threads, 1000)
    kernels = [name.rpartition("_")[2] for name in load(tiny).library.kernels]
    assert {*peaks} == {*kernels} - {"scalar"}
    assert beside.instructions(tiny) == kernels[0]
    assert all(1e8 < peak < 1e14 for peak in peaks.values())


def test_a_profile_gives_each_group_its_share_of_the_last_runs() -> None:
    def node(name: str, op: str, ts: int, dur: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": op}, "ts": ts, "dur": dur}

    events = [{"name": "model_run", "ts": at, "dur": 1000} for at in (0, 2000, 4000)]
    events += [node("q", "AdapterMatMul_i4b32_g3", 10, 999), node("lm_head", "AdapterMatMul_i4b32_g1", 2010, 100)]
    for at in (2200, 4200):
        events += [node("q", "AdapterMatMul_i4b32_g3", at, 500), node("a", "GroupQueryAttention", at + 600, 200)]
    total, found = profile.shares(events, 2)
    assert total == 1
    assert tuple(round(found[n]) for n in ("linears", "attention", "head", "between")) == (50, 20, 5, 25)


def test_a_profile_of_a_bundle_covers_prompts_and_tokens(tiny: Path) -> None:
    rows = profile.profile(tiny, 1, 32)
    assert [(row["run"], row["adapter"]) for row in rows] == [
        ("32 tokens", "on"), ("32 tokens", "off"), ("a token", "on"), ("a token", "off"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["linears %"] > 0 and row["head %"] > 0 and row["attention %"] > 0 for row in rows)


@pytest.mark.slow
def test_instructions_of_a_token_are_counted_with_and_without_our_library(
    tiny: Path,
) -> None:
    if EMULATOR is None:
        pytest.skip(NO_EMULATOR)
    rows = list(token_instructions.count(EMULATOR, "cortex-a76", tiny, {}, shapes.RANK))
    assert [row["who"] for row in rows] == ["edgepeft", "stock"]
    assert all(row["adapter on"] > row["off"] > 10_000 for row in rows)
    assert rows[0]["adapter on"] < rows[1]["adapter on"]

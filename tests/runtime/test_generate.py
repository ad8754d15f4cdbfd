from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edgepeft.errors import ArtifactError, ConfigError, DataError, VerifyError
from edgepeft.runtime import Answer, Generator, load, mixing
from edgepeft.runtime.cache import Cache, Pool
from edgepeft.runtime.stream import REPLACEMENT
from tests.runtime import writer as w

PROMPTS = ["the kitchen", "x", "turn on the lights in the kitchen, please", "the kitchen is"]
SEEDS = {"default": 1, "other": 2, "third": 3, "none": None}
NEW = 10


@pytest.fixture
def model(sealed_writer: Path) -> Generator:
    return load(sealed_writer, threads=1)


def reference(adapter: str = "default") -> w.Reference:
    seed = SEEDS[adapter]
    return w.Reference(None if seed is None else w.adapter_tensors(seed))


def expected(model: Generator, prompt: str, adapter: str = "default", count: int = NEW) -> list[int]:
    return reference(adapter).greedy(model.tokens.ids(prompt), count)


def greedy(model: Generator, prompt: str, **options: object) -> Answer:
    return model.generate(prompt, **{"max_new_tokens": NEW, **options})


# --- what it says ---


@pytest.mark.parametrize("adapter", SEEDS)
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_answers_are_those_of_the_model_without_a_cache(model: Generator, adapter: str, chunk: int) -> None:
    model.chunk = chunk
    for prompt in PROMPTS:
        answer = greedy(model, prompt, adapter=adapter)
        assert answer.tokens == expected(model, prompt, adapter)
        assert answer.prompt_tokens == len(model.tokens.ids(prompt))


@pytest.mark.parametrize("keep", [None, 1, 3, 7, 1000])
@pytest.mark.parametrize("chunk", [2, 5, 256])
def test_logits_of_a_token_list(model: Generator, chunk: int, keep: int | None) -> None:
    model.chunk = chunk
    ids = model.tokens.ids(PROMPTS[2])
    wanted = reference("other").logits(ids)[-(keep or len(ids)) :]
    found = model.logits(ids, "other", keep)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    first = len(ids) - len(wanted)
    parts = list(model.logits_by_chunk(ids, "other", first))
    assert [place for place, _ in parts] == [*np.cumsum([first, *(len(part) for _, part in parts)])][:-1]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), found)


def test_a_batch_is_what_its_rows_are_alone(model: Generator) -> None:
    found = model.generate(PROMPTS, max_new_tokens=NEW)
    assert [a.tokens for a in found] == [expected(model, prompt) for prompt in PROMPTS]
    assert model.generate([]) == []
    assert [a.text for a in model.generate(PROMPTS[:1], max_new_tokens=NEW)] == [found[0].text]


def steps(model: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes the number of rows of each run from now on."""
    rows: list[int] = []
    run = Generator._run

    def counted(self: Generator, cache: Cache, first: int, ids: np.ndarray, *keep: int) -> np.ndarray:
        rows.append(len(ids))
        return run(self, cache, first, ids, *keep)

    monkeypatch.setattr(Generator, "_run", counted)
    return rows


@pytest.mark.parametrize("gated", [True, False])
def test_rows_of_a_batch_may_have_adapters_and_seeds_of_their_own(
    writer_bundle: Path, monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    """In runs that all share, or where the graph has no gates in one after the other."""
    w.write_model(writer_bundle, w.weights(), gated)
    w.reseal(writer_bundle)
    model = load(writer_bundle, threads=1)
    rows, adapters = steps(model, monkeypatch), ["default", "other", "none", "other"]
    found = model.generate(PROMPTS, adapter=adapters, max_new_tokens=NEW)
    assert rows == ([1] * 4 + [4] * (NEW - 1) if gated else [1] * NEW + [1, 1] + [2] * (NEW - 1) + [1] * NEW)
    pairs = zip(PROMPTS, adapters, strict=True)
    assert [a.tokens for a in found] == [expected(model, prompt, adapter) for prompt, adapter in pairs]
    drawn = model.generate(PROMPTS, adapter=adapters, seed=[1, 2, 3, 4], temperature=1.0)
    alone = [
        model.generate(prompt, adapter=adapter, seed=seed, temperature=1.0)
        for prompt, adapter, seed in zip(PROMPTS, adapters, [1, 2, 3, 4], strict=True)
    ]
    assert [a.tokens for a in drawn] == [a.tokens for a in alone]
    assert len({len(a.tokens) for a in drawn}) > 1  # rows ended at different times, and changed their places


def test_more_adapters_than_a_run_takes_are_answered_all_the_same(
    writer_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any rank; and what was stacked for the sets before is let go."""
    for seed, rank in enumerate((1, 3, 8, 16, 2, 5, 4, 7), start=4):
        w.write_adapter(writer_bundle, f"rank{seed}", seed, rank)
    model = load(writer_bundle, threads=1)
    rows, adapters = steps(model, monkeypatch), [*model.adapters, "none"]
    for _ in range(2):
        prompts = [PROMPTS[place % 4] for place in range(len(adapters))]
        found = model.generate(prompts, adapter=adapters, max_new_tokens=4)
        seeds = {**SEEDS, **{name: int(name.removeprefix("rank")) for name in adapters if name.startswith("rank")}}
        ranks = {name: model._get(name).rank for name in adapters}
        for prompt, name, answer in zip(prompts, adapters, found, strict=True):
            tensors = None if name == "none" else w.adapter_tensors(seeds[name], ranks[name])
            assert answer.tokens == w.Reference(tensors).greedy(model.tokens.ids(prompt), 4), name
        adapters.reverse()
    assert set(rows) == {1, mixing.TOGETHER, len(adapters) - mixing.TOGETHER}
    assert len(model._mixes._kept) == mixing.KEPT


def test_a_row_gives_the_same_logits_whatever_adapters_its_neighbours_have(model: Generator) -> None:
    """To the bit: what other adapters make of a row is multiplied by 0."""
    seen = []
    for others in (["default"] * 2, ["none", "third"], ["third", "none"], ["default", "other"]):
        cache = Cache([model._get(name) for name in ("other", *others)], model._shape, model.context)
        for row in range(3):
            model._run(cache, row, np.array([model.tokens.ids(PROMPTS[row])]))
        seen.append(model._run(cache, 0, np.full((3, 1), 5))[0])
    assert all(np.array_equal(found, seen[0]) for found in seen)


def test_rows_that_end_early_leave_the_others_as_they_were(model: Generator) -> None:
    alone = [greedy(model, prompt) for prompt in PROMPTS]
    stops = [alone[0].text[:1], alone[2].text[2:4]]
    cut = [model.generate(prompt, max_new_tokens=NEW, stop=stops) for prompt in PROMPTS]
    assert {"stop", "length"} <= {a.finish for a in cut}
    together = model.generate(PROMPTS, max_new_tokens=NEW, stop=stops)
    assert [(a.tokens, a.text, a.finish) for a in together] == [(a.tokens, a.text, a.finish) for a in cut]


def test_messages_go_through_the_chat_template(model: Generator) -> None:
    asked = [{"role": "user", "content": "Hello"}]
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    wanted = expected(model, text)
    assert greedy(model, asked).tokens == model.chat("Hello", max_new_tokens=NEW).tokens == wanted
    both = model.generate([asked, "plain"], max_new_tokens=NEW)
    assert [a.tokens for a in both] == [wanted, expected(model, "plain")]


def test_without_a_template_only_plain_prompts_are_answered(tmp_path: Path) -> None:
    model = load(w.write_bundle(tmp_path / "bundle", template=None))
    assert greedy(model, "the").tokens == expected(model, "the")
    with pytest.raises(ArtifactError, match="has no chat template"):
        model.chat("Hello")


def test_the_first_token_of_a_model_stands_before_plain_prompts(writer_bundle: Path) -> None:
    w.reseal(writer_bundle, decoder={"bos": 1, "add_bos": True})
    model = load(writer_bundle)
    assert model.encode("ab") == model.encode("<|im_start|>ab") == [1, *model.tokens.ids("ab")]
    assert model.encode("") == [1]
    assert model.encode([{"role": "user", "content": "ab"}])[:2] != [1, 1]
    w.reseal(writer_bundle, decoder={"bos": 1, "add_bos": False})
    assert load(writer_bundle).encode("ab") == model.tokens.ids("ab")


# --- how it ends ---


def test_an_answer_ends_at_the_models_end(writer_bundle: Path) -> None:
    tokens = expected(load(writer_bundle), "the kitchen")
    w.reseal(writer_bundle, decoder={"eos": [261, tokens[4]]})
    model = load(writer_bundle)
    answer = greedy(model, "the kitchen")
    first = tokens.index(tokens[4])
    assert answer.tokens == tokens[: first + 1]
    assert answer.finish == "eos"
    assert answer.text == model.tokens.text(tokens[:first])


def test_stop_strings_are_cut_off_and_may_lie_over_tokens(model: Generator) -> None:
    text = greedy(model, "x", max_new_tokens=40).text
    place = next(i for i in range(2, len(text)) if REPLACEMENT not in text[i : i + 3] and len(text[i : i + 3]) == 3)
    answer = greedy(model, "x", max_new_tokens=40, stop=["never", text[place : place + 3]])
    assert answer.text == text[: text.index(text[place : place + 3])]
    assert answer.finish == "stop"
    assert len(answer.tokens) < 40


@pytest.mark.parametrize("over", [1, 0, -1, -5])
def test_prompt_and_answer_share_the_context(model: Generator, over: int) -> None:
    prompt = "x" * (w.CONTEXT + over)
    if over > 0:
        with pytest.raises(DataError, match=f"{w.CONTEXT + 1} tokens, this model's context has {w.CONTEXT}"):
            model.generate(prompt)
        return
    answer = model.generate(prompt, max_new_tokens=50, seed=0, temperature=1.0)
    assert (len(answer.tokens), answer.finish) == (-over, "length")
    assert f"so {-over} are left" in (answer.note or "")
    assert answer.note is None or model.generate("x", max_new_tokens=1).note is None


def test_an_answer_that_fills_the_context_is_right_to_its_end(model: Generator) -> None:
    prompt = "lights " * 14
    answer = greedy(model, prompt, max_new_tokens=1000, adapter="third")
    assert answer.tokens == expected(model, prompt, "third", w.CONTEXT - len(model.tokens.ids(prompt)))


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "said"),
    [
        ("", {}, DataError, "prompt: empty"),
        (3, {}, DataError, "found int"),
        (["a", 3], {}, DataError, "messages: expected a list .*, found 3"),
        ("\ud800", {}, DataError, "not valid Unicode"),
        ([{"content": "x"}], {}, DataError, "message 0: expected"),
        ("a", {"max_new_tokens": 0}, ConfigError, "max_new_tokens: expected"),
        ("a", {"top_p": 2}, ConfigError, "top_p: expected"),
        ("a", {"stop": [""]}, ConfigError, "stop: expected"),
        ("a", {"stop": 3}, ConfigError, "stop: expected"),
        ("a", {"adapter": "defualt"}, ArtifactError, "Did you mean 'default'"),
        (["a", "b"], {"adapter": ["default"]}, ConfigError, "one for each of 2, found 1"),
        (["a", "b"], {"stream": True}, ConfigError, "one answer at a time"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    model: Generator, prompt: object, options: dict, kind: type, said: str
) -> None:
    with pytest.raises(kind, match=said):
        model.generate(prompt, **options)
    if "stream" not in options and isinstance(prompt, str):
        with pytest.raises(kind, match=said):
            model.generate(prompt, stream=True, **options)


@pytest.mark.parametrize("tokens", [[262], [-1], [0] * (w.CONTEXT + 1)])
def test_tokens_that_are_none_are_refused(model: Generator, tokens: list[int]) -> None:
    with pytest.raises(DataError, match="tokens: "):
        model.logits(tokens)


# --- what is kept ---


def test_what_is_known_of_a_prompt_is_not_read_again(model: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    run = Generator._run
    monkeypatch.setattr(
        Generator, "_run", lambda self, c, f, ids, *k: read.append(ids.size) or run(self, c, f, ids, *k)
    )
    first = greedy(model, PROMPTS[0])
    assert (first.reused_tokens, sum(read)) == (0, first.prompt_tokens + NEW - 1)
    again = greedy(model, PROMPTS[0])
    assert (again.reused_tokens, again.tokens) == (again.prompt_tokens - 1, first.tokens)
    longer = greedy(model, PROMPTS[3])
    assert longer.reused_tokens == first.prompt_tokens
    assert longer.tokens == expected(model, PROMPTS[3])
    together = model.generate([PROMPTS[3] + " hot", PROMPTS[3] + " cold"], max_new_tokens=NEW)
    assert [a.reused_tokens for a in together] == [longer.prompt_tokens, longer.prompt_tokens + 1]
    assert together[1].tokens == expected(model, PROMPTS[3] + " cold")


def test_a_conversation_is_read_once(model: Generator) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    answer = model.chat(talk, max_new_tokens=3, stop="\x00")
    longer = [*talk, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "And?"}]
    assert model.chat(longer, max_new_tokens=3).reused_tokens >= answer.prompt_tokens


def answers_after_each_other(model: Generator) -> list[tuple[list[int], list[int]]]:
    """Return (found, expected) for one prompt under each adapter in turn, twice."""
    prompt = PROMPTS[2]
    names = [*SEEDS, *SEEDS]
    return [(greedy(model, prompt, adapter=name).tokens, expected(model, prompt, name)) for name in names]


def test_no_adapter_ever_reads_what_another_wrote(model: Generator) -> None:
    assert all(found == wanted for found, wanted in answers_after_each_other(model))


def test_a_cache_of_another_adapter_would_be_seen(model: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Pool._best

    def blind(self: Pool, adapter: object, ids: list[int]) -> tuple:
        found = [best(self, cache.adapters[0], ids) for cache in self._idle]
        return max(found, key=lambda pair: pair[1], default=(None, 0))

    monkeypatch.setattr(Pool, "_best", blind)
    assert any(found != wanted for found, wanted in answers_after_each_other(model))


def test_conversations_that_share_only_their_opening_keep_their_caches(model: Generator) -> None:
    talks = ["same opening; " + text * 6 for text in ("one two ", "three four ")]
    for talk in talks:
        greedy(model, talk, max_new_tokens=1)
    for talk in talks:
        answer = greedy(model, talk)
        assert answer.reused_tokens == answer.prompt_tokens - 1
        assert answer.tokens == expected(model, talk)


def test_no_more_caches_wait_than_may(model: Generator) -> None:
    model.pool.keep = 2
    for name in SEEDS:
        greedy(model, "x", adapter=name)
    assert [cache.adapters[0].name for cache in model.pool._idle] == ["none", "third"]
    model.pool.keep = 0
    greedy(model, "x")
    assert not model.pool._idle
    assert greedy(model, "x").reused_tokens == 0


def test_memory_grows_in_steps_up_to_the_context(model: Generator) -> None:
    cache = Cache([model._get(None)] * 2, (1, 1, 4), context=700)
    seen = []
    for length in (1, 256, 257, 600, 700):
        cache.reserve(length)
        cache.views(1, 1)[0][..., : cache.capacity, :] = length
        cache.tokens[1] = [0] * length
        seen.append(cache.capacity)
    assert seen == [256, 256, 512, 700, 700]
    small = Cache([model._get(None)], (1, 1, 4), context=700)
    small.reserve(1)
    small.views(0, 1)[1][:] = 7
    small.tokens[0] = [1, 2]
    small.reserve(300)
    assert small.views(0, 1)[1][0, 0, :, 0].tolist() == [7.0, 7.0] + [0.0] * 510


# --- streams, ends by the caller, failures ---


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_a_stream_has_the_pieces_of_the_answer(model: Generator, adapter: str) -> None:
    whole = greedy(model, PROMPTS[1], max_new_tokens=60, adapter=adapter)
    stream = greedy(model, PROMPTS[1], max_new_tokens=60, adapter=adapter, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.answer.text
    assert all(pieces)
    assert len(pieces) > 5
    assert (stream.answer.tokens, stream.answer.finish) == (whole.tokens, whole.finish)


@pytest.mark.parametrize("way", ["close", "drop", "event"])
def test_a_stream_that_ends_early_leaves_the_model_as_it_was(model: Generator, way: str) -> None:
    event = threading.Event()
    stream = greedy(model, PROMPTS[2], stream=True, max_new_tokens=60, cancel=event)
    piece = next(stream)
    event.set() if way == "event" else stream.close() if way == "close" else None
    if way != "drop":
        rest = "".join(stream)
        assert stream.answer.finish == "cancelled"
        assert stream.answer.text.startswith(piece + rest)
        assert 0 < len(stream.answer.tokens) < 60
    del stream
    gc.collect()
    again = greedy(model, PROMPTS[2])
    assert again.tokens == expected(model, PROMPTS[2])
    assert again.reused_tokens == again.prompt_tokens - 1


def test_a_stream_that_ran_out_stays_so(model: Generator) -> None:
    stream = greedy(model, "x", stream=True)
    list(stream)
    stream.close()
    assert list(stream) == []
    assert stream.answer.finish == "length"


@pytest.mark.parametrize("after", [0, 2, 5])
def test_cancelling_while_a_prompt_is_read_or_a_batch_written(
    model: Generator, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    model.chunk, event, runs, run = 4, threading.Event(), [0], Generator._run

    def counted(self: Generator, *arguments: object) -> np.ndarray:
        runs[0] += 1
        if runs[0] > after:
            event.set()
        return run(self, *arguments)

    monkeypatch.setattr(Generator, "_run", counted)
    if after == 0:
        event.set()
    answers = model.generate(PROMPTS[:3], cancel=event)
    assert {a.finish for a in answers} == {"cancelled"}
    assert runs[0] <= after + 1
    monkeypatch.undo()
    assert [a.tokens for a in model.generate(PROMPTS, max_new_tokens=NEW)] == [expected(model, p) for p in PROMPTS]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_or_failure_leaves_nothing_behind(
    model: Generator, monkeypatch: pytest.MonkeyPatch, raised: type
) -> None:
    run, left = Generator._run, [4]

    def failing(self: Generator, cache: Cache, *arguments: object) -> np.ndarray:
        left[0] -= 1
        logits = run(self, cache, *arguments)
        if left[0] == 0:
            cache.views(0, 1)[0][:] = np.nan
            raise raised
        return logits

    monkeypatch.setattr(Generator, "_run", failing)
    with pytest.raises(raised):
        greedy(model, PROMPTS[2])
    again = greedy(model, PROMPTS[2])
    assert (again.tokens, again.reused_tokens) == (expected(model, PROMPTS[2]), 0)


def test_logits_that_are_not_finite_are_an_error_and_the_next_call_is_well(writer_bundle: Path) -> None:
    weights = w.weights()
    weights["E"][ord("~") - 33 + 3 + 0] = np.nan  # the letters of a byte-level tokenizer begin with "!" after 3 tokens
    w.write_model(writer_bundle, weights)
    w.reseal(writer_bundle)
    model = load(writer_bundle)
    assert model.tokens.ids("~") == [ord("~") - 33 + 3]
    before = greedy(model, "ab")
    with pytest.raises(VerifyError, match="not finite"):
        model.generate("ab~")
    with pytest.raises(VerifyError, match="not finite"):
        list(model.generate("ab~", stream=True))
    with pytest.raises(VerifyError, match="not finite"):
        model.generate(["ab", "ab~"])
    assert greedy(model, "ab").tokens == before.tokens == expected(model, "ab")


def test_threads_do_not_disturb_each_other(model: Generator) -> None:
    wanted = {(p, name): expected(model, p, name) for p in PROMPTS for name in ("default", "other")}
    wrong: list[object] = []

    def work(first: int) -> None:
        for prompt, name in [*wanted][first:] + [*wanted][:first]:
            stream = greedy(model, prompt, adapter=name, stream=True)
            list(stream)
            if stream.answer.tokens != wanted[prompt, name]:
                wrong.append((prompt, name))

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_answers_know_how_they_came_about(model: Generator) -> None:
    answer = greedy(model, PROMPTS[2])
    assert answer.prefill_s > 0
    assert answer.decode_s > 0
    assert answer.decode_tok_s == pytest.approx((NEW - 1) / answer.decode_s)
    assert answer.prefill_tok_s == pytest.approx(answer.prompt_tokens / answer.prefill_s)
    assert {"text", "tokens", "finish", "decode_tok_s"} <= set(answer.as_dict())


def test_a_merged_model_writes_without_adapters(writer_bundle: Path) -> None:
    import onnx

    model = onnx.load(writer_bundle / "model.onnx")
    for item in [item for item in model.graph.input if item.name.startswith(w.PREFIX)]:
        model.graph.input.remove(item)
    onnx.save(model, writer_bundle / "model.onnx")
    w.reseal(writer_bundle, adapter="merged")
    merged = load(writer_bundle)
    assert merged.adapters == []
    assert greedy(merged, "x").tokens == expected(merged, "x")
    with pytest.raises(ArtifactError, match="merged"):
        greedy(merged, "x", adapter="other")


def test_an_unknown_task_is_refused(writer_bundle: Path) -> None:
    w.reseal(writer_bundle, task="text-generatoin")
    with pytest.raises(ArtifactError, match="Did you mean 'text-generation'"):
        load(writer_bundle)


PROBE = """
import sys
from edgepeft.runtime import load
model = load(sys.argv[1])
model.generate("x", max_new_tokens=2)
heavy = {"torch", "transformers", "onnx", "safetensors", "peft", "click", "tqdm", "jinja2"} & set(sys.modules)
assert not heavy, heavy
model.chat("x", max_new_tokens=2)
"""


def test_the_runtime_is_light(sealed_writer: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(sealed_writer)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "W:onnxruntime" not in done.stderr

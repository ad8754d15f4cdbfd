"""What `edgepeft doctor` looks at: each check yields what it found of an adapter, by itself or against a base.

Before the second kind an adapter is fitted to the base's names and order of rows, see `fit`. A check is a function in
CHECKS or AGAINST.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt import prompts
from edgepeft.adapt.foreign import ADAPTED, PREFIX, Foreign, some
from edgepeft.adapt.kinds import lora_group
from edgepeft.adapt.peft_checks import HEAD, OWN_MODEL
from edgepeft.errors import unknown

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.adapt.doctor_base import Base

ERROR, WARNING, NOTE = "error", "warning", "note"
EITHER = {"classifier", "score"}  # PEFT names both for every classifier, which has one of them
VOCABULARY = ("embed_tokens", "lm_head", "word_embeddings")
TRAIN_AGAIN = "Train it again."
CONVERT = "`edgepeft doctor ADAPTER --convert OUT` writes a PEFT folder with the same values."


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found, and what to do about it."""

    level: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what}." + (f" {self.advice}" if self.advice else "")


def modules(adapter: Foreign) -> list[str]:
    """Return the modules that an adapter adapts, of whatever kind it is."""
    found = (ADAPTED.match(name) for name in adapter.tensors)
    return sorted({match["module"] for match in found if match})


def heads(adapter: Foreign) -> list[str]:
    """Return the tensors that were trained whole: heads, norms, biases."""
    return sorted(n.removeprefix(PREFIX) for n in adapter.tensors if n.startswith(PREFIX) and not ADAPTED.match(n))


def scale_of(settings: Mapping[str, Any]) -> float | None:
    """Return alpha / r, or alpha / sqrt(r), where the settings say both."""
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        return None
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def kind_of(module: str) -> str:
    """Return a module's name with {i} for the layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", module)


# --- checks of itself ----------------------------------------------------------------------------------------------


def check_read(adapter: Foreign) -> Iterator[Finding]:
    """It could be read, and every tensor is known."""
    if adapter.unread:
        yield Finding(ERROR, adapter.unread)
    elif not adapter.tensors:
        yield Finding(ERROR, "no adapter tensors: it would load and do nothing", TRAIN_AGAIN)
    if adapter.strange:
        yield Finding(
            ERROR, f"{len(adapter.strange)} tensors of no known meaning: {some(adapter.strange)}",
            "Convert it with the tool that made it.",
        )  # fmt: skip
    if adapter.changes and not adapter.unread:
        yield Finding(NOTE, f"not as PEFT lays it out ({', '.join(adapter.changes)})", CONVERT)


def check_numbers(adapter: Foreign) -> Iterator[Finding]:
    """All values are finite floats."""
    import numpy as np

    odd = [name for name, array in adapter.tensors.items() if array.dtype.kind != "f"]
    if odd:
        yield Finding(ERROR, f"{len(odd)} tensors hold no floats: {some(odd)}", "Save it in float16 or float32.")
    bad = [n for n, array in adapter.tensors.items() if n not in odd and not np.isfinite(array).all()]
    if bad:
        yield Finding(ERROR, f"{len(bad)} tensors hold NaN or infinity: {some(bad)}", TRAIN_AGAIN)


def check_pairs(adapter: Foreign) -> Iterator[Finding]:
    """A and B come in pairs of one rank, the one that the settings say."""
    pairs = adapter.pairs
    half = [f"{module} lacks {'B' if 'A' in pair else 'A'}" for module, pair in pairs.items() if len(pair) < 2]
    if half:
        yield Finding(ERROR, f"half pairs: {some(half)}", "Copy the adapter again.")
    odd = []
    for module, pair in pairs.items():
        shapes = [list(array.shape) for array in pair.values()]
        if len(pair) == 2 and (any(len(s) != 2 for s in shapes) or pair["A"].shape[0] != pair["B"].shape[1]):
            odd.append(f"{module}: A {list(pair['A'].shape)}, B {list(pair['B'].shape)}")
    if odd:
        yield Finding(ERROR, f"A [R, K] and B [N, R] of different ranks: {some(odd)}", "Copy the adapter again.")


def check_effect(adapter: Foreign) -> Iterator[Finding]:
    """It changes something."""
    idle = {module: side for module, pair in adapter.pairs.items() for side in pair if not pair[side].any()}
    if not idle:
        return
    names = some(f"{module} ({side})" for module, side in idle.items())
    if len(idle) < len(adapter.pairs) or heads(adapter):
        yield Finding(WARNING, f"zero in {len(idle)} of {len(adapter.pairs)} modules, which do nothing: {names}")
    else:
        advice = "B starts at zero: was it saved before training, or were other weights trained?"
        yield Finding(ERROR, f"it loads fine and does nothing: zero in all {len(idle)} modules: {names}", advice)


def check_targets(adapter: Foreign) -> Iterator[Finding]:
    """The settings name nothing that the file lacks."""
    settings, names = adapter.settings, [*adapter.pairs, *(name.removeprefix(PREFIX) for name in adapter.others)]
    targets = settings.get("target_modules")
    if isinstance(targets, (list, tuple)) and names:
        lost = [t for t in targets if not any(name == t or f".{t}." in f".{name}." for name in names)]
        if lost:
            yield Finding(WARNING, f"target_modules names {some(lost)}, of which the file has nothing")
    heads = settings.get("modules_to_save") or ()
    held = [head for head in heads if any(f".{head}." in f".{name}." for name in names)]
    lost = [head for head in heads if head not in held and not (head in EITHER and EITHER & set(held))]
    if lost and names:
        advice = "It was saved without them; save it with PEFT's save_pretrained."
        yield Finding(ERROR, f"modules_to_save names {some(lost)}, which the file does not hold", advice)


def check_scale(adapter: Foreign) -> Iterator[Finding]:
    """The scale is a number above 0."""
    scale = scale_of(adapter.settings)
    if adapter.pairs and adapter.tensors and scale is not None and not (math.isfinite(scale) and scale > 0):
        yield Finding(ERROR, f"alpha / r is {scale:g}: the adapter is switched off", "Correct lora_alpha.")


CHECKS: tuple[Callable[[Foreign], Iterable[Finding]], ...] = (
    check_read, check_numbers, check_pairs, check_effect, check_targets, check_scale,
)  # fmt: skip


# --- fitting it to a base ------------------------------------------------------------------------------------------


def fit(adapter: Foreign, base: Base) -> tuple[Foreign, list[Finding]]:
    """Return an adapter under the base's names, its rows in the base's order, and what had to be done."""
    names, findings = matches(modules(adapter), base.linears), []
    if names:
        old, new = next(iter(names.items()))
        what = f"{len(names)} modules have other names than in the base, such as {old} for {new}"
        findings.append(Finding(NOTE, what, CONVERT.replace("ADAPTER", "ADAPTER BASE")))
        adapter = adapter.renamed(names)
        adapter = dataclasses.replace(adapter, changes=(*adapter.changes, "other module names"))
    if adapter.turned and (problem := _cannot_turn(adapter, base)):
        findings.append(Finding(ERROR, problem, "Is it for another base?"))
    elif adapter.turned:
        what = f"the rows of {len(adapter.turned)} modules (q, k) are in llama.cpp's order; they are turned back"
        findings.append(Finding(NOTE, what))
        adapter = adapter.unturned(base.heads)
    return adapter, findings


def _cannot_turn(adapter: Foreign, base: Base) -> str:
    """Say why the rows of q and k cannot be brought into the base's order."""
    heads, pairs = base.heads, adapter.pairs
    for module, role in adapter.turned.items():
        b_nr = pairs[module].get("B")
        if b_nr is None or b_nr.ndim != 2:
            return f"{module} has no B [N, R], so its rows cannot be turned back"
        rows = b_nr.shape[0]
        if not heads[role] or rows % (2 * heads[role]):
            return f"{module} has {rows} rows, which {heads[role]} heads of the base do not divide into pairs"
    return ""


def matches(modules: Iterable[str], linears: Iterable[str]) -> dict[str, str]:
    """Return {module: the base's name} where they differ by what stands before the layer, one to one."""
    known, result = set(linears), {}
    for module in modules:
        if module in known:
            continue
        parts = module.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
        for cut in range(1, last + 1):
            tail = ".".join(parts[cut:])
            found = [name for name in known if name == tail or name.endswith(f".{tail}")]
            if found:
                if len(found) == 1:
                    result[module] = found[0]
                break
    return result if len(set(result.values())) == len(result) else {}


# --- checks against a base -----------------------------------------------------------------------------------------


def check_identity(adapter: Foreign, base: Base) -> Iterator[Finding]:
    """It was trained on this base, in this format, as far as it says."""
    digest, tag = adapter.metadata.get("edgepeft.base"), adapter.metadata.get("edgepeft.format")
    if digest and digest != base.digest:
        what = f"trained on another base: its digest is {digest[:12]}…, this one's {base.digest[:12]}…"
        yield Finding(ERROR, what, "Take the base it was trained on, or train it on this one.")
    elif not digest:
        advice = "`edgepeft adapters add --base MODEL_DIR` compares the model it was trained on."
        yield Finding(WARNING, "it does not say which weights it was trained on: judged by names and shapes", advice)
    if digest == base.digest and tag and base.format and tag != base.format:
        what = f"trained on {tag} weights, the base has {base.format}: answers differ a little from those in training"
        yield Finding(WARNING, what, f"Build with --format {tag}, or give adapters add --trust-base.")
    trained_on, own = adapter.settings.get("base_model_name_or_path"), base.settings.get("_name_or_path")
    if not digest and trained_on and own and Path(str(trained_on)).name != Path(str(own)).name:
        yield Finding(WARNING, f"trained on {trained_on}; the base calls itself {own}")


def check_modules(adapter: Foreign, base: Base) -> Iterator[Finding]:
    """Every adapted module is a linear of the base, and every layer is adapted alike."""
    if not base.linears:
        yield Finding(ERROR, f"{base.path}: a merged bundle takes no adapters", "Build it with --adapter separate.")
        return
    found = modules(adapter)
    places = {*base.linears, *(name.removesuffix(".weight") for name in base.tensors)}
    strange = [module for module in found if module not in places]
    if strange:
        nearest = unknown("module", strange[0], base.linears).partition(" Known:")[0]
        kinds = some(sorted({kind_of(module) for module in base.linears}), 9)
        what = f"{len(strange)} of {len(found)} modules are not in the base: {some(strange)}"
        yield Finding(ERROR, what, f"{nearest} The base has {kinds}. Is it for another model?")
    there, adapted = Counter(map(kind_of, base.linears)), Counter(map(kind_of, found))
    part = [
        f"{kind} in {n} of {there[kind]} layers" for kind, n in adapted.items() if kind in there and n < there[kind]
    ]
    if part:
        yield Finding(NOTE, f"not in every layer: {some(part)}")
    if whole := [kind for kind in there if kind not in adapted]:
        yield Finding(NOTE, f"not adapted: {some(whole, 8)}")


def check_shapes(adapter: Foreign, base: Base) -> Iterator[Finding]:
    """Every pair has the linear's N and K."""
    odd = []
    for module, pair in adapter.pairs.items():
        if module not in base.linears or len(pair) < 2 or any(array.ndim != 2 for array in pair.values()):
            continue
        columns = pair["A"].shape[1] * lora_group(adapter.settings)
        found, wanted = (pair["B"].shape[0], columns), tuple(base.linears[module])
        if found != wanted:
            odd.append(f"{module}: {list(found)}, the base {list(wanted)}")
    if odd:
        yield Finding(
            ERROR, f"{len(odd)} modules of another size: {some(odd)}", "It is for another model: find its own."
        )


def check_prompt(adapter: Foreign, base: Base) -> Iterator[Finding]:
    """What stands before the text has the base's width, or its heads of keys."""
    settings = adapter.settings
    if settings.get("peft_type") in prompts.TYPES and "hidden_size" in base.settings:
        for problem in prompts.problems(adapter.tensors.get(prompts.ROWS), settings, base.settings):
            yield Finding(ERROR, problem.rstrip("."), "Is it for another model?")


def check_others(adapter: Foreign, base: Base) -> Iterator[Finding]:
    """Heads and other whole tensors have a place of their shape in the base."""
    for name, array in adapter.others.items():
        bare = name.removeprefix(PREFIX)
        shape = base.tensors.get(bare)
        tokens = _tokens(bare, array)
        if tokens and base.vocabulary and tokens != base.vocabulary:
            what = f"{bare} has {tokens} tokens, the base {base.vocabulary}"
            yield Finding(ERROR, what, "Its tokenizer was enlarged: resize the base likewise, or train without.")
        elif shape and all(isinstance(n, int) for n in shape) and tuple(shape) != array.shape and array.ndim > 1:
            yield Finding(ERROR, f"{bare} is {list(array.shape)}, in the base {list(shape)}")
        elif _packed(bare, base):
            head = HEAD in bare or bool(base.settings.get("tie_word_embeddings"))
            table = any(part in bare for part in VOCABULARY) and not head
            what = f"{bare} was trained whole, where a build packs the base's" + (
                ", unless it is given --embedding-format float" if table else ""
            )
            yield Finding(WARNING if table else ERROR, what, f"Adapt it by LoRA, or {OWN_MODEL}.")


def _tokens(bare: str, array: np.ndarray) -> int | None:
    """Return how many tokens a tensor speaks of, or None where it speaks of none."""
    if array.ndim != 2 or not any(part in bare for part in VOCABULARY):
        return None
    if ADAPTED.match(PREFIX + bare):
        return array.shape[1] if bare.endswith("lora_embedding_A") else None
    return array.shape[0] if bare.endswith(".weight") else None


def _packed(bare: str, base: Base) -> bool:
    """Tell whether a whole tensor is of a kind that a build packs; PEFT's own copies of adapted ones are not in use."""
    module = bare.removesuffix(".weight")
    whole = bare.endswith(".weight") and ".base_layer." not in bare and not ADAPTED.match(PREFIX + bare)
    return whole and (module in base.linears or any(part in bare for part in VOCABULARY))


def check_tokenizer(adapter: Foreign, base: Base) -> Iterator[Finding]:
    """A tokenizer that came along knows no more tokens than the base."""
    from edgepeft.adapt.doctor_base import token_count

    own = token_count(adapter.path) if adapter.path.is_dir() else None
    if own is None:
        return
    if base.vocabulary and own > base.vocabulary:
        what = f"its tokenizer knows {own} tokens, the base has embeddings for {base.vocabulary}"
        yield Finding(ERROR, what, "Resize the base's embeddings as in training, and build from that.")
    elif base.tokens and own != base.tokens:
        yield Finding(WARNING, f"its tokenizer knows {own} tokens, the base's {base.tokens}", "Compare the two.")


AGAINST: tuple[Callable[[Foreign, Any], Iterable[Finding]], ...] = (
    check_identity, check_modules, check_shapes, check_prompt, check_others, check_tokenizer,
)  # fmt: skip

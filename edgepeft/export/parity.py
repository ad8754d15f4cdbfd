"""Laying an exported graph beside the PyTorch model: every layer's output of both, and the first one that differs.

The graph names its values after the modules that compute them, so `OnnxModel.trace` (a copy of the graph, in memory,
with those values as further outputs) and `torch_trace` (forward hooks) speak of the same things. An error is relative:

    error = max |got - want| / max |want|        noise = rms(got - want) / rms(want)          per layer and batch

and anything that is not finite counts as infinite. Activations rounded to int8 make a model chaotic in its last digits
(a difference of 1e-6 flips a few roundings, whose steps flip more), so int8 results are not compared value by value but
by size: what they differ from float by must be no more than what PyTorch differs by when `int8_activations` rounds the
inputs of its packed linears in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgepeft.adapt.terms import BASE_FILE, BESIDE, PREFIX, ROUTER, TERMS_FILE
from edgepeft.artifact import read_tensors
from edgepeft.console import table
from edgepeft.errors import VerifyError
from edgepeft.export import ops
from edgepeft.export.body import FLOAT32
from edgepeft.quant.formats import FORMATS, TILE_ROWS
from edgepeft.runtime import prompts
from edgepeft.runtime.adapters import DEFAULT
from edgepeft.runtime.prompts import PAST
from edgepeft.runtime.rewrite import with_int8_cache
from edgepeft.runtime.session import BROKEN_OPTIMIZERS

if TYPE_CHECKING:
    import onnx

Trace = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]
Figures = dict[str, Any]
FLOAT_ERROR = 1e-4  # some 100 units of float32 over a few dozen layers; measured: 1e-6 to 1e-5
LOGITS = "logits"
PRESENT, KEEP, MASK = "present.", "logits_to_keep", "attention_mask"
KINDS = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
PIECE_ROWS = 4096
NEIGHBOURS = 3
SCALES = (".gate", ".s_in", ".s_out")  # neutral at 1


class OnnxModel:
    """The exported files in ONNX Runtime: `library` None is the stock one, `activation` None is as exported.

    cache_scales: of keys and values kept in int8, see `edgepeft.runtime.rewrite`; None keeps them in float32.
    """

    def __init__(
        self,
        folder: Path,
        library: Path | None,
        activation: str | None = None,
        threads: int = 0,
        traced: bool = False,
        cache_scales: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        import onnxruntime

        self.folder = folder
        self.name = "stock ONNX Runtime" if library is None else "the op library"
        proto = load(folder, activation)
        self.layers = _expose(proto) if traced else [LOGITS]
        model = proto.SerializeToString()
        if cache_scales is not None:
            model = with_int8_cache(model, cache_scales)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if library is not None:
            options.register_custom_ops_library(str(library))
        try:
            self.session = onnxruntime.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(BROKEN_OPTIMIZERS),
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no base
            raise VerifyError(f"{folder / 'model.onnx'}: {self.name} refuses it: {error}") from None
        optional = {i.name: i for i in self.session.get_overridable_initializers()}
        self.adapter_shapes = {name: item for name, item in optional.items() if name.startswith(PREFIX)}
        inputs = self.session.get_inputs()
        self._names = [i.name for i in inputs if not i.name.startswith(PAST)]
        self._beginning = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), KINDS[i.type]) for i in inputs if PAST in i.name
        } | _prompt(folder, prompts.pasts(self.session), cache_scales)
        self._every = {KEEP: np.zeros(1, np.int64)} if KEEP in optional else {}

    def feeds(self, batch: Batch, others: Batch | None = None) -> dict[str, np.ndarray]:
        """Return what the graph takes for a batch: a decoder starts with the adapter's prompt if it has one.

        It gives every token logits. `others` replace adapter tensors, those of the prompt among them.
        """
        past = self._beginning | {n: array for n, array in (others or {}).items() if n in self._beginning}
        own = {name: batch[name] for name in self._names}
        if width := _width(past):
            own[MASK] = np.pad(own[MASK], ((0, 0), (width, 0)), constant_values=1)
        return {**past, **self._every, **own, **(others or {})}

    def trace(self, batch: Batch, feeds: Mapping[str, np.ndarray] | None = None) -> Trace:
        """Return {layer: output}; `feeds` replace adapter tensors."""
        found = self.session.run(self.layers, self.feeds(batch, feeds))
        return dict(zip(self.layers, found, strict=True))

    def logits(self, batch: Batch, feeds: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Return logits float32 [M, labels], or [M, S, vocabulary] of a decoder."""
        return self.session.run([LOGITS], self.feeds(batch, feeds))[0]

    def steps(
        self, ids: np.ndarray, size: int, watch: Callable[[dict[str, np.ndarray]], None] | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the logits float32 [1, size, vocabulary] of a decoder's tokens ids [1, S], `size` of them at a time.

        Each run goes on from the keys and values of the one before; `watch` is shown those of all tokens.
        """
        past = self._beginning
        names = [name.replace(PAST, PRESENT) for name in past]
        for start in range(0, ids.shape[1], size):
            new = ids[:, start : start + size]
            part = {"input_ids": new, MASK: np.ones((1, _width(past) + new.shape[1]), np.int64)}
            logits, *present = self.session.run([LOGITS, *names], {**past, **self._every, **part})
            past = dict(zip(past, present, strict=True))
            yield logits
        if watch is not None:
            watch(past)

    def past(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return what a decoder takes as past after the tokens ids [1, S]."""
        names = [name.replace(PAST, PRESENT) for name in self._beginning]
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return dict(zip(self._beginning, self.session.run(names, self.feeds(batch)), strict=True))

    def without_adapter(self) -> dict[str, np.ndarray]:
        """Return the feeds that leave the base: rank 0, scales of 1, no branches, the base's own biases and norms."""
        own = read_tensors(base) if (base := self.folder / "adapters" / BASE_FILE).exists() else {}
        feeds: dict[str, np.ndarray] = dict(own) | {n: array[:, :, :0] for n, array in self._beginning.items()}
        for name, item in self.adapter_shapes.items():
            dtype = np.float16 if "float16" in item.type else np.float32
            if name.endswith(("lora_A.weight", "lora_B.weight")):
                feeds[name] = np.zeros((0, item.shape[1]), dtype)
            elif name.endswith(BESIDE):
                width = int(name.endswith(ROUTER))
                feeds[name] = np.zeros([size if isinstance(size, int) else width for size in item.shape], dtype)
            elif name.endswith(SCALES):
                feeds[name] = np.ones([size if isinstance(size, int) else 1 for size in item.shape], dtype)
        return feeds


def _width(past: Batch) -> int:
    """Return how many columns keys and values have."""
    return next((array.shape[2] for array in past.values()), 0)


def _prompt(folder: Path, pasts: Mapping[str, tuple[Any, ...]], scales: Batch | None) -> dict[str, np.ndarray]:
    """Return the keys and values that the exported adapter puts before a text, none for most."""
    file = folder / "adapters" / DEFAULT / TERMS_FILE
    found = prompts.taken(read_tensors(file) if file.exists() else {}, pasts, folder)
    return found if scales is None else prompts.codes(found, scales)


def load(folder: Path, activation: str | None) -> onnx.ModelProto:
    """Return the exported graph, its large tensors left in their files, with the activation of every node set."""
    import onnx

    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if activation and node.domain == ops.DOMAIN and attribute.name == "activation":
                attribute.s = activation.encode()
    return proto


def model_bytes(folder: Path, activation: str) -> bytes:
    """Return model.onnx with another activation; it has to lie in the same folder."""
    return load(folder, activation).SerializeToString(deterministic=True)


def _expose(proto: onnx.ModelProto) -> list[str]:
    """Make every float value an output; returns their names in the order they are computed."""
    shapes = {value.name: value for value in proto.graph.value_info}
    names = [name for node in proto.graph.node for name in node.output if name in shapes]
    names = [name for name in names if shapes[name].type.tensor_type.elem_type == FLOAT32 and ":" not in name]
    proto.graph.output.extend(shapes[name] for name in names)
    return [*names, LOGITS]


# --- PyTorch -----------------------------------------------------------------------------------------------------


def torch_trace(model: Any, batch: Batch, layers: Sequence[str]) -> Trace:
    """Return {layer: output} of a transformers or PEFT model for those of `layers` that it has, and its logits."""
    import torch

    found: Trace = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found[name] = first.detach().float().numpy().copy()

        return hook

    modules = dict((model.get_base_model() if hasattr(model, "get_base_model") else model).named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in layers if name in modules]
    try:
        with torch.inference_mode():
            arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
            logits = model(**arrays).logits.float().numpy()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _of_tokens(array, batch, logits) for name, array in {**found, LOGITS: logits}.items()}


def _of_tokens(output: np.ndarray, batch: Batch, logits: np.ndarray) -> np.ndarray:
    """Return an output without the columns of a language model's prompt, which the graph has in its cache."""
    count = next(iter(batch.values())).shape[1]
    return output[:, -count:] if logits.ndim == 3 and output.shape[1] == logits.shape[1] else output


@contextlib.contextmanager
def int8_activations(model: Any) -> Iterator[None]:
    """Let the packed linears of a model round their inputs to int8, by the rule of the fused op."""
    import torch

    from edgepeft.quant.linear import QuantLinear

    def rounded(layer: QuantLinear) -> Any:
        def forward(x: Any) -> Any:
            block = FORMATS[layer.format].act_block
            q, scale = ops.quantize_activations(x.numpy().reshape(-1, x.shape[-1]), block)
            near = torch.from_numpy(q * scale[:, :, None]).reshape(x.shape)
            pieces = [near @ torch.from_numpy(weight).T for weight in _rounded_weight(layer)]
            y = torch.cat(pieces, -1)[..., : layer.out_features] + layer.offset_product(x)
            return y if layer.bias is None else y + layer.bias

        return forward

    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    try:
        for layer in layers:
            layer.forward = rounded(layer)  # type: ignore[method-assign]  # for a while
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _rounded_weight(layer: Any) -> Iterator[np.ndarray]:
    """Yield a packed weight as it is multiplied with int8 activations, float32 [some, K] in order."""
    w, scale, step = layer.qweight.numpy(), layer.qscale.numpy(), PIECE_ROWS // TILE_ROWS
    for start in range(0, len(w), step):
        part = slice(start, start + step)
        values_nk, scale_nb = ops.codes_and_scales(layer.format, w[part], scale[part], activation="int8")
        blocks = values_nk.reshape(len(values_nk), scale_nb.shape[1], -1) * scale_nb[:, :, None]
        yield blocks.reshape(values_nk.shape).astype(np.float32)


# --- comparing ---------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """One layer: its error and what would have been allowed."""

    layer: str
    error: float
    allowed: float

    @property
    def missed(self) -> bool:
        """Tell whether the error is too large; NaN is."""
        return not self.error <= self.allowed


def _same_tokens(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return `want` at the tokens that `got` has: all, or the first alone where the graph computes no other."""
    first = want[:, :1] if want.ndim == 3 else want
    return first if got.shape == first.shape else want


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return max |got - want| / max |want|; infinite for a wrong size or anything that is not finite."""
    want = _same_tokens(got, want)
    if got.size != want.size or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got.reshape(want.shape) - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30))


def noise(got: np.ndarray, want: np.ndarray) -> float:
    """Return rms(got - want) / rms(want); infinite for a wrong size or anything that is not finite."""
    want = _same_tokens(got, want)
    if got.size != want.size or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    size = float(np.sqrt(np.mean(np.square(want, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(got.reshape(want.shape) - want, dtype=np.float64)))) / max(size, 1e-30)


def differences(got: Trace, want: Trace, allowed: float) -> list[Difference]:
    """Return the largest error of every layer that both have, in the order of `got`."""
    return [Difference(name, largest_error(got[name], want[name]), allowed) for name in got if name in want]


def noise_differences(got: Trace, want: Trace, rounded: Trace, factor: float, floor: float) -> list[Difference]:
    """Return each layer's noise against `factor` times that of PyTorch's own rounding, and no less than `floor`."""
    names = [name for name in got if name in want and name in rounded]
    allowed = {name: max(factor * noise(rounded[name], want[name]), floor) for name in names}
    return [Difference(name, noise(got[name], want[name]), allowed[name]) for name in names]


def require(what: str, rows: Sequence[Difference], advice: str) -> float:
    """Return the largest error. Raises VerifyError naming the first layer that misses, with its neighbours."""
    missed = [i for i, row in enumerate(rows) if row.missed]
    if not missed:
        return max((row.error for row in rows), default=0.0)
    first = missed[0]
    near = rows[max(0, first - NEIGHBOURS) : first + NEIGHBOURS + 1]
    lines = [{**row._asdict(), "": "<- starts here" if row is rows[first] else ""} for row in near]
    layer, error, allowed = rows[first]
    raise VerifyError(
        f"{what}: the difference starts in {layer}: expected an error of at most {allowed:.3g}, found {error:.3g} "
        f"({len(missed)} of {len(rows)} layers miss). {advice}\n{table(lines)}"
    )

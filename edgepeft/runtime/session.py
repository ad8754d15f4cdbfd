"""A loaded bundle: one ONNX Runtime session and its adapters.

What it becomes when it is loaded is its task's, of TASKS: see `edgepeft.runtime.classify` and `.generate`.

device="webgpu" runs the bundle's graph for GPUs instead: see `edgepeft.runtime.webgpu`. device="vulkan" runs the same
graph as the CPU, see `edgepeft.runtime.vulkan`: adapters lie in memory that the GPU sees, and are always fed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import read_tensors
from edgepeft.config import MOST_THREADS
from edgepeft.console import say
from edgepeft.errors import ArtifactError, ConfigError, TargetError, unknown
from edgepeft.runtime import adapters as ad
from edgepeft.runtime import library as lib
from edgepeft.runtime import prompts, vulkan, webgpu
from edgepeft.runtime.fallback import GpuGaveUpError
from edgepeft.runtime.manifest import Manifest, check_bundle
from edgepeft.runtime.mixing import Mixes

WEIGHTS_ELSEWHERE = (1, 21)  # ONNX Runtime that can be told where the weights of a model given as bytes are
QUIET = 3  # ONNX Runtime's severity "error": it warns once for every overridable initializer
# ONNX Runtime's threads wait for a next run with a core each at full load, for more than a second after an answer.
REST = ("session.force_spinning_stop", "1")
# Widens float16 initializers that no kernel takes; it ends the process over a function's body in 1.23 to 1.29.
BROKEN_OPTIMIZERS = ("FuseFp16InitializerToFp32NodeTransformer",)
DEVICES = ("cpu", "webgpu", "vulkan", "auto")  # GPUS, and what may be without one
KV_CACHES = ("float32", "int8")  # what keys and values are kept as
CACHE_SCALES = "kv_cache.safetensors"
TASKS = {  # what a bundle becomes: the class of its task and where it is
    "text-classification": ("edgepeft.runtime.classify", "Model"),
    "text-generation": ("edgepeft.runtime.generate", "Generator"),
}
Name = str | Mapping[str, float] | None  # of an adapter, or {name: weight} of a sum
Names = Name | Sequence[Name]  # one for all, or one for each
_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        say(text)


def per_row(name: str, value: Any, count: int) -> list[Any]:
    """Return one value for every row: a list as it is, anything else for all. Raises ConfigError for another number."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{name}: expected one, or one for each of {count}, found {len(values)}.")
    return values


def _onnxruntime(manifest: Manifest) -> Any:
    """Import ONNX Runtime once it is known to be safe here and new enough for the bundle."""
    wanted, machine = manifest["onnxruntime"], platform.machine()
    if installed := lib.installed_onnxruntime():
        lib.check_onnxruntime(wanted, installed, machine, lib.cpu_flags())
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError(f"ONNX Runtime cannot be imported ({error}). pip install -r requirements.txt") from None
    lib.check_onnxruntime(wanted, onnxruntime.__version__, machine, set())
    return onnxruntime


def _library(manifest: Manifest, choice: str | Path) -> lib.Library | None:
    path = lib.find_library(manifest, choice)
    if path is not None:
        return lib.open_library(path)
    if str(choice) == "auto":
        _say_once(
            f"no op library for {lib.platform_tag()} in this bundle: running on stock ONNX Runtime, which gives the "
            "same answers, but slower"
        )
    return None


def cache_scales(manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the scales of int8 keys and values, by the name of the graph's input.

    Raises ConfigError for a bundle of another task, ArtifactError for one whose verification found none that would do.
    """
    if manifest["task"] != "text-generation":
        raise ConfigError(f"kv_cache='int8': {manifest.folder} has no keys and values, its task is {manifest['task']}.")
    path = manifest.folder / CACHE_SCALES
    if not path.exists():
        raise ArtifactError(
            f"{manifest.folder}: has no scales for an int8 cache. `edgepeft verify` measures them, and tells under "
            "'cache' why where it does not; build the bundle again, or take kv_cache='float32'."
        )
    return read_tensors(path)


def _model_source(
    manifest: Manifest, options: Any, activation: str | None, library: lib.Library | None, version: str, kv_cache: str
) -> Any:
    """Return the model's path, or its bytes where it has to be another one: see `edgepeft.runtime.rewrite`.

    That is where an activation is asked for that was not exported, for attention windows on an older ONNX Runtime, and
    for keys and values in int8.
    """
    from edgepeft.runtime import rewrite

    path, changes = manifest.folder / "model.onnx", []
    if activation is not None and activation != manifest["activation"]:
        if library is None:
            why = "stock ONNX Runtime has its own rule; it needs the op library."
            raise ConfigError(f"activation={activation!r}: {why}")
        changes.append(lambda model: rewrite.with_activation(model, activation))
    windows = manifest.values.get("decoder", {}).get("windows")
    if windows and lib.version_tuple(version) < rewrite.NEW_WINDOWS:
        changes.append(rewrite.with_older_windows)
    if kv_cache == "int8":
        scales = cache_scales(manifest)
        changes.append(lambda model: rewrite.with_int8_cache(model, scales))
    if not changes:
        return str(path)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(manifest.folder))
    return functools.reduce(lambda model, change: change(model), changes, path.read_bytes())


@contextlib.contextmanager
def _placed(source: str | bytes, folder: Path, version: str) -> Iterator[str | bytes]:
    """Yield a model's bytes as a file among links to the bundle's own, for an ONNX Runtime that looks only there."""
    if isinstance(source, str) or lib.version_tuple(version) >= WEIGHTS_ELSEWHERE:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="edgepeft-") as place:
        for path in folder.resolve().iterdir():
            if path.name != "model.onnx":
                (Path(place) / path.name).symlink_to(path)
        model = Path(place) / "model.onnx"
        model.write_bytes(source)
        yield str(model)  # weights are mapped when the session is made, so all of this may go then


def open_session(
    manifest: Manifest,
    threads: int,
    library: lib.Library | None,
    activation: str | None = None,
    kv_cache: str = KV_CACHES[0],
) -> Any:
    """Make the ONNX Runtime session of a bundle.

    Raises ArtifactError with ONNX Runtime's words when it refuses the model, TargetError when it has no int8 cache.
    """
    onnxruntime = _onnxruntime(manifest)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads
    options.add_session_config_entry(*REST)
    options.inter_op_num_threads = 1
    source = _model_source(manifest, options, activation, library, onnxruntime.__version__, kv_cache)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library.path))
        with _placed(source, manifest.folder, onnxruntime.__version__) as model:
            return onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(BROKEN_OPTIMIZERS)
            )
    except Exception as error:  # ORT's own exceptions share no base
        if kv_cache == "int8":
            need = "take a newer one (1.32.0 can), or kv_cache='float32'"
            raise TargetError(
                f"ONNX Runtime {onnxruntime.__version__} has no int8 cache: {need}. It says: {error}"
            ) from None
        what = f"ONNX Runtime {onnxruntime.__version__} refuses the model: {error}"
        raise ArtifactError(f"{manifest.folder}: {what}") from None


class Bundle:
    """A loaded bundle, whatever its task: its files, its session and its adapters."""

    def __init__(self, manifest: Manifest, session: Any, library: lib.Library | None, threads: int) -> None:
        self.manifest = manifest
        self.session = session
        self.library = library
        self.threads = threads
        self.instead: Callable[[], Bundle] | None = None  # makes the same on the CPU, where device is "auto"
        self._used: str | Mapping[str, float] = ad.DEFAULT
        self.gpu = webgpu.is_gpu(session)
        self.memory = vulkan.memory(session)
        self._slots = webgpu.slots(session, ad.slots(session)) if self.gpu else ad.slots(session)
        self._folders = ad.adapter_folders(manifest.folder) if self._slots else {}
        self._pasts = prompts.pasts(session)
        self._loaded: dict[str, ad.Adapter] = {}
        self._active = self._get(ad.DEFAULT)
        self._mixes = Mixes(self._slots, lambda: self._get(ad.DEFAULT))

    def __repr__(self) -> str:
        kernels = self.library.build if self.library else "stock ONNX Runtime"
        return f"<edgepeft {self.manifest['name']}: adapter {self.adapter} of {self.adapters}, {kernels}>"

    @property
    def adapters(self) -> list[str]:
        """Return the names of the adapters in the bundle; none where it was merged."""
        return list(self._folders)

    @property
    def adapter(self) -> str:
        """Return the name of the adapter in use, or "base"."""
        return self._active.name

    def _get(self, name: Name) -> ad.Adapter:
        """Return an adapter, made ready at its first use; the one in use for None."""
        if name is None:
            return self._active
        if isinstance(name, Mapping):
            return self._sum(name)
        if name not in self._loaded:
            made = self._make(name)
            if self.gpu:
                made = dataclasses.replace(made, feeds=webgpu.feeds(self.session, made.feeds))
            if self.memory:
                made = dataclasses.replace(made, feeds=self.memory.keep(made.feeds))
            self._loaded[name] = made
        return self._loaded[name]

    def _sum(self, weights: Mapping[str, float]) -> ad.Adapter:
        """Return adapters as one, each times its weight."""
        numbers = [weight for weight in weights.values() if isinstance(weight, (int, float)) and math.isfinite(weight)]
        if not weights or len(numbers) < len(weights):
            raise ConfigError(f"adapter: expected a number for each name, as {{'a': 0.7, 'b': 0.3}}, found {weights}.")
        if self.gpu:
            raise ConfigError("adapter: sums are the CPU's. `edgepeft adapters mix` makes one adapter of several.")
        name = " + ".join(f"{float(weight)!r} {part}" for part, weight in sorted(weights.items()))
        if name not in self._loaded:
            parts = [(self._get(part), float(weight)) for part, weight in sorted(weights.items())]
            self._loaded[name] = self._mixes.sum(name, parts, self._get(ad.BASE))
        return self._loaded[name]

    def _make(self, name: str) -> ad.Adapter:
        labels = list(self.manifest.values.get("labels", ()))
        if not self._slots and name == ad.DEFAULT:
            return ad.Adapter(name, tuple(labels), 0, {})
        if not self._slots:
            raise ArtifactError(f"{self.manifest.folder}: merged at export, so it has no adapters to choose from.")
        if name == ad.BASE:
            return ad.base_adapter(self._slots, self._get(ad.DEFAULT).labels, self.manifest.folder / "adapters")
        if name not in self._folders:
            self._folders = ad.adapter_folders(self.manifest.folder)
        if name not in self._folders:
            raise ArtifactError(f"{self.manifest.folder}: " + unknown("adapter", name, [*self._folders, ad.BASE]))
        base = self.manifest["base_digest"], self.manifest["format"]
        return ad.load_adapter(self._folders[name], self._slots, *base, labels, self._pasts)

    def use(self, name: str | Mapping[str, float]) -> None:
        """Take another adapter, or {name: weight} as one, for the calls that name none; only the first use costs."""
        self._active, self._used = self._get(name), name

    def fed(self, name: str, new_name: str) -> None:
        """Let an adapter be taken under a second name by which it is always fed, as benches compare the two ways."""
        self._loaded[new_name] = dataclasses.replace(self._get(name), name=new_name)

    def feeds(self, name: str) -> Mapping[str, Any]:
        """Return all that an adapter feeds, {input of the graph: OrtValue}."""
        return self._get(name).feeds

    def prompt(self, name: str) -> int:
        """Return how many tokens of the context an adapter takes for what it puts before the text."""
        return self._get(name).columns

    def off(self, name: str) -> str:
        """Let an adapter be taken turned off, under its own head, and return the name for that."""
        adapter, base, off = self._get(name), self._get(ad.BASE), f"{name} off"
        self._loaded[off] = dataclasses.replace(
            adapter, name=off, feeds={**adapter.feeds, **base.feeds}, prompt={}, columns=0
        )
        return off

    def base(self) -> None:
        """Turn the adapter off: rank 0 everywhere, under the default adapter's head."""
        self.use(ad.BASE)

    def _feeds(self, rows: Sequence[ad.Adapter]) -> Mapping[str, Any]:
        """Return what a run's rows feed."""
        if rows[0].parts or any(adapter is not rows[0] for adapter in rows):
            return self._mixes.of(rows).feeds(rows)
        own = rows[0].name == ad.DEFAULT and not self.memory  # the default's are the graph's own values
        return {} if own else rows[0].feeds

    def _groups(self, adapters: Sequence[ad.Adapter]) -> list[list[int]]:
        """Return the places of rows that can share a run: those of one adapter on a GPU."""
        if not self.gpu:
            return self._mixes.groups(adapters)
        own = {id(adapter): adapter for adapter in adapters}.values()
        return [[place for place, one in enumerate(adapters) if one is adapter] for adapter in own]

    def _bind(self, feeds: Mapping[str, Any]) -> Any:
        """Return a new binding of adapters' tensors; whoever runs it keeps them alive."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _run_bound(self, binding: Any) -> None:
        """Run what is bound. Raises TargetError with ONNX Runtime's words where a GPU gives up."""
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ORT's own exceptions share no base
            if not self.gpu and not self.memory:
                raise
            raise GpuGaveUpError(f"{self.manifest.folder}: the GPU gave up: {error}. device='cpu' works.") from None

    def trial(self) -> None:
        """Run the least there is, to see whether it runs."""
        raise NotImplementedError

    def verify(self) -> None:
        """Hash every file of the bundle again. Raises ArtifactError, naming each that changed."""
        check_bundle(self.manifest.folder, "full")


def known_task(bundle: Path | str, task: str) -> str:
    """Return a bundle's task. Raises ArtifactError for one that this edgepeft does not know."""
    if task not in TASKS:
        raise ArtifactError(f"{bundle}: {unknown('task', task, TASKS)} Take a newer edgepeft.")
    return task


def task_class(manifest: Manifest) -> type[Bundle]:
    """Return the class of a bundle's task."""
    module, name = TASKS[known_task(manifest.folder, manifest["task"])]
    return getattr(importlib.import_module(module), name)


def check_threads(threads: int) -> None:
    """Raise ConfigError for more threads than this machine can use."""
    if not 0 <= threads <= MOST_THREADS:
        raise ConfigError(f"threads: expected 0 (all cores) to {MOST_THREADS} on this machine, found {threads}.")


GPUS: dict[str, Callable[[Manifest, str | Path, str], Any]] = {  # how a session on a GPU is made of a bundle
    "webgpu": lambda manifest, library, precision: webgpu.open_session(manifest.folder),
    "vulkan": lambda manifest, library, precision: vulkan.open_session(
        vulkan.find_library(manifest, library), manifest.folder / "model.onnx", precision
    ),
}


def _on_gpu_if_it_runs(make: Callable[[str], Any]) -> Any:
    """Return the bundle that a device makes, of the first that runs it once, or None, saying why."""
    reasons = []
    for device in GPUS:
        try:
            model = make(device)
            model.trial()
            return model
        except (ArtifactError, TargetError) as reason:
            reasons.append(str(reason))
    _say_once(f"running on the CPU: {'; '.join(reasons)}")
    return None


def _only_cpu(activation: str | None, kv_cache: str) -> str:
    """Return what was asked for that the CPU's graph alone can do, or ""."""
    asked = {"activation='int8'": activation == "int8", f"kv_cache={kv_cache!r}": kv_cache != KV_CACHES[0]}
    return " and ".join(name for name, wanted in asked.items() if wanted)


def load(
    bundle: Path | str,
    threads: int = 0,
    adapter: str = ad.DEFAULT,
    library: str | Path = "auto",
    activation: str | None = None,
    check: str = "auto",
    kv_cache: str = KV_CACHES[0],
    device: str = DEVICES[0],
    precision: str = vulkan.PRECISIONS[0],
) -> Any:
    """Load a bundle and return what its task says: a `Model` that classifies or a `Generator` that writes (TASKS).

    threads 0 takes all cores; library is "auto", "none" or a path; activation None is as exported. kv_cache "int8"
    keeps a language model's keys and values in a quarter of the memory: see edgepeft.runtime.cache. device "webgpu"
    or "vulkan" runs every node on a GPU, "auto" does so where a first run succeeds and says why where it does not;
    where a later one fails, an answer begins again on the CPU, unless it is streamed. On "vulkan" a path as library
    is that of the provider, and precision "float16" halves the memory of keys and values and rounds products where
    the GPU computes in float16.

    Raises ArtifactError for a folder that is no bundle or was changed, TargetError for a library or an ONNX Runtime
    that cannot work here, ConfigError for what does not exist. `check` is "auto", "full" or "quick":
    see edgepeft.runtime.manifest.
    """
    check_threads(threads)
    if kv_cache not in KV_CACHES:
        raise ConfigError("kv_cache: " + unknown("kind of cache", kv_cache, KV_CACHES))
    if device not in DEVICES:
        raise ConfigError("device: " + unknown("device", device, DEVICES))
    cpu_asked = _only_cpu(activation, kv_cache)
    if device in GPUS and cpu_asked:
        raise ConfigError(f"device {device!r}: activations and cache are float there; leave {cpu_asked} out.")
    if precision not in vulkan.PRECISIONS:
        raise ConfigError("precision: " + unknown("precision", precision, vulkan.PRECISIONS))
    if precision != vulkan.PRECISIONS[0] and device != "vulkan":
        raise ConfigError(f"precision={precision!r} is for device='vulkan', found device={device!r}. Leave it out.")
    manifest = check_bundle(bundle, check)
    kind = task_class(manifest)

    def on_gpu(device: str) -> Any:
        model = kind(manifest, GPUS[device](manifest, library, precision), None, threads)
        model.use(adapter)
        return model

    def on_cpu() -> Any:
        found = _library(manifest, library)
        model = kind(manifest, open_session(manifest, threads, found, activation, kv_cache), found, threads)
        model.use(adapter)
        return model

    if device in GPUS:
        return on_gpu(device)
    if device == "auto" and cpu_asked:
        _say_once(f"running on the CPU: {cpu_asked} is not for GPUs")
    elif device == "auto" and (model := _on_gpu_if_it_runs(on_gpu)):
        model.instead = on_cpu
        return model
    return on_cpu()

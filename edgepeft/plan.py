"""What a build would do, before it does it: the resolved settings, each stage's state, and sizes in bytes.

Sizes are computed from the shapes in the checkpoint's header and the table of formats, so nothing is loaded:

    packed  = sum over weights of codes and scales       adapter = 2 bytes x R x (K + N) over the linears, for a LoRA

What another method adds is known once it is trained, so it is left out of the sum.

Formats that --size chooses are measured when the model is quantized: once that was done they are read from the run
folder, before it sizes are those of --format and --embedding-format.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt.methods import METHODS
from edgepeft.artifact import Run, read_json
from edgepeft.config import Config
from edgepeft.console import table
from edgepeft.errors import ArtifactError
from edgepeft.pipeline import STAGES, Stage, open_inputs, stage_key
from edgepeft.quant.formats import TIED_FORMATS

if TYPE_CHECKING:
    from edgepeft.backbone.families import Family
    from edgepeft.backbone.load import ModelSource

HALF_BYTES, FLOAT_BYTES = 2, 4


def plan_text(config: Config) -> str:
    """Return the plan of a build. Raises EdgePeftError when model, data or target cannot be used."""
    from edgepeft.backbone.check import check_length

    source, family, data, target = open_inputs(config)
    shown = config.replace(max_length=check_length(config, source))
    counts = ", ".join(f"{len(getattr(data, name))} {name}" for name in ("train", "validation", "test"))
    lines = [
        "settings",
        table([{"setting": name, "value": str(value)} for name, value in dataclasses.asdict(shown).items()]),
        f"\nmodel   {source.path} ({family.tag}, {source.settings[family.layers_setting]} layers)",
        f"data    {counts}" + (f"; {len(data.labels)} labels" if data.labels else ""),
        f"target  {target.name}: {target.description}",
        "\nsizes in MB (1e6 bytes)",
        table(sizes(config, source, family, known := chosen_formats(config))),
        *(
            []
            if known or not config.size
            else [f"--size {config.size}: formats are chosen when quantizing; not known yet"]
        ),
        "\nstages",
        table([{"stage": stage.name, "state": _state(stage, config)} for stage in STAGES]),
    ]
    return "\n".join(lines)


def chosen_formats(config: Config) -> dict[str, str]:
    """Return {module: format} that --size chose, where the run folder holds what the settings give."""
    stage, run = STAGES[0], Run(Path(config.output))
    if not config.size or _state(stage, config) != "up to date":
        return {}
    about = read_json(run.path(stage.folder) / "quantized.json")
    back = {tiled: tag for tag, tiled in TIED_FORMATS.items()}  # a tied embedding is named as it is stored
    return {
        layer["name"]: back[layer["format"]] if layer["kind"] == "embedding" and layer["layout"] == "tiles"
        else layer["format"]
        for layer in about["layers"]
        if "tied_to" not in layer
    }  # fmt: skip


def sizes(
    config: Config, source: ModelSource, family: Family, chosen: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return float and packed megabytes of each kind of tensor, of the adapter, and their sum.

    chosen: {module: format} of those that have one of their own.
    """
    from edgepeft.backbone.checkpoint import backbone_shapes
    from edgepeft.quant.stage import format_for

    kinds, tied = family.tensors(source.settings), family.tied(source.settings)
    rows: dict[str, list[int]] = {}
    adapter = 0
    for name, shape in backbone_shapes(source, family).items():
        kind = kinds[name]
        size = math.prod(shape) * FLOAT_BYTES
        fmt, _ = format_for(config, kind, shape, tied, (chosen or {}).get(name.removesuffix(".weight")))
        row = rows.setdefault({"bias": "float", "norm": "float"}.get(kind, kind), [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + size, row[2] + (fmt.size_bytes(*shape) if fmt else size)
        adapter += HALF_BYTES * config.rank * sum(shape) if kind == "linear" else 0
    if config.adapter != "merged" and METHODS[config.method].lora_everywhere and not config.adapter_from:
        rows["adapter"] = [0, 0, adapter]
    rows["sum"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    return [
        {"part": part, "tensors": row[0] or None, "float32": row[1] / 1e6, "shipped": row[2] / 1e6}
        for part, row in rows.items()
    ]


def _state(stage: Stage, config: Config) -> str:
    """Say whether a stage is up to date, to do, or has nothing to do."""
    run = Run(Path(config.output))
    if not stage.applies(config):
        return f"nothing to do (--adapter {config.adapter})"
    try:
        return "up to date" if run.holds(stage.folder, stage_key(stage, config, run)) else "to do"
    except ArtifactError:
        return "to do"

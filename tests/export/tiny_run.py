"""A finished run of a tiny BERT up to the adapter, made without training: quantized, with a random adapter and head."""

import json
from pathlib import Path

import numpy as np
from builders import LABELS, tiny_bert, tiny_data

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run, write_json
from edgepeft.config import Config

HIDDEN, RANK = 64, 4


def random_adapter(
    run: Run, folder: Path, rank: int = RANK, labels: int = len(LABELS), hidden: int = HIDDEN, seed: int = 0
) -> None:
    """Write a PEFT folder whose every tensor is random; alpha is twice the rank, as trained ones have it."""
    about = json.loads((run.path("quantized") / "quantized.json").read_text())
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in [*about["layers"], *about["kept"]]:
        if layer["kind"] == "linear":
            n, k = layer["shape"]
            name = f"base_model.model.{layer['name']}.lora_"
            tensors[f"{name}A.weight"] = rng.standard_normal((rank, k), np.float32) / np.float32(np.sqrt(k))
            tensors[f"{name}B.weight"] = rng.standard_normal((n, rank), np.float32) * np.float32(0.1)
    tensors["base_model.model.classifier.weight"] = rng.standard_normal((labels, hidden), np.float32)
    tensors["base_model.model.classifier.bias"] = rng.standard_normal(labels, np.float32)
    settings = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "modules_to_save": ["classifier"], "base_model_name_or_path": "tiny",
        "target_modules": sorted(
            layer["name"] for layer in [*about["layers"], *about["kept"]] if layer["kind"] == "linear"
        ),
    }  # fmt: skip
    peft_files.write(folder, settings, tensors, about["base_digest"], about["format"])


def make_run(folder: Path, hidden: int = HIDDEN, **settings) -> tuple[Config, Run]:
    """Quantize a tiny BERT and give it an adapter and the figures a training would have left."""
    from edgepeft.quant.stage import quantize
    from edgepeft.train.data import load_splits
    from edgepeft.train.loop import evaluate, load_tokenizer

    model = settings.pop("model", None) or tiny_bert(folder / "model")
    data = tiny_data(folder / "data")
    config = Config(model=str(model), data=str(data), output=str(folder / "run"), threads=1, **settings)
    run = Run(folder / "run")
    run.make("quantized", "", lambda out: quantize(config, run, out))
    random_adapter(run, run.path("adapter"), hidden=hidden)
    splits = load_splits(config)
    write_json(run.path("adapter") / "training.json", {"labels": list(splits.labels), "config": {"method": "lora"}})
    model = torch_model(config, run)
    figures = evaluate(model, config, splits.test, load_tokenizer(run.path("quantized")))
    training = {"labels": list(splits.labels), "config": {"method": "lora"}, "test": figures, "validation": figures}
    write_json(run.path("adapter") / "training.json", training)
    return config, run


def torch_model(config: Config, run: Run, adapter: Path | None = None):
    """The packed model in PyTorch, with the run's adapter as PEFT loads it."""
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model

    model = quantized_model(run.path("quantized"), LABELS, config)
    return PeftModel.from_pretrained(model, str(adapter or run.path("adapter"))).eval()


def export_run(config: Config, run: Run) -> Path:
    """Run the export stage."""
    from edgepeft.export.stage import export

    run.make("export", "", lambda out: export(config, run, out))
    return run.path("export")

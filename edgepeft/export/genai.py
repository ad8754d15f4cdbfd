"""genai_config.json: what ONNX Runtime GenAI needs to host a bundle from Python, C, C++, C# or Java.

    graph's names and sizes, special tokens, context ─► genai_config.json beside model.onnx

Its file names one op library for all processors. A bundle names that of its target; on another machine an app says
which before it makes the model, as each of the languages can:

    config = onnxruntime_genai.Config("bundle")
    config.overlay('{"model": {"decoder": {"session_options": {"custom_ops_library": "lib/linux-x86_64/..."}}}}')

Batches: prompts of unlike length are padded on the right with `pad_token_id`, as its Tokenizer.encode_batch does, and
each row is then what it is alone. GenAI takes every such token for padding wherever it stands, so no prompt of a batch
may hold one; where a model's padding also ends its turns, as in many chat templates, give it one row at a time.
Adapters are its Adapters API's: `edgepeft adapters add` writes the file that it loads beside each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.errors import ArtifactError

NAME = "genai_config.json"
SAFE_LEVEL = {"graph_optimization_level": "ORT_ENABLE_EXTENDED"}  # all of it ends the process in ONNX Runtime 1.24
ADAPTER_VERSION, MODEL_VERSION = 2, 1  # 2: B lies turned
INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


def genai_config(model_type: str, context: int, numbers: Mapping[str, Any], library: str | None) -> dict[str, Any]:
    """Return genai_config.json. numbers: as `export.stage.running_numbers` gives them.

    library: path of the op library below the bundle, None for ONNX Runtime's own operators.
    """
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": [], **SAFE_LEVEL}
    if library is not None:
        session["custom_ops_library"] = library
    decoder = {
        "session_options": session, "filename": "model.onnx", "head_size": numbers["head_dim"],
        "hidden_size": numbers["hidden"], "num_attention_heads": numbers["heads"],
        "num_hidden_layers": numbers["layers"], "num_key_value_heads": numbers["kv_heads"], "inputs": INPUTS,
        "outputs": OUTPUTS,
    }  # fmt: skip
    pad = numbers["eos"][0] if numbers["pad"] is None and numbers["eos"] else numbers["pad"] or 0
    model = {
        "type": model_type, "bos_token_id": pad if numbers["bos"] is None else numbers["bos"],
        "eos_token_id": numbers["eos"], "pad_token_id": pad, "context_length": context,
        "vocab_size": numbers["vocabulary"], "decoder": decoder,
    }  # fmt: skip
    search = {
        "do_sample": False, "max_length": context, "min_length": 0, "num_beams": 1, "num_return_sequences": 1,
        "past_present_share_buffer": True, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0,
    }  # fmt: skip
    return {"model": model, "search": search}


def write_onnx_adapter(feeds: Mapping[str, Any], path: Path) -> None:
    """Write what the runtime feeds for an adapter, {input of the graph: OrtValue}, as ONNX Runtime's `.onnx_adapter`.

    Inputs that the adapter leaves alone are among them, neutral: those of the graph's own default would stay in else.
    Raises ArtifactError when ONNX Runtime cannot write it.
    """
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(ADAPTER_VERSION)
    adapter.set_model_version(MODEL_VERSION)
    adapter.set_parameters(dict(feeds))
    try:
        adapter.export_adapter(str(path))
    except Exception as error:  # ONNX Runtime's own exceptions share no base
        raise ArtifactError(f"{path}: ONNX Runtime cannot write the adapter: {error}") from None

"""Processes that are measured side by side: ours, llama.cpp and ONNX Runtime GenAI.

`protocol` is what they share. `llama` and `genai` are run as files by an interpreter that has those packages and need
not have edgepeft, so they import nothing of it; `ours` runs in this one. `edgepeft.bench.turns` starts and asks them.
"""

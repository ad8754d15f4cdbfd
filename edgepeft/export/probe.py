"""Run a model file on a machine that has only numpy and ONNX Runtime: arrays in, arrays out.

    python probe.py MODEL LIBRARY INPUTS.npz OUTPUTS.npz [THREADS]

LIBRARY may be "-" for stock ONNX Runtime. INPUTS holds the graph's inputs by name (adapter tensors too, if wanted);
OUTPUTS receives its outputs and `onnxruntime`, the version that computed them. Used to compare an emulated or remote
device with this machine; it stands alone, so that it can be copied there.
"""

import sys

import numpy as np


def run(model: str, library: str, inputs: str, outputs: str, threads: int = 1) -> None:
    """Load the model, feed one set of arrays and write what comes out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library != "-":
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(inputs) as arrays:
        found = session.run(None, dict(arrays))
    names = [output.name for output in session.get_outputs()]
    np.savez(outputs, onnxruntime=np.array(onnxruntime.__version__), **dict(zip(names, found)))  # noqa: B905


if __name__ == "__main__":
    run(*sys.argv[1:5], *map(int, sys.argv[5:6]))  # type: ignore[arg-type]

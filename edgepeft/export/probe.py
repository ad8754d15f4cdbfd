"""Run model files on a machine that has only numpy and ONNX Runtime: arrays in, arrays out.

    python probe.py LIBRARY INPUTS.npz MODEL...

LIBRARY may be "-" for stock ONNX Runtime. INPUTS holds the graphs' inputs by name (adapter tensors too, if wanted);
beside each MODEL, its suffix replaced by .npz, come its outputs and `onnxruntime`, the version that computed them. Used
to compare an emulated or remote device with this machine; it stands alone, so that it can be copied there.
"""

import os
import sys

import numpy as np


def run(library: str, inputs: str, *models: str) -> None:
    """Load each model, feed it the same arrays on one thread and write what comes out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if library != "-":
        options.register_custom_ops_library(library)
    with np.load(inputs) as stored:
        arrays = dict(stored)
    for model in models:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, arrays), strict=True))
        np.savez(os.path.splitext(model)[0] + ".npz", onnxruntime=np.array(onnxruntime.__version__), **found)


if __name__ == "__main__":
    run(*sys.argv[1:])

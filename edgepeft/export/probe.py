"""Run model files on a machine that has only numpy and ONNX Runtime: arrays in, arrays out.

    python probe.py LIBRARY INPUTS.npz MODEL...

LIBRARY may be "-" for stock ONNX Runtime. INPUTS holds one or more runs of the graphs' inputs (adapter tensors too, if
wanted), named RUN/NAME; beside each MODEL, its suffix replaced by .npz, come the outputs under such names, less a
decoder's keys and values, and `onnxruntime`, the version that computed them. Used to compare an emulated or remote
device with this machine; it stands alone, so that it can be copied there.
"""

import os
import sys

import numpy as np

BROKEN_OPTIMIZER = "FuseFp16InitializerToFp32NodeTransformer"  # as in edgepeft.runtime.session


def run(library: str, inputs: str, *models: str) -> None:
    """Load each model, feed it the same arrays on one thread and write what comes out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if library != "-":
        options.register_custom_ops_library(library)
    runs: dict[str, dict[str, np.ndarray]] = {}
    with np.load(inputs) as stored:
        for key, array in stored.items():
            place, _, name = key.partition("/")
            runs.setdefault(place, {})[name] = array
    for model in models:
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=[BROKEN_OPTIMIZER]
        )
        names = [output.name for output in session.get_outputs() if not output.name.startswith("present.")]
        found = {"onnxruntime": np.array(onnxruntime.__version__)}
        for place, arrays in runs.items():
            outputs = session.run(names, arrays)
            found.update({f"{place}/{name}": output for name, output in zip(names, outputs, strict=True)})
        np.savez(os.path.splitext(model)[0] + ".npz", **found)  # type: ignore[arg-type]  # numpy's stubs


if __name__ == "__main__":
    run(*sys.argv[1:])

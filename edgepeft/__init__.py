"""edgepeft: parameter-efficient fine-tuning for the edge.

A frozen backbone in 4 or 8 bits and an adapter in full precision go from a Hugging Face folder and a data file to a
bundle that runs on an ARM board. Importing this package loads nothing heavy; each stage imports what it needs.
"""

__version__ = "0.1.0"
OP_ABI = 3  # raised when inputs, attributes or layouts of the ops change: libraries and bundles of another are refused

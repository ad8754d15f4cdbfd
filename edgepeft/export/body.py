"""The body of an ONNX function, node by node: each call adds one operator of opset 21 and returns its value's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

FLOAT32, INT32, INT64 = 1, 6, 7  # onnx.TensorProto
FLOAT_ATTRIBUTES = ("value_float", "epsilon", "scale", "softcap")


class Body:
    """Collects the nodes of a function body; each call returns the name of the new value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, out: str = "", domain: str = "", refs: str = "", **attrs: Any) -> str:
        """Add a node; return its first output.

        out: names its outputs, apart by spaces, else there is one. refs: names attributes that come from the calling
        node ("K N", "value_float=epsilon").
        """
        from onnx import AttributeProto, helper

        outs = out.split() or [f"v{len(self.nodes)}"]
        node = helper.make_node(op, list(inputs), outs, name=outs[0], domain=domain, **attrs)
        for pair in refs.split():
            inner, _, outer = pair.partition("=")
            kind = AttributeProto.FLOAT if inner in FLOAT_ATTRIBUTES else AttributeProto.INT
            node.attribute.add(name=inner, ref_attr_name=outer or inner, type=kind)
        self.nodes.append(node)
        return outs[0]

    def split(self, value: str, parts: int, axis: int) -> list[str]:
        """Cut a value into equal parts along an axis."""
        from onnx import helper

        outs = [f"v{len(self.nodes)}_{i}" for i in range(parts)]
        self.nodes.append(helper.make_node("Split", [value], outs, name=outs[0], axis=axis, num_outputs=parts))
        return outs

    def ints(self, *values: int) -> str:
        """Return a constant int64 vector."""
        return self("Constant", value_ints=list(values))

    def scalar(self, value: np.ndarray) -> str:
        """Return a constant tensor."""
        from onnx import numpy_helper

        return self("Constant", value=numpy_helper.from_array(value))

    def byte(self, value: int) -> str:
        """Return a constant uint8."""
        import numpy as np

        return self.scalar(np.array(value, np.uint8))

    def masked(self, value: str, mask: int) -> str:
        """Return the bits that the mask has too."""
        return self("BitwiseAnd", value, self.byte(mask))

    def shifted(self, value: str, direction: str) -> str:
        """Shift uint8 values by four bits; what leaves the byte is lost."""
        return self("BitShift", value, self.byte(4), direction=direction)

    def attribute(self, name: str) -> str:
        """Return an integer attribute of the calling node as a tensor of shape [1]."""
        return self("Reshape", self("Constant", refs=f"value_int={name}"), self.ints(1))

    def rows_then(self, value: str, *shape: int) -> str:
        """Reshape to [N, *shape]."""
        return self("Reshape", value, self("Concat", self.attribute("N"), self.ints(*shape), axis=0))

    def then_rows(self, value: str, *shape: int) -> str:
        """Reshape to [*shape, N]."""
        n = self.attribute("N")
        return self("Reshape", value, self("Concat", self.ints(*shape), n, axis=0) if shape else n)

    def float32(self, value: str) -> str:
        """Return the value as float32."""
        return self("Cast", value, to=FLOAT32)

    def transposed(self, value: str) -> str:
        """Return a matrix turned."""
        return self("Transpose", value, perm=[1, 0])

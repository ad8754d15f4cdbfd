#include "operators.h"

#include <string.h>

Failure set_nothing(const Node&, Step*) { return nullptr; }

namespace {
const Operator kOperators[] = {
    {"edgepeft", "AdapterMatMul_*", set_linear, run_linear, false},
    {"edgepeft", "RMSNorm", set_norm, run_norm, false},
    {"edgepeft", "SkipRMSNorm", set_norm, run_norm, false},
    {"edgepeft", "SkipLayerNorm", set_skip_layer_norm, run_norm, false},
    {"edgepeft", "GroupQueryAttention", set_cached_attention, run_cached_attention, false},
    {"com.microsoft", "GroupQueryAttention", set_cached_attention, run_cached_attention, false},
    {"edgepeft", "PaddedAttention*", set_padded_attention, run_padded_attention, false},
    {"edgepeft", "GatedActivation_silu", set_each, run_each, false},
    {"edgepeft", "GatedActivation_gelu_tanh", set_each, run_each, false},
    {"edgepeft", "ErfGelu", set_each, run_each, false},
    {"", "Gelu", set_each, run_each, false},
    {"", "Relu", set_each, run_each, false},
    {"", "Tanh", set_each, run_each, false},
    {"", "Sigmoid", set_each, run_each, false},
    {"", "Sum", set_each, run_each, false},
    {"", "Add", set_each, run_each, false},
    {"", "Sub", set_each, run_each, false},
    {"", "Mul", set_each, run_each, false},
    {"", "Div", set_each, run_each, false},
    {"edgepeft", "RouterGate", set_nothing, run_router_gate, false},
    {"edgepeft", "Bottleneck", set_nothing, run_bottleneck, false},
    {"edgepeft", "Before", set_nothing, run_before, false},
    {"edgepeft", "PackedEmbedding_*", set_embedding, run_embedding, false},
    {"edgepeft", "RowEmbedding_*", set_row_embedding, run_embedding, false},
    {"", "Gemm", set_dense, run_dense, false},
    {"", "MatMul", set_dense, run_dense, false},
    {"", "Gather", set_gather, run_gather, false},
    {"", "GatherND", set_gather_nd, run_gather_nd, false},
    {"", "Transpose", set_turn, run_turn, false},
    {"", "Split", set_split, run_split, false},
    {"", "Identity", set_nothing, run_same, true},
    {"", "Reshape", set_nothing, run_reshape, true},
    {"", "Squeeze", set_nothing, run_squeeze, true},
    {"", "Unsqueeze", set_nothing, run_unsqueeze, true},
    {"", "Shape", set_shape, run_shape, false},
    {"", "Cast", set_cast, run_cast, false},
    {"", "ReduceSum", set_sum, run_sum, false},
    {"", "Where", set_nothing, run_where, false},
    {"", "Range", set_nothing, run_range, false},
    {"", "Concat", set_concat, run_concat, false},
    {"", "Pad", set_pad, run_pad, false},
    {"", "Min", set_count, run_count, false},
    {"", "Max", set_count, run_count, false},
    {"", "Equal", set_count, run_count, false},
};
}  // namespace

const Operator* find_operator(const char* domain, const char* name) {
  if (!strcmp(domain, "ai.onnx")) domain = "";
  for (const Operator& op : kOperators) {
    const size_t length = strlen(op.name);
    const bool begins = op.name[length - 1] == '*';
    if (!strcmp(op.domain, domain) && (begins ? !strncmp(op.name, name, length - 1) : !strcmp(op.name, name))) return &op;
  }
  return nullptr;
}

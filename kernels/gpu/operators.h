// The operators' two halves, by file; the table that lists them is in operators.cc.
#pragma once
#include "program.h"
#include "shaders.h"

Failure set_nothing(const Node& node, Step* step);

// linear.cc
Failure set_linear(const Node& node, Step* step);
Failure run_linear(Run& run, const Step& step);

// attention.cc
Failure set_cached_attention(const Node& node, Step* step);
Failure run_cached_attention(Run& run, const Step& step);
Failure set_padded_attention(const Node& node, Step* step);
Failure run_padded_attention(Run& run, const Step& step);

// layers.cc
Failure set_norm(const Node& node, Step* step);
Failure set_skip_layer_norm(const Node& node, Step* step);
Failure run_norm(Run& run, const Step& step);
Failure set_each(const Node& node, Step* step);
Failure run_each(Run& run, const Step& step);
Failure set_embedding(const Node& node, Step* step);
Failure set_row_embedding(const Node& node, Step* step);
Failure run_embedding(Run& run, const Step& step);
Failure set_dense(const Node& node, Step* step);
Failure run_dense(Run& run, const Step& step);
enum class Each : int64_t { add = 0, gelu = 5 };  // some of each.comp's
// y = op(a, b), the shorter one repeated; all lie on the GPU.
Failure each(Run& run, Each op, const Value& a, const Value* b, const Value& y);
// y [.., N] = a [.., K] b + c, b [K, N] or, turned, [N, K]; c [N] or null.
Failure multiply(Run& run, const Step& step, Value& a, Value& b, Value* c, bool turned, const Value& y);

// branches.cc
Failure run_router_gate(Run& run, const Step& step);
Failure run_bottleneck(Run& run, const Step& step);
Failure run_before(Run& run, const Step& step);

// shapes.cc: what picks, cuts and renames
Failure set_gather(const Node& node, Step* step);
Failure run_gather(Run& run, const Step& step);
Failure set_gather_nd(const Node& node, Step* step);
Failure run_gather_nd(Run& run, const Step& step);
Failure set_turn(const Node& node, Step* step);
Failure run_turn(Run& run, const Step& step);
Failure set_split(const Node& node, Step* step);
Failure run_split(Run& run, const Step& step);
Failure run_same(Run& run, const Step& step);
Failure run_reshape(Run& run, const Step& step);
Failure run_squeeze(Run& run, const Step& step);
Failure run_unsqueeze(Run& run, const Step& step);

// counts.cc: on the CPU alone
Failure set_shape(const Node& node, Step* step);
Failure run_shape(Run& run, const Step& step);
Failure set_cast(const Node& node, Step* step);
Failure run_cast(Run& run, const Step& step);
Failure set_sum(const Node& node, Step* step);
Failure run_sum(Run& run, const Step& step);
Failure run_where(Run& run, const Step& step);
Failure run_range(Run& run, const Step& step);
Failure set_concat(const Node& node, Step* step);
Failure run_concat(Run& run, const Step& step);
Failure set_pad(const Node& node, Step* step);
Failure run_pad(Run& run, const Step& step);
Failure set_count(const Node& node, Step* step);
Failure run_count(Run& run, const Step& step);
// Computes a step of `set_each` or `set_count` there; the operands are on the CPU.
Failure count(Run& run, const Step& step);

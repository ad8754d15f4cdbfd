// One call of the op as scratch, preparation and independent tasks; whoever calls brings memory and threads.
//
// Tasks split the tiles of W, so each weight byte is read by one thread; only when x has more rows than a tile job
// may take are they split as well, and W is then unpacked once per kJobRows rows. Preparation (quantize x, t = A.x) is
// one task where it is small: a second barrier costs more than it saves.
#include "adapter_matmul.h"

namespace {

constexpr int64_t kTaskBytes = 32 * 1024;      // weights per task at M = 1: some microseconds
constexpr int64_t kPrepareMacs = 512 * 1024;   // per preparation task

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rank_stride(const Group& g) { return ceil_div(g.rank, kRankPad) * kRankPad; }
int64_t tile_count(const Call& call) {
  int64_t tiles = 0;
  for (int g = 0; g < call.groups; g++) tiles += ceil_div(call.group[g].n, kTileRows);
  return tiles;
}

// Hands out scratch, or, from null, only measures it.
struct Arena {
  char* at;
  template <class T>
  void take(T*& p, int64_t count) {
    p = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) & ~int64_t{63};
  }
};

int64_t lay_out(Call& call, void* base) {
  Arena arena{static_cast<char*>(base)};
  float* x_in = nullptr;
  if (call.s_in) arena.take(x_in, call.m * call.k);
  call.x_in = call.s_in ? x_in : call.x;
  if (call.act == Act::int8) {
    const int64_t blocks = call.m * (call.k / info(call.format).act_block);
    arena.take(call.q, call.m * call.k);
    arena.take(call.q_scale, blocks);
    arena.take(call.q_fix, blocks);
  }
  for (int g = 0; g < call.groups; g++) arena.take(call.t[g], call.m * rank_stride(call.group[g]));
  return arena.at - static_cast<char*>(base);
}

void gate_rows(const Call& call, int g, int64_t m0, int64_t m1) {
  const Group& group = call.group[g];
  const int64_t stride = rank_stride(group);
  for (int64_t m = m0; m < m1; m++) {
    float* t = call.t[g] + m * stride;
    const float* gate = group.gate ? group.gate + m * group.gate_row : nullptr;
    for (int64_t r = 0; gate && r < group.rank; r++) t[r] *= gate[r * group.gate_step];
    for (int64_t r = group.rank; r < stride; r++) t[r] = 0;
  }
}

TileJob tile_job(const Call& call, int64_t tile, int64_t m0, int64_t m1) {
  const FormatInfo& f = info(call.format);
  int g = 0;
  int64_t n0 = tile * kTileRows;  // in its group
  while (n0 >= call.group[g].n) n0 -= call.group[g++].n;
  const Group& group = call.group[g];
  const int64_t blocks = call.k / f.act_block;
  TileJob job = {};
  job.k = call.k;
  job.m = m1 - m0;
  job.w = call.w + tile * tile_bytes(f, call.k);
  job.w_scale = static_cast<const char*>(call.w_scale) + tile * tile_scale_bytes(f, call.k);
  if (call.act == Act::int8) {
    job.q = call.q + m0 * call.k;
    job.q_scale = call.q_scale + m0 * blocks;
    job.q_fix = call.q_fix + m0 * blocks;
  } else {
    job.x = call.x_in + m0 * call.k;
  }
  job.rank = group.rank;
  job.t_stride = rank_stride(group);
  job.t = call.t[g] + m0 * job.t_stride;
  job.b = static_cast<const char*>(group.b) + n0 * group.rank * (group.half ? 2 : 4);
  job.b_half = group.half;
  job.s_out = group.s_out ? group.s_out + n0 * group.s_out_step : nullptr;
  job.s_out_step = group.s_out_step;
  job.bias = group.bias ? group.bias + n0 * group.bias_step : nullptr;
  job.bias_step = group.bias_step;
  job.y = group.y + m0 * group.n + n0;
  job.y_stride = group.n;
  job.columns = static_cast<int>(group.n - n0 < kTileRows ? group.n - n0 : kTileRows);
  return job;
}

}  // namespace

int64_t plan(Call& call) {
  const FormatInfo& f = info(call.format);
  const int64_t tiles = tile_count(call);
  const int64_t reuse = 1 + (call.m < kJobRows ? call.m : kJobRows) / 8;  // more rows of x: fewer tiles make a task
  int64_t per_task = kTaskBytes / (tile_bytes(f, call.k) * reuse);
  if (per_task < 1) per_task = 1;
  call.tiles_per_task = per_task;
  call.tile_tasks = ceil_div(tiles, per_task);
  call.row_tasks = ceil_div(call.m, kJobRows);
  call.tasks = call.tile_tasks * call.row_tasks;
  int64_t ranks = 4;  // quantizing costs about as much as that
  for (int g = 0; g < call.groups; g++) ranks += call.group[g].rank;
  const int64_t rows = kPrepareMacs / (ranks * call.k) & ~int64_t{3};
  call.rows_per_prepare = rows < 4 ? 4 : rows;
  call.prepare_tasks = ceil_div(call.m, call.rows_per_prepare);
  return lay_out(call, nullptr);
}

void place(Call& call, void* scratch) { lay_out(call, scratch); }

void prepare(const Call& call, int64_t task) {
  const FormatInfo& f = info(call.format);
  const int64_t m0 = task * call.rows_per_prepare, blocks = call.k / f.act_block;
  const int64_t m1 = call.m - m0 < call.rows_per_prepare ? call.m : m0 + call.rows_per_prepare;
  if (call.s_in)
    for (int64_t m = m0; m < m1; m++)
      for (int64_t c = 0; c < call.k; c++)
        const_cast<float*>(call.x_in)[m * call.k + c] = call.s_in[c * call.s_in_step] * call.x[m * call.k + c];
  if (call.act == Act::int8)
    for (int64_t m = m0; m < m1; m++)
      call.ops->quantize(call.x_in + m * call.k, call.k, f.act_block, call.ops->zero, call.q + m * call.k,
                         call.q_scale + m * blocks, call.q_fix + m * blocks);
  for (int g = 0; g < call.groups; g++) {
    const Group& group = call.group[g];
    if (!group.rank) continue;
    const int64_t stride = rank_stride(group);
    call.ops->project(group.a, group.half, group.rank, call.k, call.x + m0 * call.k, m1 - m0, call.t[g] + m0 * stride, stride);
    gate_rows(call, g, m0, m1);
  }
}

void run(const Call& call, int64_t task) {
  const int64_t m0 = task / call.tile_tasks * kJobRows, m1 = call.m - m0 < kJobRows ? call.m : m0 + kJobRows;
  const int64_t first = task % call.tile_tasks * call.tiles_per_task, tiles = tile_count(call);
  for (int64_t tile = first; tile < first + call.tiles_per_task && tile < tiles; tile++)
    call.ops->tile(tile_job(call, tile, m0, m1));
}

// One call of the op as scratch, preparation and independent tasks; whoever calls brings memory and threads.
//
// Tasks split the tiles of W, so each weight byte is read by one thread; only when x has more rows than a tile job
// may take are they split as well, and W is then unpacked once per rows_per_job rows. Preparation (quantize x, t = A.x) is
// cut into units. Every task begins by claiming units until none is left, and waits for those that others still compute:
// one barrier less than with tasks of their own, and A is read by all threads.
//
// A gate that is zero for a whole block of ranks in a row switches the block off there: its part of A.x is not computed,
// and zero even where A.x would be NaN. A batch may thus stack the adapters of its rows along R.
#include "adapter_matmul.h"

namespace {

constexpr int64_t kPanelBytes = 1 << 20;       // of int8 x
constexpr int64_t kLeastJobRows = 64;
constexpr int64_t kTaskBytes = 32 * 1024;      // weights per task at M = 1: some microseconds
constexpr int64_t kUnitMacs = 512 * 1024;      // of preparation
constexpr int kSpins = 2000;                   // some microseconds

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t live_stride(const Group& g) { return ceil_div(g.rank, kRankPanel) * (kRankPanel / kRankBlock); }
int64_t gate_rows(const Call& call, const Group& g) { return ceil_div(call.m, g.gate_each); }
int64_t job_rows(const Call& call, int64_t m0) { return call.m - m0 < call.rows_per_job ? call.m - m0 : call.rows_per_job; }
// As many rows of x as the jobs that follow one another find in a core's cache, in whole register tiles.
int64_t rows_per_job(const Call& call) {
  const int64_t rows = kPanelBytes / call.k & ~int64_t{63};
  return rows < kLeastJobRows ? kLeastJobRows : rows < kJobRows ? rows : kJobRows;
}
int64_t job_outputs(const Call& call) { return int64_t{call.m == 1 ? call.ops->tiles_alone : call.ops->tiles} * kTileRows; }
int64_t job_count(const Call& call) {  // for one block of rows
  int64_t jobs = 0;
  for (int g = 0; g < call.groups; g++) jobs += ceil_div(call.group[g].n, job_outputs(call));
  return jobs;
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
    const int64_t columns = call.m * ceil_div(call.k, kChunk) * kChunk, blocks = columns / info(call.format).act_block;
    arena.take(call.q, columns);
    arena.take(call.q_scale, blocks);
    arena.take(call.q_fix, blocks);
  }
  arena.take(call.sums, call.m * call.blocks);
  for (int g = 0; g < call.groups; g++) {
    const Group& group = call.group[g];
    const bool gated = group.gate && group.rank;
    arena.take(call.t[g], call.m * group.rank);
    arena.take(call.live[g], gated ? gate_rows(call, group) * live_stride(group) : 0);
    arena.take(call.live_any[g], gated ? call.row_tasks * live_stride(group) : 0);
    arena.take(call.in_place[g], call.row_tasks);
  }
  arena.take(call.progress, 1);
  return arena.at - static_cast<char*>(base);
}

const float* gate_of(const Group& g, int64_t m) { return g.gate + m / g.gate_each * g.rank; }

// Marks the live blocks of a row of gates and returns how many there are.
int64_t mark_live(const Group& g, const float* gate, uint8_t* live) {
  int64_t count = 0;
  for (int64_t block = 0; block < live_stride(g); block++) {
    const int64_t first = block * kRankBlock, left = g.rank - first;
    uint32_t any = 0;  // of the bits without their sign: NaN is not zero
    if (g.gate_step == 1 && left >= kRankBlock) for (int64_t i = 0; i < kRankBlock; i++) any |= float_bits(gate[first + i]) << 1;
    else for (int64_t i = 0; i < kRankBlock && i < left; i++) any |= float_bits(gate[(first + i) * g.gate_step]) << 1;
    count += live[block] = any != 0;
  }
  return count;
}

// Takes what is live from a group before that has the same gates, as linears of one layout have. False: there is none.
bool chosen_before(Call& call, int g) {
  const Group& group = call.group[g];
  const auto size = [&](int64_t rows) { return static_cast<size_t>(rows * live_stride(group)); };
  for (int i = 0; group.gate && i < g; i++) {
    const Group& other = call.group[i];
    if (other.gate != group.gate || other.gate_each != group.gate_each || other.gate_step != group.gate_step || other.rank != group.rank)
      continue;
    if (!call.live[i]) call.live[g] = nullptr;
    if (call.live[g]) __builtin_memcpy(call.live[g], call.live[i], size(gate_rows(call, group)));
    if (call.live[g]) __builtin_memcpy(call.live_any[g], call.live_any[i], size(call.row_tasks));
    __builtin_memcpy(call.in_place[g], call.in_place[i], static_cast<size_t>(call.row_tasks));
    call.live_ranks[g] = call.live_ranks[i];
    return true;
  }
  return false;
}

// Tells jobs whose rows share little of B from the others, and forgets what is live where that is all.
void choose_adapter_path(Call& call, int g) {
  if (chosen_before(call, g)) return;
  const Group& group = call.group[g];
  const int64_t stride = live_stride(group), blocks = ceil_div(group.rank, kRankBlock);
  const bool gated = group.gate && group.rank;
  int64_t all = 0;  // live blocks of all rows
  for (int64_t job = 0, marked = 0, own = blocks; job < call.row_tasks; job++) {
    const int64_t m0 = job * call.rows_per_job, m1 = m0 + job_rows(call, m0);
    int64_t in_job = gated ? 0 : (m1 - m0) * blocks;
    uint8_t* any = call.live_any[g] + job * stride;
    for (int64_t m = m0, end; gated && m < m1; m = end) {  // rows that share gates
      const int64_t row = m / group.gate_each;
      uint8_t* live = call.live[g] + row * stride;
      end = (row + 1) * group.gate_each < m1 ? (row + 1) * group.gate_each : m1;
      if (row == marked) own = mark_live(group, gate_of(group, m), live), marked++;
      for (int64_t block = 0; block < stride; block++) any[block] = live[block] | (m > m0 && any[block]);
      in_job += own * (end - m);
    }
    call.in_place[g][job] = in_job <= 2 * blocks || m1 - m0 <= call.ops->tile_m;
    all += in_job;
  }
  if (all == call.m * blocks) call.live[g] = nullptr;
  call.live_ranks[g] = all * kRankBlock;
}

void multiply(float* v, const float* by, int64_t step, int64_t n) {
  if (step == 1) for (int64_t i = 0; i < n; i++) v[i] *= by[i];
  else for (int64_t i = 0; i < n; i++) v[i] *= by[i * step];
}

// Ranks r0..r1 of t = gate . (A.x) for rows m0..m1 that have the same live blocks, where they are live.
void project_alike(const Call& call, int g, const uint8_t* live, int64_t m0, int64_t m1, int64_t r0, int64_t r1) {
  const Group& group = call.group[g];
  const int64_t row_bytes = call.k * (group.half ? 2 : 4);
  float* t = call.t[g] + m0 * group.rank;
  for (int64_t r = r0, end; r < r1; r = end) {
    const bool on = !live || live[r / kRankBlock];
    for (end = r; end < r1 && on == (!live || live[end / kRankBlock]);) end += kRankBlock;
    if (end > r1) end = r1;
    if (!on) continue;
    call.ops->project(static_cast<const char*>(group.a) + r * row_bytes, group.half, end - r, call.k, call.x + m0 * call.k,
                      m1 - m0, t + r, group.rank);
    for (int64_t m = m0; group.gate && m < m1; m++)
      multiply(t + (m - m0) * group.rank + r, gate_of(group, m) + r * group.gate_step, group.gate_step, end - r);
  }
}

void project_rows(const Call& call, int g, int64_t m0, int64_t m1, int64_t r0, int64_t r1) {
  const int64_t stride = live_stride(call.group[g]), each = call.group[g].gate_each;
  if (!call.live[g]) return project_alike(call, g, nullptr, m0, m1, r0, r1);
  for (int64_t m = m0, end; m < m1; m = end) {
    const uint8_t* live = call.live[g] + m / each * stride;
    for (end = (m / each + 1) * each; end < m1 && alike(live, call.live[g] + end / each * stride, stride);) end += each;
    project_alike(call, g, live, m, end < m1 ? end : m1, r0, r1);
  }
}

// Sums of a row of s_in . x over each block. Sixteen at a time, so that a compiler may use vectors.
void sum_blocks(const Call& call, int64_t m) {
  const int64_t size = call.k / call.blocks;
  const float* x = call.x_in + m * call.k;
  for (int64_t b = 0; b < call.blocks; b++) {
    float part[16] = {}, sum = 0;
    for (int64_t c = 0; c < size; c += 16, x += 16)
      for (int i = 0; i < 16; i++) part[i] += x[i];
    for (int i = 0; i < 16; i++) sum += part[i];
    call.sums[m * call.blocks + b] = sum;
  }
}

void quantize_rows(const Call& call, int64_t m0, int64_t m1) {
  const int block = info(call.format).act_block, blocks = kChunk / block;
  const int64_t step = call.m == 1 ? call.k : kChunk;  // a row alone lies in one piece
  for (int64_t m = m0; m < m1; m++) {
    for (int64_t c = 0; call.s_in && c < call.k; c++)
      const_cast<float*>(call.x_in)[m * call.k + c] = call.s_in[c * call.s_in_step] * call.x[m * call.k + c];
    for (int64_t c = 0, at = m; call.act == Act::int8 && c < call.k; c += step, at += call.m)
      call.ops->quantize(call.x_in + m * call.k + c, call.k - c < step ? call.k - c : step, block, call.ops->zero,
                         call.q + at * kChunk, call.q_scale + at * blocks, call.q_fix + at * blocks);
    if (call.blocks) sum_blocks(call, m);
  }
}

int64_t rank_units(const Call& call, int g) { return ceil_div(call.group[g].rank, call.ranks_per_unit); }

// Unit i of some rows: first they are quantized, then come the ranks of each group.
void prepare(const Call& call, int64_t unit) {
  int64_t per_rows = 1;
  for (int g = 0; g < call.groups; g++) per_rows += rank_units(call, g);
  const int64_t m0 = unit / per_rows * call.rows_per_unit;
  const int64_t m1 = call.m - m0 < call.rows_per_unit ? call.m : m0 + call.rows_per_unit;
  int64_t i = unit % per_rows;
  if (!i--) return quantize_rows(call, m0, m1);
  int g = 0;
  while (i >= rank_units(call, g)) i -= rank_units(call, g++);
  const int64_t r0 = i * call.ranks_per_unit, left = call.group[g].rank - r0;
  project_rows(call, g, m0, m1, r0, r0 + (left < call.ranks_per_unit ? left : call.ranks_per_unit));
}

void plan_preparation(Call& call) {
  int64_t ranks = 4, live = 4, most = 1;  // quantizing costs about as much as 4
  for (int g = 0; g < call.groups; g++) {
    ranks += call.group[g].rank;
    live += call.live_ranks[g] / call.m;
    if (call.group[g].rank > most) most = call.group[g].rank;
  }
  const int64_t rows = kUnitMacs / (live * call.k) & ~int64_t{3};
  call.rows_per_unit = rows < 4 ? 4 : rows;
  call.ranks_per_unit = call.m <= 4 || call.m * ranks * call.k <= kUnitMacs ? kRankBlock : most;
  call.prepare_units = 1;
  for (int g = 0; g < call.groups; g++) call.prepare_units += rank_units(call, g);
  call.prepare_units *= ceil_div(call.m, call.rows_per_unit);
}

// Returns when all is prepared, by this thread or others.
void prepare_together(const Call& call) {
  int64_t* done = &call.progress->done;
  if (__atomic_load_n(done, __ATOMIC_ACQUIRE) == call.prepare_units) return;
  for (int64_t unit; (unit = __atomic_fetch_add(&call.progress->claimed, 1, __ATOMIC_RELAXED)) < call.prepare_units;) {
    prepare(call, unit);
    __atomic_fetch_add(done, 1, __ATOMIC_RELEASE);
  }
  for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < call.prepare_units; spins++)
    if (spins > kSpins) yield_cpu();
}

TileJob tile_job(const Call& call, int64_t number, int64_t m0, int64_t m1) {
  const FormatInfo& f = info(call.format);
  int g = 0;
  int64_t n0 = number * job_outputs(call), tile = 0;  // n0: in its group
  for (; n0 >= call.group[g].n; g++) {
    n0 -= ceil_div(call.group[g].n, job_outputs(call)) * job_outputs(call);
    tile += ceil_div(call.group[g].n, kTileRows);
  }
  tile += n0 / kTileRows;
  const Group& group = call.group[g];
  const int64_t left = group.n - n0;
  TileJob job = {};
  job.k = call.k;
  job.m = m1 - m0;
  job.w = call.w + tile * tile_bytes(f, call.k);
  job.w_scale = static_cast<const char*>(call.w_scale) + tile * tile_scale_bytes(f, call.k);
  job.w_step = tile_bytes(f, call.k);
  job.w_scale_step = tile_scale_bytes(f, call.k);
  if (call.act == Act::int8) {
    job.q = call.q + m0 * kChunk;
    job.q_scale = call.q_scale + m0 * (kChunk / f.act_block);
    job.q_fix = call.q_fix + m0 * (kChunk / f.act_block);
    job.q_rows = call.m;
  } else {
    job.x = call.x_in + m0 * call.k;
  }
  job.rank = group.rank;
  job.t = call.t[g] + m0 * job.rank;
  job.live_stride = live_stride(group);
  job.live = call.live[g];
  job.live_each = group.gate_each;
  job.row = m0;
  job.live_any = call.live[g] ? call.live_any[g] + m0 / call.rows_per_job * job.live_stride : nullptr;
  job.in_place = call.in_place[g][m0 / call.rows_per_job];
  job.b = static_cast<const char*>(group.b) + n0 * (group.half ? 2 : 4);
  job.b_step = group.n;
  job.b_half = group.half;
  job.blocks = call.blocks;
  job.sums = call.sums + m0 * call.blocks;
  job.offset = static_cast<const char*>(call.offset) + tile * kTileRows * (call.offset_half ? 2 : 4);
  for (int i = 0; i < call.groups; i++) job.offset_step += ceil_div(call.group[i].n, kTileRows) * kTileRows;
  job.offset_half = call.offset_half;
  job.s_out = group.s_out ? group.s_out + n0 * group.s_out_step : nullptr;
  job.s_out_step = group.s_out_step;
  job.bias = group.bias ? group.bias + n0 * group.bias_step : nullptr;
  job.bias_step = group.bias_step;
  job.y = group.y + m0 * group.n + n0;
  job.y_stride = group.n;
  job.columns = static_cast<int>(left < job_outputs(call) ? left : job_outputs(call));
  return job;
}

}  // namespace

int64_t plan(Call& call) {
  const FormatInfo& f = info(call.format);
  call.rows_per_job = rows_per_job(call);
  const int64_t reuse = 1 + job_rows(call, 0) / 8;  // more rows of x: fewer jobs make a task
  const int64_t per_task = kTaskBytes / (tile_bytes(f, call.k) * (job_outputs(call) / kTileRows) * reuse);
  call.jobs_per_task = per_task < 1 ? 1 : per_task;
  call.tile_tasks = ceil_div(job_count(call), call.jobs_per_task);
  call.row_tasks = ceil_div(call.m, call.rows_per_job);
  call.tasks = call.tile_tasks * call.row_tasks;
  return lay_out(call, nullptr);
}

void place(Call& call, void* scratch) {
  lay_out(call, scratch);
  *call.progress = {};
  for (int g = 0; g < call.groups; g++) choose_adapter_path(call, g);
  plan_preparation(call);
}

void run(const Call& call, int64_t task) {
  const int64_t m0 = task / call.tile_tasks * call.rows_per_job, m1 = m0 + job_rows(call, m0);
  const int64_t first = task % call.tile_tasks * call.jobs_per_task, jobs = job_count(call);
  prepare_together(call);
  for (int64_t job = first; job < first + call.jobs_per_task && job < jobs; job++)
    call.ops->tile(tile_job(call, job, m0, m1));
}

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
int64_t gate_rows(const Call& call, const Group& g) { return g.gate ? ceil_div(call.m, g.gate_each) : 1; }
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
    arena.take(call.t[g], call.m * group.rank);
    arena.take(call.run[g], gate_rows(call, group));
    arena.take(call.span[g], gate_rows(call, group) * (ceil_div(group.rank, kRankBlock) + 1) / 2);
  }
  arena.take(call.progress, 1);
  return arena.at - static_cast<char*>(base);
}

const float* gate_of(const Group& g, int64_t m) { return g.gate + m / g.gate_each * g.rank; }

// Whether a block of ranks is live in a row of gates: of the bits without their sign, as NaN is not zero.
bool is_live(const Group& g, const float* gate, int64_t first) {
  const int64_t left = g.rank - first;
  uint32_t any = 0;
  if (g.gate_step == 1 && left >= kRankBlock) for (int64_t i = 0; i < kRankBlock; i++) any |= float_bits(gate[first + i]) << 1;
  else for (int64_t i = 0; i < kRankBlock && i < left; i++) any |= float_bits(gate[(first + i) * g.gate_step]) << 1;
  return any;
}

// Writes what is live in row m and those that share its gates, and returns how many spans it is.
int64_t find_spans(const Group& g, int64_t m, Span* span) {
  int64_t spans = 0, end = 0;
  for (int64_t r = 0; r < g.rank; r = end) {
    end = r + kRankBlock < g.rank ? r + kRankBlock : g.rank;
    if (g.gate && !is_live(g, gate_of(g, m), r)) continue;
    if (spans && span[spans - 1].to == r) span[spans - 1].to = end;
    else span[spans++] = {r, end};
  }
  return spans;
}

int64_t ranks_of(const Run& run) {
  int64_t ranks = 0;
  for (int64_t s = 0; s < run.spans; s++) ranks += run.span[s].to - run.span[s].from;
  return ranks;
}

bool alike(const Run& a, const Run& b) {
  bool same = a.spans == b.spans;
  for (int64_t s = 0; same && s < a.spans; s++) same = a.span[s].from == b.span[s].from && a.span[s].to == b.span[s].to;
  return same;
}

bool same_gates(const Group& a, const Group& b) {
  return a.gate == b.gate && a.gate_each == b.gate_each && a.gate_step == b.gate_step && a.rank == b.rank;
}

// Finds what is live in which rows; a group before this one may know, as linears of one layout share their gates.
void find_live(Call& call, int g) {
  const Group& group = call.group[g];
  for (int i = 0; i < g; i++)
    if (same_gates(call.group[i], group)) {
      call.run[g] = call.run[i];
      call.live[g] = call.live[i];
      return;
    }
  Run* last = nullptr;
  Span* span = call.span[g];
  call.live[g] = 0;
  for (int64_t m = 0, end; m < call.m; m = end) {
    end = group.gate && group.gate_each < call.m - m ? m + group.gate_each : call.m;
    const Run run = {end, span, find_spans(group, m, span)};
    const int64_t ranks = ranks_of(run);
    if (ranks > call.live[g]) call.live[g] = ranks;
    if (last && alike(*last, run)) {
      last->end = end;
    } else {
      *(last = last ? last + 1 : call.run[g]) = run;
      span += run.spans;
    }
  }
}

void multiply(float* v, const float* by, int64_t step, int64_t n) {
  if (step == 1) for (int64_t i = 0; i < n; i++) v[i] *= by[i];
  else for (int64_t i = 0; i < n; i++) v[i] *= by[i * step];
}

// As one stream, which a processor foresees, as it does not those of the few ranks that several rows are multiplied by at once.
void fetch(const char* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// Columns c0..c1 of t = gate . (A.x) for rows m0..m1 of a run.
void project_run(const Call& call, int g, const Run& run, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
  const Group& group = call.group[g];
  const int64_t row_bytes = call.k * (group.half ? 2 : 4), step = call.live[g];
  for (int64_t s = 0, c = 0; s < run.spans && c < c1; c += run.span[s].to - run.span[s].from, s++) {
    const int64_t from = run.span[s].from, to = run.span[s].to;
    const int64_t r0 = c < c0 ? from + c0 - c : from, r1 = to - from < c1 - c ? to : from + c1 - c;
    if (r0 >= r1) continue;
    float* t = call.t[g] + m0 * step + c + r0 - from;
    if (group.gate && m1 - m0 >= 4) fetch(static_cast<const char*>(group.a) + r0 * row_bytes, (r1 - r0) * row_bytes);
    call.ops->project(static_cast<const char*>(group.a) + r0 * row_bytes, group.half, r1 - r0, call.k, call.x + m0 * call.k,
                      m1 - m0, t, step);
    for (int64_t m = m0; group.gate && m < m1; m++, t += step) multiply(t, gate_of(group, m) + r0 * group.gate_step, group.gate_step, r1 - r0);
  }
}

const Run* run_of(const Call& call, int g, int64_t m) {
  const Run* run = call.run[g];
  while (run->end <= m) run++;
  return run;
}

void project_rows(const Call& call, int g, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
  const Run* run = run_of(call, g, m0);
  for (int64_t m = m0, end; m < m1; m = end, run++) {
    end = run->end < m1 ? run->end : m1;
    project_run(call, g, *run, m, end, c0, c1);
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

int64_t rank_units(const Call& call, int g) { return ceil_div(call.live[g], call.ranks_per_unit); }

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
  project_rows(call, g, m0, m1, i * call.ranks_per_unit, (i + 1) * call.ranks_per_unit);
}

void plan_preparation(Call& call) {
  int64_t ranks = 4, most = 1;  // quantizing costs about as much as 4
  for (int g = 0; g < call.groups; g++) {
    ranks += call.live[g];
    if (call.live[g] > most) most = call.live[g];
  }
  const int64_t rows = kUnitMacs / (ranks * call.k) & ~int64_t{3};
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
  job.rank = call.live[g];
  job.t = call.t[g] + m0 * job.rank;
  job.run = run_of(call, g, m0);
  job.row = m0;
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
  for (int g = 0; g < call.groups; g++) find_live(call, g);
  plan_preparation(call);
}

void run(const Call& call, int64_t task) {
  const int64_t m0 = task / call.tile_tasks * call.rows_per_job, m1 = m0 + job_rows(call, m0);
  const int64_t first = task % call.tile_tasks * call.jobs_per_task, jobs = job_count(call);
  prepare_together(call);
  for (int64_t job = first; job < first + call.jobs_per_task && job < jobs; job++)
    call.ops->tile(tile_job(call, job, m0, m1));
}

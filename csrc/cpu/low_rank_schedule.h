// How a `low_rank` op is cut into tasks for torch's threads: the rows of one adapter together, so that its factors are
// read once.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "low_rank_arguments.h"

namespace lora_kernels {

// A thread's own memory, kept from call to call.
struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
  char* get(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(4096, size));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
};
inline thread_local Buffer kernel_scratch, local_rows, column_block;

inline void* scratch() { return kernel_scratch.get(kScratch); }
inline float* floats(Buffer& buffer, int64_t count) {
  return reinterpret_cast<float*>(buffer.get(count * sizeof(float)));
}

// Row indices of a run within a group, for Rows.
inline const int32_t* index_of(const Group& group) { return group.pairs ? group.pairs + group.first : nullptr; }
inline int64_t offset_of(const Group& group) { return group.pairs ? 0 : group.first; }
inline int64_t pair_of(const Group& group, int64_t i) {
  return group.pairs ? group.pairs[group.first + i] : group.first + i;
}

inline Rows rows_of(const Matrix& matrix, const Group& group, int64_t column, int divisor) {
  Rows rows = matrix.view(column, index_of(group), divisor);
  rows.data = static_cast<char*>(rows.data) + offset_of(group) * matrix.stride * element_size(matrix.dtype);
  return rows;
}

// Call f(task) for every task, on torch's threads where the work repays waking them.
template <class F>
void for_each_task(int64_t tasks, bool parallel, const F& f) {
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (!parallel || threads < 2) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

// Below this many bytes of factors and rows one thread is done before a second one has woken up.
constexpr int64_t kWorthThreads = 160 << 10;

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// y += s · w · (x Aᵀ) Bᵀ, or one half of it: v comes from x and A or is given, and goes to y and B or is the result.
struct LowRank {
  const Routing& routing;
  int64_t slices, rank;  // padded
  const LowRankKernels& kernels = low_rank_kernels();
  const Matrix* x = nullptr;  // shrink from
  const Factors* A = nullptr;
  const Matrix* v_in = nullptr;  // or given [S * P, R]
  Matrix* y = nullptr;           // expand to
  const Factors* B = nullptr;
  float* v_out = nullptr;  // or the result [S, P, R]
  const Scales* scales = nullptr;
  const float* weights = nullptr;

  int live_rank(int64_t s, int64_t l) const {
    int live = int(rank);
    if (A) live = std::min(live, A->at(s, l).rank);
    if (B) live = std::min(live, B->at(s, l).rank);
    return live;
  }

  // Parts [part, part_end) of v = x Aᵀ, or the given v, for a run of pairs: [count, R].
  void make_v(const Group& run, int64_t s, int64_t part, int64_t part_end, float* v) const {
    int live = live_rank(s, run.adapter);
    if (A) {
      Factor a = A->at(s, run.adapter);
      a.rank = live;
      Rows rows = rows_of(*x, run, 0, routing.divisor);
      for (int64_t p = part; p < part_end; ++p)
        kernels.shrink(rows, int(run.count), a, p * kPart, std::min((p + 1) * kPart, x->columns), p > part, v, rank,
                       scratch());
    } else {
      const float* data = static_cast<const float*>(v_in->data) + s * routing.pairs * v_in->stride;
      for (int64_t i = 0; i < run.count; ++i)
        std::memcpy(v + i * rank, data + pair_of(run, i) * v_in->stride, live * sizeof(float));
    }
  }

  void scale_v(const Group& run, int64_t s, float* v) const {
    if (!B) return;
    int live = live_rank(s, run.adapter);
    float scale = scales->at(s, run.adapter);
    if (scale == 1.0f && !weights) return;
    for (int64_t i = 0; i < run.count; ++i) {
      float factor = weights ? scale * weights[pair_of(run, i)] : scale;
      for (int r = 0; r < live; ++r) v[i * rank + r] *= factor;
    }
  }

  // Columns [begin, end) of slice s of y, or the rows of v_out.
  void use_v(const Group& run, int64_t s, const float* v, int64_t begin, int64_t end) const {
    int live = live_rank(s, run.adapter);
    if (!live) return;
    if (B) {
      Factor b = B->at(s, run.adapter);
      b.rank = live;
      kernels.expand(rows_of(*y, run, first_column(s), 1), int(run.count), v, rank, b, begin, end, scratch());
    } else {
      float* out = v_out + s * routing.pairs * rank;
      for (int64_t i = 0; i < run.count; ++i)
        std::memcpy(out + pair_of(run, i) * rank, v + i * rank, live * sizeof(float));
    }
  }

  int64_t first_column(int64_t s) const {
    int64_t column = 0;
    for (int64_t i = 0; i < s; ++i) column += B->widths[i];
    return column;
  }

  int64_t parts() const { return A ? std::max<int64_t>(divide_up(x->columns, kPart), 1) : 1; }

  int64_t bytes(const std::vector<Group>& groups) const {
    int64_t sum = 0, size = A ? element_size(A->table[0].dtype) : B ? element_size(B->table[0].dtype) : 4;
    int64_t in = A ? x->columns : 0, out = B ? y->columns : 0;
    for (const Group& g : groups) sum += (slices * in + out) * rank * size + g.count * (in + 2 * out) * 2;
    return sum;
  }

  // Runs short enough for all threads to have one, of at least 64 rows, so that factors are read few times.
  std::vector<Group> runs() const {
    int64_t total = 0, threads = torch::stable::get_num_threads();
    for (const Group& g : routing.groups) total += g.count;
    int64_t longest = std::max<int64_t>(64, divide_up(divide_up(total, threads), 16) * 16);
    if (longest > 512) longest = divide_up(divide_up(total, divide_up(total, 512 * threads) * threads), 16) * 16;
    std::vector<Group> out;
    for (const Group& g : routing.groups) {
      int64_t pieces = divide_up(g.count, longest), length = divide_up(divide_up(g.count, pieces), 16) * 16;
      for (int64_t first = 0; first < g.count; first += length)
        out.push_back({g.adapter, g.pairs, first, std::min(length, g.count - first)});
    }
    return out;
  }

  void run() const {
    if (routing.groups.empty()) return;
    bool parallel = bytes(routing.groups) >= kWorthThreads;
    if (routing.divisor > 1 && B) {
      mix(parallel);
      return;
    }
    const std::vector<Group> cut = parallel ? runs() : std::vector<Group>();
    const std::vector<Group>& tasks = parallel ? cut : routing.groups;
    if (parallel && int64_t(tasks.size()) < int64_t(torch::stable::get_num_threads())) {
      split(tasks);
      return;
    }
    for_each_task(tasks.size(), parallel, [&](int64_t task) {
      const Group& run = tasks[task];
      float* v = floats(local_rows, run.count * rank);
      for (int64_t s = 0; s < slices; ++s) {
        if (!live_rank(s, run.adapter)) continue;
        make_v(run, s, 0, parts(), v);
        scale_v(run, s, v);
        use_v(run, s, v, 0, B ? B->widths[s] : 0);
      }
    });
  }

  // v of all runs: [S, Σ count, R], the first of the planes that held the parts of K.
  struct Shrunk {
    std::vector<int64_t> start;  // of each run
    int64_t count = 0, rank;
    float* data;

    float* at(int64_t s, int64_t run) const { return data + (s * count + start[run]) * rank; }
  };

  // Parts of K by task, then added in order and scaled.
  Shrunk shrink_all(const std::vector<Group>& runs) const {
    Shrunk v;
    for (const Group& run : runs) {
      v.start.push_back(v.count);
      v.count += run.count;
    }
    int64_t planes = parts(), plane = slices * v.count * rank, n = runs.size();
    v.rank = rank;
    v.data = floats(local_rows, planes * plane);
    for_each_task(n * slices * planes, A != nullptr, [&](int64_t task) {
      int64_t part = task % planes, s = task / planes % slices, i = task / planes / slices;
      if (live_rank(s, runs[i].adapter)) make_v(runs[i], s, part, part + 1, v.at(s, i) + part * plane);
    });
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0; s < slices; ++s) {
        int live = live_rank(s, runs[i].adapter);
        float* sum = v.at(s, i);
        for (int64_t part = 1; part < planes; ++part)
          for (int64_t row = 0; row < runs[i].count; ++row)
            for (int r = 0; r < live; ++r) sum[row * rank + r] += sum[part * plane + row * rank + r];
        scale_v(runs[i], s, sum);
      }
    return v;
  }

  // Fewer runs than threads: columns of N by task.
  void split(const std::vector<Group>& runs) const {
    Shrunk v = shrink_all(runs);
    int64_t n = runs.size();
    int64_t width =
        B ? std::max<int64_t>(divide_up(divide_up(B->total, torch::stable::get_num_threads()), 64) * 64, 128) : 1;
    int64_t widest = B ? *std::max_element(B->widths.begin(), B->widths.end()) : 1, chunks = divide_up(widest, width);
    for_each_task(n * slices * chunks, B != nullptr, [&](int64_t task) {
      int64_t chunk = task % chunks, s = task / chunks % slices, i = task / chunks / slices;
      int64_t end = B ? std::min(B->widths[s], (chunk + 1) * width) : 0;
      if (!B || chunk * width < end) use_v(runs[i], s, v.at(s, i), chunk * width, end);
    });
  }

  // y = x Wᵀ + bias and the adapters' part on top, of one slice: columns by task, the part added to those just made.
  void run_on(const Factor& W, const void* bias) const {
    constexpr int64_t kFew = 16, kColumns = 256;
    std::vector<Group> cut = runs();
    Shrunk v = shrink_all(cut);
    int64_t threads = torch::stable::get_num_threads(), width = divide_up(divide_up(y->columns, threads), 32) * 32;
    if (y->rows > kFew) width = std::min(width, kColumns);  // stay in a cache
    for_each_task(divide_up(y->columns, width), true, [&](int64_t task) {
      int64_t begin = task * width, end = std::min(begin + width, y->columns);
      kernels.linear(x->view(0, nullptr, 1), int(x->rows), W, x->columns, bias, y->view(0, nullptr, 1), begin, end,
                     scratch());
      for (size_t i = 0; i < cut.size(); ++i) use_v(cut[i], 0, v.at(0, i), begin, end);
    });
  }

  // Several adapters a row: every pair's v first, then the columns of y in fp32, adapter by adapter, rounded once.
  void mix(bool parallel) const {
    constexpr int64_t kColumns = 64;
    std::vector<Group> tasks = runs();
    float* v = floats(local_rows, slices * routing.pairs * rank);
    std::vector<int64_t> start(1, 0);
    for (const Group& run : tasks) start.push_back(start.back() + run.count);
    auto at = [&](int64_t s, int64_t i) { return v + (s * routing.pairs + start[i]) * rank; };
    for_each_task(tasks.size() * slices, parallel, [&](int64_t task) {
      int64_t s = task % slices, i = task / slices;
      if (!live_rank(s, tasks[i].adapter)) return;
      make_v(tasks[i], s, 0, parts(), at(s, i));
      scale_v(tasks[i], s, at(s, i));
    });
    std::vector<std::pair<int64_t, int64_t>> blocks;  // (slice, first column in it)
    for (int64_t s = 0; s < slices; ++s)
      for (int64_t n = 0; n < B->widths[s]; n += kColumns) blocks.push_back({s, n});
    for_each_task(blocks.size(), parallel, [&](int64_t task) {
      auto [s, n] = blocks[task];
      int64_t columns = std::min(kColumns, B->widths[s] - n);
      float* sum = floats(column_block, y->rows * kColumns);
      convert(*y, first_column(s) + n, columns, sum, true);
      for (size_t i = 0; i < tasks.size(); ++i) {
        Factor b = B->at(s, tasks[i].adapter);
        b.rank = live_rank(s, tasks[i].adapter);
        if (!b.rank) continue;
        b.data = static_cast<const char*>(b.data) + n * b.stride * element_size(b.dtype);
        Rows rows{sum + offset_of(tasks[i]) * kColumns, DType::f32, kColumns, index_of(tasks[i]), routing.divisor};
        kernels.expand(rows, int(tasks[i].count), at(s, i), rank, b, 0, columns, scratch());
      }
      convert(*y, first_column(s) + n, columns, sum, false);
    });
  }

  // Columns of y to floats [rows, 64] or back.
  static void convert(const Matrix& y, int64_t column, int64_t columns, float* out, bool from_y) {
    // Plain loops: a mixture is bound by its factors, not by this.
    for (int64_t i = 0; i < y.rows; ++i) {
      char* row = static_cast<char*>(y.data) + (i * y.stride + column) * element_size(y.dtype);
      float* wide = out + i * 64;
      for (int64_t n = 0; n < columns; ++n) {
        switch (y.dtype) {
          case DType::f32:
            move(reinterpret_cast<float*>(row)[n], wide[n], from_y);
            break;
          case DType::bf16:
            move(reinterpret_cast<torch::headeronly::BFloat16*>(row)[n], wide[n], from_y);
            break;
          case DType::f16:
            move(reinterpret_cast<torch::headeronly::Half*>(row)[n], wide[n], from_y);
            break;
        }
      }
    }
  }
  template <class T>
  static void move(T& narrow, float& wide, bool from_y) {
    if (from_y)
      wide = static_cast<float>(narrow);
    else
      narrow = static_cast<T>(wide);
  }
};

}  // namespace lora_kernels

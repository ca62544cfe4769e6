// Transforms along rows that lie in a block's shared memory.
//
// y = scale · (H₁ ⊗ H₂ ⊗ ... ⊗ H_{2^m}) x for rows x of N numbers. A row is N / 2 pairs of neighbours in fp32, and the
// transform is a list of passes: each takes values `radix` at a time, `stride` pairs apart, and puts back their product
// with H_2^k or a base. The first pass reads x itself and the last writes y, so three passes cost two trips through
// shared memory. The butterfly within a pair comes with the last.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace lora_kernels {

constexpr int kMostPasses = 12;
constexpr int kMostThreads = 512;
constexpr int kAnyBase = 64;                // in place of a kernel's widest pass: bases of any order too
constexpr int kOutputs = 64, kColumns = 8;  // of a base of any order, that a warp computes at once

// n / value for n * value < 2^32, by a product; the host sets `magic`, 0 for a value of 1.
struct Divisor {
  uint32_t value, magic;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return magic ? uint32_t(uint64_t(n) * magic >> 32) : n;
  }
};

struct Pass {
  uint32_t radix;  // 1 only moves, a power of two to 32, or a base's order
  Divisor stride;  // pairs
  Divisor tasks;   // of a row
  uint32_t step;   // bytes in shared memory from one of its values to the next
  uint32_t signs;  // where a base's bits start: those of its rows for H, of its columns for its transpose

  // The first of the pairs of a task of one row.
  __device__ __forceinline__ uint32_t pair_of(uint32_t task) const {
    return stride.quotient(task) * (radix - 1) * stride.value + task;
  }
};

struct Hadamard {
  const void* x;
  void* y;                           // [rows, 2 pairs], contiguous
  const uint32_t* signs;             // null where no base needs its bits
  int64_t rows, row_stride, stride;  // of x, in elements
  uint32_t pairs, rows_each;         // of a row; rows of a block
  uint32_t pad;                      // a pair is left out in shared memory after every 2^pad
  float scale;
  bool transpose, paired;  // paired: a pair of x is one aligned access
  int count;
  Pass passes[kMostPasses];

  // Where pair p lies in shared memory, in bytes. 2^pad is 16 where the strides of all passes are 1 or a multiple of
  // it: the 16 lanes of one access then meet each of the 16 pairs of banks once, with a stride of 1 (lanes are 17 pairs
  // apart) as with another (they are neighbours); and from one value of a task to the next it is always the same step.
  __host__ __device__ __forceinline__ uint32_t place_of(uint32_t p) const { return (p + (p >> pad)) * 8; }

  // The rows of this block.
  __device__ __forceinline__ int64_t first_row() const { return int64_t(blockIdx.x) * rows_each; }
  __device__ __forceinline__ uint32_t live_rows() const {
    int64_t rest = rows - first_row();
    return rest < rows_each ? uint32_t(rest) : rows_each;
  }
};

template <class T>
struct Pairs;
template <>
struct Pairs<float> {
  using Type = float2;
  static __device__ __forceinline__ float2 wide(float2 v) { return v; }
  static __device__ __forceinline__ float2 rounded(float x, float y) { return make_float2(x, y); }
};
template <>
struct Pairs<bf16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ float2
  wide(const Type& v) {  // two instructions where CUDA's conversion takes three
    uint32_t bits = reinterpret_cast<const uint32_t&>(v);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  static __device__ __forceinline__ Type rounded(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pairs<f16> {
  using Type = __half2;
  static __device__ __forceinline__ float2 wide(Type v) { return __half22float2(v); }
  static __device__ __forceinline__ Type rounded(float x, float y) { return __floats2half2_rn(x, y); }
};

// H_R with R = 2^k, on pairs; with their stride, 1 or 16, where it is known when compiled, which frees addresses of
// sums.
template <int R, uint32_t kKnown = 0>
struct Butterfly {
  static constexpr int kRadix = R;
  static constexpr uint32_t kStride = kKnown;

  static __device__ __forceinline__ void apply(float2 (&v)[R], bool) {
#pragma unroll
    for (int h = 1; h < R; h *= 2)
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (!(i & h)) {
          float2 a = v[i], b = v[i + h];
          v[i] = make_float2(a.x + b.x, a.y + b.y);
          v[i + h] = make_float2(a.x - b.x, a.y - b.y);
        }
  }
};

// Bit a is set where a is a square modulo the prime q, but zero.
__host__ __device__ constexpr uint32_t squares(int q) {
  uint32_t bits = 0;
  for (int a = 1; a < q; ++a) bits |= 1u << a * a % q;
  return bits;
}

// Whether entry (i, j) of Paley's first matrix of order K is -1.
template <int K>
__device__ __forceinline__ constexpr bool negative_of_first(int i, int j) {
  constexpr int q = K - 1;
  constexpr uint32_t square = squares(q);
  if (i == 0) return j > 0;
  return j > 0 && i != j && !(square >> (i - j + q) % q & 1);
}

// The same of his second, [[C + I, C - I], [C - I, -C - I]].
template <int K>
__device__ __forceinline__ constexpr bool negative_of_second(int i, int j) {
  constexpr int q = K / 2 - 1;
  constexpr uint32_t square = squares(q);
  int a = i % (q + 1), b = j % (q + 1);
  bool lower = i > q, right = j > q;
  if (a == b) return lower || right;
  return (lower && right) != (a && b && !(square >> (a - b + q) % q & 1));
}

// The base of order K, its signs known when compiled. Four inputs have eight sums ±, up to their sign, so each output
// takes one addition for four inputs: K / 4 + 3 an element.
template <int K, bool kSecond>
struct Base {
  static constexpr int kRadix = K;
  static constexpr uint32_t kStride = 0;

  static __device__ __forceinline__ constexpr bool negative(int i, int j) {
    return kSecond ? negative_of_second<K>(i, j) : negative_of_first<K>(i, j);
  }

  template <class Value>
  static __device__ __forceinline__ void product(float (&out)[K], Value value) {
#pragma unroll
    for (int j = 0; j < K; j += 4) {
      float a = value(j), b = value(j + 1), c = value(j + 2), d = value(j + 3);
      float ab[2] = {a + b, a - b}, cd[2] = {c + d, c - d}, sum[2][2], difference[2][2];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[k / 2][k % 2] = ab[k / 2] + cd[k % 2];
        difference[k / 2][k % 2] = ab[k / 2] - cd[k % 2];
      }
#pragma unroll
      for (int i = 0; i < K; ++i) {
        bool minus = negative(i, j), b = negative(i, j + 1) != minus, c = negative(i, j + 2) != minus;
        bool d = negative(i, j + 3) != negative(i, j + 2);
        float term = c ? difference[b][d] : sum[b][d];
        out[i] = j == 0 ? (minus ? -term : term) : minus ? out[i] - term : out[i] + term;
      }
    }
  }

  // Paley's first matrices are skew, H + Hᵀ = 2 I, his second symmetric.
  static __device__ __forceinline__ float transposed(float in, float out) { return kSecond ? out : 2.f * in - out; }

  static __device__ __forceinline__ void apply(float2 (&v)[K], bool transpose) {
    float out[K];
    product(out, [&](int j) { return v[j].x; });
#pragma unroll
    for (int i = 0; i < K; ++i) v[i].x = transpose ? transposed(v[i].x, out[i]) : out[i];
    product(out, [&](int j) { return v[j].y; });
#pragma unroll
    for (int i = 0; i < K; ++i) v[i].y = transpose ? transposed(v[i].y, out[i]) : out[i];
  }
};

// i with its lowest bit cleared, from whose address that of i is a step of a power of two.
__device__ __forceinline__ constexpr int before(int i) { return i & (i - 1); }

// The pairs of a task, `step` bytes apart.
template <class Pair, int R>
struct Task {
  using Bytes = std::conditional_t<std::is_const_v<Pair>, const unsigned char, unsigned char>;
  Bytes* at[R];

  __device__ __forceinline__ Task(Bytes* first, uint32_t step) {
    at[0] = first;
#pragma unroll
    for (int i = 1; i < R; ++i) at[i] = at[before(i)] + (i - before(i)) * step;
  }

  __device__ __forceinline__ Pair& operator[](int i) const { return *reinterpret_cast<Pair*>(at[i]); }
};

// One pass with the values of a task in registers.
template <class T, class Transform>
__device__ __forceinline__ void run_pass(const Hadamard& a, const Pass& pass, unsigned char* shared, bool first,
                                         bool last) {
  using Pair = typename Pairs<T>::Type;
  constexpr int R = Transform::kRadix;
  constexpr uint32_t known = Transform::kStride;
  const uint32_t stride = known ? known : pass.stride.value, step = known ? (known + known / 16) * 8 : pass.step;
  const uint32_t tasks = pass.tasks.value * a.live_rows();
  const T* x = static_cast<const T*>(a.x) + a.first_row() * a.row_stride;
  Pair* y = static_cast<Pair*>(a.y) + a.first_row() * a.pairs;
  for (uint32_t task = threadIdx.x; task < tasks; task += blockDim.x) {
    uint32_t row = pass.tasks.quotient(task), p = pass.pair_of(task - row * pass.tasks.value);
    uint32_t held = a.place_of(row * a.pairs + p);
    float2 v[R];
    if (!first) {
      Task<const float2, R> from(shared + held, step);
#pragma unroll
      for (int i = 0; i < R; ++i) v[i] = from[i];
    } else if (a.paired) {
      Task<const Pair, R> from(reinterpret_cast<const unsigned char*>(x + row * a.row_stride + 2 * p),
                               stride * sizeof(Pair));
#pragma unroll
      for (int i = 0; i < R; ++i) v[i] = Pairs<T>::wide(from[i]);
    } else {
      const T* at = x + row * a.row_stride + 2 * p * a.stride;
      for (int i = 0; i < R; ++i, at += 2 * stride * a.stride)
        v[i] = make_float2(to_float(at[0]), to_float(at[a.stride]));
    }
    Transform::apply(v, a.transpose);
    if (!last) {
      // Addresses are computed anew: kept from the loads they would take a register for each value.
      Task<float2, R> to(shared + computed_anew(held), step);
#pragma unroll
      for (int i = 0; i < R; ++i) to[i] = v[i];
    } else {
      Task<Pair, R> to(reinterpret_cast<unsigned char*>(y + row * a.pairs + p), stride * sizeof(Pair));
#pragma unroll
      for (int i = 0; i < R; ++i) {
        float second = v[i].y * a.scale;
        to[i] = Pairs<T>::rounded(__fmaf_rn(v[i].x, a.scale, second), __fmaf_rn(v[i].x, a.scale, -second));
      }
    }
  }
}

// The bf16 pair nearest to (u, v), the first in the low half; what it leaves of both takes their place.
__device__ __forceinline__ uint32_t take_nearest(float& u, float& v) {
  __nv_bfloat162 near = __floats2bfloat162_rn(u, v);
  uint32_t bits = reinterpret_cast<uint32_t&>(near);
  u -= __uint_as_float(bits << 16);
  v -= __uint_as_float(bits & 0xffff0000u);
  return bits;
}

// A pass with a base of any order, from shared memory to shared memory, on tensor cores: the base's entries are exact
// in bf16, and an fp32 number is the sum of three. A warp computes kOutputs outputs of kColumns columns of pairs; all
// outputs of a column are held by the block before the first takes an input's place.
__device__ __forceinline__ void run_any_base(const Hadamard& a, const Pass& pass, unsigned char* shared) {
  constexpr int kTiles = kOutputs / 16;
  const uint32_t K = pass.radix, words = (K + 31) / 32, tasks = pass.tasks.value * a.live_rows();
  const uint32_t chunks = (K + kOutputs - 1) / kOutputs, at_once = blockDim.x / 32 / chunks;
  const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t group = warp / chunks, first = warp % chunks * kOutputs;
  auto place = [&](uint32_t task) {
    uint32_t row = pass.tasks.quotient(task);
    return a.place_of(row * a.pairs + pass.pair_of(task - row * pass.tasks.value));
  };
  for (uint32_t done = 0; done < tasks; done += at_once * kColumns) {
    const uint32_t column = done + group * kColumns;
    const bool mine = group < at_once && column < tasks;
    float out[2][kTiles][4] = {};  // of the first numbers of the pairs and of the second
    if (mine) {
      const unsigned char* in = shared + place(min(column + g, tasks - 1));
      for (uint32_t k = 0; k < K; k += 16) {
        float x[2][4];  // rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t j = k + 2 * t + i % 2 + i / 2 * 8;
          float2 v = j < K ? *reinterpret_cast<const float2*>(in + j * pass.step) : make_float2(0.f, 0.f);
          x[0][i] = v.x, x[1][i] = v.y;
        }
        uint32_t parts[2][3][2];
#pragma unroll
        for (int i = 0; i < 12; ++i)
          parts[i % 2][i / 4][i / 2 % 2] = take_nearest(x[i % 2][i / 2 % 2 * 2], x[i % 2][i / 2 % 2 * 2 + 1]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (first + tile * 16 >= K) break;
          uint32_t H[4];  // rows g and g + 8, columns 2t and 2t + 8 on
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t row = min(first + tile * 16 + g + i % 2 * 8, K - 1);
            uint32_t bits = a.signs[pass.signs + row * words + k / 32] >> (k % 32 + 2 * t + i / 2 * 8);
            H[i] = 0x3f803f80u | (bits & 1) << 15 | (bits & 2) << 30;
          }
#pragma unroll
          for (int part = 2; part >= 0; --part) {
            mma_bf16(out[0][tile], H, parts[0][part]);
            mma_bf16(out[1][tile], H, parts[1][part]);
          }
        }
      }
    }
    __syncthreads();
    if (mine)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (uint32_t task = column + 2 * t + c; task < tasks) {
          unsigned char* to = shared + place(task);
#pragma unroll
          for (int i = 0; i < 2 * kTiles; ++i)
            if (uint32_t row = first + i / 2 * 16 + g + i % 2 * 8; row < K)
              *reinterpret_cast<float2*>(to + row * pass.step) =
                  make_float2(out[0][i / 2][i % 2 * 2 + c], out[1][i / 2][i % 2 * 2 + c]);
        }
  }
}

// kWidest: the widest pass that this kernel holds in registers; the fewer values, the more warps fit.
template <class T, int kWidest>
__global__ void __launch_bounds__(kMostThreads, kWidest > 16 ? 1 : 2) hadamard_kernel(const Hadamard a) {
  LORA_KERNELS_SHARED(shared);
  for (int i = 0; i < a.count; ++i) {
    const Pass& pass = a.passes[i];
    bool first = i == 0, last = i == a.count - 1;
    if (!first) __syncthreads();
    auto run = [&](auto transform) { run_pass<T, decltype(transform)>(a, pass, shared, first, last); };
    // clang-format off
    if (pass.radix == 1) run(Butterfly<1>{});
    else if (pass.radix == 2) run(Butterfly<2>{});
    else if (pass.radix == 4) run(Butterfly<4>{});
    else if (pass.radix == 8 && pass.stride.value == 16) run(Butterfly<8, 16>{});
    else if (pass.radix == 8) run(Butterfly<8>{});
    else if (pass.radix == 16 && pass.stride.value == 1) run(Butterfly<16, 1>{});
    else if (pass.radix == 16 && pass.stride.value == 16) run(Butterfly<16, 16>{});
    else if (pass.radix == 16) run(Butterfly<16>{});
    else if (pass.radix == 12) run(Base<12, false>{});
    else if constexpr (kWidest >= 20) {
      if (pass.radix == 20) run(Base<20, false>{});
      else if constexpr (kWidest >= 28) {
        if (pass.radix == 28) run(Base<28, true>{});
        else if constexpr (kWidest >= 32) {
          if (pass.radix == 32) run(Butterfly<32>{});
          else if constexpr (kWidest == kAnyBase) run_any_base(a, pass, shared);
        }
      }
    }
    // clang-format on
  }
}

}  // namespace lora_kernels

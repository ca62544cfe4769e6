// The `low_rank` ops on the CPU: what may be read is checked before anything is written.
#include <torch/csrc/stable/library.h>

#include "low_rank_add.h"
#include "low_rank_schedule.h"
#include "new_tensor.h"

namespace lora_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::vector<View> views_of(const std::vector<Tensor>& tensors) { return {tensors.begin(), tensors.end()}; }

void check_mixture(const Routing& routing, const View* ids, const View* weights) {
  bool mixture = ids && ids->dims == 2;
  STD_TORCH_CHECK(!mixture || weights, "a mixture needs weights");
  STD_TORCH_CHECK(!weights || weights->numel() == routing.pairs, "weights");
}

void check_same_form(const Factors& A, const Factors& B) {
  STD_TORCH_CHECK(A.stacked == B.stacked && A.slices == B.slices && A.adapters == B.adapters &&
                      (A.table.empty() || A.table[0].dtype == B.table[0].dtype),
                  "A and B differ");
  for (size_t i = 0; i < A.table.size(); ++i)
    STD_TORCH_CHECK(A.table[i].rank == B.table[i].rank, "A and B differ in rank");
}

void lora_add(const Tensor& y, const Tensor& x, std::vector<Tensor> A, std::vector<Tensor> B, OptionalTensor ids,
              OptionalTensor indptr, OptionalTensor plan, OptionalTensor scaling, OptionalTensor ranks,
              OptionalTensor weights, double scale) {
  std::vector<View> a = views_of(A), b = views_of(B);
  low_rank_add(View(y), View(x), {a.data(), a.size()}, {b.data(), b.size()}, OptionalView(ids), OptionalView(indptr),
               OptionalView(plan), OptionalView(scaling), OptionalView(ranks), OptionalView(weights), scale);
}

Tensor lora_shrink(const Tensor& x, std::vector<Tensor> A, OptionalTensor ids, OptionalTensor indptr,
                   OptionalTensor plan, OptionalTensor ranks, int64_t pairs) {
  Matrix in{View(x)};
  std::vector<View> views = views_of(A);
  Factors a({views.data(), views.size()}, 0);
  for (int64_t width : a.widths) STD_TORCH_CHECK(width == in.columns, "A does not fit x");
  a.set_ranks(OptionalView(ranks));
  int64_t k = in.rows ? pairs / in.rows : 1;
  Routing routing(OptionalView(ids), OptionalView(indptr), OptionalView(plan), in.rows, a.adapters, k);
  STD_TORCH_CHECK(routing.pairs == pairs, "pairs");
  Tensor v = new_tensor({a.slices, pairs, a.padded_rank});
  if (v.numel()) std::memset(v.data_ptr(), 0, v.numel() * sizeof(float));
  LowRank op{routing, a.slices, a.padded_rank};
  op.x = &in, op.A = &a, op.v_out = static_cast<float*>(v.data_ptr());
  op.run();
  return v;
}

void lora_expand(const Tensor& y, const Tensor& v, std::vector<Tensor> B, OptionalTensor ids, OptionalTensor indptr,
                 OptionalTensor plan, OptionalTensor scaling, OptionalTensor ranks, OptionalTensor weights,
                 double scale) {
  Output out{View(y)};
  std::vector<View> views = views_of(B);
  Factors b({views.data(), views.size()}, 1);
  STD_TORCH_CHECK(v.scalar_type() == ScalarType::Float, "v dtype");
  STD_TORCH_CHECK(v.dim() == 3 && v.size(0) == b.slices && v.size(2) == b.padded_rank, "v does not fit B");
  Compact compact{View(v)};
  Matrix in(compact);
  in.stride = b.padded_rank;
  STD_TORCH_CHECK(b.total == out.columns, "y does not fit");
  b.set_ranks(OptionalView(ranks));
  OptionalView of_ids(ids), of_weights(weights);
  Weights per_pair(of_weights, out.rows);
  Routing routing(of_ids, OptionalView(indptr), OptionalView(plan), out.rows, b.adapters, per_pair.per_row());
  check_mixture(routing, of_ids, of_weights);
  STD_TORCH_CHECK(routing.pairs == v.size(1), "v does not fit y");
  Scales scales(OptionalView(scaling), scale, b.slices, b.adapters);
  LowRank op{routing, b.slices, b.padded_rank};
  op.v_in = &in, op.y = &out, op.B = &b, op.scales = &scales, op.weights = per_pair.values;
  op.run();
  out.finish();
}

Tensor lora_outer(const Tensor& u, const Tensor& w, int64_t adapters, OptionalTensor ids, OptionalTensor indptr,
                  OptionalTensor plan, OptionalTensor scaling, OptionalTensor weights, double scale, int64_t pairs) {
  Matrix left{View(u)}, right{View(w)};
  int64_t rows = std::min(left.rows, right.rows);
  Weights per_pair(OptionalView(weights), rows);
  Routing routing(OptionalView(ids), OptionalView(indptr), OptionalView(plan), rows, adapters, rows ? pairs / rows : 1);
  STD_TORCH_CHECK(routing.pairs == pairs && (left.rows == pairs || left.rows == rows) &&
                      (right.rows == pairs || right.rows == rows) && (!weights || weights->numel() == pairs),
                  "pairs");
  Scales scales(OptionalView(scaling), scale, 1, adapters);
  int64_t P = left.columns, Q = right.columns;
  Tensor out = new_tensor({adapters, P, Q});
  float* data = static_cast<float*>(out.data_ptr());
  if (out.numel()) std::memset(data, 0, out.numel() * sizeof(float));
  const LowRankKernels& kernels = low_rank_kernels();
  int64_t width = std::max<int64_t>(divide_up(divide_up(Q, 2 * torch::stable::get_num_threads()), 64) * 64, 64);
  int64_t chunks = divide_up(Q, width), groups = routing.groups.size();
  bool parallel = pairs * (P + Q) * 4 >= kWorthThreads;
  for_each_task(groups * chunks, parallel, [&](int64_t task) {
    const Group& group = routing.groups[task / chunks];
    int64_t begin = task % chunks * width, end = std::min(Q, begin + width);
    float* s = floats(local_rows, group.count);
    for (int64_t i = 0; i < group.count; ++i)
      s[i] = scales.at(0, group.adapter) * (per_pair.values ? per_pair.values[pair_of(group, i)] : 1.0f);
    kernels.outer(rows_of(left, group, 0, left.rows ? int(pairs / left.rows) : 1), P,
                  rows_of(right, group, 0, right.rows ? int(pairs / right.rows) : 1), begin, end, int(group.count), s,
                  false, false, data + group.adapter * P * Q, Q, scratch());
  });
  return out;
}

// A permutation of the pairs, as int32; checked.
std::vector<int32_t> permutation(const View& given, int64_t pairs) {
  STD_TORCH_CHECK(given.on_cpu && given.dims == 1 && given.numel() == pairs, "order");
  STD_TORCH_CHECK(given.type == ScalarType::Int || given.type == ScalarType::Long, "order");
  Compact order(given);
  std::vector<int32_t> out(pairs);
  std::vector<bool> seen(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    int64_t pair = order.type == ScalarType::Int ? static_cast<const int32_t*>(order.data)[i]
                                                 : static_cast<const int64_t*>(order.data)[i];
    STD_TORCH_CHECK(pair >= 0 && pair < pairs && !seen[pair], "order");
    seen[pair] = true;
    out[i] = int32_t(pair);
  }
  return out;
}

void lora_plan(const Tensor& table, const Tensor& ids, OptionalTensor indptr, int64_t adapters, OptionalTensor order) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Int && table.is_contiguous(), "table");
  int64_t capacity = table.numel() - adapters - 3;
  OptionalView segments(indptr), permuted(order);
  int64_t rows = !indptr ? -1 : order ? permuted.view.numel() : capacity;
  const std::vector<int32_t>& of_pair = pair_ids(View(ids), segments, rows, adapters);
  int64_t pairs = of_pair.size();
  STD_TORCH_CHECK(pairs <= capacity, "the plan has too little room");
  std::vector<int32_t> pair_at;
  if (order) pair_at = permutation(permuted.view, pairs);
  if (indptr && !order) {
    Compact bounds(segments.view);
    pairs = bounds.type == ScalarType::Int ? static_cast<const int32_t*>(bounds.data)[ids.numel()]
                                           : static_cast<const int64_t*>(bounds.data)[ids.numel()];
  }
  int32_t* p = static_cast<int32_t*>(table.data_ptr());
  p[0] = int32_t(pairs);
  p[1] = int32_t(adapters);
  sort_pairs(of_pair, adapters, p + 2, p + 3 + adapters, order ? pair_at.data() : nullptr);
}

// The arguments that both forms share, checked against each other.
struct Added {
  Matrix x;
  Output y;
  Factors A, B;

  Added(const View& y_, const View& x_, Views A_, Views B_, const View* ranks)
      : x(x_), y(y_), A(A_, 0, kMaxRank * int64_t(B_.count)), B(B_, 1) {
    if (A.slices == 1 && B.slices > 1) A.split(B.slices, ranks);
    check_same_form(A, B);
    for (int64_t width : A.widths) STD_TORCH_CHECK(width == x.columns, "A does not fit x");
    STD_TORCH_CHECK(B.total == y.columns && y.rows == x.rows, "y does not fit");
    STD_TORCH_CHECK(x.dtype == y.dtype || y.dtype == DType::f32, "y dtype");
    STD_TORCH_CHECK(A.table.empty() || A.table[0].dtype == x.dtype || A.table[0].dtype == DType::f32, "factor dtype");
  }

  LowRank op(const Routing& routing, const Scales& scales) {
    LowRank op{routing, A.slices, A.padded_rank};
    op.x = &x, op.A = &A, op.y = &y, op.B = &B, op.scales = &scales;
    return op;
  }
};

}  // namespace

void low_rank_add(const View& y, const View& x, Views A, Views B, const View* ids, const View* indptr, const View* plan,
                  const View* scaling, const View* ranks, const View* weights, double scale) {
  Added added(y, x, A, B, ranks);
  added.A.set_ranks(ranks);
  Weights per_pair(weights, added.x.rows);
  Routing routing(ids, indptr, plan, added.x.rows, added.A.adapters, per_pair.per_row());
  check_mixture(routing, ids, weights);
  Scales scales(scaling, scale, added.A.slices, added.A.adapters);
  LowRank op = added.op(routing, scales);
  op.weights = per_pair.values;
  op.run();
  added.y.finish();
}

bool takes_linear(const View& x, const View& W, const View* bias) {
  // Torch's product gains on more rows, where reordering W is little of its work.
  constexpr int64_t kMostRows = 256, kLongest = 8192;
  if (!low_rank_kernels().linear || W.dims != 2 || x.dims < 1) return false;
  int64_t N = W.sizes[0], K = W.sizes[1], rows = K ? x.numel() / K : 0;
  for (const View* t : {&x, &W, bias})
    if (t && (t->type != ScalarType::BFloat16 || !t->is_contiguous())) return false;
  if (bias && (bias->dims != 1 || bias->sizes[0] != N)) return false;
  return x.sizes[x.dims - 1] == K && K % 32 == 0 && K <= kLongest && N > 0 && N % 16 == 0 && rows > 0 &&
         rows <= kMostRows;
}

void low_rank_linear(const View& y, const View& x, const View& W, const View* bias, Views A, Views B, const View* plan,
                     const View* scaling, double scale) {
  Added added(y, x, A, B, nullptr);
  Routing routing(nullptr, nullptr, plan, added.x.rows, added.A.adapters, 1);
  Scales scales(scaling, scale, added.A.slices, added.A.adapters);
  // Another thread may have chosen another instruction set meanwhile.
  STD_TORCH_CHECK(takes_linear(x, W, bias) && W.sizes[0] == added.y.columns && added.y.dtype == DType::bf16 &&
                      !added.y.copy && !added.A.stacked,
                  "base layer");
  added.op(routing, scales).run_on({W.data, DType::bf16, int(W.sizes[0]), W.sizes[1], 1}, bias ? bias->data : nullptr);
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_add_", TORCH_BOX(&lora_kernels::lora_add));
  m.impl("lora_shrink", TORCH_BOX(&lora_kernels::lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_kernels::lora_expand));
  m.impl("lora_outer", TORCH_BOX(&lora_kernels::lora_outer));
  m.impl("lora_plan_", TORCH_BOX(&lora_kernels::lora_plan));
}

// How an op over transformed rows is cut: a tile at a time, tiles on torch's threads.
#pragma once

#include "low_rank_schedule.h"
#include "new_tensor.h"
#include "transform_constants.h"

namespace lora_kernels {

inline const TransformKernels& transform_kernels() { return *low_rank_kernels().transforms; }

// Where a thread's tiles are, and room for what a kernel keeps aside.
struct Room {
  Tile x, y;
  void* scratch;

  // For tiles of so many vectors.
  Room(int64_t of_x, int64_t of_y, int64_t of_scratch) {
    thread_local Buffer buffer;
    int64_t lanes = transform_kernels().lanes;
    float* data = floats(buffer, (2 * of_x + 2 * of_y + of_scratch) * lanes);
    x = {data, data + of_x * lanes};
    data += 2 * of_x * lanes;
    y = {data, data + of_y * lanes};
    scratch = data + 2 * of_y * lanes;
  }
};

// Rows [first, first + m) of a matrix.
inline Rows rows_from(const Matrix& matrix, int64_t first) {
  Rows rows = matrix.view(0, nullptr, 1);
  rows.data = static_cast<char*>(rows.data) + first * matrix.stride * element_size(matrix.dtype);
  return rows;
}

// A transform of rows of one length: loads a tile, transforms it, stores it.
class Transform {
public:
  int64_t length = 0;

  static Transform none(int64_t length) { return Transform(length, Kind::none); }
  static Transform trigonometric(int64_t length, Form form, float first, float rest) {
    Transform t(length, Kind::trigonometric);
    t.fourier_ = &fourier_of(length), t.form_ = form, t.first_ = first, t.rest_ = rest;
    return t;
  }
  static Transform hadamard(const HadamardOf& H, float scale) {
    Transform t(H.length, Kind::hadamard);
    t.hadamard_ = &H, t.rest_ = scale;
    return t;
  }
  static Transform haar(int64_t length, int64_t levels) {
    Transform t(length, Kind::haar);
    t.levels_ = levels;
    return t;
  }

  // What Room needs.
  int64_t vectors() const { return fourier_ && length % 2 ? 2 * length : length; }
  int64_t scratch() const {
    int64_t vectors = 0;
    if (fourier_)
      for (int i = 0; i < fourier_->passes; ++i) vectors = std::max<int64_t>(vectors, 2 * fourier_->radix[i]);
    if (hadamard_)
      for (const Hadamard::Base& base : hadamard_->held) vectors = std::max(vectors, 4 * base.order);
    return vectors;
  }

  // T x, or with x's rows cut or filled with zeros to the length.
  void forward(const Rows& x, int m, int64_t columns, Tile& tile, void* scratch) const {
    const TransformKernels& kernels = transform_kernels();
    kernels.load(x, m, columns, fourier_ ? order_in_of(*fourier_, form_) : Order{}, tile.now);
    std::memset(tile.now + columns * kernels.lanes, 0,
                fourier_ ? 0 : (length - columns) * kernels.lanes * sizeof(float));
    apply(tile, false, scratch);
  }
  // out = Tᵀ tile + add.
  void backward(Tile& tile, const Rows& out, const Rows* add, int m, int64_t columns, void* scratch) const {
    apply(tile, true, scratch);
    transform_kernels().store(tile.now, m, columns, fourier_ ? order_out_of(*fourier_, form_) : Order{}, out, add);
  }
  // y = T x or Tᵀ x.
  void whole(const Rows& x, const Rows& y, int m, bool transpose, Tile& tile, void* scratch) const {
    const TransformKernels& kernels = transform_kernels();
    if (kind_ == Kind::hadamard && hadamard_->power >= kernels.lanes) {
      kernels.hadamard_rows(x, y, m, *hadamard_, transpose, rest_, tile.now, scratch);
    } else if (!transpose) {
      forward(x, m, length, tile, scratch);
      kernels.store(tile.now, m, length, Order{}, y, nullptr);
    } else {
      kernels.load(x, m, length, Order{}, tile.now);
      backward(tile, y, nullptr, m, length, scratch);
    }
  }

private:
  enum class Kind { none, trigonometric, hadamard, haar };

  Transform(int64_t length, Kind kind) : length(length), kind_(kind) {}

  void apply(Tile& tile, bool transpose, void* scratch) const {
    const TransformKernels& kernels = transform_kernels();
    switch (kind_) {
      case Kind::none:
        return;
      case Kind::trigonometric:
        return (transpose ? kernels.transposed : kernels.trigonometric)(tile, *fourier_, form_, first_, rest_, scratch);
      case Kind::hadamard:
        return kernels.hadamard(tile.now, *hadamard_, transpose, rest_, scratch);
      case Kind::haar:
        for (int64_t i = 0; i < levels_; ++i) {
          int64_t N = length, halvings = transpose ? levels_ - 1 - i : i;
          while (halvings--) N -= N / 2;
          kernels.haar(tile, N, transpose);
        }
    }
  }

  Kind kind_;
  const Fourier* fourier_ = nullptr;
  const HadamardOf* hadamard_ = nullptr;
  Form form_ = Form::fourier;
  float first_ = 1, rest_ = 1;
  int64_t levels_ = 0;
};

inline Form form_of(const std::string& name) {
  STD_TORCH_CHECK(name == "fourier" || name == "cosine" || name == "hartley", "form");
  return name == "fourier" ? Form::fourier : name == "cosine" ? Form::cosine : Form::hartley;
}

}  // namespace lora_kernels

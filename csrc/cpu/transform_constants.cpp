#include "transform_constants.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>

namespace lora_kernels {
namespace {

constexpr double kPi = 3.14159265358979323846;

struct FourierConstants : Fourier {
  std::vector<float> numbers;
};

// (cos, sin) of 2π i / of, for 0 <= i < of, from an angle of the first eighth, so that it is right to the last bit.
void add_angle(std::vector<float>& numbers, int64_t i, int64_t of, bool minus = false) {
  bool below = 2 * i > of;  // the lower half of the circle
  if (below) i = of - i;
  bool left = 4 * i > of;
  int64_t twice = left ? of - 2 * i : 2 * i;  // π twice / of, at most π / 2
  bool steep = 4 * twice > of;
  double angle = steep ? kPi * double(of - 2 * twice) / double(2 * of) : kPi * double(twice) / double(of);
  double c = steep ? std::sin(angle) : std::cos(angle), s = steep ? std::cos(angle) : std::sin(angle);
  numbers.push_back(float(left ? -c : c));
  numbers.push_back(float(below != minus ? -s : s));
}

// Radices whose product is n: eights, and fours for what they leave of a power of two; then primes.
std::vector<int> radices_of(int64_t n) {
  std::vector<int> radices;
  int twos = 0;
  for (; n % 2 == 0; n /= 2) ++twos;
  int fours = twos % 3 == 2 ? 1 : twos % 3 == 1 && twos > 1 ? 2 : 0;
  for (int left = twos - 2 * fours; left >= 3; left -= 3) radices.push_back(8);
  for (int i = 0; i < fours; ++i) radices.push_back(4);
  if (twos == 1) radices.push_back(2);
  for (int64_t p = 3; n > 1; p += 2) {
    if (p * p > n) p = n;
    for (; n % p == 0; n /= p) radices.push_back(int(p));
  }
  return radices;
}

std::unique_ptr<FourierConstants> make(int64_t N) {
  auto f = std::make_unique<FourierConstants>();
  int64_t n = N % 2 ? N : N / 2;
  f->length = N, f->complex_length = n;
  std::vector<int> radices = radices_of(n);
  f->passes = int(radices.size());
  std::copy(radices.begin(), radices.end(), f->radix);
  std::vector<float>& numbers = f->numbers;
  int64_t left = n;
  for (int P : radices) {
    int64_t groups = left / P;
    for (int64_t p = 0; p < groups; ++p)
      for (int j = 1; j < P; ++j) add_angle(numbers, p * j % left, left, true);
    left = groups;
  }
  size_t roots = numbers.size();
  for (int P : radices)
    for (int j = 0; P % 2 && j < P; ++j) add_angle(numbers, j, P);
  size_t halves = numbers.size();
  for (int64_t k = 0; k <= N / 4; ++k) add_angle(numbers, k, N);
  size_t quarters = numbers.size();
  for (int64_t k = 0; k <= N / 2; ++k) add_angle(numbers, k, 4 * N);
  const float* data = numbers.data();
  f->twiddles = data, f->roots = data + roots, f->halves = data + halves, f->quarters = data + quarters;
  return f;
}

// A base's entries, by its order: that of a matrix tells which one it is (reference/hadamard.py).
const float* base_of(int64_t order, const int32_t* signs) {
  static std::mutex mutex;
  static std::map<int64_t, std::vector<float>> known;
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<float>& entries = known[order];
  if (entries.empty()) {
    int64_t words = (order + 31) / 32;
    entries.resize(order * order);
    for (int64_t i = 0; i < order; ++i)
      for (int64_t j = 0; j < order; ++j)
        entries[i * order + j] = uint32_t(signs[i * words + j / 32]) >> (j % 32) & 1 ? -1.0f : 1.0f;
  }
  return entries.data();
}

}  // namespace

const Fourier& fourier_of(int64_t length) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<FourierConstants>> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto& constants = known[length];
  if (!constants) constants = make(length);
  return *constants;
}

HadamardOf::HadamardOf(int64_t N, const View* signs, const std::vector<int64_t>& orders) {
  length = N, power = N;
  int64_t start = 0;
  for (int64_t order : orders) {
    STD_TORCH_CHECK(order > 1 && order <= 2048 && power % order == 0, "orders");
    power /= order;
    int64_t words = (order + 31) / 32;
    STD_TORCH_CHECK(signs && signs->on_cpu && signs->type == ScalarType::Int && signs->is_contiguous() &&
                        signs->numel() >= start + 2 * order * words,
                    "signs");
    held.push_back({order, base_of(order, static_cast<const int32_t*>(signs->data) + start)});
    start += 2 * order * words;
  }
  STD_TORCH_CHECK(power > 0 && (power & (power - 1)) == 0, "no such Hadamard matrix");
  bases = held.data(), count = int(held.size());
}

}  // namespace lora_kernels

// What one CUDA thread calls on its own, by CUDA's names.
#pragma once

#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "executor.h"

// Each is indivisible: another thread runs only where this one waits.
namespace simt {

template <class T, class F>
T exchange(T* address, F f) {
  const T before = *address;
  *address = f(before);
  return before;
}

}  // namespace simt

template <class T>
T atomicAdd(T* address, std::common_type_t<T> v) {
  return simt::exchange(address, [v](T before) { return T(before + v); });
}
inline int atomicAdd(int* address, int v) {  // wraps around
  return simt::exchange(address, [v](int before) { return int(unsigned(before) + unsigned(v)); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> v) {
  return simt::exchange(address, [v](T before) { return before < v ? v : before; });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> v) {
  return simt::exchange(address, [v](T before) { return v < before ? v : before; });
}
// These two may be what a loop waits with, so that others must run.
template <class T>
T atomicExch(T* address, std::common_type_t<T> v) {
  const T before = simt::exchange(address, [v](T) { return v; });
  simt::pause();
  return before;
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> v) {
  const T old = simt::exchange(address, [=](T before) { return before == expected ? v : before; });
  simt::pause();
  return old;
}
inline void __threadfence() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// Of a NaN and a number, the number.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

namespace simt {

// CUDA's overloads take an unsigned and a signed integer of one size as unsigned.
template <class A, class B>
using Common = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>, std::common_type_t<A, B>>;

}  // namespace simt

template <class A, class B>
simt::Common<A, B> max(A a, B b) {
  const simt::Common<A, B> x = simt::Common<A, B>(a), y = simt::Common<A, B>(b);
  return x < y ? y : x;
}
template <class A, class B>
simt::Common<A, B> min(A a, B b) {
  const simt::Common<A, B> x = simt::Common<A, B>(a), y = simt::Common<A, B>(b);
  return y < x ? y : x;
}

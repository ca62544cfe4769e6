// What CUDA's threads do together, by CUDA's names.
#pragma once

#include "executor.h"

inline void __syncthreads(simt::Place place = simt::Place::here()) {
  simt::sync_block({"__syncthreads", place}, false);
}
inline int __syncthreads_or(int predicate, simt::Place place = simt::Place::here()) {
  return simt::sync_block({"__syncthreads_or", place}, predicate).yes != 0;
}
inline int __syncthreads_count(int predicate, simt::Place place = simt::Place::here()) {
  return int(simt::sync_block({"__syncthreads_count", place}, predicate).yes);
}
inline int __syncthreads_and(int predicate, simt::Place place = simt::Place::here()) {
  const simt::Votes votes = simt::sync_block({"__syncthreads_and", place}, predicate);
  return votes.yes == votes.all;
}

inline void __syncwarp(unsigned mask = ~0u, simt::Place place = simt::Place::here()) {
  int nothing = 0;
  simt::collective({"__syncwarp", place}, mask, nothing, [](auto) {});
}

namespace simt {

template <class T>
struct Shuffle {
  T value;
  unsigned from;
};

// Every lane gets the value of lane `from`.
template <class T>
T shuffle(const Call& call, unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "a register or two");
  if (!(mask >> from & 1)) fail(at(call, mask) + " reads lane " + std::to_string(from) + ", which is not in the mask");
  Shuffle<T> mine{value, from};
  collective(call, mask, mine, [](auto lanes) {
    T results[32];
    lanes.each([&](auto& lane, unsigned i) { results[i] = lanes[lane.from].value; });
    lanes.each([&](auto& lane, unsigned i) { lane.value = results[i]; });
  });
  return mine.value;
}

struct Segment {
  unsigned lane, begin, end;
};

// The lanes of a shuffle of this width around the current one.
inline Segment segment(int width) {
  if (width < 1 || width > 32 || width & (width - 1)) fail("shuffle of width " + std::to_string(width));
  const unsigned lane = current->position.lane, begin = lane & ~unsigned(width - 1);
  return {lane, begin, begin + unsigned(width)};
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, simt::Place place = simt::Place::here()) {
  const simt::Segment s = simt::segment(width);
  return simt::shuffle({"__shfl_sync", place}, mask, value, s.begin + (unsigned(lane) & unsigned(width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place place = simt::Place::here()) {
  const simt::Segment s = simt::segment(width);
  return simt::shuffle({"__shfl_up_sync", place}, mask, value, s.lane - s.begin < delta ? s.lane : s.lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place place = simt::Place::here()) {
  const simt::Segment s = simt::segment(width);
  return simt::shuffle({"__shfl_down_sync", place}, mask, value, s.end - s.lane <= delta ? s.lane : s.lane + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Place place = simt::Place::here()) {
  const simt::Segment s = simt::segment(width);
  const unsigned from = s.lane ^ unsigned(bits);  // an earlier segment may be read, a later one not
  return simt::shuffle({"__shfl_xor_sync", place}, mask, value, from < s.end ? from : s.lane);
}

namespace simt {

template <class T>
struct Contribution {
  T value;
  unsigned result;
};

inline unsigned ballot(const Call& call, unsigned mask, bool predicate) {
  Contribution<bool> mine{predicate, 0};
  collective(call, mask, mine, [](auto lanes) {
    unsigned result = 0;
    lanes.each([&](auto& lane, unsigned i) { result |= unsigned(lane.value) << i; });
    lanes.each([&](auto& lane, unsigned) { lane.result = result; });
  });
  return mine.result;
}

template <class T, class F>
T reduce(const Call& call, unsigned mask, T value, F f) {
  T mine = value;
  collective(call, mask, mine, [&](auto lanes) {
    const unsigned own = current->position.lane;
    T result = value;
    lanes.each([&](T& other, unsigned i) { result = i == own ? result : f(result, other); });
    lanes.each([&](T& other, unsigned) { other = result; });
  });
  return mine;
}

}  // namespace simt

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::ballot({"__ballot_sync", place}, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::ballot({"__any_sync", place}, mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::ballot({"__all_sync", place}, mask, predicate) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Place place = simt::Place::here()) {
  simt::Contribution<T> mine{value, 0};
  simt::collective({"__match_any_sync", place}, mask, mine, [](auto lanes) {
    lanes.each([&](auto& lane, unsigned) {
      lanes.each([&](auto& other, unsigned i) { lane.result |= unsigned(lane.value == other.value) << i; });
    });
  });
  return mine.result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, simt::Place place = simt::Place::here()) {
  return simt::reduce({"__reduce_add_sync", place}, mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value, simt::Place place = simt::Place::here()) {
  return int(__reduce_add_sync(mask, unsigned(value), place));
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, simt::Place place = simt::Place::here()) {
  return simt::reduce({"__reduce_max_sync", place}, mask, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, simt::Place place = simt::Place::here()) {
  return simt::reduce({"__reduce_min_sync", place}, mask, value, [](T a, T b) { return b < a ? b : a; });
}

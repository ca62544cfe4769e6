// Which thread runs next, which block, and when a copy arrives: all that hardware leaves open, picked by a seed.
#pragma once

#include <stdint.h>

#include <vector>

namespace simt {

constexpr unsigned max_warps = 32;
constexpr unsigned max_cluster = 8;  // blocks

struct Position {
  unsigned warp, lane;
};

// Threads that can go on.
struct Ready {
  unsigned warps = 0;  // those with a lane that can
  unsigned lanes[max_warps] = {};

  void add(unsigned warp, unsigned mask) {
    lanes[warp] |= mask;
    warps |= unsigned(lanes[warp] != 0) << warp;
  }
  void remove(Position p) {
    lanes[p.warp] &= ~(1u << p.lane);
    warps &= ~(unsigned(lanes[p.warp] == 0) << p.warp);
  }
};

// Seed 0: threads in turn, each until it has to wait; blocks in order; copies arrive at once. Any other seed: blocks
// and a warp's lanes in random order, copies late or whenever, and warps, by the seed's remainder modulo 4, 1: a random
// one as far as it can go; 2: always the last one that can go on; 3: as 1, but one warp of each block runs only while
// no other can; 0: a random one at each step. Of the blocks of a cluster, 0: in turn, each until it has to wait;
// otherwise as warps: 1: another one where the warp cannot go on; 2: the last one; 3: one runs only while no other can;
// 0: a random one at each step.
class Schedule {
public:
  explicit Schedule(unsigned seed);

  std::vector<uint64_t> order_of_blocks(uint64_t blocks);
  // The block that begins, of as many with as many warps each.
  unsigned begin_blocks(unsigned blocks, unsigned warps);
  // One of the cluster's blocks that can go on, a bit each; `now` ran last, and so did a warp that can go on or not.
  unsigned next_block(unsigned ready, unsigned now, bool warp_can_stay);
  // One of the threads that can go on, of which there is at least one; `now` ran last.
  Position next(const Ready& ready, Position now);
  // Whether a copy arrives when it is issued; otherwise when it is waited for.
  bool copy_arrives_at_once();

private:
  unsigned random();
  unsigned any_of(unsigned mask);
  unsigned any_block(unsigned ready);
  unsigned next_warp(const Ready& ready, Position now);

  unsigned seed_;
  uint64_t state_;
  unsigned starved_ = 0, starved_block_ = 0;
};

}  // namespace simt

// What a cluster's threads are at, and how an error tells it.
#pragma once

#include <string>

#include "executor.h"

namespace simt {

// Lanes at one collective.
struct Gathering {
  Call call;
  unsigned bytes, mask, arrived;
};

struct Warp {
  unsigned returned = 0;  // or not of the block
  unsigned at_barrier = 0, at_cluster_barrier = 0;
  int open = 0;
  Gathering gatherings[32];
  void* operands[32];
};

struct Barrier {
  Call call{};
  unsigned arrived = 0, votes = 0;
  Votes result{};  // of the last time it opened
};

struct Block {
  uint3 index{};
  unsigned rank = 0;
  Thread* thread = nullptr;  // the first one
  Position last{};           // ran before another block did
  unsigned threads = 0, warps = 0;
  unsigned live = 0;  // have not returned
  Ready ready;
  Barrier barrier;
  Warp warp[max_warps];
};

struct Cluster {
  unsigned blocks = 0;
  unsigned live = 0;  // threads that have not returned
  Barrier barrier;
  Block block[max_cluster];
};

extern Cluster cluster;
extern Block* own;  // the current thread's

// "(1, 2, 3)"; "7" for (7, 0, 0) where y and z say nothing.
std::string coordinates(uint3 index);

// "thread 5 of block 2"
std::string name_of(const Thread& thread);

// What every thread of the cluster is at, a line for each such place.
std::string states();

[[noreturn]] void fail_deadlocked();

}  // namespace simt

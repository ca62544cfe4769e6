// Runs a kernel's blocks, or clusters of them, one after another, a fiber for each thread, and checks what the threads
// do together.
#pragma once

#include <stddef.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "numbers.h"
#include "schedule.h"

namespace simt {

// What a GPU would answer with a fault, a hang, or a wrong result.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned max_threads = 1024;

// Picks the order in which everything runs from the next launch on: see schedule.h.
void set_seed(unsigned seed);
unsigned seed();

struct Copy {
  void* to;
  const void* from;
  int bytes;
  unsigned group;
};

struct Thread {
  uint3 index;
  Position position;
  Fiber fiber;
  std::vector<Copy> copies;  // issued, not arrived
  unsigned group = 0;        // of those not committed yet
};

struct Launch {
  dim3 grid, block;
  uint3 block_index;  // of the current thread, as the next
  unsigned cluster_rank = 0;
  Schedule schedule{0};
};

extern Thread* current;
extern Launch launched;

// Throws an Error that begins with the names of the current thread and its block.
[[noreturn]] void fail(const std::string& problem);

// Where the source calls something; not known of instructions.
struct Place {
  const char* file = nullptr;
  int line = 0;

  // As a default argument: of the call that leaves it out.
  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Call {
  const char* name;
  Place place;
};

// "at __syncthreads (wht.cuh:45)", and of a collective "at __shfl_sync (wht.cuh:45), mask 0xffffffff".
std::string at(const Call& call);
std::string at(const Call& call, unsigned mask);

// Waits for all threads of the block that have not returned. The threads' votes, and how many threads voted.
struct Votes {
  unsigned yes, all;
};
Votes sync_block(const Call& call, bool vote);

// Waits for all threads of the cluster that have not returned.
void sync_cluster(const Call& call);

// Lets others run.
void pause();

// The pointers that the lanes of a warp brought, by lane, for the one that came last; null for the others, once
// release() has been called. `bytes` tells apart operands that do not fit together.
void** gather(const Call& call, unsigned bytes, unsigned mask, void* operands);
void release(unsigned mask);

template <class Operands>
class Lanes {
public:
  Lanes(void** operands, unsigned mask) : operands_(operands), mask_(mask) {}
  Operands& operator[](unsigned lane) const { return *static_cast<Operands*>(operands_[lane]); }
  template <class F>
  void each(F f) const {
    for (unsigned rest = mask_; rest; rest &= rest - 1) {
      const unsigned lane = unsigned(__builtin_ctz(rest));
      f((*this)[lane], lane);
    }
  }

private:
  void** operands_;
  unsigned mask_;
};

// What lanes of a warp do at once: each brings its operands, and the last to come works for all.
template <class Operands, class Together>
void collective(const Call& call, unsigned mask, Operands& mine, Together together) {
  if (void** operands = gather(call, sizeof(Operands), mask, &mine)) {
    together(Lanes<Operands>(operands, mask));
    release(mask);
  }
}

void run(unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* kernel);

// kernel<<<grid, block, shared_bytes>>>(args...), finished on return; `cluster` blocks along x run at the same time.
template <class... P, class... A>
void launch_clusters(unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...), A... args) {
  auto call = [&] { kernel(args...); };
  run(cluster, grid, block, shared_bytes, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}
template <class... P, class... A>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...), A... args) {
  launch_clusters(1, grid, block, shared_bytes, kernel, args...);
}

}  // namespace simt

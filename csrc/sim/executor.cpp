#include "executor.h"

#include <string.h>

#include <exception>
#include <utility>

#include "memory.h"
#include "report.h"

namespace simt {

Thread* current = nullptr;
Launch launched;
Cluster cluster;
Block* own = cluster.block;

namespace {

Thread threads[max_cluster][max_threads];
Fiber caller;
std::exception_ptr error;
unsigned chosen_seed = 0;
void (*body)(void*);
void* kernel;

bool same_function(const Call& a, const Call& b) { return a.name == b.name || !strcmp(a.name, b.name); }

// A frame of their own: what is on a thread's stack where it waits stays small.
[[noreturn]] __attribute__((noinline, cold)) void fail_at(const Call& call, const char* problem) {
  fail(at(call) + problem + states());
}

// A barrier is no place for a thread that lanes of its warp wait for elsewhere.
inline void check_met(const Warp& w, const Call& call, unsigned bit) {
  for (int i = 0; i < w.open; ++i)
    if (w.gatherings[i].mask & bit) fail_at(call, ", where lanes do not meet it");
}

// Nor is one barrier while others wait at another.
inline void check_same(Barrier& b, const Call& call) {
  if (!b.arrived) b.call = call;
  if (!same_function(b.call, call) || b.call.place.line != call.place.line)
    fail_at(call, ", the others at another barrier");
}

void turn_to(Block& block) {
  own = &block;
  launched.block_index = block.index;
  launched.cluster_rank = block.rank;
  turn_to_shared(block.rank);
}

// A block that can go on becomes the current one. Which of its threads ran last.
Position choose_block() {
  unsigned ready = 0;
  for (unsigned b = 0; b < cluster.blocks; ++b) ready |= unsigned(cluster.block[b].ready.warps != 0) << b;
  own->last = current->position;
  if (!ready) return own->last;
  const unsigned next = launched.schedule.next_block(ready, own->rank, own->ready.lanes[own->last.warp]);
  if (next != own->rank) turn_to(cluster.block[next]);
  return own->last;
}

// A thread that can go on becomes the current one.
inline __attribute__((always_inline)) void choose() {
  Position last = current->position;
  if (__builtin_expect(cluster.blocks > 1, 0)) last = choose_block();
  Block& block = *own;
  if (!block.ready.warps) fail_deadlocked();
  const Position next = launched.schedule.next(block.ready, last);
  block.ready.remove(next);
  current = &block.thread[32 * next.warp + next.lane];
}

// Goes on with a thread that can; with the current one when it is called again.
void go_on() {
  Thread& before = *current;
  choose();
  if (current != &before) before.fiber.switch_to(current->fiber);
}

void open_barrier() {
  Barrier& b = own->barrier;
  b.result = {b.votes, b.arrived};
  b.votes = b.arrived = 0;
  for (unsigned w = 0; w < own->warps; ++w) own->ready.add(w, std::exchange(own->warp[w].at_barrier, 0u));
}

void open_cluster_barrier() {
  cluster.barrier.arrived = 0;
  for (Block* b = cluster.block; b < cluster.block + cluster.blocks; ++b)
    for (unsigned w = 0; w < b->warps; ++w) b->ready.add(w, std::exchange(b->warp[w].at_cluster_barrier, 0u));
}

__attribute__((noinline)) void end_block() {
  check_red_zones();
  if (cluster.blocks > 1) end_shared();
}

[[noreturn]] __attribute__((noinline, cold)) void fail_returning() {
  fail("returns, but lanes of its warp wait for it" + states());
}

void thread_returns() {
  Thread& me = *current;
  finish_copies(me);
  Warp& w = own->warp[me.position.warp];
  const unsigned bit = 1u << me.position.lane;
  for (int i = 0; i < w.open; ++i)
    if (w.gatherings[i].mask & bit) fail_returning();
  w.returned |= bit;
  --own->live;
  --cluster.live;
  if (own->barrier.arrived && own->barrier.arrived == own->live) open_barrier();
  if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.live) open_cluster_barrier();
  if (!own->live) end_block();
  if (cluster.live) choose();
}

// Not watched by AddressSanitizer, for its frame is never left, and the next thread's begins in the same place.
[[noreturn]] __attribute__((no_sanitize("address"))) void thread_main() {
  Fiber::entered();
  Fiber& me = current->fiber;
  try {
    body(kernel);
    thread_returns();
  } catch (...) {
    error = std::current_exception();
  }
  me.switch_to(error || !cluster.live ? caller : current->fiber, true);
  __builtin_unreachable();
}

void prepare(Block& block, unsigned rank) {
  const dim3& size = launched.block;
  block.rank = rank;
  block.thread = threads[rank];
  block.threads = block.live = size.x * size.y * size.z;
  block.warps = (block.threads + 31) / 32;
  block.ready = {};
  block.barrier = {};
  for (unsigned w = 0; w < block.warps; ++w) {
    const unsigned rest = block.threads - 32 * w, lanes = rest < 32 ? (1u << rest) - 1 : ~0u;
    block.warp[w].open = 0;
    block.warp[w].at_barrier = block.warp[w].at_cluster_barrier = 0;
    block.warp[w].returned = ~lanes;
    block.ready.add(w, lanes);
  }
  uint3 index{0, 0, 0};
  for (unsigned i = 0, all = block.threads; i < all; ++i) {
    Thread& t = threads[rank][i];
    t.index = index;
    t.position = {i / 32, i % 32};
    t.copies.clear();
    t.group = 0;
    t.fiber.prepare(thread_main, i);
    if (++index.x == size.x) {
      index.x = 0;
      if (++index.y == size.y) index.y = 0, ++index.z;
    }
  }
  // As if the last thread had just run: in turn, the first one follows.
  block.last = block.thread[block.threads - 1].position;
}

// The blocks from this one on.
void run_cluster(uint3 first, size_t shared_bytes) {
  cluster.barrier = {};
  cluster.live = 0;
  for (unsigned rank = 0; rank < cluster.blocks; ++rank) {
    Block& block = cluster.block[rank];
    prepare(block, rank);
    block.index = {first.x + rank, first.y, first.z};
    cluster.live += block.live;
    fill_shared(rank, shared_bytes);
  }
  turn_to(cluster.block[launched.schedule.begin_blocks(cluster.blocks, cluster.block[0].warps)]);
  current = &own->thread[own->threads - 1];
  choose();
  caller.switch_to(current->fiber);
  current = nullptr;
  if (!error) return;
  for (unsigned rank = 0; rank < cluster.blocks; ++rank)
    for (unsigned i = 0; i < own->threads; ++i) threads[rank][i].fiber.forget_frames();
  std::rethrow_exception(std::exchange(error, nullptr));
}

void check_configuration(unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto show = [](dim3 d) { return coordinates({d.x, d.y, d.z}); };
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw Error("cannot launch a grid of " + show(grid) + " blocks: 1 to 2147483647, 65535 and 65535 are possible");
  if (!block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      uint64_t(block.x) * block.y * block.z > max_threads)
    throw Error("cannot launch blocks of " + show(block) + " threads: 1 to 1024 are possible, and 64 in z");
  if (!cluster || cluster > max_cluster || grid.x % cluster)
    throw Error("cannot launch a grid of " + show(grid) + " blocks in clusters of " + std::to_string(cluster) +
                ": 1 to 8 that divide x are possible");
  if (shared_bytes > max_shared_bytes)
    throw Error("cannot launch with " + std::to_string(shared_bytes) + " bytes of shared memory: at most " +
                std::to_string(max_shared_bytes) + " are possible");
}

}  // namespace

void set_seed(unsigned seed) { chosen_seed = seed; }
unsigned seed() { return chosen_seed; }

void fail(const std::string& problem) { throw Error(name_of(*current) + ": " + problem); }

void pause() {
  own->ready.add(current->position.warp, 1u << current->position.lane);
  go_on();
}

Votes sync_block(const Call& call, bool vote) {
  const Position me = current->position;
  const unsigned bit = 1u << me.lane;
  Warp& w = own->warp[me.warp];
  Barrier& b = own->barrier;
  check_met(w, call, bit);
  check_same(b, call);
  w.at_barrier |= bit;
  b.votes += vote;
  if (++b.arrived == own->live) open_barrier();
  go_on();
  return b.result;
}

void sync_cluster(const Call& call) {
  const Position me = current->position;
  const unsigned bit = 1u << me.lane;
  Warp& w = own->warp[me.warp];
  check_met(w, call, bit);
  check_same(cluster.barrier, call);
  w.at_cluster_barrier |= bit;
  if (++cluster.barrier.arrived == cluster.live) open_cluster_barrier();
  go_on();
}

void** gather(const Call& call, unsigned bytes, unsigned mask, void* operands) {
  const Position me = current->position;
  const unsigned bit = 1u << me.lane;
  Warp& w = own->warp[me.warp];
  if (!(mask & bit)) fail(at(call, mask) + ", a mask without its own lane " + std::to_string(me.lane));
  if (mask & w.returned) fail(at(call, mask) + ", with lanes that have returned or do not exist" + states());
  if (mask & (w.at_barrier | w.at_cluster_barrier)) fail(at(call, mask) + ", lanes of which are elsewhere" + states());
  Gathering* mine = nullptr;
  for (int i = 0; i < w.open; ++i) {
    Gathering& g = w.gatherings[i];
    if (g.mask == mask && g.bytes == bytes && same_function(g.call, call))
      mine = &g;
    else if (g.mask & bit && g.arrived & mask)  // each waits for the other
      fail(at(call, mask) + ", lanes of which are elsewhere" + states());
  }
  if (!mine) *(mine = &w.gatherings[w.open++]) = {call, bytes, mask, 0};
  mine->arrived |= bit;
  w.operands[me.lane] = operands;
  if (mine->arrived != mask) {
    go_on();
    return nullptr;
  }
  *mine = w.gatherings[--w.open];
  return w.operands;
}

void release(unsigned mask) {
  own->ready.add(current->position.warp, mask);
  go_on();
}

void run(unsigned blocks, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* argument) {
  if (current) throw Error("cannot launch from a kernel");
  check_configuration(blocks, grid, block, shared_bytes);
  body = call;
  kernel = argument;
  launched = {grid, block, {}, 0, Schedule(chosen_seed)};
  cluster.blocks = blocks;
  const unsigned across = grid.x / blocks;  // clusters along x
  for (const uint64_t c : launched.schedule.order_of_blocks(uint64_t(across) * grid.y * grid.z))
    run_cluster({unsigned(c % across) * blocks, unsigned(c / across % grid.y), unsigned(c / across / grid.y)},
                shared_bytes);
}

}  // namespace simt

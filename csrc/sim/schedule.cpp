#include "schedule.h"

#include <numeric>
#include <utility>

namespace simt {

Schedule::Schedule(unsigned seed) : seed_(seed), state_(0x9e3779b97f4a7c15u * (uint64_t(seed) + 1)) {}

// xorshift64*
unsigned Schedule::random() {
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return unsigned(state_ * 0x2545f4914f6cdd1du >> 32);
}

// The first bit that is set from a random one on.
unsigned Schedule::any_of(unsigned mask) {
  const unsigned start = random() & 31;
  const unsigned turned = mask >> start | (start ? mask << (32 - start) : 0);
  return (unsigned(__builtin_ctz(turned)) + start) & 31;
}

std::vector<uint64_t> Schedule::order_of_blocks(uint64_t blocks) {
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (seed_)
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  return order;
}

unsigned Schedule::begin_blocks(unsigned blocks, unsigned warps) {
  starved_ = 1u << random() % warps;
  if (blocks == 1) return 0;
  starved_block_ = 1u << random() % blocks;
  return next_block((1u << blocks) - 1, 0, seed_ == 0);
}

// Each as likely.
unsigned Schedule::any_block(unsigned ready) {
  for (int n = int(random() % unsigned(__builtin_popcount(ready))); n; --n) ready &= ready - 1;
  return unsigned(__builtin_ctz(ready));
}

unsigned Schedule::next_block(unsigned ready, unsigned now, bool warp_can_stay) {
  const bool can_stay = ready >> now & 1;
  if (!seed_) return can_stay ? now : unsigned(__builtin_ctz(ready >> now ? ready & ~0u << now : ready));
  switch (seed_ % 4) {
    case 1:
      return warp_can_stay ? now : any_block(ready);
    case 2:
      return 31u - unsigned(__builtin_clz(ready));
    case 3: {
      const unsigned others = ready & ~starved_block_;
      return others >> now & 1 ? now : any_block(others ? others : ready);
    }
    default:
      return any_block(ready);
  }
}

unsigned Schedule::next_warp(const Ready& ready, Position now) {
  const bool can_stay = ready.lanes[now.warp];
  switch (seed_ % 4) {
    case 1:
      return can_stay ? now.warp : any_of(ready.warps);
    case 2:
      return 31u - unsigned(__builtin_clz(ready.warps));
    case 3: {
      const unsigned others = ready.warps & ~starved_;
      if (!others) return any_of(ready.warps);
      return can_stay && others >> now.warp & 1 ? now.warp : any_of(others);
    }
    default:
      return any_of(ready.warps);
  }
}

Position Schedule::next(const Ready& ready, Position now) {
  if (seed_) {
    const unsigned warp = next_warp(ready, now);
    return {warp, any_of(ready.lanes[warp])};
  }
  if (const unsigned rest = ready.lanes[now.warp] & ~0u << now.lane & ~(1u << now.lane))
    return {now.warp, unsigned(__builtin_ctz(rest))};
  const unsigned later = ready.warps & ~0u << now.warp & ~(1u << now.warp);
  const unsigned warp = unsigned(__builtin_ctz(later ? later : ready.warps));
  return {warp, unsigned(__builtin_ctz(ready.lanes[warp]))};
}

bool Schedule::copy_arrives_at_once() { return seed_ == 0 || (seed_ % 2 == 0 && random() % 2); }

}  // namespace simt

#include "report.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace simt {

namespace {

std::string hexadecimal(unsigned mask) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

std::string what_it_is_at(const Block& block, Position p) {
  const Warp& w = block.warp[p.warp];
  const unsigned bit = 1u << p.lane;
  if (w.returned & bit) return "returned";
  if (w.at_barrier & bit) return at(block.barrier.call);
  if (w.at_cluster_barrier & bit) return at(cluster.barrier.call);
  for (int i = 0; i < w.open; ++i)
    if (w.gatherings[i].arrived & bit) return at(w.gatherings[i].call, w.gatherings[i].mask);
  const bool running = &block == own && p.warp == current->position.warp && p.lane == current->position.lane;
  return running ? "this one" : "can go on";
}

std::string name_in_block(unsigned thread) {
  const dim3& size = launched.block;
  if (size.y * size.z == 1) return std::to_string(thread);
  return coordinates({thread % size.x, thread / size.x % size.y, thread / size.x / size.y});
}

std::string states_in(const Block& block) {
  std::vector<std::pair<std::string, std::string>> all;  // what threads are at, and which
  for (unsigned first = 0, end; first < block.threads; first = end) {
    const std::string it = what_it_is_at(block, {first / 32, first % 32});
    for (end = first + 1; end < block.threads && what_it_is_at(block, {end / 32, end % 32}) == it;) ++end;
    const std::string run = name_in_block(first) + (end - first > 1 ? " to " + name_in_block(end - 1) : "");
    const auto same = std::find_if(all.begin(), all.end(), [&](const auto& one) { return one.first == it; });
    if (same == all.end())
      all.emplace_back(it, run);
    else
      same->second += ", " + run;
  }
  std::string text;
  for (const auto& [it, which] : all) text += "\n  " + it + ": thread " + which;
  return text;
}

}  // namespace

std::string coordinates(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string name_of(const Thread& thread) {
  return "thread " + name_in_block(32 * thread.position.warp + thread.position.lane) + " of block " +
         coordinates(launched.block_index);
}

std::string at(const Call& call) {
  const std::string name = std::string("at ") + call.name;
  if (!call.place.file) return name;
  const char* slash = strrchr(call.place.file, '/');
  return name + " (" + (slash ? slash + 1 : call.place.file) + ":" + std::to_string(call.place.line) + ")";
}

std::string at(const Call& call, unsigned mask) { return at(call) + ", mask " + hexadecimal(mask); }

std::string states() {
  std::string text;
  for (const Block* b = cluster.block; b < cluster.block + cluster.blocks; ++b)
    text += (cluster.blocks > 1 ? "\n block " + coordinates(b->index) + ":" : "") + states_in(*b);
  return text;
}

void fail_deadlocked() {
  const std::string first = coordinates(cluster.block[0].index);
  const std::string where = cluster.blocks == 1
                                ? "block " + first
                                : "blocks " + first + " to " + coordinates(cluster.block[cluster.blocks - 1].index);
  throw Error(where + ": deadlock, no thread can go on" + states());
}

}  // namespace simt

#include "memory.h"

#include <string.h>

#include <algorithm>

#include "executor.h"
#include "report.h"

namespace simt {

namespace {

constexpr size_t red_zone = 1024;
constexpr unsigned char red = 0xa5;

// What is shared begins at an odd multiple of 16: no more may be relied on.
struct alignas(64) Memory {
  unsigned char before[red_zone + 16], shared[max_shared_bytes], after[red_zone];
};
Memory memories[max_cluster];
unsigned char* begin = memories[0].shared;  // of the current block
size_t size = 0;

void perform(const Copy& copy) {
  memcpy(copy.to, copy.from, size_t(copy.bytes));
  memset(static_cast<char*>(copy.to) + copy.bytes, 0, size_t(16 - copy.bytes));
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

unsigned char* shared_memory() { return begin; }

void fill_shared(unsigned rank, size_t bytes) {
  Memory& m = memories[rank];
#ifdef LORA_KERNELS_SIM_ASAN
  __asan_unpoison_memory_region(&m, sizeof(m));
#endif
  size = bytes;
  memset(m.before, red, sizeof(m.before));
  memset(m.shared, 0xff, bytes);
  memset(m.shared + bytes, red, red_zone);
#ifdef LORA_KERNELS_SIM_ASAN
  __asan_poison_memory_region(m.before, sizeof(m.before));
  __asan_poison_memory_region(m.shared + bytes, sizeof(m) - sizeof(m.before) - bytes);
#endif
}

void turn_to_shared(unsigned rank) { begin = memories[rank].shared; }

void end_shared() {
  memset(begin, 0xff, size);
#ifdef LORA_KERNELS_SIM_ASAN
  __asan_poison_memory_region(begin, size);
#endif
}

const void* in_block(const void* shared, unsigned rank) {
  const auto* p = static_cast<const unsigned char*>(shared);
  if (p < begin || p >= begin + size) fail("in_block of an address outside its shared memory");
  if (rank >= cluster.blocks)
    fail("in_block of block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.blocks));
  const Block& block = cluster.block[rank];
  if (!block.live) fail("in_block of block " + coordinates(block.index) + ", which has ended");
  return memories[rank].shared + (p - begin);
}

void check_red_zones() {
#ifndef LORA_KERNELS_SIM_ASAN  // which has reported it
  const auto untouched = [](unsigned char byte) { return byte == red; };
  const std::string block = "block " + coordinates(launched.block_index);
  const unsigned char* before = begin - sizeof(Memory::before);
  if (!std::all_of(before, static_cast<const unsigned char*>(begin), untouched))
    throw Error(block + " wrote before its shared memory");
  const unsigned char* end = begin + size;
  const unsigned char* written = std::find_if_not(end, end + red_zone, untouched);
  if (written != end + red_zone)
    throw Error(block + " wrote at byte " + std::to_string(written - begin) + " of its " + std::to_string(size) +
                " bytes of shared memory");
#endif
}

void check_shared(const void* address, size_t bytes, const char* instruction) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < begin || p + bytes > begin + size)
    fail(std::string(instruction) + " at byte " + std::to_string(p - begin) + " of " + std::to_string(size) +
         " bytes of shared memory");
  if (!aligned(p)) fail(std::string(instruction) + " at an address that is not a multiple of 16");
}

void copy_async(void* shared, const void* global, int bytes) {
  check_shared(shared, 16, "cp.async");
  if (!aligned(global)) fail("cp.async from an address that is not a multiple of 16");
  if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  const Copy copy{shared, global, bytes, current->group};
  if (launched.schedule.copy_arrives_at_once()) return perform(copy);
#ifdef LORA_KERNELS_SIM_ASAN
  if (__asan_region_is_poisoned(const_cast<void*>(global), size_t(bytes)))
    perform(copy);  // reported where it is issued
#endif
  current->copies.push_back(copy);
}

void commit_copies() { ++current->group; }

void wait_copies(unsigned pending_groups) {
  auto& copies = current->copies;
  const auto arrives = [&](const Copy& copy) { return copy.group + pending_groups < current->group; };
  const auto rest = std::find_if_not(copies.begin(), copies.end(), arrives);
  std::for_each(copies.begin(), rest, perform);
  copies.erase(copies.begin(), rest);
}

void finish_copies(Thread& thread) {
  std::for_each(thread.copies.begin(), thread.copies.end(), perform);
  thread.copies.clear();
}

}  // namespace simt

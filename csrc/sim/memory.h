// The shared memory of a cluster's blocks, and asynchronous copies into it.
#pragma once

#include <stddef.h>

namespace simt {

struct Thread;

constexpr size_t max_shared_bytes = 227 << 10;  // of one block on sm_90 and sm_100; sm_80 has 163 KiB

unsigned char* shared_memory();

// Every bit set, in a block's: NaN in each floating-point type.
void fill_shared(unsigned rank, size_t bytes);
// Goes on with that block's.
void turn_to_shared(unsigned rank);
// An error if something beside the current block's was written.
void check_red_zones();
// What is still read of the current block's is NaN, and an error where a sanitizer sees it.
void end_shared();

// The same place in another block of the cluster, which must not have ended.
const void* in_block(const void* shared, unsigned rank);

// An error unless all of it is shared memory, at a multiple of 16.
void check_shared(const void* address, size_t bytes, const char* instruction);

void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(unsigned pending_groups);
void finish_copies(Thread& thread);

}  // namespace simt

#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__x86_64__)
// A jump and no return: it goes to where the last one went, which the processor foresees.
__asm__(
    ".text\n"
    ".globl lora_kernels_sim_switch\n"
    ".p2align 4\n"
    "lora_kernels_sim_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  popq %rcx\n"
    "  jmp *%rcx\n");
#elif defined(__aarch64__)
__asm__(
    ".text\n"
    ".globl lora_kernels_sim_switch\n"
    ".p2align 4\n"
    "lora_kernels_sim_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif

namespace simt {

#ifdef LORA_KERNELS_SIM_ASAN
Fiber* Fiber::left_ = nullptr;
constexpr size_t stack_bytes = 512 << 10;  // its frames are larger
#else
constexpr size_t stack_bytes = 128 << 10;
#endif

void Fiber::allocate() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);  // an overflow is a fault, not another thread's data
  stack_ = static_cast<char*>(memory) + page;
  bytes_ = stack_bytes;
  owned_ = true;
}

Fiber::~Fiber() {
  if (!owned_) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  munmap(stack_ - page, page + bytes_);
}

void Fiber::prepare(void (*entry)(), unsigned number) {
  if (!stack_) allocate();
  // Frames of different fibers must not meet in the same sets of the cache.
  char* top = stack_ + bytes_ - number * 320 % 4096;
#ifdef LORA_KERNELS_SIM_ASAN
  fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, where to go, and where entry() would return to
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  stack_pointer_ = frame;
#elif defined(__aarch64__)
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uintptr_t>(entry);
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = size_t(top - stack_);
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::entered() {
#ifdef LORA_KERNELS_SIM_ASAN
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!left_->owned_) {
    left_->stack_ = static_cast<char*>(const_cast<void*>(stack));
    left_->bytes_ = bytes;
  }
#endif
}

void Fiber::forget_frames() {
#ifdef LORA_KERNELS_SIM_ASAN
  if (owned_) __asan_unpoison_memory_region(stack_, bytes_);
#endif
}

}  // namespace simt

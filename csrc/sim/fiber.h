// Stacks to run code on, and the switch from one to another.
#pragma once

#include <stddef.h>

#if defined(__SANITIZE_ADDRESS__)
#define LORA_KERNELS_SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LORA_KERNELS_SIM_ASAN 1
#endif
#endif

#ifdef LORA_KERNELS_SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
#define LORA_KERNELS_SIM_ASSEMBLY 1
// Stores the stack pointer, once the registers that a call keeps are on the stack, and goes on from another one.
extern "C" void lora_kernels_sim_switch(void** from, void* to) __asm__("lora_kernels_sim_switch");
#else
#include <ucontext.h>
#endif

namespace simt {

// Without prepare() it stands for the code that switches to the first one.
class Fiber {
public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // The next switch to it starts entry(), which never returns, at the top of its stack. `number` tells fibers apart.
  void prepare(void (*entry)(), unsigned number);

  // entry() begins with it.
  static void entered();

  // Goes on with `to`. `ended`: nothing will switch back to this one before prepare().
  void switch_to(Fiber& to, bool ended = false) {
#ifdef LORA_KERNELS_SIM_ASAN
    left_ = this;
    __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack_, to.stack_, to.bytes_);
#else
    (void)ended;
#endif
#ifdef LORA_KERNELS_SIM_ASSEMBLY
    lora_kernels_sim_switch(&stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
#ifdef LORA_KERNELS_SIM_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // Forgets what AddressSanitizer knows of frames on its stack that were never left.
  void forget_frames();

private:
  void allocate();

  char* stack_ = nullptr;
  size_t bytes_ = 0;
  bool owned_ = false;
#ifdef LORA_KERNELS_SIM_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef LORA_KERNELS_SIM_ASAN
  void* fake_stack_ = nullptr;
  static Fiber* left_;
#endif
};

}  // namespace simt

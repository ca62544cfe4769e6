// The part of DLPack 1.x's binary interface that is used here (https://dmlc.github.io/dlpack, dlpack.h).
#pragma once

#include <stdint.h>

namespace lora_kernels::dlpack {

constexpr int32_t kCPU = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// What the capsule `Tensor.__dlpack_c_exchange_api__` points to. Functions that are not called are left untyped.
struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void (*allocate)();
  void (*managed_from_object)();
  void (*object_from_managed)();
  int (*view_of_object)(void* object, Tensor* out);  // borrows; 0, or -1 and a Python exception
  void (*current_stream)();
};

}  // namespace lora_kernels::dlpack

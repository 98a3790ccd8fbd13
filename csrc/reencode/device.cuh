// What the re-encoder's CUDA kernels share: packs of 16 bytes, sums over a row and over rows, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

namespace qts::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxThreads = 512;
constexpr unsigned kWarp = 0xffffffffu;

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// 16 bytes where the memory allows it, else one element.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Packs that a thread keeps in registers: 16 elements, or 8 where they come one by one.
template <int V>
constexpr int kItems = V == 1 ? 8 : 16 / V;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* from, int pack) {
  return reinterpret_cast<const Pack<T, V>*>(from)[pack];
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, int pack, const Pack<T, V>& x) {
  reinterpret_cast<Pack<T, V>*>(to)[pack] = x;
}

// The sum of `x` over threadIdx.x, the same bits in every thread. `shared` holds one float a warp. Every thread of the
// block must come here, unless a warp alone has a row (blockDim.x == 32), which needs no barrier.
__device__ __forceinline__ float row_sum(float x, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kWarp, x, offset);
  if (blockDim.x == 32) return x;
  const int lane = threadIdx.x & 31;
  // The first barrier: nobody still reads what the previous row left in `shared`.
  __syncthreads();
  if (lane == 0) shared[threadIdx.x >> 5] = x;
  __syncthreads();
  x = lane < static_cast<int>(blockDim.x >> 5) ? shared[lane] : 0.0f;
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kWarp, x, offset);
  return x;
}

// The threads of a block whose x runs over a row: one row a warp where that holds the row, else one row a block.
inline dim3 row_block(int64_t packs, int items) {
  const int64_t wanted = (packs + items - 1) / items;
  if (wanted <= 32) return dim3(32, 8);
  return dim3(static_cast<unsigned>(std::min<int64_t>((wanted + 31) / 32 * 32, kMaxThreads)));
}

struct Launch {
  explicit Launch(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
const T* data(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Whether all these addresses (null ones too) can be read 16 bytes at a time.
inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

inline void check_like(const std::optional<Tensor>& x, const Tensor& like, int64_t numel) {
  if (!x.has_value()) return;
  STD_TORCH_CHECK(x->scalar_type() == like.scalar_type() && x->numel() == numel, "expected ", numel,
                  " elements of the first tensor's dtype, got ", x->numel());
  STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == like.get_device_index(),
                  "expected every tensor on the device of the first");
}

// f(T{}) with the CUDA type of the tensor's dtype.
template <class F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace qts::cuda

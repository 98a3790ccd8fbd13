// bias + erf-GELU and its backward on the GPU. A thread keeps a pack of columns: the bias is read once, and the sum for
// its gradient needs no other thread.
#include "reencode/column_sums.cuh"
#include "reencode/device.cuh"

#define QTS_ISA cuda
#define QTS_INLINE __device__ __forceinline__

namespace qts::cuda {
namespace {

using Vec = float;
QTS_INLINE float broadcast(float x) { return x; }
QTS_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QTS_INLINE float exp2(float x) { return exp2f(x); }
// One unit in the last place, where a division costs as much as half of the polynomial.
QTS_INLINE float reciprocal(float x) { return __fdividef(1.0f, x); }
QTS_INLINE float select(bool condition, float a, float b) { return condition ? a : b; }

}  // namespace
}  // namespace qts::cuda

#include "reencode/gelu.inl"

namespace qts::cuda {
namespace {

// Rows that a thread has in flight at once.
constexpr int kRows = 4;

template <typename T, int V>
__global__ void __launch_bounds__(128)
    bias_gelu_kernel(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ out, int64_t rows,
                     int columns) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns / V) return;
  const Pack<T, V> b = load<V>(bias, c);
  for (int64_t first = blockIdx.y * int64_t{kRows}; first < rows; first += gridDim.y * int64_t{kRows}) {
    Pack<T, V> y[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (first + i < rows) y[i] = load<V>(x + (first + i) * columns, c);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i < rows) {
#pragma unroll
        for (int j = 0; j < V; ++j) y[i].value[j] = narrow<T>(gelu(widen(y[i].value[j]) + widen(b.value[j])));
        store(out + (first + i) * columns, c, y[i]);
      }
    }
  }
}

// Part blockIdx.y of the rows; its sums of grad_x, before their rounding, go to partial [parts, columns].
template <typename T, int V>
__global__ void __launch_bounds__(128)
    bias_gelu_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                              T* __restrict__ grad_x, float* __restrict__ partial, int64_t rows, int columns) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns / V) return;
  const Pack<T, V> b = load<V>(bias, c);
  const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  float sums[V] = {};
  for (int64_t first = begin; first < end; first += 2) {
    Pack<T, V> g[2], y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i < end) {
        g[i] = load<V>(grad + (first + i) * columns, c);
        y[i] = load<V>(x + (first + i) * columns, c);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i < end) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float dy = widen(g[i].value[j]) * gelu_derivative(widen(y[i].value[j]) + widen(b.value[j]));
          sums[j] += dy;
          g[i].value[j] = narrow<T>(dy);
        }
        store(grad_x + (first + i) * columns, c, g[i]);
      }
    }
  }
  float* to = partial + blockIdx.y * int64_t{columns} + c * int64_t{V};
#pragma unroll
  for (int j = 0; j < V; ++j) to[j] = sums[j];
}

struct Columns {
  unsigned threads, blocks;
};

Columns column_blocks(int64_t columns, int vector) {
  STD_TORCH_CHECK(columns < int64_t{1} << 30, "F must be below 2^30, got ", columns);
  const int64_t packs = columns / vector, threads = std::clamp<int64_t>((packs + 31) / 32 * 32, 32, 128);
  return {static_cast<unsigned>(threads), static_cast<unsigned>((packs + threads - 1) / threads)};
}

Tensor bias_gelu(Tensor x, Tensor bias) {
  x = contiguous(x);
  bias = contiguous(bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_like(bias, x, columns);
  const Launch launch(x);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  if (rows * columns == 0) return out;
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const bool whole = columns % kVector<T> == 0 && aligned({data<T>(x), data<T>(bias), data<T>(out)});
    const Columns split = column_blocks(columns, whole ? kVector<T> : 1);
    const dim3 grid(split.blocks, static_cast<unsigned>(std::min<int64_t>((rows + kRows - 1) / kRows, 65535)));
    const auto kernel = whole ? bias_gelu_kernel<T, kVector<T>> : bias_gelu_kernel<T, 1>;
    kernel<<<grid, split.threads, 0, launch.stream>>>(
        data<T>(x), data<T>(bias), static_cast<T*>(out.mutable_data_ptr()), rows, static_cast<int>(columns));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) {
  grad = contiguous(grad);
  x = contiguous(x);
  bias = contiguous(bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_like(grad, x, rows * columns);
  check_like(bias, x, columns);
  const Launch launch(x);
  Tensor grad_x = torch::stable::new_empty(x, {rows, columns});
  Tensor grad_bias = torch::stable::new_empty(x, {columns}, ScalarType::Float);
  if (columns == 0) return {grad_x, grad_bias};
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const bool whole =
        columns % kVector<T> == 0 && aligned({data<T>(grad), data<T>(x), data<T>(bias), data<T>(grad_x)});
    const Columns split = column_blocks(columns, whole ? kVector<T> : 1);
    // About 2048 blocks, which fill a large card; parts follow from the shape alone.
    const int64_t parts = std::min<int64_t>(rows, std::clamp<int64_t>(2048 / split.blocks, 16, 1024));
    Tensor partial = torch::stable::new_empty(x, {parts, columns}, ScalarType::Float);
    float* sums = partial.mutable_data_ptr<float>();
    if (rows > 0) {
      const auto kernel = whole ? bias_gelu_gradient_kernel<T, kVector<T>> : bias_gelu_gradient_kernel<T, 1>;
      kernel<<<dim3(split.blocks, static_cast<unsigned>(parts)), split.threads, 0, launch.stream>>>(
          data<T>(grad), data<T>(x), data<T>(bias), static_cast<T*>(grad_x.mutable_data_ptr()), sums, rows,
          static_cast<int>(columns));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    sum_columns(sums, parts, columns, grad_bias.mutable_data_ptr<float>(), launch.stream);
  });
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace qts::cuda

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CUDA, m) {
  m.impl("bias_gelu", TORCH_BOX(&qts::cuda::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&qts::cuda::bias_gelu_backward));
}

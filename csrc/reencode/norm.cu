// Gather + addend + RMSNorm, residual + RMSNorm, and the backward of both, on the GPU. Memory-bound: a row is read
// once, kept in registers between the statistics and the result, and written once.
#include "reencode/column_sums.cuh"
#include "reencode/device.cuh"

namespace qts::cuda {
namespace {

template <typename T>
struct NormRows {
  const T* x;
  const int64_t* indices;  // row of x for each row of the result; null: the same row
  int64_t x_rows, x_stride;
  const T *addend, *weight;  // either may be null
  T *sum, *normed;
  float* rstd;
  int64_t rows;
  int columns;
  float eps;
};

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) norm_rows_kernel(const NormRows<T> a) {
  constexpr int kKept = kItems<V>;
  __shared__ float shared[32];
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  if (row >= a.rows) return;  // only where a warp has a row of its own, so no barrier waits for it
  const int packs = a.columns / V, stride = blockDim.x * kKept;
  // One turn of the outer loops, except for rows longer than a block's registers: those read their sums again.
  const bool resident = packs <= stride;
  T* sum = a.sum + row * a.columns;
  T* normed = a.normed + row * a.columns;

  const int64_t source = a.indices ? a.indices[row] : row;
  if (source < 0 || source >= a.x_rows) {
    Pack<T, V> zero;
#pragma unroll
    for (int j = 0; j < V; ++j) zero.value[j] = narrow<T>(0.0f);
    for (int c = threadIdx.x; c < packs; c += blockDim.x) {
      store(sum, c, zero);
      store(normed, c, zero);
    }
    if (threadIdx.x == 0) a.rstd[row] = rsqrtf(a.eps);
    return;  // the whole row, so the whole block or warp
  }
  const T* x = a.x + source * a.x_stride;
  const T* addend = a.addend ? a.addend + row * a.columns : nullptr;

  Pack<T, V> kept[kKept];
  float squares = 0.0f;
  for (int first = threadIdx.x; first < packs; first += stride) {
    Pack<T, V> added[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int c = first + i * blockDim.x;
      if (c < packs) {
        kept[i] = load<V>(x, c);
        if (addend) added[i] = load<V>(addend, c);
      }
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int c = first + i * blockDim.x;
      if (c < packs) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (addend) kept[i].value[j] = narrow<T>(widen(kept[i].value[j]) + widen(added[i].value[j]));
          const float v = widen(kept[i].value[j]);  // the statistics are those of what was rounded
          squares = fmaf(v, v, squares);
        }
        store(sum, c, kept[i]);
      }
    }
  }
  const float rstd = rsqrtf(row_sum(squares, shared) / a.columns + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;

  for (int first = threadIdx.x; first < packs; first += stride) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int c = first + i * blockDim.x;
      if (c < packs) {
        if (!resident) kept[i] = load<V>(sum, c);  // this thread wrote it
        Pack<T, V> weight, out;
        if (a.weight) weight = load<V>(a.weight, c);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float v = widen(kept[i].value[j]) * rstd;
          out.value[j] = narrow<T>(a.weight ? v * widen(weight.value[j]) : v);
        }
        store(normed, c, out);
      }
    }
  }
}

template <typename T>
struct NormGradient {
  const T *grad_normed, *grad_sum, *x, *weight;  // grad_sum and weight may be null
  const float* rstd;
  T* grad_x;
  float* partial;  // [parts, columns], null without weight
  int64_t rows;
  int parts, columns;
};

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) norm_gradient_kernel(const NormGradient<T> a) {
  constexpr int kKept = kItems<V>;
  __shared__ float shared[32];
  const int part = blockIdx.x * blockDim.y + threadIdx.y;
  if (part >= a.parts) return;  // only where a warp has a part of its own, so no barrier waits for it
  const int packs = a.columns / V, stride = blockDim.x * kKept;
  const bool resident = packs <= stride;
  const int64_t begin = a.rows * part / a.parts, end = a.rows * (part + 1) / a.parts;
  float* partial = a.partial ? a.partial + int64_t{part} * a.columns : nullptr;

  float sums[kKept][V] = {};
  for (int64_t row = begin; row < end; ++row) {
    const T* grad_normed = a.grad_normed + row * a.columns;
    const T* grad_sum = a.grad_sum ? a.grad_sum + row * a.columns : nullptr;
    const T* x = a.x + row * a.columns;
    T* grad_x = a.grad_x + row * a.columns;
    const float rstd = a.rstd[row];

    Pack<T, V> g[kKept], h[kKept];
    float dot = 0.0f;
    for (int first = threadIdx.x; first < packs; first += stride) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int c = first + i * blockDim.x;
        if (c < packs) {
          g[i] = load<V>(grad_normed, c);
          h[i] = load<V>(x, c);
        }
      }
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int c = first + i * blockDim.x;
        if (c < packs) {
          Pack<T, V> weight;
          if (a.weight) weight = load<V>(a.weight, c);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float gh = widen(g[i].value[j]) * (widen(h[i].value[j]) * rstd);
            dot = a.weight ? fmaf(gh, widen(weight.value[j]), dot) : dot + gh;
          }
        }
      }
    }
    const float mean = row_sum(dot, shared) / a.columns;

    for (int first = threadIdx.x; first < packs; first += stride) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int c = first + i * blockDim.x;
        if (c < packs) {
          if (!resident) {
            g[i] = load<V>(grad_normed, c);
            h[i] = load<V>(x, c);
          }
          Pack<T, V> weight, added, out;
          if (a.weight) weight = load<V>(a.weight, c);
          if (grad_sum) added = load<V>(grad_sum, c);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float grad = widen(g[i].value[j]), normed = widen(h[i].value[j]) * rstd;
            const float weighted = a.weight ? grad * widen(weight.value[j]) : grad;
            float dx = rstd * fmaf(-normed, mean, weighted);
            if (grad_sum) dx += widen(added.value[j]);
            out.value[j] = narrow<T>(dx);
            if (partial && resident) {
              sums[i][j] = fmaf(grad, normed, sums[i][j]);
            } else if (partial) {
              // Rows longer than the registers add up in memory: the same thread every time.
              float* to = partial + c * int64_t{V} + j;
              *to = fmaf(grad, normed, row == begin ? 0.0f : *to);
            }
          }
          store(grad_x, c, out);
        }
      }
    }
  }
  if (!partial || !resident) return;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int c = threadIdx.x + i * blockDim.x;
    if (c < packs) {
#pragma unroll
      for (int j = 0; j < V; ++j) partial[c * V + j] = sums[i][j];
    }
  }
}

int checked_columns(int64_t columns) {
  STD_TORCH_CHECK(columns < int64_t{1} << 30, "D must be below 2^30, got ", columns);
  return static_cast<int>(columns);
}

unsigned checked_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "too many rows for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, const Tensor* indices, const std::optional<Tensor>& addend,
                                        const std::optional<Tensor>& weight, double eps) {
  const int64_t rows = indices ? indices->numel() : x.size(0), columns = x.size(1);
  check_like(addend, x, rows * columns);
  check_like(weight, x, columns);
  const Launch launch(x);
  Tensor sum = torch::stable::new_empty(x, {rows, columns});
  Tensor normed = torch::stable::new_empty(x, {rows, columns});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  if (rows == 0) return {sum, normed, rstd};
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const NormRows<T> work{data<T>(x),
                           indices ? indices->const_data_ptr<int64_t>() : nullptr,
                           x.size(0),
                           x.stride(0),
                           data<T>(addend),
                           data<T>(weight),
                           static_cast<T*>(sum.mutable_data_ptr()),
                           static_cast<T*>(normed.mutable_data_ptr()),
                           rstd.mutable_data_ptr<float>(),
                           rows,
                           checked_columns(columns),
                           static_cast<float>(eps)};
    const bool whole = columns % kVector<T> == 0 && work.x_stride % kVector<T> == 0 &&
                       aligned({work.x, work.addend, work.weight, work.sum, work.normed});
    const dim3 block = whole ? row_block(columns / kVector<T>, kItems<kVector<T>>) : row_block(columns, kItems<1>);
    const unsigned grid = checked_blocks((rows + block.y - 1) / block.y);
    if (whole) {
      norm_rows_kernel<T, kVector<T>><<<grid, block, 0, launch.stream>>>(work);
    } else {
      norm_rows_kernel<T, 1><<<grid, block, 0, launch.stream>>>(work);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {sum, normed, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gather_add_rms_norm(Tensor tokens, Tensor indices, std::optional<Tensor> addend,
                                                       std::optional<Tensor> weight, double eps) {
  // Rows may lie anywhere, so a slice of a larger tensor is gathered without a copy of the whole.
  if (tokens.size(1) != 1 && tokens.stride(1) != 1) tokens = contiguous(tokens);
  indices = contiguous(indices);
  STD_TORCH_CHECK(indices.is_cuda() && indices.get_device_index() == tokens.get_device_index(),
                  "expected indices on the device of tokens");
  return norm(tokens, &indices, contiguous(addend), contiguous(weight), eps);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, std::optional<Tensor> weight, double eps) {
  return norm(contiguous(x), nullptr, contiguous(residual), contiguous(weight), eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_sum, Tensor x,
                                             std::optional<Tensor> weight, Tensor rstd) {
  x = contiguous(x);
  grad_normed = contiguous(grad_normed);
  grad_sum = contiguous(grad_sum);
  weight = contiguous(weight);
  rstd = contiguous(rstd);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_like(grad_normed, x, rows * columns);
  check_like(grad_sum, x, rows * columns);
  check_like(weight, x, columns);
  STD_TORCH_CHECK(rstd.numel() == rows && rstd.is_cuda(), "rstd must have ", rows, " entries on the GPU, got ",
                  rstd.numel());
  const Launch launch(x);
  Tensor grad_x = torch::stable::new_empty(x, {rows, columns});
  Tensor grad_weight = torch::stable::new_empty(x, {weight.has_value() ? columns : 0}, ScalarType::Float);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const void* out = grad_x.const_data_ptr();
    const bool whole = columns % kVector<T> == 0 &&
                       aligned({data<T>(grad_normed), data<T>(grad_sum), data<T>(x), data<T>(weight), out});
    const dim3 block = whole ? row_block(columns / kVector<T>, kItems<kVector<T>>) : row_block(columns, kItems<1>);
    // Enough parts to fill a large card, few enough that their sums are a small share of the traffic.
    const int64_t parts = std::min<int64_t>(rows, block.y > 1 ? 2048 : 512);
    std::optional<Tensor> partial;
    if (weight.has_value()) partial = torch::stable::new_empty(x, {parts, columns}, ScalarType::Float);
    float* sums = partial.has_value() ? partial->mutable_data_ptr<float>() : nullptr;
    if (rows > 0) {
      const NormGradient<T> work{data<T>(grad_normed), data<T>(grad_sum), data<T>(x), data<T>(weight),
                                 rstd.const_data_ptr<float>(), static_cast<T*>(grad_x.mutable_data_ptr()), sums, rows,
                                 static_cast<int>(parts), checked_columns(columns)};
      const unsigned grid = checked_blocks((parts + block.y - 1) / block.y);
      if (whole) {
        norm_gradient_kernel<T, kVector<T>><<<grid, block, 0, launch.stream>>>(work);
      } else {
        norm_gradient_kernel<T, 1><<<grid, block, 0, launch.stream>>>(work);
      }
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (weight.has_value()) sum_columns(sums, parts, columns, grad_weight.mutable_data_ptr<float>(), launch.stream);
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace qts::cuda

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CUDA, m) {
  m.impl("gather_add_rms_norm", TORCH_BOX(&qts::cuda::gather_add_rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&qts::cuda::add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&qts::cuda::rms_norm_backward));
}

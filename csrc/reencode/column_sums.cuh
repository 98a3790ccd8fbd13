// The second stage of a sum over rows. The first leaves one row of sums for each part of the rows; parts are cut by the
// shape alone and added up in a fixed order, without atomics, so a gradient has the same bits on every run.
#pragma once

#include "reencode/device.cuh"

namespace qts::cuda {
namespace {

constexpr int kLanes = 16;

// partial [parts, columns] -> total [columns]; zeros where there are no parts.
__global__ void __launch_bounds__(32 * kLanes)
    column_sums_kernel(const float* __restrict__ partial, int parts, int64_t columns, float* __restrict__ total) {
  __shared__ float shared[kLanes][32];
  const int64_t column = blockIdx.x * int64_t{32} + threadIdx.x;
  float sum = 0.0f;
  if (column < columns)
    for (int p = threadIdx.y; p < parts; p += kLanes) sum += partial[p * columns + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
#pragma unroll
  for (int lane = 1; lane < kLanes; ++lane) sum += shared[lane][threadIdx.x];
  total[column] = sum;
}

void sum_columns(const float* partial, int64_t parts, int64_t columns, float* total, cudaStream_t stream) {
  if (columns == 0) return;
  const auto blocks = static_cast<unsigned>((columns + 31) / 32);
  column_sums_kernel<<<blocks, dim3(32, kLanes), 0, stream>>>(partial, static_cast<int>(parts), columns, total);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace qts::cuda

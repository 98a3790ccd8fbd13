// CUDA on one CPU thread, for tests: the blocks of a launch run one after another, and the threads of a block are fibers
// that take turns where they wait for each other. Only what the kernels under csrc/ use.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time has it

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }

namespace emulator {

enum class State { runs, waits_for_block, waits_for_warp, done };

struct Fiber {
  ucontext_t context;
  dim3 thread;
  State state = State::runs;
  float given = 0, taken = 0;  // of a shuffle
  int partner = 0;
};

inline constexpr size_t stack_bytes = 32 << 10;
inline const std::unique_ptr<char[]> stacks(new char[1024 * stack_bytes]);
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline std::exception_ptr failure;
inline size_t current = 0;
inline int64_t launches = 0;

inline void wait(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

inline void enter() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current].state = State::done;
}

// Lets those go on whom all have reached: a warp whose 32 lanes shuffle, a block whose remaining threads wait.
inline bool release() {
  bool any = false, block = true;
  for (size_t first = 0; first < fibers.size(); first += 32) {
    size_t shuffling = 0;
    for (size_t i = first; i < first + 32; ++i) shuffling += fibers[i].state == State::waits_for_warp;
    if (shuffling < 32) continue;
    for (size_t i = first; i < first + 32; ++i) fibers[i].taken = fibers[first + fibers[i].partner].given;
    for (size_t i = first; i < first + 32; ++i) fibers[i].state = State::runs;
    any = true;
  }
  for (const Fiber& f : fibers) block = block && (f.state == State::waits_for_block || f.state == State::done);
  for (Fiber& f : fibers) {
    if (!block || f.state == State::done) continue;
    f.state = State::runs;
    any = true;
  }
  return any;
}

inline void run_block() {
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    f.state = State::runs;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.get() + i * stack_bytes;
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, enter, 0);
  }
  do {
    for (current = 0; current < fibers.size(); ++current) {
      if (fibers[current].state != State::runs) continue;
      threadIdx = fibers[current].thread;
      swapcontext(&scheduler, &fibers[current].context);
      if (failure) std::rethrow_exception(failure);
    }
  } while (release());
  for (const Fiber& f : fibers) {
    if (f.state != State::done) throw std::runtime_error("a thread waits for others that do not come");
  }
}

inline void run(dim3 grid, dim3 block, std::function<void()> kernel) {
  if (grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024 || grid.x * grid.y * grid.z == 0)
    throw std::runtime_error("invalid configuration argument");
  if (block.x * block.y * block.z % 32 != 0) throw std::runtime_error("only whole warps are emulated");
  ++launches;
  failure = nullptr;
  body = std::move(kernel);
  gridDim = grid;
  blockDim = block;
  fibers = std::vector<Fiber>(block.x * block.y * block.z);
  for (unsigned i = 0; i < fibers.size(); ++i)
    fibers[i].thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
}

// What `kernel<<<grid, block, shared, stream>>>` is rewritten to.
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t, cudaStream_t) {
  return [=](Parameters... arguments) { run(grid, block, [&] { kernel(arguments...); }); };
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::waits_for_block); }

inline float __shfl_xor_sync(unsigned, float x, int lane_mask) {
  emulator::Fiber& self = emulator::fibers[emulator::current];
  self.given = x;
  self.partner = static_cast<int>(emulator::current % 32) ^ lane_mask;
  emulator::wait(emulator::State::waits_for_warp);
  return self.taken;
}

// Work shared out to torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include <torch/csrc/stable/ops.h>

namespace qts {

// Uninitialised memory that starts on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// Calls make() once a thread and the function that it returns with each item 0 <= i < n. Threads take the next item
// when they are done with one, so that items of different cost, and cores that others use too, keep none waiting.
// `flops` is the work in all; below 2 MFLOP (some 20 us of one core) waking a thread costs more than it saves.
template <typename Make>
void for_each_item(int64_t n, double flops, const Make& make) {
  const int64_t threads = flops < 2e6 ? 1 : std::min<int64_t>(n, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    const auto run = make();
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) run(i);
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, worker);
  } else if (n > 0) {
    worker(0, 1);
  }
}

}  // namespace qts

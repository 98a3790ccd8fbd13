// Largest remainder with caps on the CPU, in integers: see qts_kernels/ops/allocate_tokens/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxTotal = std::numeric_limits<int32_t>::max();
constexpr int64_t kLeadingBit = int64_t{1} << 52;
constexpr int64_t kEntriesAThread = 4096;

struct Entry {
  int64_t index, cap, mantissa, exponent;  // the weight is mantissa * 2^(exponent - 1075)
  int64_t integer, share, remainder;
};

Entry make_entry(int64_t index, double weight, int64_t cap) {
  if (!(std::isfinite(weight) && weight > 0)) weight = 0;
  int64_t bits;
  std::memcpy(&bits, &weight, sizeof(bits));
  const int64_t exponent = bits >> 52, fraction = bits & (kLeadingBit - 1);
  return {index, cap, exponent > 0 ? fraction | kLeadingBit : fraction, std::max<int64_t>(exponent, 1), 0, 0, 0};
}

// The sum of the integers, which stays below 2^61.
int64_t make_integers(std::vector<Entry>& entries) {
  int64_t largest = 1, spare = -8, whole = 0;
  for (const Entry& e : entries) largest = std::max(largest, e.exponent);
  for (size_t n = entries.size() - 1; n > 0; n >>= 1) ++spare;
  spare = std::max<int64_t>(spare, 0);
  for (Entry& e : entries) whole += e.integer = e.mantissa >> std::min<int64_t>(largest - e.exponent + spare, 63);
  if (whole > 0) return whole;
  for (Entry& e : entries) e.integer = 1;
  return static_cast<int64_t>(entries.size());
}

// left * integer has 84 bits: the quotient is off by one at most, and the difference of products modulo 2^64 is exact.
void divide(Entry& e, int64_t left, int64_t whole) {
  e.share = static_cast<int64_t>(static_cast<double>(left) * static_cast<double>(e.integer) /
                                 static_cast<double>(whole));
  e.remainder = static_cast<int64_t>(static_cast<uint64_t>(left) * static_cast<uint64_t>(e.integer) -
                                     static_cast<uint64_t>(e.share) * static_cast<uint64_t>(whole));
  const int64_t correction = (e.remainder >= whole) - (e.remainder < 0);
  e.share += correction;
  e.remainder -= correction * whole;
}

void allocate(std::vector<Entry>& entries, int64_t left, int64_t* counts) {
  int64_t caps = 0;
  for (Entry& e : entries) caps += e.cap = std::clamp<int64_t>(e.cap, 0, left);
  left = std::min(left, caps);
  while (!entries.empty()) {
    const int64_t whole = make_integers(entries);
    for (Entry& e : entries) divide(e, left, whole);
    const auto bound = std::partition(entries.begin(), entries.end(), [](const Entry& e) { return e.share < e.cap; });
    if (bound == entries.end()) break;
    for (auto e = bound; e != entries.end(); ++e) {
      counts[e->index] = e->cap;
      left -= e->cap;
    }
    entries.erase(bound, entries.end());
  }
  for (const Entry& e : entries) left -= counts[e.index] = e.share;
  if (left == 0) return;
  const auto first = [](const Entry& a, const Entry& b) {
    return a.remainder != b.remainder ? a.remainder > b.remainder : a.index < b.index;
  };
  std::nth_element(entries.begin(), entries.begin() + (left - 1), entries.end(), first);
  for (int64_t i = 0; i < left; ++i) ++counts[entries[static_cast<size_t>(i)].index];
}

Tensor allocate_tokens(Tensor weights, Tensor cu_seqlens, Tensor total, std::optional<Tensor> cap) {
  weights = torch::stable::contiguous(weights);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  total = torch::stable::contiguous(total);
  if (cap.has_value()) cap = torch::stable::contiguous(*cap);
  const int64_t segments = total.numel(), entries = weights.numel();
  STD_TORCH_CHECK(cu_seqlens.numel() == segments + 1, "total must have one entry a segment, got ", segments, " for ",
                  cu_seqlens.numel() - 1, " segments");
  STD_TORCH_CHECK(!cap.has_value() || cap->numel() == entries, "cap must have ", entries, " entries");
  const double* weight = weights.const_data_ptr<double>();
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t* wanted = total.const_data_ptr<int64_t>();
  const int64_t* most = cap.has_value() ? cap->const_data_ptr<int64_t>() : nullptr;
  for (int64_t s = 0; s < segments; ++s)
    STD_TORCH_CHECK(0 <= offsets[s] && offsets[s] <= offsets[s + 1] && offsets[s + 1] <= entries,
                    "cu_seqlens must rise from 0 to ", entries, ", got ", offsets[s], " before ", offsets[s + 1]);
  Tensor out = torch::stable::new_empty(weights, {entries}, ScalarType::Long);
  int64_t* counts = out.mutable_data_ptr<int64_t>();

  const int64_t grain = std::max<int64_t>(1, kEntriesAThread * segments / std::max<int64_t>(entries, 1));
  torch::stable::parallel_for(0, segments, grain, [&](int64_t begin, int64_t end) {
    std::vector<Entry> scratch;
    for (int64_t s = begin; s < end; ++s) {
      scratch.clear();
      for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i)
        scratch.push_back(make_entry(i, weight[i], most ? most[i] : kMaxTotal));
      allocate(scratch, std::clamp<int64_t>(wanted[s], 0, kMaxTotal), counts);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("allocate_tokens", TORCH_BOX(&allocate_tokens)); }

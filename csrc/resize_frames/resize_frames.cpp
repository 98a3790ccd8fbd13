// Every frame to a grid of its own on the CPU: each token is a weighted sum of a few others, and so is each gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/parallel.h"
#include "gather_tokens/rows.h"
#include "resize_frames/taps.h"
#include "weighted_rows/element.h"
#include "weighted_rows/kernels.h"

namespace {

using torch::stable::Tensor;
using qts::Element;
using namespace qts::resize_frames;

// One row of a frame's new grid, [width, columns]: what it is made of along both axes, and where both grids lie.
struct Row {
  const Taps *vertical, *horizontal;
  int64_t y, source_row, source_width, target_row;
  int64_t source_rows, target_rows;  // rows of the source frame that exist; of this grid row that are wanted
};

struct Grids {
  const char* source;
  char* target;
  Element type;
  int64_t columns, row_bytes;
};

void make_row(const Row& row, const Grids& grids) {
  const Taps &vertical = *row.vertical, &horizontal = *row.horizontal;
  std::vector<const void*> rows;
  std::vector<float> weights;
  for (int64_t x = 0; x < row.target_rows; ++x) {
    rows.clear();
    weights.clear();
    for (int64_t v = vertical.start[row.y]; v < vertical.start[row.y + 1]; ++v) {
      for (int64_t h = horizontal.start[x]; h < horizontal.start[x + 1]; ++h) {
        const int64_t index = vertical.index[v] * row.source_width + horizontal.index[h];
        if (index >= row.source_rows) continue;
        rows.push_back(grids.source + (row.source_row + index) * grids.row_bytes);
        weights.push_back(vertical.weights[v] * horizontal.weights[h]);
      }
    }
    char* out = grids.target + (row.target_row + x) * grids.row_bytes;
    if (rows.size() == 1 && weights[0] == 1.0f) {
      std::memcpy(out, rows[0], static_cast<size_t>(grids.row_bytes));
    } else {
      QTS_DISPATCH(weighted_rows, grids.type, rows.data(), weights.data(), static_cast<int64_t>(rows.size()),
                   grids.columns, grids.type, out);
    }
  }
}

void make_rows(const std::vector<Row>& rows, const Grids& grids, int64_t numel) {
  qts::for_each_item(static_cast<int64_t>(rows.size()), 8.0 * static_cast<double>(numel), [&] {
    return [&](int64_t i) { make_row(rows[static_cast<size_t>(i)], grids); };
  });
}

struct Plan {
  Taps vertical, horizontal;
};

// linspace is along the tokens in raster order: one axis, of a grid of one row.
Plan plan(const std::string& mode, int64_t height, int64_t width, int64_t new_height, int64_t new_width) {
  if (mode == "bilinear") return {bilinear_taps(height, new_height), bilinear_taps(width, new_width)};
  if (mode == "adaptive_avg") return {average_taps(height, new_height), average_taps(width, new_width)};
  STD_TORCH_CHECK(mode == "linspace", "mode must be bilinear, adaptive_avg or linspace, got ", mode);
  return {linspace_taps(1, 1), linspace_taps(height * width, new_height * new_width)};
}

// f(frame, first row, its number of rows, plan) for each frame that has tokens. The plans outlive the call.
template <class F>
std::vector<std::unique_ptr<Plan>> each_frame(const Tensor& sizes, const Tensor& cu_seqlens, int64_t rows,
                                              int64_t height, int64_t width, const std::string& mode, const F& f) {
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  std::vector<std::unique_ptr<Plan>> plans;
  for (int64_t t = 0; t + 1 < cu_seqlens.numel(); ++t) {
    const int64_t start = offsets[t], count = offsets[t + 1] - start;
    STD_TORCH_CHECK(0 <= start && 0 <= count && start + count <= rows, "cu_seqlens must rise from 0 to ", rows,
                    ", got ", start, " before ", offsets[t + 1]);
    if (count == 0) continue;
    STD_TORCH_CHECK(size[2 * t] > 0 && size[2 * t + 1] > 0 && count <= size[2 * t] * size[2 * t + 1],
                    "cu_seqlens must be made of sizes");
    plans.push_back(std::make_unique<Plan>(plan(mode, height, width, size[2 * t], size[2 * t + 1])));
    f(t, start, count, *plans.back());
  }
  return plans;
}

void check_inputs(const Tensor& sizes, const Tensor& cu_seqlens, int64_t frames) {
  STD_TORCH_CHECK(sizes.numel() == 2 * frames && cu_seqlens.numel() == frames + 1, "sizes and cu_seqlens must be of ",
                  frames, " frames, got ", sizes.numel() / 2, " and ", cu_seqlens.numel() - 1);
}

Tensor resize_frames(Tensor frames, Tensor sizes, Tensor cu_seqlens, int64_t rows, std::string mode) {
  frames = torch::stable::contiguous(frames);
  sizes = torch::stable::contiguous(sizes);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  const int64_t height = frames.size(1), width = frames.size(2), columns = frames.size(3);
  check_inputs(sizes, cu_seqlens, frames.size(0));
  Tensor tokens = torch::stable::new_empty(frames, {rows, columns});
  const int64_t row_bytes = columns * static_cast<int64_t>(frames.element_size());
  const Grids grids{static_cast<const char*>(frames.const_data_ptr()), static_cast<char*>(tokens.mutable_data_ptr()),
                    qts::element_type(frames), columns, row_bytes};
  qts::advise_huge_pages(grids.target, rows * row_bytes);
  std::vector<Row> work;
  int64_t stop = 0;
  const auto plans = each_frame(sizes, cu_seqlens, rows, height, width, mode,
                                [&](int64_t t, int64_t start, int64_t count, const Plan& p) {
    stop = start + count;
    const int64_t new_width = p.horizontal.size(), source_width = mode == "linspace" ? height * width : width;
    for (int64_t y = 0; y * new_width < count; ++y)
      work.push_back({&p.vertical, &p.horizontal, y, t * height * width, source_width, start + y * new_width,
                      height * width, std::min(new_width, count - y * new_width)});
  });
  std::memset(grids.target + stop * row_bytes, 0, static_cast<size_t>((rows - stop) * row_bytes));
  make_rows(work, grids, stop * columns);
  return tokens;
}

Tensor resize_frames_backward(Tensor grad, Tensor sizes, Tensor cu_seqlens, int64_t height, int64_t width,
                              std::string mode) {
  grad = torch::stable::contiguous(grad);
  sizes = torch::stable::contiguous(sizes);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  const int64_t frames = sizes.size(0), rows = grad.size(0), columns = grad.size(1);
  check_inputs(sizes, cu_seqlens, frames);
  Tensor out = torch::stable::new_empty(grad, {frames, height, width, columns});
  const int64_t row_bytes = columns * static_cast<int64_t>(grad.element_size());
  const Grids grids{static_cast<const char*>(grad.const_data_ptr()), static_cast<char*>(out.mutable_data_ptr()),
                    qts::element_type(grad), columns, row_bytes};
  const int64_t numel = frames * height * width * columns;
  qts::advise_huge_pages(grids.target, frames * height * width * row_bytes);
  std::vector<Row> work;
  const int64_t lines = mode == "linspace" ? 1 : height, line_width = mode == "linspace" ? height * width : width;
  const Plan nothing{transposed({}, lines), transposed({}, line_width)};
  const auto add = [&](int64_t t, int64_t start, int64_t count, const Plan& p, int64_t new_width) {
    for (int64_t y = 0; y < lines; ++y)
      work.push_back({&p.vertical, &p.horizontal, y, start, new_width, t * height * width + y * line_width, count,
                      line_width});
  };
  int64_t next = 0;
  const auto plans = each_frame(sizes, cu_seqlens, rows, height, width, mode,
                                [&](int64_t t, int64_t start, int64_t count, Plan& p) {
    const int64_t new_width = p.horizontal.size();
    p = {transposed(p.vertical, lines), transposed(p.horizontal, line_width)};
    for (; next < t; ++next) add(next, 0, 0, nothing, 0);
    add(next++, start, count, p, new_width);
  });
  for (; next < frames; ++next) add(next, 0, 0, nothing, 0);
  make_rows(work, grids, numel);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) {
  m.impl("resize_frames", TORCH_BOX(&resize_frames));
  m.impl("resize_frames_backward", TORCH_BOX(&resize_frames_backward));
}

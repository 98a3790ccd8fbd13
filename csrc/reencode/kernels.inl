// Row kernels of the re-encoder. Included after cpu/target_<isa>.h; see cpu/isa.h for the one rule.

#include "cpu/simd.inl"

namespace qts::QTS_ISA {
namespace {
QTS_INLINE Vec reciprocal(Vec x) { return 1.0f / x; }
}  // namespace
}  // namespace qts::QTS_ISA

#include "reencode/gelu.inl"

#define QTS_LAMBDA __attribute__((always_inline))

namespace qts::QTS_ISA {
namespace {

// f(i, width) for each vector of a row; the last one may be shorter. Whole vectors are known to be whole, so that the
// compiler drops the handling of parts from the loop.
template <typename F>
QTS_INLINE void each_vector(int64_t columns, const F& f) {
  int64_t i = 0;
  for (; i + LANES <= columns; i += LANES) f(i, (int64_t)LANES);
  if (i < columns) f(i, columns - i);
}

template <typename T>
QTS_INLINE Vec get(const T* from, int64_t width) {
  return width == LANES ? load(from) : load_part(from, width);
}

template <typename T>
QTS_INLINE void put(T* to, Vec x, int64_t width) {
  if (width == LANES) {
    store(to, x);
  } else {
    store_part(to, x, width);
  }
}

// A row's sum of up to 2^20 squares in fp32: four running sums a lane keep both the rounding and the wait small.
struct RowSum {
  Vec part[4] = {};
  QTS_INLINE void add(Vec a, Vec b, int64_t i) {
    Vec& p = part[i / LANES & 3];
    p = fma(a, b, p);
  }
  QTS_INLINE float total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

QTS_INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

template <typename T>
void norm_typed(const NormRows& rows, int64_t begin, int64_t end) {
  const int64_t columns = rows.columns;
  const T* weight = (const T*)rows.weight;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t source = rows.indices ? rows.indices[row] : row;
    T* sum = (T*)rows.sum + row * columns;
    T* normed = (T*)rows.normed + row * columns;
    if (source < 0 || source >= rows.x_rows) {
      __builtin_memset(sum, 0, columns * sizeof(T));
      __builtin_memset(normed, 0, columns * sizeof(T));
      rows.rstd[row] = inverse_root(rows.eps);
      continue;
    }
    const T* x = (const T*)rows.x + source * rows.x_stride;
    const T* addend = rows.addend ? (const T*)rows.addend + row * columns : nullptr;
    RowSum squares;
    each_vector(columns, [&](int64_t i, int64_t width) QTS_LAMBDA {
      Vec v = get(x + i, width);
      if (addend) v += get(addend + i, width);
      put(sum + i, v, width);
      // Read back: the statistics are those of what was rounded.
      v = get(sum + i, width);
      squares.add(v, v, i);
    });
    const float rstd = inverse_root(squares.total() / (float)columns + rows.eps);
    rows.rstd[row] = rstd;
    each_vector(columns, [&](int64_t i, int64_t width) QTS_LAMBDA {
      Vec v = get(sum + i, width) * rstd;
      if (weight) v *= get(weight + i, width);
      put(normed + i, v, width);
    });
  }
}

template <typename T>
void norm_gradient_typed(const NormGradient& rows, int64_t begin, int64_t end, float* column_sums) {
  const int64_t columns = rows.columns;
  const T* weight = (const T*)rows.weight;
  if (column_sums) __builtin_memset(column_sums, 0, columns * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = (const T*)rows.grad_normed + row * columns;
    const T* grad_sum = rows.grad_sum ? (const T*)rows.grad_sum + row * columns : nullptr;
    const T* x = (const T*)rows.x + row * columns;
    T* out = (T*)rows.grad_x + row * columns;
    const float rstd = rows.rstd[row];
    RowSum dot;
    each_vector(columns, [&](int64_t i, int64_t width) QTS_LAMBDA {
      const Vec g = get(grad + i, width), h = get(x + i, width) * rstd;
      dot.add(weight ? g * get(weight + i, width) : g, h, i);
      if (column_sums) put(column_sums + i, fma(g, h, get(column_sums + i, width)), width);
    });
    const float mean = dot.total() / (float)columns;
    each_vector(columns, [&](int64_t i, int64_t width) QTS_LAMBDA {
      Vec g = get(grad + i, width);
      if (weight) g *= get(weight + i, width);
      Vec dx = (g - get(x + i, width) * rstd * mean) * rstd;
      if (grad_sum) dx += get(grad_sum + i, width);
      put(out + i, dx, width);
    });
  }
}

template <typename T>
void gelu_typed(const GeluRows& rows, int64_t begin, int64_t end) {
  const int64_t columns = rows.columns;
  const T* bias = (const T*)rows.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)rows.x + row * columns;
    T* out = (T*)rows.out + row * columns;
    each_vector(columns, [&](int64_t i, int64_t width) QTS_LAMBDA {
      put(out + i, gelu(get(x + i, width) + get(bias + i, width)), width);
    });
  }
}

template <typename T>
void gelu_gradient_typed(const GeluRows& rows, int64_t begin, int64_t end, float* column_sums) {
  const int64_t columns = rows.columns;
  const T* bias = (const T*)rows.bias;
  __builtin_memset(column_sums, 0, columns * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = (const T*)rows.grad + row * columns;
    const T* x = (const T*)rows.x + row * columns;
    T* out = (T*)rows.out + row * columns;
    each_vector(columns, [&](int64_t i, int64_t width) QTS_LAMBDA {
      const Vec dy = get(grad + i, width) * gelu_derivative(get(x + i, width) + get(bias + i, width));
      put(out + i, dy, width);
      put(column_sums + i, get(column_sums + i, width) + dy, width);
    });
  }
}

#define QTS_SWITCH(type, function, ...)                            \
  switch (type) {                                                  \
    case Float::fp32: function<float>(__VA_ARGS__); break;         \
    case Float::bf16: function<bf16>(__VA_ARGS__); break;          \
    case Float::fp16: function<fp16>(__VA_ARGS__); break;          \
  }

}  // namespace

void norm_rows(Float type, const NormRows& rows, int64_t begin, int64_t end) {
  QTS_SWITCH(type, norm_typed, rows, begin, end)
}

void norm_gradient(Float type, const NormGradient& rows, int64_t begin, int64_t end, float* column_sums) {
  QTS_SWITCH(type, norm_gradient_typed, rows, begin, end, column_sums)
}

void gelu_rows(Float type, const GeluRows& rows, int64_t begin, int64_t end) {
  QTS_SWITCH(type, gelu_typed, rows, begin, end)
}

void gelu_gradient(Float type, const GeluRows& rows, int64_t begin, int64_t end, float* column_sums) {
  QTS_SWITCH(type, gelu_gradient_typed, rows, begin, end, column_sums)
}

#undef QTS_SWITCH
#undef QTS_LAMBDA

}  // namespace qts::QTS_ISA

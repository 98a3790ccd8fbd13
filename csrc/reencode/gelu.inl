// The erf form of GELU and its derivative, once for the CPU's vectors and for the GPU's threads: the includer defines
// QTS_INLINE, QTS_ISA, Vec, broadcast, fma, exp2, reciprocal and select in namespace qts::QTS_ISA.

namespace qts::QTS_ISA {
namespace {

// exp(-y^2 / 2), from which both the normal distribution's tail and its density follow.
QTS_INLINE Vec bell(Vec y) { return exp2(y * y * -0.72134752f); }

// Phi(y), given bell(y). The tail Phi(-|y|) is bell(y) * ratio(|y|), and the ratio is smooth: t times a polynomial in
// t = 1 / (1 + .345 |y|), minimax in relative error, 2.0e-8 up to |y| = 14, where bell(y) leaves fp32. Unlike
// 1 + erf(y / sqrt 2) it loses no digits where y is negative.
QTS_INLINE Vec normal_cdf(Vec y, Vec bell_y) {
  const Vec magnitude = select(y < 0.0f, -y, y);
  const Vec t = reciprocal(fma(magnitude, broadcast(0.345f), broadcast(1.0f)));
  Vec p = broadcast(-0.0283820437068f);
  p = fma(p, t, broadcast(0.145282327069f));
  p = fma(p, t, broadcast(-0.271173699408f));
  p = fma(p, t, broadcast(0.18719724564f));
  p = fma(p, t, broadcast(-0.0376019712823f));
  p = fma(p, t, broadcast(0.111799686375f));
  p = fma(p, t, broadcast(0.117238271017f));
  p = fma(p, t, broadcast(0.138020886526f));
  p = fma(p, t, broadcast(0.137619290375f));
  const Vec tail = p * t * bell_y;
  return select(y < 0.0f, tail, 1.0f - tail);
}

QTS_INLINE Vec gelu(Vec y) { return y * normal_cdf(y, bell(y)); }

// Phi(y) + y phi(y).
QTS_INLINE Vec gelu_derivative(Vec y) {
  const Vec bell_y = bell(y);
  return fma(y * 0.39894228f, bell_y, normal_cdf(y, bell_y));
}

}  // namespace
}  // namespace qts::QTS_ISA

// Which instruction set the CPU kernels run with, chosen once at run time.
//
// An op's kernels live in one `kernels.inl`, compiled several times: `<op>_portable.cpp`, `<op>_avx2.cpp` and
// `<op>_avx512.cpp` each include cpu/target_<isa>.h, then kernels.inl, then cpu/target_end.h. The target header sets
// the instruction set for what follows it and defines QTS_ISA, the namespace (qts::portable, qts::avx2, ...) that keeps
// the copies apart. QTS_DISPATCH calls the copy that the machine can run.
//
// The one rule: a kernel uses no inline function or template from outside its own namespace (no std::, no torch::;
// intrinsics and memcpy are fine). The linker keeps one copy of such a function, and if that is the AVX-512 one, then
// the portable code runs it too and dies on an older CPU. Threads, tensors and errors belong to the caller's file.
#pragma once

#if defined(__x86_64__)
#define QTS_X86 1
#else
#define QTS_X86 0
#endif

// Linux lets a program use the AMX tiles only where it asked to; GCC has them from version 11 on.
#if QTS_X86 && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define QTS_AMX 1
#else
#define QTS_AMX 0
#endif

namespace qts {

// Ordered: a machine that has one has those before it. avx512 is F + BW + DQ + VL; avx512_bf16 adds vdpbf16ps,
// amx_bf16 tdpbf16ps.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx_bf16 };

// The best that the machine has, or what the environment variable QTS_CPU_ISA (portable, avx2, avx512, avx512_bf16,
// amx_bf16) asks for; it is read at the first call and is meant for tests. Throws where it asks for something the CPU
// lacks.
Isa isa();

}  // namespace qts

// QTS_DISPATCH(f, args...) calls qts::<isa>::f(args...). An op without a copy for more runs its avx512 one there.
#if QTS_X86
#define QTS_DISPATCH(f, ...)                                          \
  (::qts::isa() >= ::qts::Isa::avx512 ? ::qts::avx512::f(__VA_ARGS__) \
   : ::qts::isa() == ::qts::Isa::avx2 ? ::qts::avx2::f(__VA_ARGS__)   \
                                      : ::qts::portable::f(__VA_ARGS__))
#else
#define QTS_DISPATCH(f, ...) (::qts::portable::f(__VA_ARGS__))
#endif

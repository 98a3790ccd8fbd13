// Ends what target_<isa>.h began.
#if defined(QTS_AVX2) || defined(QTS_AVX512)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

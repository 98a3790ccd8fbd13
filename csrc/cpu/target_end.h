// Ends what target_<isa>.h began; the last line of the file. GCC instantiates templates at the end of the file, with
// the options in force there, so its target stays on.
#if defined(__clang__) && (defined(QTS_AVX2) || defined(QTS_AVX512))
#pragma clang attribute pop
#endif

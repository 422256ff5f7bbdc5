// The entry points: each name stands for the build for the best instruction set of this machine, chosen once, when the
// library is loaded. The builds themselves are exported too (mlite_cpu_NAME_ISA), for tests.
#include "functions.h"

#ifdef __x86_64__
#define MLITE_BUILDS(X, name) X(name, avx512bf16) X(name, avx512) X(name, avx2) X(name, baseline)
#else
#define MLITE_BUILDS(X, name) X(name, baseline)
#endif

// Instruction sets are numbered in ascending order; each holds those before it.
static int best_instruction_set() {
#ifdef __x86_64__
  __builtin_cpu_init();  // resolvers run before constructors do
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

#define MLITE_DECLARE(name, isa) decltype(mlite_cpu_##name) mlite_cpu_##name##_##isa;
#ifdef __x86_64__
#define MLITE_CHOOSE(name)                 \
  const int best = best_instruction_set(); \
  if (best == 3) return mlite_cpu_##name##_avx512bf16; \
  if (best == 2) return mlite_cpu_##name##_avx512; \
  return best == 1 ? mlite_cpu_##name##_avx2 : mlite_cpu_##name##_baseline
#else
#define MLITE_CHOOSE(name) return mlite_cpu_##name##_baseline
#endif
#define MLITE_ENTRY(name)                                                                                     \
  MLITE_BUILDS(MLITE_DECLARE, name)                                                                           \
  __attribute__((used)) static decltype(&mlite_cpu_##name) resolve_##name() { MLITE_CHOOSE(name); }           \
  decltype(mlite_cpu_##name) mlite_cpu_##name __attribute__((ifunc("resolve_" #name)));

extern "C" {

MLITE_CPU_FUNCTIONS(MLITE_ENTRY)

// 0 baseline, 1 avx2, 2 avx512, 3 avx512bf16: builds up to this one run on this machine.
int mlite_cpu_instruction_set() { return best_instruction_set(); }

int64_t mlite_cpu_workspace_rows(int64_t rows, int64_t) {
  // Sums of 32 rows, but no more than 256 of them: both steps' sums stay short, and the workspace small. The number of
  // threads has no part in it, so that it has none in the result.
  const int64_t blocks = (rows + 31) / 32;
  return blocks < 1 ? 1 : blocks > 256 ? 256 : blocks;
}
}

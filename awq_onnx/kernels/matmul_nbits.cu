// The kernels of com.microsoft::MatMulNBits with 4 bits: which there are, by name. launch.c tells when each one runs.
#include <params.h>
#include <primitives.cuh>
#include <codes.cuh>
#include <gemv.cuh>
#include <gemm.cuh>
#include <plain.cuh>

// For a size of blocks: with K of whole stages (see gemv.cuh) and any, symmetric and with zero points.
#define GEMV(T, type, shift, size)                                                                                     \
    KERNEL(awq_gemv_##type##_b##size##_whole, AWQ_GEMV_THREADS, 2) {                                                   \
        gemv::run<T, gemv::Layout<shift, false, true>>(p);                                                             \
    }                                                                                                                  \
    KERNEL(awq_gemv_##type##_b##size##_whole_zp, AWQ_GEMV_THREADS, 2) {                                                \
        gemv::run<T, gemv::Layout<shift, true, true>>(p);                                                              \
    }                                                                                                                  \
    KERNEL(awq_gemv_##type##_b##size, AWQ_GEMV_THREADS, 2) { gemv::run<T, gemv::Layout<shift, false, false>>(p); }     \
    KERNEL(awq_gemv_##type##_b##size##_zp, AWQ_GEMV_THREADS, 2) { gemv::run<T, gemv::Layout<shift, true, false>>(p); }

#define GEMVS(T, type) GEMV(T, type, 5, 32) GEMV(T, type, 6, 64) GEMV(T, type, 7, 128)

// Rows of W by tokens; launch.c has the same list.
#define GEMM(T, type, rows, tokens, blocks, ...)                                                                       \
    static_assert(gemm::Tile<__VA_ARGS__>::ROWS == rows && gemm::Tile<__VA_ARGS__>::TOKENS == tokens, "name");         \
    KERNEL(awq_gemm_##type##_##rows##x##tokens, (gemm::Tile<__VA_ARGS__>::THREADS), blocks) {                          \
        gemm::run<T, gemm::Tile<__VA_ARGS__>, false>(p);                                                               \
    }                                                                                                                  \
    KERNEL(awq_gemm_##type##_##rows##x##tokens##_zp, (gemm::Tile<__VA_ARGS__>::THREADS), blocks) {                     \
        gemm::run<T, gemm::Tile<__VA_ARGS__>, true>(p);                                                                \
    }

#define GEMMS(T, type)                                                                                                 \
    GEMM(T, type, 128, 16, 3, 2, 2, 4, 1)                                                                              \
    GEMM(T, type, 128, 32, 3, 2, 4, 4, 1)                                                                              \
    GEMM(T, type, 128, 64, 3, 2, 8, 4, 1)                                                                              \
    GEMM(T, type, 128, 128, 1, 2, 8, 4, 2)

#define PLAIN(T, type)                                                                                                 \
    KERNEL(awq_plain_##type, 256, 1) { plain::multiply<T>(p); }                                                        \
    KERNEL(awq_dequantize_##type, 256, 1) { plain::dequantize<T>(p); }                                                 \
    KERNEL(awq_add_bias_##type, 256, 1) { plain::add_bias<T>(p); }

#define SUM_SPLITS(T, type)                                                                                            \
    KERNEL(awq_sum_splits_##type, 256, 1) { plain::sum_splits<T>(p); }

GEMVS(Half, f16)
GEMVS(Bfloat, bf16)
GEMMS(Half, f16)
GEMMS(Bfloat, bf16)
PLAIN(Half, f16)
PLAIN(Bfloat, bf16)
PLAIN(plain::Single, f32)
SUM_SPLITS(Half, f16)
SUM_SPLITS(Bfloat, bf16)

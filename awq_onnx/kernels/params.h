/* What every MatMulNBits kernel is told: one struct by value, the same in C (launch.c) and in CUDA. */
#ifndef AWQ_ONNX_PARAMS_H
#define AWQ_ONNX_PARAMS_H

/* Of 16-bit floats only the bits are known here. G blocks in a row of K inputs; padded_K = G block_size. */
struct awq_params {
    const unsigned short *a;          /* (M, K) */
    const unsigned char *codes;       /* (N, padded_K / 2): two codes in a byte, the first in the low half */
    const unsigned short *scales;     /* (N, G) */
    const unsigned char *zero_points; /* (N, zero_point_stride), two in a byte; NULL: 8 everywhere */
    const unsigned short *bias;       /* (N,) or NULL */
    unsigned short *y;                /* (M, N); for the kernel `dequantize`: the weight (N, K) */
    float *partial;                   /* (splits, M, N): sums over parts of K, where splits > 1 */
    int M, N, K;
    int G, padded_K, zero_point_stride;
    int block_shift; /* block_size = 1 << block_shift */
    int splits;      /* into how many parts K is cut */
    int split_K;     /* inputs in a part, a multiple of 64 */
    int aligned;     /* rows of `a` (`dequantize`: of the weight) start at multiples of 16 bytes */
};

/* A tile of the GEMV: rows of W, rows of `a`; inputs in a stage; stages in the ring of each warp. */
#define AWQ_GEMV_ROWS 16
#define AWQ_GEMV_TOKENS 8
#define AWQ_GEMV_STAGE 256
#ifndef AWQ_GEMV_STAGES
#define AWQ_GEMV_STAGES 4
#endif
#define AWQ_GEMV_THREADS 256 /* at most */
#define AWQ_GEMV_PITCH 20

/* Bytes of shared memory: a stage holds codes and the 4-byte words that scales and zero points of each row lie in (they
 * may begin in the middle of the first); behind all rings, two times the partial sums of every warp. */
#define AWQ_GEMV_SCALE_WORDS(block_shift) ((AWQ_GEMV_STAGE >> (block_shift)) / 2 + 1)
#define AWQ_GEMV_ZERO_POINT_WORDS 2
#define AWQ_GEMV_STAGE_BYTES(block_shift, zero_points)                                                                 \
    (AWQ_GEMV_ROWS * (AWQ_GEMV_STAGE / 2 + 4 * AWQ_GEMV_SCALE_WORDS(block_shift) +                                     \
                      ((zero_points) ? 4 * AWQ_GEMV_ZERO_POINT_WORDS : 0)))
#define AWQ_GEMV_SHARED_BYTES(warps, block_shift, zero_points)                                                         \
    ((warps) *                                                                                                         \
     (AWQ_GEMV_STAGES * AWQ_GEMV_STAGE_BYTES(block_shift, zero_points) + 2 * AWQ_GEMV_TOKENS * AWQ_GEMV_PITCH * 4))

/* The GEMM, likewise; a stage holds activations too. */
#define AWQ_GEMM_STAGE 64
#ifndef AWQ_GEMM_STAGES
#define AWQ_GEMM_STAGES 4
#endif
#define AWQ_GEMM_SCALE_WORDS 2
#define AWQ_GEMM_STAGE_BYTES(rows, tokens)                                                                             \
    ((tokens) * AWQ_GEMM_STAGE * 2 + (rows) * (AWQ_GEMM_STAGE / 2 + 4 * AWQ_GEMM_SCALE_WORDS + 4))
#define AWQ_GEMM_SHARED_BYTES(rows, tokens) (AWQ_GEMM_STAGES * AWQ_GEMM_STAGE_BYTES(rows, tokens))

#endif

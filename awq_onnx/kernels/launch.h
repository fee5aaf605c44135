/* MatMulNBits on the GPU, from any host program: which CUDA kernel runs for which shape, and its launch.
 *
 * Nothing of CUDA is linked or included: the driver is opened when it is first asked for, the machine code
 * is a file of its own (see compile.py). Knows no onnxruntime.
 */
#ifndef AWQ_ONNX_LAUNCH_H
#define AWQ_ONNX_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

/* Of activations, scales, bias and output; ONNX's numbers (TensorProto.DataType), and onnxruntime's. */
enum awq_type { AWQ_FLOAT32 = 1, AWQ_FLOAT16 = 10, AWQ_BFLOAT16 = 16 };

/* A weight (N, K) of 4 bits: codes uint8 (N, G, block_size / 2), G = ceil(K / block_size). */
struct awq_weight {
    int64_t N, K;
    int64_t block_size; /* 16, 32, 64, 128 or 256 */
    int type;           /* enum awq_type */
};

/* One product y (M, N) = a (M, K) W' + bias. All pointers but `stream` and `cublas` are on the device. */
struct awq_call {
    int64_t M;
    const void *a;           /* (M, K) */
    const void *codes;       /* uint8 (N, G, block_size / 2) */
    const void *scales;      /* (N, G) */
    const void *zero_points; /* uint8 (N, ceil(G / 2)); NULL: 8 everywhere */
    const void *bias;        /* (N,), or NULL */
    void *y;                 /* (M, N), every element is written */
    void *workspace;         /* scratch; NULL where none is needed */
    size_t workspace_bytes;  /* of it: what awq_workspace_bytes() says */
    void *cublas;            /* cublasHandle_t set to `stream`, of the process' only cuBLAS; NULL: our own kernels */
    void *stream;            /* CUstream */
};

/* What a function has to say, formatted as by printf: good until the calling thread has said two things more. */
const char *awq_sentence(const char *format, ...);

/* A device with its kernels loaded. */
struct awq_gpu;

/* The device of the calling thread's CUDA context (of device 0 where there is none), its kernels loaded from
 * `folder`/awq_sm_XY.cubin: once in a process, later calls return the same. driver: the library of CUDA's driver, NULL
 * for the system's. Returns NULL and sets *error to a sentence where that fails. May allocate and load modules: not
 * while a CUDA graph is captured. */
const struct awq_gpu *awq_gpu_open(const char *driver, const char *folder, const char **error);

/* Why no kernel serves such a weight, a sentence that says what to do; NULL where one does. */
const char *awq_refusal(const struct awq_weight *weight);

/* Bytes of scratch on the device that a product with M rows needs. with_cublas: whether the call will have it. */
size_t awq_workspace_bytes(const struct awq_gpu *gpu, const struct awq_weight *weight, int64_t M, int with_cublas);

/* Launches on call->stream and returns; no allocation, no synchronisation. Returns NULL, or a sentence. */
const char *awq_matmul_nbits(const struct awq_gpu *gpu, const struct awq_weight *weight, const struct awq_call *call);

#endif

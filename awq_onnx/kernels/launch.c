/* See launch.h. The driver and the kernels are opened; a plan is made for a shape; kernels are launched. */
#include "launch.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "params.h"

/* Functions of CUDA's driver that are opened, with their types (CUDA Driver API reference). CUresult is an int. */
#define DRIVER_FUNCTIONS(F)                                                                                            \
    F(cuInit, (unsigned))                                                                                              \
    F(cuCtxGetCurrent, (void **))                                                                                      \
    F(cuCtxSetCurrent, (void *))                                                                                       \
    F(cuCtxGetDevice, (int *))                                                                                         \
    F(cuDeviceGet, (int *, int))                                                                                       \
    F(cuDevicePrimaryCtxRetain, (void **, int))                                                                        \
    F(cuDeviceGetAttribute, (int *, int, int))                                                                         \
    F(cuGetErrorString, (int, const char **))                                                                          \
    F(cuModuleLoadData, (void **, const void *))                                                                       \
    F(cuModuleGetFunction, (void **, void *, const char *))                                                            \
    F(cuFuncSetAttribute, (void *, int, int))                                                                          \
    F(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *, void *, int, size_t))                                       \
    F(cuLaunchKernel,                                                                                                  \
      (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **))

#define DRIVER_POINTER(name, arguments) int(*name) arguments;

typedef int cublas_gemm_ex(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int,
                           int, const void *, void *, int, int, int, int);

/* CUdevice_attribute, CUfunction_attribute, cudaDataType, cublasComputeType_t, cublasOperation_t, cublasGemmAlgo_t */
enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };
enum { MAX_DYNAMIC_SHARED_BYTES = 8 };
enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, ANY_ALGORITHM = -1 };

enum { TYPES = 3, FAST_TYPES = 2 };           /* the last, float32, has only simple kernels */
enum { SMALLEST_SHIFT = 5, GEMV_SHIFTS = 3 }; /* the GEMV's blocks: 32, 64, 128 */
enum { WARP_CHOICES = 4 };                    /* of a block of the GEMV: 1, 2, 4, 8 */
static const char *const TYPE_NAMES[TYPES] = {"f16", "bf16", "f32"};
static const int CUBLAS_TYPES[TYPES] = {CUDA_R_16F, CUDA_R_16BF, CUDA_R_32F};

/* The tiles that matmul_nbits.cu makes a GEMM for: rows of W, rows of `a`, threads. */
static const struct tile {
    int rows, tokens, threads;
} TILES[] = {{128, 16, 128}, {128, 32, 128}, {128, 64, 128}, {128, 128, 256}};
enum { TILE_COUNT = sizeof TILES / sizeof TILES[0] };

enum { ALIGNED_INPUTS = 8 }; /* of 16 bits: K is a multiple of them where each row of `a` is as aligned as the first */
enum { MOST_BLOCKS_Y = 65535 }; /* of a grid */

/* From how many rows of `a` on the weight is dequantised, once, for cuBLAS. */
enum { CUBLAS_FROM = 257, CUBLAS_FROM_FLOAT32 = 16 };
/* K is cut until so many blocks have work on a multiprocessor, but not into parts below so many stages. */
enum { BLOCKS_WANTED = 2, FEWEST_STAGES = 8, MOST_SPLITS = 16 };

/* A kernel whose blocks stay until all is done. */
struct kernel {
    void *function;
    int blocks; /* of them that fit on a multiprocessor */
};

struct awq_gpu {
    struct awq_gpu *next;
    char *driver_name;
    int device, multiprocessors;
    DRIVER_FUNCTIONS(DRIVER_POINTER)
    cublas_gemm_ex *gemm_ex;                                         /* NULL where there is no cuBLAS */
    struct kernel gemv[FAST_TYPES][GEMV_SHIFTS][2][2][WARP_CHOICES]; /* [whole stages][zero points][log2 of warps] */
    void *gemm[FAST_TYPES][TILE_COUNT][2];
    void *plain[TYPES], *dequantize[TYPES], *add_bias[TYPES], *sum_splits[FAST_TYPES];
};

const char *awq_sentence(const char *format, ...) {
    static _Thread_local char texts[2][2048]; /* in turns: one may be part of the other */
    static _Thread_local int turn = 0;
    char *text = texts[turn ^= 1];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof texts[0], format, values);
    va_end(values);
    return text;
}

static const char *failure(const struct awq_gpu *gpu, const char *what, int code) {
    const char *reason = NULL;
    if (gpu->cuGetErrorString(code, &reason) || !reason) reason = "unknown error";
    return awq_sentence("CUDA could not %s: %s (error %d)", what, reason, code);
}

/* ---- opening ---- */

static const char *open_driver(struct awq_gpu *gpu, const char *name) {
    void *library = dlopen(name ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return awq_sentence("CUDA's driver cannot be opened (%s): is this a machine with an NVIDIA GPU?", dlerror());
#define OPEN(name, arguments)                                                                                          \
    *(void **)&gpu->name = dlsym(library, #name);                                                                      \
    if (!gpu->name) return awq_sentence("CUDA's driver is too old: it has no function %s", #name);
    DRIVER_FUNCTIONS(OPEN)
    return NULL;
}

/* cuBLAS as the caller's handle has it: that of the process. Of two versions nothing tells which the handle is of. */
static void open_cublas(struct awq_gpu *gpu) {
    void *newer = dlopen("libcublas.so.13", RTLD_NOW | RTLD_NOLOAD),
         *older = dlopen("libcublas.so.12", RTLD_NOW | RTLD_NOLOAD);
    void *library = newer && older ? NULL : newer ? newer : older;
    if (library) *(void **)&gpu->gemm_ex = dlsym(library, "cublasGemmEx");
}

static const char *find_device(struct awq_gpu *gpu) {
    void *context = NULL;
    int error = gpu->cuInit(0);
    if (error) return failure(gpu, "start", error);
    error = gpu->cuCtxGetCurrent(&context);
    if (!error && !context) {
        int device;
        error = gpu->cuDeviceGet(&device, 0);
        if (!error) error = gpu->cuDevicePrimaryCtxRetain(&context, device);
        if (!error) error = gpu->cuCtxSetCurrent(context);
    }
    if (!error) error = gpu->cuCtxGetDevice(&gpu->device);
    if (!error) error = gpu->cuDeviceGetAttribute(&gpu->multiprocessors, MULTIPROCESSORS, gpu->device);
    return error ? failure(gpu, "find a device", error) : NULL;
}

/* The whole file and a zero behind it; NULL where there is none. */
static char *content(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    char *bytes = NULL;
    long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    if (size > 0 && !fseek(file, 0, SEEK_SET) && (bytes = malloc((size_t)size + 1)))
        bytes[fread(bytes, 1, (size_t)size, file)] = 0;
    fclose(file);
    return bytes;
}

/* Machine code for a smaller capability of the same generation runs too. */
static const char *load_module(struct awq_gpu *gpu, const char *folder, void **module) {
    int major = 0, minor = 0;
    char path[4096];
    char *image = NULL;
    gpu->cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, gpu->device);
    gpu->cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, gpu->device);
    if (major < 8) return awq_sentence("the GPU has compute capability %d.%d, the kernels need 8.0", major, minor);
    for (int lower = minor; lower >= 0 && !image; lower--) {
        snprintf(path, sizeof path, "%s/awq_sm_%d%d.cubin", folder, major, lower);
        image = content(path);
    }
    if (!image)
        return awq_sentence(
            "the kernels for this GPU, awq_sm_%d%d.cubin, are not in %s: make them there with "
            "python -m awq_onnx.kernels export",
            major, minor, folder);
    const int error = gpu->cuModuleLoadData(module, image);
    free(image);
    return error ? failure(gpu, awq_sentence("load %s", path), error) : NULL;
}

static const char *find(struct awq_gpu *gpu, void *module, const char *name, int shared_bytes, void **function) {
    int error = gpu->cuModuleGetFunction(function, module, name);
    if (!error && shared_bytes) error = gpu->cuFuncSetAttribute(*function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes);
    return error ? failure(gpu, awq_sentence("use the kernel %s", name), error) : NULL;
}

static const char *find_gemv(struct awq_gpu *gpu, void *module, int type, int shift, int whole, int zero_points) {
    char name[64];
    struct kernel *kernels = gpu->gemv[type][shift - SMALLEST_SHIFT][whole][zero_points];
    const int most = AWQ_GEMV_SHARED_BYTES(AWQ_GEMV_THREADS / 32, shift, zero_points);
    snprintf(name, sizeof name, "awq_gemv_%s_b%d%s%s", TYPE_NAMES[type], 1 << shift, whole ? "_whole" : "",
             zero_points ? "_zp" : "");
    for (int i = 0; i < WARP_CHOICES; i++) {
        const char *error = find(gpu, module, name, most, &kernels[i].function);
        if (error) return error;
        const size_t shared_bytes = AWQ_GEMV_SHARED_BYTES((size_t)1 << i, shift, zero_points);
        gpu->cuOccupancyMaxActiveBlocksPerMultiprocessor(&kernels[i].blocks, kernels[i].function, 32 << i,
                                                         shared_bytes);
    }
    return NULL;
}

static const char *find_gemm(struct awq_gpu *gpu, void *module, int type, int tile, int zero_points) {
    char name[64];
    const struct tile *shape = &TILES[tile];
    const int shared_bytes = AWQ_GEMM_SHARED_BYTES(shape->rows, shape->tokens);
    snprintf(name, sizeof name, "awq_gemm_%s_%dx%d%s", TYPE_NAMES[type], shape->rows, shape->tokens,
             zero_points ? "_zp" : "");
    return find(gpu, module, name, shared_bytes, &gpu->gemm[type][tile][zero_points]);
}

static const char *find_plain(struct awq_gpu *gpu, void *module, int type) {
    const struct {
        const char *name;
        void **function;
    } wanted[] = {{"plain", &gpu->plain[type]},
                  {"dequantize", &gpu->dequantize[type]},
                  {"add_bias", &gpu->add_bias[type]},
                  {"sum_splits", &gpu->sum_splits[type % FAST_TYPES]}};
    const char *error = NULL;
    for (int i = 0; i < (type < FAST_TYPES ? 4 : 3) && !error; i++) {
        char name[64];
        snprintf(name, sizeof name, "awq_%s_%s", wanted[i].name, TYPE_NAMES[type]);
        error = find(gpu, module, name, 0, wanted[i].function);
    }
    return error;
}

static const char *find_kernels(struct awq_gpu *gpu, void *module) {
    const char *error = NULL;
    for (int type = 0; type < TYPES && !error; type++) {
        for (int zero_points = 0; zero_points < 2 && type < FAST_TYPES && !error; zero_points++) {
            for (int i = 0; i < 2 * GEMV_SHIFTS && !error; i++)
                error = find_gemv(gpu, module, type, SMALLEST_SHIFT + i / 2, i % 2, zero_points);
            for (int i = 0; i < TILE_COUNT && !error; i++) error = find_gemm(gpu, module, type, i, zero_points);
        }
        if (!error) error = find_plain(gpu, module, type);
    }
    return error;
}

static struct awq_gpu *known(struct awq_gpu *gpu, const struct awq_gpu *wanted) {
    while (gpu && (gpu->device != wanted->device || strcmp(gpu->driver_name, wanted->driver_name))) gpu = gpu->next;
    return gpu;
}

static const char *open_all(struct awq_gpu *gpu, const char *folder) {
    void *module = NULL;
    const char *error = load_module(gpu, folder, &module);
    return error ? error : find_kernels(gpu, module);
}

static struct awq_gpu *open_once(const char *driver, const char *folder, const char **error) {
    static struct awq_gpu *all = NULL;
    struct awq_gpu *gpu = calloc(1, sizeof *gpu);
    struct awq_gpu *before = NULL;
    if (!gpu || !(gpu->driver_name = strdup(driver ? driver : ""))) {
        free(gpu);
        return *error = "out of memory", NULL;
    }
    *error = open_driver(gpu, driver);
    if (!*error) *error = find_device(gpu);
    if (!*error) before = known(all, gpu);
    if (!*error && !before) *error = open_all(gpu, folder);
    if (*error || before) {
        free(gpu->driver_name);
        free(gpu);
        return before;
    }
    gpu->next = all;
    return all = gpu;
}

const struct awq_gpu *awq_gpu_open(const char *driver, const char *folder, const char **error) {
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one_at_a_time);
    struct awq_gpu *gpu = open_once(driver, folder, error);
    if (gpu && !gpu->gemm_ex) open_cublas(gpu); /* it may have been loaded since */
    pthread_mutex_unlock(&one_at_a_time);
    return gpu;
}

/* ---- planning ---- */

static int type_index(int type) { return type == AWQ_FLOAT16 ? 0 : type == AWQ_BFLOAT16 ? 1 : 2; }

static int block_shift(const struct awq_weight *weight) {
    int shift = 0;
    while ((int64_t)1 << shift < weight->block_size) shift++;
    return shift;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char *awq_refusal(const struct awq_weight *weight) {
    const int64_t limit = INT32_MAX - 1024;
    if (weight->type != AWQ_FLOAT16 && weight->type != AWQ_BFLOAT16 && weight->type != AWQ_FLOAT32)
        return "activations must be float16, bfloat16 or float32";
    if (weight->block_size < 16 || weight->block_size > 256 || (weight->block_size & (weight->block_size - 1)))
        return "block_size must be 16, 32, 64, 128 or 256";
    if (weight->N < 1 || weight->K < 1 || weight->N > limit || weight->K > limit)
        return "N and K must be at least 1, and below 2^31";
    return NULL;
}

enum way { PLAIN, GEMV, GEMM, CUBLAS };

/* How a product with M rows is computed, where tensors are as aligned as allocations are. */
struct plan {
    enum way way;
    int tile;            /* of TILES, for GEMM */
    int splits, split_K; /* parts of K, for GEMM */
};

static int choose_tile(const struct awq_gpu *gpu, const struct awq_weight *weight, int64_t M) {
    int tile = 0;
    while (tile < TILE_COUNT - 1 && TILES[tile].tokens < M) tile++;
    /* The largest makes the best use of what it loads, where there are enough of them for every multiprocessor. */
    if (tile == TILE_COUNT - 1) {
        const int64_t tiles = ceil_div(weight->N, TILES[tile].rows) * ceil_div(M, TILES[tile].tokens);
        if (tiles < gpu->multiprocessors) tile--;
    }
    return tile;
}

static void split(struct plan *plan, const struct awq_gpu *gpu, const struct awq_weight *weight, int64_t M) {
    const struct tile *tile = &TILES[plan->tile];
    const int64_t stages = ceil_div(ceil_div(weight->K, weight->block_size) * weight->block_size, AWQ_GEMM_STAGE);
    const int64_t tiles = ceil_div(weight->N, tile->rows) * ceil_div(M, tile->tokens);
    int64_t splits = (int64_t)gpu->multiprocessors * BLOCKS_WANTED / tiles;
    if (splits > MOST_SPLITS) splits = MOST_SPLITS;
    if (splits > stages / FEWEST_STAGES) splits = stages / FEWEST_STAGES;
    if (splits < 1) splits = 1;
    const int64_t part = ceil_div(stages, splits);
    plan->splits = (int)ceil_div(stages, part);
    plan->split_K = (int)(part * AWQ_GEMM_STAGE);
}

static struct plan make_plan(const struct awq_gpu *gpu, const struct awq_weight *weight, int64_t M, int with_cublas) {
    struct plan plan = {PLAIN, 0, 1, 0};
    if (M >= (weight->type == AWQ_FLOAT32 ? CUBLAS_FROM_FLOAT32 : CUBLAS_FROM) && with_cublas && gpu->gemm_ex)
        plan.way = CUBLAS;
    else if (weight->type == AWQ_FLOAT32 || weight->block_size < 1 << SMALLEST_SHIFT) plan.way = PLAIN;
    else if (M <= AWQ_GEMV_TOKENS && weight->N >= AWQ_GEMV_ROWS &&
             weight->block_size < 1 << (SMALLEST_SHIFT + GEMV_SHIFTS))
        plan.way = GEMV;
    else if (weight->K % ALIGNED_INPUTS == 0) {
        plan.way = GEMM;
        plan.tile = choose_tile(gpu, weight, M);
        split(&plan, gpu, weight, M);
    }
    return plan;
}

static size_t workspace_of(const struct plan *plan, const struct awq_weight *weight, int64_t M) {
    if (plan->way == CUBLAS) return (size_t)weight->N * (size_t)weight->K * (weight->type == AWQ_FLOAT32 ? 4 : 2);
    return plan->splits > 1 ? (size_t)plan->splits * (size_t)M * (size_t)weight->N * sizeof(float) : 0;
}

size_t awq_workspace_bytes(const struct awq_gpu *gpu, const struct awq_weight *weight, int64_t M, int with_cublas) {
    if (M == 0) return 0;
    const struct plan plan = make_plan(gpu, weight, M, with_cublas);
    return workspace_of(&plan, weight, M);
}

/* ---- launching ---- */

static struct awq_params parameters(const struct awq_weight *weight, const struct awq_call *call) {
    const int64_t G = ceil_div(weight->K, weight->block_size);
    struct awq_params p = {.a = call->a,
                           .codes = call->codes,
                           .scales = call->scales,
                           .zero_points = call->zero_points,
                           .bias = call->bias,
                           .y = call->y,
                           .M = (int)call->M,
                           .N = (int)weight->N,
                           .K = (int)weight->K,
                           .G = (int)G,
                           .padded_K = (int)(G * weight->block_size),
                           .zero_point_stride = (int)ceil_div(G, 2),
                           .block_shift = block_shift(weight),
                           .splits = 1,
                           .aligned = weight->K % ALIGNED_INPUTS == 0 && (uintptr_t)call->a % 16 == 0};
    return p;
}

struct shape {
    int64_t grid[3];
    int threads, shared_bytes;
};

static const char *launch(const struct awq_gpu *gpu, void *function, const struct shape *shape, struct awq_params *p,
                          void *stream) {
    void *arguments[] = {p};
    const int error =
        gpu->cuLaunchKernel(function, (unsigned)shape->grid[0], (unsigned)shape->grid[1], (unsigned)shape->grid[2],
                            (unsigned)shape->threads, 1, 1, (unsigned)shape->shared_bytes, stream, arguments, NULL);
    return error ? failure(gpu, "run MatMulNBits", error) : NULL;
}

static const char *run_plain(const struct awq_gpu *gpu, int type, struct awq_params *p, void *stream) {
    const int64_t turns = ceil_div(p->M, 4);
    const struct shape shape = {{ceil_div(p->N, 8), turns < MOST_BLOCKS_Y ? turns : MOST_BLOCKS_Y, 1}, 256, 0};
    return launch(gpu, gpu->plain[type], &shape, p, stream);
}

static const char *run_gemv(const struct awq_gpu *gpu, int type, struct awq_params *p, void *stream) {
    const int zero_points = p->zero_points != NULL;
    const int64_t tiles = ceil_div(p->N, AWQ_GEMV_ROWS), stages = ceil_div(p->padded_K, AWQ_GEMV_STAGE);
    int choice = 0; /* as many warps as there are stages to share, up to 8 */
    while (choice < WARP_CHOICES - 1 && (int64_t)1 << choice < stages) choice++;
    const int whole = p->aligned && p->K % AWQ_GEMV_STAGE == 0 && (uintptr_t)p->scales % 16 == 0 &&
                      (uintptr_t)p->zero_points % 4 == 0;
    const struct kernel *kernel = &gpu->gemv[type][p->block_shift - SMALLEST_SHIFT][whole][zero_points][choice];
    const int64_t slots = (int64_t)gpu->multiprocessors * kernel->blocks;
    const struct shape shape = {{tiles < slots ? tiles : slots, 1, 1},
                                32 << choice,
                                AWQ_GEMV_SHARED_BYTES(1 << choice, p->block_shift, zero_points)};
    return launch(gpu, kernel->function, &shape, p, stream);
}

static const char *run_gemm(const struct awq_gpu *gpu, int type, const struct plan *plan, struct awq_params *p,
                            void *workspace, void *stream) {
    const struct tile *tile = &TILES[plan->tile];
    const struct shape shape = {{ceil_div(p->N, tile->rows), ceil_div(p->M, tile->tokens), plan->splits},
                                tile->threads,
                                AWQ_GEMM_SHARED_BYTES(tile->rows, tile->tokens)};
    const struct shape sums = {{ceil_div((int64_t)p->M * p->N, 256), 1, 1}, 256, 0};
    p->splits = plan->splits;
    p->split_K = plan->split_K;
    p->partial = workspace;
    const char *error = launch(gpu, gpu->gemm[type][plan->tile][p->zero_points != NULL], &shape, p, stream);
    return error || p->splits == 1 ? error : launch(gpu, gpu->sum_splits[type], &sums, p, stream);
}

static const char *run_cublas(const struct awq_gpu *gpu, int type, const struct awq_params *p,
                              const struct awq_call *call) {
    const struct shape words = {{p->N, ceil_div(p->K, 8 * 256), 1}, 256, 0};
    const struct shape elements = {{ceil_div((int64_t)p->M * p->N, 256), 1, 1}, 256, 0};
    const float one = 1, zero = 0;
    const int kind = CUBLAS_TYPES[type];
    struct awq_params weight = *p;
    weight.y = call->workspace;
    weight.aligned = p->K % ALIGNED_INPUTS == 0 && (uintptr_t)call->workspace % 16 == 0;
    const char *error = launch(gpu, gpu->dequantize[type], &words, &weight, call->stream);
    if (error) return error;
    /* Row by row as here is column by column for cuBLAS: it makes y' = W a'. */
    const int status =
        gpu->gemm_ex(call->cublas, CUBLAS_OP_T, CUBLAS_OP_N, p->N, p->M, p->K, &one, call->workspace, kind, p->K, p->a,
                     kind, p->K, &zero, p->y, kind, p->N, CUBLAS_COMPUTE_32F, ANY_ALGORITHM);
    if (status) return awq_sentence("cuBLAS could not run MatMulNBits (status %d)", status);
    struct awq_params sum = *p;
    return p->bias ? launch(gpu, gpu->add_bias[type], &elements, &sum, call->stream) : NULL;
}

const char *awq_matmul_nbits(const struct awq_gpu *gpu, const struct awq_weight *weight, const struct awq_call *call) {
    if (call->M == 0) return NULL;
    if ((uintptr_t)call->codes % 16) return "the codes must start at a multiple of 16 bytes";
    if (call->M > INT32_MAX - 1024) return "the activations have too many rows: at most 2^31";
    struct plan plan = make_plan(gpu, weight, call->M, call->cublas != NULL);
    /* cuBLAS may have been found only after the caller asked. */
    if (workspace_of(&plan, weight, call->M) > call->workspace_bytes) plan = make_plan(gpu, weight, call->M, 0);
    if (workspace_of(&plan, weight, call->M) > call->workspace_bytes) return "the workspace is too small";
    const int type = type_index(weight->type);
    struct awq_params p = parameters(weight, call);
    if (plan.way == GEMM && !p.aligned) plan.way = PLAIN;
    switch (plan.way) {
        case CUBLAS: return run_cublas(gpu, type, &p, call);
        case GEMM: return run_gemm(gpu, type, &plan, &p, call->workspace, call->stream);
        case GEMV: return run_gemv(gpu, type, &p, call->stream);
        default: return run_plain(gpu, type, &p, call->stream);
    }
}

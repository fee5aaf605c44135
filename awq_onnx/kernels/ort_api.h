/* The part of onnxruntime's C API that is used here, without a header of onnxruntime.
 *
 * The API is a table of functions that later versions only append to: a function has the same index in all of them,
 * and one binary serves all versions from 1.18 on.
 */
#ifndef AWQ_ONNX_ORT_API_H
#define AWQ_ONNX_ORT_API_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtOpAttr OrtOpAttr;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtCustomOp OrtCustomOp;
typedef void api_function(void);

typedef struct {
    api_function *const *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* What is used of the API: result, name, index in the table, arguments. */
#define ORT_FUNCTIONS(F)                                                                                               \
    F(OrtStatus *, CreateStatus, 0, (int code, const char *message))                                                   \
    F(OrtStatus *, CreateCustomOpDomain, 26, (const char *name, OrtCustomOpDomain **domain))                           \
    F(OrtStatus *, CustomOpDomain_Add, 27, (OrtCustomOpDomain * domain, const OrtCustomOp *op))                        \
    F(OrtStatus *, AddCustomOpDomain, 28, (OrtSessionOptions * options, OrtCustomOpDomain * domain))                   \
    F(OrtStatus *, GetTensorMutableData, 51, (OrtValue * value, void **data))                                          \
    F(OrtStatus *, CastTypeInfoToTensorInfo, 55, (const OrtTypeInfo *info, const OrtTensorTypeAndShapeInfo **tensor))  \
    F(OrtStatus *, CreateTensorTypeAndShapeInfo, 57, (OrtTensorTypeAndShapeInfo * *info))                              \
    F(OrtStatus *, SetTensorElementType, 58, (OrtTensorTypeAndShapeInfo * info, int type))                             \
    F(OrtStatus *, SetDimensions, 59, (OrtTensorTypeAndShapeInfo * info, const int64_t *dims, size_t count))           \
    F(OrtStatus *, GetTensorElementType, 60, (const OrtTensorTypeAndShapeInfo *info, int *type))                       \
    F(OrtStatus *, GetDimensionsCount, 61, (const OrtTensorTypeAndShapeInfo *info, size_t *count))                     \
    F(OrtStatus *, GetDimensions, 62, (const OrtTensorTypeAndShapeInfo *info, int64_t *dims, size_t count))            \
    F(OrtStatus *, GetSymbolicDimensions, 63,                                                                          \
      (const OrtTensorTypeAndShapeInfo *info, const char **names, size_t count))                                       \
    F(OrtStatus *, GetTensorTypeAndShape, 65, (const OrtValue *value, OrtTensorTypeAndShapeInfo **info))               \
    F(OrtStatus *, AllocatorAlloc, 75, (OrtAllocator * allocator, size_t bytes, void **memory))                        \
    F(OrtStatus *, AllocatorFree, 76, (OrtAllocator * allocator, void *memory))                                        \
    F(OrtStatus *, AllocatorGetInfo, 77, (const OrtAllocator *allocator, const OrtMemoryInfo **info))                  \
    F(OrtStatus *, KernelInfoGetAttribute_int64, 86, (const OrtKernelInfo *info, const char *name, int64_t *value))    \
    F(OrtStatus *, KernelContext_GetInputCount, 88, (const OrtKernelContext *context, size_t *count))                  \
    F(OrtStatus *, KernelContext_GetInput, 90,                                                                         \
      (const OrtKernelContext *context, size_t index, const OrtValue **value))                                         \
    F(OrtStatus *, KernelContext_GetOutput, 91,                                                                        \
      (OrtKernelContext * context, size_t index, const int64_t *dims, size_t count, OrtValue **value))                 \
    F(void, ReleaseStatus, 93, (OrtStatus * status))                                                                   \
    F(void, ReleaseTypeInfo, 98, (OrtTypeInfo * info))                                                                 \
    F(void, ReleaseTensorTypeAndShapeInfo, 99, (OrtTensorTypeAndShapeInfo * info))                                     \
    F(void, ReleaseCustomOpDomain, 101, (OrtCustomOpDomain * domain))                                                  \
    F(OrtStatus *, AddSessionConfigEntry, 130, (OrtSessionOptions * options, const char *key, const char *value))      \
    F(void, ReleaseAllocator, 132, (OrtAllocator * allocator))                                                         \
    F(OrtStatus *, KernelContext_GetGPUComputeStream, 193, (const OrtKernelContext *context, void **stream))           \
    F(OrtStatus *, KernelInfo_GetInputCount, 230, (const OrtKernelInfo *info, size_t *count))                          \
    F(OrtStatus *, KernelInfo_GetInputName, 232, (const OrtKernelInfo *info, size_t index, char *name, size_t *bytes)) \
    F(OrtStatus *, KernelInfo_GetInputTypeInfo, 234, (const OrtKernelInfo *info, size_t index, OrtTypeInfo **type))    \
    F(OrtStatus *, GetSessionConfigEntry, 238,                                                                         \
      (const OrtSessionOptions *options, const char *key, char *value, size_t *bytes))                                 \
    F(OrtStatus *, KernelInfo_GetNodeName, 244, (const OrtKernelInfo *info, char *name, size_t *bytes))                \
    F(OrtStatus *, KernelContext_GetResource, 265,                                                                     \
      (const OrtKernelContext *context, int version, int resource, void **value))                                      \
    F(OrtStatus *, ShapeInferContext_GetInputTypeShape, 268,                                                           \
      (const OrtShapeInferContext *context, size_t index, OrtTensorTypeAndShapeInfo **info))                           \
    F(OrtStatus *, ShapeInferContext_GetAttribute, 269,                                                                \
      (const OrtShapeInferContext *context, const char *name, const OrtOpAttr **attribute))                            \
    F(OrtStatus *, ShapeInferContext_SetOutputTypeShape, 270,                                                          \
      (const OrtShapeInferContext *context, size_t index, const OrtTensorTypeAndShapeInfo *info))                      \
    F(OrtStatus *, SetSymbolicDimensions, 271, (OrtTensorTypeAndShapeInfo * info, const char **names, size_t count))   \
    F(OrtStatus *, ReadOpAttr, 272,                                                                                    \
      (const OrtOpAttr *attribute, int type, void *data, size_t bytes, size_t *needed_bytes))                          \
    F(OrtStatus *, KernelContext_GetScratchBuffer, 277,                                                                \
      (const OrtKernelContext *context, const OrtMemoryInfo *where, size_t bytes, void **memory))                      \
    F(OrtStatus *, KernelInfoGetAllocator, 278, (const OrtKernelInfo *info, int memory_type, OrtAllocator **allocator))

#define DECLARE(result, name, index, arguments) result(*name) arguments;
#define TAKE(result, name, index, arguments) ort->name = (result(*) arguments)table[index];

struct ort {
    ORT_FUNCTIONS(DECLARE)
};

enum { API_VERSION = 18, OLDEST_API = 1 };       /* the first with index 278 */
enum { OP_VERSION = 17 };                        /* of struct OrtCustomOp: the first with all that is filled below */
enum { FAIL = 1, INVALID_ARGUMENT = 2 };         /* OrtErrorCode */
enum { REQUIRED = 0, OPTIONAL = 1 };             /* OrtCustomOpInputOutputCharacteristic */
enum { ANY_TYPE = 0, UINT8 = 2 };                /* ONNXTensorElementDataType; those of numbers are in enum awq_type */
enum { DEFAULT_MEMORY = 0 };                     /* OrtMemType */
enum { INTEGER_ATTRIBUTE = 1 };                  /* OrtOpAttrType */
enum { CUDA_RESOURCES = 1, CUBLAS = 10000 + 2 }; /* version and id of a CudaResource */

/* The interface of a custom op, as onnxruntime lays it out. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const void *api, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *kernel, OrtKernelContext *);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const void *api, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
    api_function *later[6]; /* of versions that OP_VERSION does not claim */
};

/* The functions of a table. */
static inline struct ort take_functions(api_function *const *table) {
    struct ort functions, *ort = &functions;
    ORT_FUNCTIONS(TAKE)
    return functions;
}

#endif

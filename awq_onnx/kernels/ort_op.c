/* MatMulNBits as a custom op of onnxruntime: register the library with a session and its nodes run on our kernels.
 *
 * Two ops of one behaviour: com.microsoft::MatMulNBits takes the place of onnxruntime's own, and
 * awq_onnx::MatMulNBits serves the nodes that were moved there. Whatever can fail or allocates is done when a session
 * is created; what runs then launches, and nothing else, so that a CUDA graph can be captured.
 */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launch.h"
#include "ort_api.h"
#include "reference.h"

enum input { A, CODES, SCALES, ZERO_POINTS, G_IDX, BIAS, INPUTS };
enum { MOST_AXES = 16, DOMAINS = 2, TYPES = 3, PLACES = 2 };

static const char *const DOMAIN_NAMES[DOMAINS] = {"awq_onnx", "com.microsoft"};
/* Of a session's configuration: "0" where com.microsoft::MatMulNBits stays onnxruntime's; "1" once registered. */
static const char REPLACE_ENTRY[] = "awq_onnx.replace", REGISTERED_ENTRY[] = "awq_onnx.registered";
static const int TYPE_OF[TYPES] = {AWQ_FLOAT16, AWQ_BFLOAT16, AWQ_FLOAT32};
static const char CUDA_PROVIDER[] = "CUDAExecutionProvider", CPU_PROVIDER[] = "CPUExecutionProvider";

/* What `awq_configure` says. driver, folder: see awq_gpu_open; NULL: the default. */
struct configuration {
    const char *provider, *driver, *folder;
};

/* An op for activations of one type on one provider: onnxruntime takes several of one name, and picks. */
struct op {
    OrtCustomOp interface; /* first: a pointer to one is a pointer to the other */
    const struct registration *registration;
    const char *provider;
    int type;
};

/* The ops as they were registered with one onnxruntime (a process can have several) under one configuration. They
 * stay until the process ends: sessions refer to them, and nothing tells when the last one is gone. */
struct registration {
    struct registration *next;
    const void *table;
    struct ort ort;
    int infers_shapes;
    struct configuration configuration;
    struct op ops[DOMAINS][PLACES][TYPES];
    OrtCustomOpDomain *domains[DOMAINS];
};

/* A node of a session. */
struct kernel {
    const struct registration *registration;
    struct awq_weight weight;
    int computes_on_cpu;       /* by reference.c */
    const struct awq_gpu *gpu; /* NULL where it does */
    OrtAllocator *allocator;   /* of the provider's memory */
};

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static struct configuration configured = {CUDA_PROVIDER, NULL, NULL};
static struct registration *registrations = NULL;
static atomic_long calls;

/* ---- errors ---- */

static OrtStatus *failed(const struct ort *ort, const char *reason) { return ort->CreateStatus(FAIL, reason); }

/* Whether the call did what it should. */
static int done(const struct ort *ort, OrtStatus *status) {
    if (status) ort->ReleaseStatus(status);
    return !status;
}

/* "the MatMulNBits node NAME: REASON" */
static OrtStatus *refused(const struct ort *ort, const OrtKernelInfo *info, const char *reason) {
    char name[512] = "", message[2048];
    size_t bytes = sizeof name;
    if (!done(ort, ort->KernelInfo_GetNodeName(info, name, &bytes))) strcpy(name, "?");
    snprintf(message, sizeof message, "awq-onnx cannot run the MatMulNBits node '%s': %s", name, reason);
    return ort->CreateStatus(INVALID_ARGUMENT, message);
}

/* ---- what is known of a node before it runs ---- */

struct tensor {
    int given, type;
    int64_t elements; /* -1: not known */
};

static int64_t product(const int64_t *dims, size_t count) {
    int64_t elements = 1;
    for (size_t i = 0; i < count; i++) {
        if (dims[i] < 0) return -1;
        elements *= dims[i];
    }
    return elements;
}

/* An optional input that is left out has no name. */
static int is_given(const struct ort *ort, const OrtKernelInfo *info, size_t index) {
    size_t count = 0, bytes = 0;
    if (!done(ort, ort->KernelInfo_GetInputCount(info, &count)) || index >= count) return 0;
    return done(ort, ort->KernelInfo_GetInputName(info, index, NULL, &bytes)) && bytes > 1;
}

static struct tensor look_at(const struct ort *ort, const OrtKernelInfo *info, size_t index) {
    struct tensor tensor = {is_given(ort, info, index), ANY_TYPE, -1};
    OrtTypeInfo *type = NULL;
    const OrtTensorTypeAndShapeInfo *shape = NULL;
    size_t count = 0;
    int64_t dims[MOST_AXES];
    if (!tensor.given || !done(ort, ort->KernelInfo_GetInputTypeInfo(info, index, &type))) return tensor;
    if (done(ort, ort->CastTypeInfoToTensorInfo(type, &shape)) && shape) {
        done(ort, ort->GetTensorElementType(shape, &tensor.type));
        if (done(ort, ort->GetDimensionsCount(shape, &count)) && count && count <= MOST_AXES &&
            done(ort, ort->GetDimensions(shape, dims, count)))
            tensor.elements = product(dims, count);
    }
    ort->ReleaseTypeInfo(type);
    return tensor;
}

static int64_t attribute(const struct ort *ort, const OrtKernelInfo *info, const char *name, int64_t otherwise) {
    int64_t value = otherwise;
    return done(ort, ort->KernelInfoGetAttribute_int64(info, name, &value)) ? value : otherwise;
}

#define ELSE_ADOPT                                                                                                     \
    "run python -m awq_onnx.kernels adopt on the model and register with replace=False, which leaves this node to "    \
    "onnxruntime"

static const char *refusal_of_format(const struct ort *ort, const OrtKernelInfo *info) {
    const int64_t bits = attribute(ort, info, "bits", 4);
    if (bits != 4)
        return awq_sentence("its weight has %lld bits, where the kernels know 4: " ELSE_ADOPT, (long long)bits);
    if (attribute(ort, info, "weight_prepacked", 0))
        return "its weight is packed for another kernel: take the model as it was before";
    if (look_at(ort, info, G_IDX).given) return "it has the input g_idx, which the kernels do not know: " ELSE_ADOPT;
    const struct tensor zero_points = look_at(ort, info, ZERO_POINTS);
    if (zero_points.given && zero_points.type != UINT8)
        return "its zero points are not uint8, two in a byte: quantize the model with awq-onnx, or " ELSE_ADOPT;
    return NULL;
}

/* Elements that an input must have. */
static int64_t size_of_input(const struct awq_weight *weight, enum input input) {
    const int64_t G = (weight->K + weight->block_size - 1) / weight->block_size;
    switch (input) {
        case CODES: return weight->N * G * weight->block_size / 2;
        case SCALES: return weight->N * G;
        case ZERO_POINTS: return weight->N * ((G + 1) / 2);
        default: return weight->N;
    }
}

static const char *refusal_of_tensors(const struct ort *ort, const OrtKernelInfo *info,
                                      const struct awq_weight *weight) {
    const struct {
        enum input input;
        const char *name;
        int type;
    } wanted[] = {{CODES, "codes B", UINT8},
                  {SCALES, "scales", weight->type},
                  {ZERO_POINTS, "zero points", UINT8},
                  {BIAS, "bias", weight->type}};
    for (int i = 0; i < 4; i++) {
        const struct tensor tensor = look_at(ort, info, wanted[i].input);
        const int64_t size = size_of_input(weight, wanted[i].input);
        if (!tensor.given) continue;
        if (tensor.type != wanted[i].type)
            return awq_sentence("its %s are not of %s: the model is broken", wanted[i].name,
                                wanted[i].type == UINT8 ? "uint8" : "the type that A has");
        if (tensor.elements < 0)
            return awq_sentence("the shape of its %s is not known before it runs: make them constants", wanted[i].name);
        if (tensor.elements != size)
            return awq_sentence("its %s are %lld numbers, where N, K and block_size make %lld: the model is broken",
                                wanted[i].name, (long long)tensor.elements, (long long)size);
    }
    return NULL;
}

static const char *refusal(const struct ort *ort, const OrtKernelInfo *info, const struct awq_weight *weight) {
    const char *reason = refusal_of_format(ort, info);
    if (!reason) reason = awq_refusal(weight);
    return reason ? reason : refusal_of_tensors(ort, info, weight);
}

/* ---- a node of a session ---- */

static int is_cuda(const struct registration *registration) {
    return !strcmp(registration->configuration.provider, CUDA_PROVIDER);
}

static void destroy_kernel(void *opaque) {
    struct kernel *kernel = opaque;
    if (kernel && kernel->allocator) kernel->registration->ort.ReleaseAllocator(kernel->allocator);
    free(kernel);
}

/* Loads what runs it, so that nothing is left to do then. */
static OrtStatus *open_kernel(struct kernel *kernel, const OrtKernelInfo *info) {
    const struct ort *ort = &kernel->registration->ort;
    const struct configuration *configuration = &kernel->registration->configuration;
    if (kernel->computes_on_cpu) return NULL;
    const char *error = NULL;
    kernel->gpu = awq_gpu_open(configuration->driver, configuration->folder, &error);
    if (!kernel->gpu) return refused(ort, info, error);
    return ort->KernelInfoGetAllocator(info, DEFAULT_MEMORY, &kernel->allocator);
}

static OrtStatus *create_kernel(const OrtCustomOp *interface, const void *api, const OrtKernelInfo *info,
                                void **created) {
    (void)api;
    const struct op *op = (const struct op *)interface;
    const struct ort *ort = &op->registration->ort;
    if (strcmp(op->provider, op->registration->configuration.provider))
        return refused(ort, info,
                       "the kernels were registered for CUDA, and the session runs it on the CPU: create it "
                       "with providers=['CUDAExecutionProvider'], or do not register them");
    struct kernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return failed(ort, "awq-onnx: there is no memory left");
    kernel->registration = op->registration;
    kernel->computes_on_cpu = !is_cuda(op->registration) && !op->registration->configuration.driver;
    kernel->weight.N = attribute(ort, info, "N", 0);
    kernel->weight.K = attribute(ort, info, "K", 0);
    kernel->weight.block_size = attribute(ort, info, "block_size", 0);
    kernel->weight.type = op->type;
    const char *reason = refusal(ort, info, &kernel->weight);
    OrtStatus *status = reason ? refused(ort, info, reason) : open_kernel(kernel, info);
    if (status) destroy_kernel(kernel);
    else *created = kernel;
    return status;
}

/* The rows of an input (…, K), and its shape with N in the place of K. */
static OrtStatus *shape_of_output(const struct kernel *kernel, const OrtValue *a, int64_t *dims, size_t *count,
                                  int64_t *M) {
    const struct ort *ort = &kernel->registration->ort;
    OrtTensorTypeAndShapeInfo *shape = NULL;
    OrtStatus *status = ort->GetTensorTypeAndShape(a, &shape);
    if (!status) status = ort->GetDimensionsCount(shape, count);
    if (!status && (*count < 1 || *count > MOST_AXES)) status = failed(ort, "awq-onnx: A has no axis, or too many");
    if (!status) status = ort->GetDimensions(shape, dims, *count);
    if (!status && dims[*count - 1] != kernel->weight.K)
        status = failed(ort, awq_sentence("awq-onnx: the rows of A have %lld numbers, not the %lld of attribute K",
                                          (long long)dims[*count - 1], (long long)kernel->weight.K));
    if (shape) ort->ReleaseTensorTypeAndShapeInfo(shape);
    if (status) return status;
    *M = product(dims, *count - 1);
    dims[*count - 1] = kernel->weight.N;
    return NULL;
}

/* Where an input's numbers are; NULL where it is left out. */
static OrtStatus *data_of_input(const struct ort *ort, const OrtKernelContext *context, size_t index,
                                const void **data) {
    size_t count = 0;
    const OrtValue *value = NULL;
    *data = NULL;
    OrtStatus *status = ort->KernelContext_GetInputCount(context, &count);
    if (status || index >= count) return status;
    status = ort->KernelContext_GetInput(context, index, &value);
    return status || !value ? status : ort->GetTensorMutableData((OrtValue *)value, (void **)data);
}

static OrtStatus *tensors_of_call(const struct kernel *kernel, OrtKernelContext *context, struct awq_call *call) {
    const struct ort *ort = &kernel->registration->ort;
    int64_t dims[MOST_AXES];
    size_t count = 0;
    const OrtValue *a = NULL;
    OrtValue *y = NULL;
    OrtStatus *status = ort->KernelContext_GetInput(context, A, &a);
    if (!status) status = shape_of_output(kernel, a, dims, &count, &call->M);
    if (!status) status = data_of_input(ort, context, A, &call->a);
    if (!status) status = data_of_input(ort, context, CODES, &call->codes);
    if (!status) status = data_of_input(ort, context, SCALES, &call->scales);
    if (!status) status = data_of_input(ort, context, ZERO_POINTS, &call->zero_points);
    if (!status) status = data_of_input(ort, context, BIAS, &call->bias);
    if (!status) status = ort->KernelContext_GetOutput(context, 0, dims, count, &y);
    return status ? status : ort->GetTensorMutableData(y, &call->y);
}

/* Scratch comes from the provider's pool, which on CUDA knows on which stream it is used: another one gets it only
 * after that. It goes back as soon as all is launched. */
static OrtStatus *take_workspace(const struct kernel *kernel, OrtKernelContext *context, size_t bytes, void **memory) {
    const struct ort *ort = &kernel->registration->ort;
    const OrtMemoryInfo *where = NULL;
    if (!bytes) return NULL;
    if (!is_cuda(kernel->registration)) return ort->AllocatorAlloc(kernel->allocator, bytes, memory);
    OrtStatus *status = ort->AllocatorGetInfo(kernel->allocator, &where);
    return status ? status : ort->KernelContext_GetScratchBuffer(context, where, bytes, memory);
}

static OrtStatus *compute_on_gpu(const struct kernel *kernel, OrtKernelContext *context, struct awq_call *call) {
    const struct ort *ort = &kernel->registration->ort;
    OrtStatus *status = NULL;
    if (is_cuda(kernel->registration)) {
        status = ort->KernelContext_GetGPUComputeStream(context, &call->stream);
        if (!status && !done(ort, ort->KernelContext_GetResource(context, CUDA_RESOURCES, CUBLAS, &call->cublas)))
            call->cublas = NULL;
    }
    if (!status) {
        call->workspace_bytes = awq_workspace_bytes(kernel->gpu, &kernel->weight, call->M, call->cublas != NULL);
        status = take_workspace(kernel, context, call->workspace_bytes, &call->workspace);
    }
    const char *error = status ? NULL : awq_matmul_nbits(kernel->gpu, &kernel->weight, call);
    if (error) status = failed(ort, error);
    if (call->workspace && !done(ort, ort->AllocatorFree(kernel->allocator, call->workspace)) && !status)
        status = failed(ort, "awq-onnx: onnxruntime does not take its scratch memory back");
    return status;
}

static OrtStatus *compute(void *opaque, OrtKernelContext *context) {
    const struct kernel *kernel = opaque;
    struct awq_call call = {0};
    OrtStatus *status = tensors_of_call(kernel, context, &call);
    if (status) return status;
    atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
    if (call.M == 0) return NULL;
    if (!kernel->computes_on_cpu) return compute_on_gpu(kernel, context, &call);
    const char *error = awq_reference(&kernel->weight, &call);
    return error ? failed(&kernel->registration->ort, error) : NULL;
}

/* ---- the shape of the output, before it runs ---- */

/* The shape of A, its last axis N long: what onnxruntime knows of its own op, so that it plans memory as well. */
static OrtStatus *set_shape(const struct ort *ort, OrtShapeInferContext *context, int64_t *dims, const char **names,
                            size_t count, int type) {
    OrtTensorTypeAndShapeInfo *shape = NULL;
    OrtStatus *status = ort->CreateTensorTypeAndShapeInfo(&shape);
    if (!status) status = ort->SetTensorElementType(shape, type);
    if (!status) status = ort->SetDimensions(shape, dims, count);
    if (!status) status = ort->SetSymbolicDimensions(shape, names, count);
    if (!status) status = ort->ShapeInferContext_SetOutputTypeShape(context, 0, shape);
    if (shape) ort->ReleaseTensorTypeAndShapeInfo(shape);
    return status;
}

static OrtStatus *infer_shape(const OrtCustomOp *interface, OrtShapeInferContext *context) {
    const struct ort *ort = &((const struct op *)interface)->registration->ort;
    OrtTensorTypeAndShapeInfo *a = NULL; /* belongs to the context */
    const OrtOpAttr *attribute = NULL;
    int64_t N = 0, dims[MOST_AXES];
    int type = ANY_TYPE; /* of A, which need not be that of the op: onnxruntime asks one of them for all */
    const char *names[MOST_AXES];
    size_t count = 0, bytes;
    const int known = done(ort, ort->ShapeInferContext_GetAttribute(context, "N", &attribute)) &&
                      done(ort, ort->ReadOpAttr(attribute, INTEGER_ATTRIBUTE, &N, sizeof N, &bytes)) &&
                      done(ort, ort->ShapeInferContext_GetInputTypeShape(context, A, &a)) &&
                      done(ort, ort->GetTensorElementType(a, &type)) && done(ort, ort->GetDimensionsCount(a, &count)) &&
                      count >= 1 && count <= MOST_AXES && done(ort, ort->GetDimensions(a, dims, count)) &&
                      done(ort, ort->GetSymbolicDimensions(a, names, count));
    if (!known) return NULL;               /* it is known when it runs */
    for (size_t i = 0; i + 1 < count; i++) /* there is no way to say that an axis is unknown and has no name */
        if (dims[i] < 0 && !*names[i]) return NULL;
    dims[count - 1] = N;
    names[count - 1] = "";
    return set_shape(ort, context, dims, names, count, type);
}

/* ---- the interface of the ops ---- */

static const char *name_of(const OrtCustomOp *op) {
    (void)op;
    return "MatMulNBits";
}

static const char *provider_of(const OrtCustomOp *op) { return ((const struct op *)op)->provider; }

static size_t input_count(const OrtCustomOp *op) {
    (void)op;
    return INPUTS;
}

static size_t output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

/* By A the op is picked. Others are let in with any type, to be refused with a reason. */
static int type_of_input(const OrtCustomOp *op, size_t index) {
    return index == A ? ((const struct op *)op)->type : ANY_TYPE;
}

static int type_of_output(const OrtCustomOp *op, size_t index) {
    (void)index;
    return ((const struct op *)op)->type;
}

static int need_of_input(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index > SCALES ? OPTIONAL : REQUIRED;
}

static int need_of_output(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return REQUIRED;
}

static int memory_of_input(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return DEFAULT_MEMORY;
}

static void fill(struct op *op, const struct registration *registration, const char *provider, int type) {
    op->registration = registration;
    op->provider = provider;
    op->type = type;
    op->interface = (OrtCustomOp){.version = OP_VERSION,
                                  .GetName = name_of,
                                  .GetExecutionProviderType = provider_of,
                                  .GetInputType = type_of_input,
                                  .GetInputTypeCount = input_count,
                                  .GetOutputType = type_of_output,
                                  .GetOutputTypeCount = output_count,
                                  .KernelDestroy = destroy_kernel,
                                  .GetInputCharacteristic = need_of_input,
                                  .GetOutputCharacteristic = need_of_output,
                                  .GetInputMemoryType = memory_of_input,
                                  .CreateKernelV2 = create_kernel,
                                  .KernelComputeV2 = compute,
                                  .InferOutputShapeFn = registration->infers_shapes ? infer_shape : NULL};
}

/* ---- registration ---- */

static int same(const char *a, const char *b) { return a == b || (a && b && !strcmp(a, b)); }

static int is_for(const struct registration *registration, const void *table, const struct configuration *wanted) {
    const struct configuration *is = &registration->configuration;
    return registration->table == table && same(is->provider, wanted->provider) && same(is->driver, wanted->driver) &&
           same(is->folder, wanted->folder);
}

/* On the CPU too where the kernels are for CUDA: a node that ends up there is refused in words of ours. */
static OrtStatus *fill_domain(struct registration *registration, int domain) {
    static const char *const PROVIDERS[PLACES] = {CPU_PROVIDER, CUDA_PROVIDER};
    const struct ort *ort = &registration->ort;
    const int places = is_cuda(registration) ? PLACES : 1;
    OrtStatus *status = ort->CreateCustomOpDomain(DOMAIN_NAMES[domain], &registration->domains[domain]);
    for (int i = 0; i < places * TYPES && !status; i++) {
        struct op *op = &registration->ops[domain][i / TYPES][i % TYPES];
        fill(op, registration, PROVIDERS[i / TYPES], TYPE_OF[i % TYPES]);
        status = ort->CustomOpDomain_Add(registration->domains[domain], &op->interface);
    }
    return status;
}

static void remove_registration(struct registration *registration) {
    for (int domain = 0; domain < DOMAINS; domain++)
        if (registration->domains[domain]) registration->ort.ReleaseCustomOpDomain(registration->domains[domain]);
    free(registration);
}

/* Earlier versions crash while they ask for shapes, where an input that may be left out is. */
static int infers_shapes(const char *version) {
    int major = 0, minor = 0;
    return sscanf(version, "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 24);
}

static OrtStatus *add_registration(const OrtApiBase *base, api_function *const *table, const struct ort *ort) {
    struct registration *made = calloc(1, sizeof *made);
    if (!made) return failed(ort, "awq-onnx: there is no memory left");
    made->table = table;
    made->ort = *ort;
    made->infers_shapes = infers_shapes(base->GetVersionString());
    made->configuration = configured;
    OrtStatus *status = NULL;
    for (int domain = 0; domain < DOMAINS && !status; domain++) status = fill_domain(made, domain);
    if (status) {
        remove_registration(made);
        return status;
    }
    made->next = registrations;
    registrations = made;
    return NULL;
}

/* Whether an entry of the session's configuration is there, and so. */
static int entry_is(const struct ort *ort, const OrtSessionOptions *options, const char *entry, const char *value) {
    char found[8] = "";
    size_t bytes = sizeof found;
    return done(ort, ort->GetSessionConfigEntry(options, entry, found, &bytes)) && !strcmp(found, value);
}

/* The folder of this library, as it is found from anywhere. From then on the library stays: what it has loaded onto a
 * GPU would be loaded once more for every session otherwise. */
static const char *own_folder(void) {
    static char *folder = NULL;
    Dl_info library;
    if (folder || !dladdr((const void *)&registrations, &library)) return folder;
    dlopen(library.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    folder = realpath(library.dli_fname, NULL);
    if (folder && strrchr(folder, '/')) *strrchr(folder, '/') = 0;
    return folder;
}

static OrtStatus *register_ops(OrtSessionOptions *options, const OrtApiBase *base, api_function *const *table,
                               const struct ort *ort) {
    if (entry_is(ort, options, REGISTERED_ENTRY, "1"))
        return failed(ort, "awq-onnx's kernels are registered with these session options already: make new ones");
    const char *beside = own_folder();
    if (!configured.folder && !(configured.folder = beside))
        return failed(ort, "awq-onnx: the folder of the kernels' library is not found");
    const struct registration *found = registrations;
    while (found && !is_for(found, table, &configured)) found = found->next;
    OrtStatus *status = found ? NULL : add_registration(base, table, ort);
    if (!found) found = registrations;
    const int count = entry_is(ort, options, REPLACE_ENTRY, "0") ? 1 : DOMAINS;
    for (int domain = 0; domain < count && !status; domain++)
        status = ort->AddCustomOpDomain(options, found->domains[domain]);
    return status ? status : ort->AddSessionConfigEntry(options, REGISTERED_ENTRY, "1");
}

static OrtStatus *too_old(const OrtApiBase *base) {
    const struct ort ort = {.CreateStatus = (OrtStatus * (*)(int, const char *)) base->GetApi(OLDEST_API)[0]};
    return failed(&ort, awq_sentence("awq-onnx's kernels need onnxruntime 1.%d or later, this is %s", API_VERSION,
                                     base->GetVersionString()));
}

/* What onnxruntime calls. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    api_function *const *table = base->GetApi(API_VERSION);
    if (!table) return too_old(base);
    const struct ort ort = take_functions(table);
    pthread_mutex_lock(&one_at_a_time);
    OrtStatus *status = register_ops(options, base, table, &ort);
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

static const char *copy(const char *text, int *ok) {
    char *copied = text ? strdup(text) : NULL;
    if (text && !copied) *ok = 0;
    return copied;
}

/* How the next sessions run the ops; those that are there are not changed.
 *
 * provider: CUDAExecutionProvider, which is so without this call, or CPUExecutionProvider. driver: a library in the
 * place of CUDA's; NULL: the system's, and on the CPU reference.c computes. folder: where the kernels' machine code
 * lies; NULL: beside this library. Returns NULL, or a sentence. */
const char *awq_configure(const char *provider, const char *driver, const char *folder);
const char *awq_configure(const char *provider, const char *driver, const char *folder) {
    int ok = 1;
    const char *known = !provider || same(provider, CUDA_PROVIDER) ? CUDA_PROVIDER : CPU_PROVIDER;
    if (provider && !same(provider, known)) return awq_sentence("there are no kernels for %s", provider);
    /* Copies are never freed: registrations go on using them. They are few and short. */
    const struct configuration next = {known, copy(driver, &ok), copy(folder, &ok)};
    if (!ok) return "there is no memory left";
    pthread_mutex_lock(&one_at_a_time);
    configured = next;
    pthread_mutex_unlock(&one_at_a_time);
    return NULL;
}

/* How often nodes have run on these kernels since the process began. */
long awq_calls(void);
long awq_calls(void) { return atomic_load_explicit(&calls, memory_order_relaxed); }

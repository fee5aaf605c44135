// The functions of CUDA's driver that launch.c opens, and cuBLAS' one, over the machine of machine.h. Pointers of the
// device are pointers of the host. Built as a library, with the kernels' own source in it.
#include <matmul_nbits.cu>

namespace {

const int SUCCESS = 0, NOT_FOUND = 500, INVALID = 1;
const int MULTIPROCESSORS = 4, BLOCKS = 2;  // few, so that blocks of a small test go on to further tiles
const size_t SHARED_BYTES = 227 << 10;

std::vector<std::string> launches;  // names, in order

float element(const void *matrix, int type, size_t at) {
    if (type == 0) return static_cast<const float *>(matrix)[at];
    const u16 bits = static_cast<const u16 *>(matrix)[at];
    return type == 2 ? Half::wide(bits) : Bfloat::wide(bits);
}

void put(void *matrix, int type, size_t at, float value) {
    if (type == 0) static_cast<float *>(matrix)[at] = value;
    else static_cast<u16 *>(matrix)[at] = type == 2 ? Half::narrow(value) : Bfloat::narrow(value);
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return SUCCESS; }
int cuCtxGetCurrent(void **context) { return *context = &launches, SUCCESS; }
int cuCtxSetCurrent(void *) { return SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
int cuDeviceGet(int *device, int) { return *device = 0, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &launches, SUCCESS; }

int cuGetErrorString(int, const char **text) { return *text = "the emulated driver says no", SUCCESS; }

int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
        case 16: return *value = MULTIPROCESSORS, SUCCESS;
        case 75: return *value = 9, SUCCESS;
        case 76: return *value = 0, SUCCESS;
        case 97: return *value = static_cast<int>(SHARED_BYTES), SUCCESS;
        default: return INVALID;
    }
}

int cuModuleLoadData(void **module, const void *image) {
    *module = &launches;
    return std::strcmp(static_cast<const char *>(image), "broken") ? SUCCESS : INVALID;
}

int cuModuleGetFunction(void **function, void *, const char *name) {
    const auto found = machine::kernels().find(name);
    if (found == machine::kernels().end()) return NOT_FOUND;
    *function = &*found;
    return SUCCESS;
}

int cuFuncSetAttribute(void *, int attribute, int value) {
    return attribute == 8 && value <= static_cast<int>(SHARED_BYTES) ? SUCCESS : INVALID;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *, int, size_t) { return *blocks = BLOCKS, SUCCESS; }

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void *, void **arguments, void **) {
    const auto &named = *static_cast<std::pair<const std::string, machine::Call> *>(function);
    if (!grid_x || grid_y - 1 > 65534 || grid_z - 1 > 65534 || block_x * block_y * block_z > 1024 ||
        shared_bytes > SHARED_BYTES)
        return INVALID;
    launches.push_back(named.first);
    machine::launch({grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes,
                    [&] { named.second(arguments); });
    return SUCCESS;
}

// C = op(A) op(B), column-major, as cuBLAS has it: the one case that is asked for, A transposed and B not.
int cublasGemmEx(void *, int transpose_a, int transpose_b, int m, int n, int k, const void *, const void *a, int type_a,
                 int lda, const void *b, int type_b, int ldb, const void *, void *c, int, int ldc, int, int) {
    if (transpose_a != 1 || transpose_b != 0) return INVALID;
    launches.push_back("cublas");
    for (int column = 0; column < n; column++)
        for (int row = 0; row < m; row++) {
            float sum = 0;
            for (int i = 0; i < k; i++)
                sum += element(a, type_a, static_cast<size_t>(row) * lda + i) *
                       element(b, type_b, static_cast<size_t>(column) * ldb + i);
            put(c, type_a, static_cast<size_t>(column) * ldc + row, sum);
        }
    return SUCCESS;
}

// For tests: what ran since the last call, names between spaces.
const char *emulated_launches() {
    static std::string names;
    names.clear();
    for (const auto &one : launches) names += one + " ";
    launches.clear();
    return names.c_str();
}

}  // extern "C"

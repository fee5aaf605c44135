// The kernels of awq_onnx/kernels/arrays.py on the processor: on the machine of emulator/machine.h.
#include "emulator/machine.h"

#include <cmath>

#define __global__
#define __shared__ static  // one block runs at a time; it starts with what the one before left
#define __launch_bounds__(...)
#define threadIdx (machine::block->running->index)
#define blockIdx (machine::block->index)
#define blockDim (machine::block->dimension)
#define gridDim (machine::block->grid)
#define __syncthreads() machine::meet_block()

using std::min;

// Names of one source mean nothing in another.
namespace compensate {
#include <compensate.cu>
const machine::Registration registered("round_channels", round_channels);
}  // namespace compensate

namespace cholesky {
#include <cholesky.cu>
const machine::Registration registered("factor_block", factor_block);
}  // namespace cholesky

// 0, or 1 where there is no kernel of that name. Pointers of the device are pointers of the host.
extern "C" int launch_on_cpu(const char *name, unsigned blocks, unsigned threads, void **arguments) {
    const auto found = machine::kernels().find(name);
    if (found == machine::kernels().end()) return 1;
    machine::launch({blocks, 1, 1}, {threads, 1, 1}, 0, [&] { found->second(arguments); });
    return 0;
}

// Rounding that makes up for itself, for one block of channels: awq_onnx/compensate.py says what, and its loop in numpy
// is the specification. There, every channel is a few small calls; here the whole block is one.
//
// Columns do not depend on each other: each is a thread's own, channels go from the last to the first. FEW of them are
// kept in registers. What the later channels of the block ask of those is summed up first, from their errors in shared
// memory; then each one's error is taken off those before it. FEW is FEW_ROWS there, so that sums are over the same.
//
// Shapes: K in, n out, G blocks of b. No includes. Compiled without contraction: `fmaf` is where one rounding is meant.

constexpr int ROWS = 128;    // channels of a call, at most
constexpr int FEW = 16;      // channels in registers
constexpr int COLUMNS = 64;  // of a block of threads: what it is launched with

struct Channel {
    float target, wanted, scale, lowest, highest;
    long long at;  // of its code
};

// Channels start .. stop - 1, in the order of `feedback`; at most ROWS of them, in ceil(n / COLUMNS) blocks of threads.
//
// feedback (K, K): below its diagonal, row j, column i: how much of the error of channel j is taken off channel i.
// order (K,): where each channel's codes belong. wanted (K, n): the weights in this order. targets (stop - start, n):
// the same of these channels, less what the errors of later blocks ask for. scales, zero_points (G, n).
// Written are rows start .. stop - 1 of errors (K, n), and their rows of codes (G * b, n), less zero points.
extern "C" __global__ void __launch_bounds__(COLUMNS)
    round_channels(const float *__restrict__ feedback, const long long *__restrict__ order,
                   const float *__restrict__ wanted, const float *__restrict__ targets,
                   const float *__restrict__ scales, const float *__restrict__ zero_points, float largest_code,
                   int block_size, int K, int n, int start, int stop, float *__restrict__ errors,
                   float *__restrict__ codes) {
    __shared__ float asked[ROWS * FEW];      // row j, column i: of channel `first` + j by channel `first` + i
    __shared__ float known[ROWS * COLUMNS];  // errors of this block of channels
    const int count = stop - start, lane = threadIdx.x;
    const long long column = (long long)blockIdx.x * COLUMNS + lane;

    for (int first = (count - 1) / FEW * FEW; first >= 0; first -= FEW) {
        const int few = min(FEW, count - first);
        __syncthreads();  // all have read what was asked before
        for (int at = lane; at < (count - first) * FEW; at += COLUMNS) {
            const long long j = start + first + at / FEW, i = start + first + at % FEW;
            asked[at] = i < j ? feedback[j * K + i] : 0.0f;
        }
        __syncthreads();
        if (column >= n) continue;

        Channel some[FEW];
        float sums[FEW] = {};
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            if (i < few) {
                const int at = start + first + i;
                const long long channel = order[at], cell = channel / block_size * n + column;
                const float zero_point = zero_points[cell];
                some[i] = {targets[(long long)(first + i) * n + column],
                           wanted[(long long)at * n + column],
                           scales[cell],
                           -zero_point,
                           largest_code - zero_point,
                           channel * n + column};
            }
        }
        for (int j = FEW; j < count - first; j++) {
            const float error = known[(first + j) * COLUMNS + lane];
#pragma unroll
            for (int i = 0; i < FEW; i++) sums[i] = fmaf(asked[j * FEW + i], error, sums[i]);
        }
#pragma unroll
        for (int i = 0; i < FEW; i++) some[i].target -= sums[i];
#pragma unroll
        for (int i = FEW - 1; i >= 0; i--) {
            if (i < few) {
                const float nearest = rintf(some[i].target * (1.0f / some[i].scale));
                const float code = fminf(fmaxf(nearest, some[i].lowest), some[i].highest);
                const float error = code * some[i].scale - some[i].wanted;
                codes[some[i].at] = code;
                errors[(long long)(start + first + i) * n + column] = error;
                known[(first + i) * COLUMNS + lane] = error;
#pragma unroll
                for (int before = 0; before < i; before++) some[before].target -= asked[i * FEW + before] * error;
            }
        }
    }
}

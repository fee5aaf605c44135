// The simple kernels: any shape, one thought each.
#pragma once

namespace plain {

// The eight codes of a word, each less the zero point of its block, times its scale, in float32.
template <class T>
DEVICE void dequantize_word(const awq_params &p, float (&w)[8], int n, int word) {
    const int block = 8 * word >> p.block_shift;
    const float scale = T::wide(p.scales[static_cast<u64>(n) * p.G + block]);
    const u32 zero_point =
        p.zero_points ? zero_point_of(p.zero_points + static_cast<u64>(n) * p.zero_point_stride, block) : 8u;
    const u32 codes = reinterpret_cast<const u32 *>(p.codes + static_cast<u64>(n) * (p.padded_K / 2))[word];
#pragma unroll
    for (int i = 0; i < 8; i++)
        w[i] = scale * static_cast<float>(static_cast<int>(codes >> 4 * i & 15u) - static_cast<int>(zero_point));
}

// Output n for TOKENS rows of `a`, made by a warp.
template <class T, int TOKENS>
DEVICE void make_outputs(const awq_params &p, int first_m, int n, int lane) {
    float sums[TOKENS] = {};
    for (int word = lane; 8 * word < p.K; word += 32) {
        float w[8];
        dequantize_word<T>(p, w, n, word);
#pragma unroll
        for (int j = 0; j < TOKENS; j++) {
            const Words4 x = activations(p, first_m + j, 8 * word);
#pragma unroll
            for (int i = 0; i < 8; i++) sums[j] += w[i] * T::wide(static_cast<u16>(x.word[i / 2] >> 16 * (i % 2)));
        }
    }
#pragma unroll
    for (int j = 0; j < TOKENS; j++) {
        const float sum = sum_of_warp(sums[j]);
        if (lane == 0 && first_m + j < p.M)
            p.y[static_cast<u64>(first_m + j) * p.N + n] = T::narrow(p.bias ? sum + T::wide(p.bias[n]) : sum);
    }
}

// y = a W', an output for each warp: for what the others are not made for, and to compare with.
template <class T>
DEVICE void multiply(const awq_params &p) {
    const int TOKENS = 4, n = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (n >= p.N) return;
    for (int m = blockIdx.y * TOKENS; m < p.M; m += gridDim.y * TOKENS)
        make_outputs<T, TOKENS>(p, m, n, threadIdx.x % 32);
}

// The weight (N, K) itself, to y: a thread makes eight inputs of one row.
template <class T>
DEVICE void dequantize(const awq_params &p) {
    const int word = blockIdx.y * blockDim.x + threadIdx.x, n = blockIdx.x, k = 8 * word;
    if (k >= p.K) return;
    float w[8];
    dequantize_word<T>(p, w, n, word);
    u16 *to = p.y + static_cast<u64>(n) * p.K + k;
    Words4 packed = {{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < 8; i++) packed.word[i / 2] |= static_cast<u32>(T::narrow(w[i])) << 16 * (i % 2);
    if (p.aligned) {
        *reinterpret_cast<Words4 *>(to) = packed;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (k + i < p.K) to[i] = static_cast<u16>(packed.word[i / 2] >> 16 * (i % 2));
}

// y = the sums over the parts of K, in order, plus the bias: an element for a thread.
template <class T>
DEVICE void sum_splits(const awq_params &p) {
    const u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x, size = static_cast<u64>(p.M) * p.N;
    if (at >= size) return;
    float sum = p.bias ? T::wide(p.bias[at % p.N]) : 0;
    for (int split = 0; split < p.splits; split++) sum += p.partial[split * size + at];
    p.y[at] = T::narrow(sum);
}

// y += bias.
template <class T>
DEVICE void add_bias(const awq_params &p) {
    const u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < static_cast<u64>(p.M) * p.N) p.y[at] = T::narrow(T::wide(p.y[at]) + T::wide(p.bias[at % p.N]));
}

}  // namespace plain

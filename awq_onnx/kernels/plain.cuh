// The simple kernels: any shape, one thought each.
#pragma once

namespace plain {

// float32, which only these kernels know.
struct Single {
    static DEVICE float wide(float value) { return value; }
    static DEVICE float narrow(float value) { return value; }
};

// What a number takes in memory; in params.h all are of 16 bits.
template <class T>
struct Stored {
    typedef u16 type;
};
template <>
struct Stored<Single> {
    typedef float type;
};

template <class T>
DEVICE float number(const u16 *numbers, u64 at) {
    return T::wide(reinterpret_cast<const typename Stored<T>::type *>(numbers)[at]);
}

template <class T>
DEVICE void put(u16 *numbers, u64 at, float value) {
    reinterpret_cast<typename Stored<T>::type *>(numbers)[at] = T::narrow(value);
}

// Eight inputs of row m of `a` from input k on, zeros beyond M and K.
template <class T>
DEVICE void load(const awq_params &p, float (&x)[8], int m, int k) {
    if constexpr (sizeof(typename Stored<T>::type) == sizeof(u16)) {
        const Words4 read = activations(p, m, k);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = T::wide(static_cast<u16>(read.word[i / 2] >> 16 * (i % 2)));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = m < p.M && k + i < p.K ? number<T>(p.a, static_cast<u64>(m) * p.K + k + i) : 0;
    }
}

// The eight codes of a word, each less the zero point of its block, times its scale, in float32.
template <class T>
DEVICE void dequantize_word(const awq_params &p, float (&w)[8], int n, int word) {
    const int block = 8 * word >> p.block_shift;
    const float scale = number<T>(p.scales, static_cast<u64>(n) * p.G + block);
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
            float x[8];
            load<T>(p, x, first_m + j, 8 * word);
#pragma unroll
            for (int i = 0; i < 8; i++) sums[j] += w[i] * x[i];
        }
    }
#pragma unroll
    for (int j = 0; j < TOKENS; j++) {
        const float sum = sum_of_warp(sums[j]);
        if (lane == 0 && first_m + j < p.M)
            put<T>(p.y, static_cast<u64>(first_m + j) * p.N + n, p.bias ? sum + number<T>(p.bias, n) : sum);
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
    const u64 at = static_cast<u64>(n) * p.K + k;
    if (sizeof(typename Stored<T>::type) == sizeof(u16) && p.aligned) {
        Words4 packed = {{0, 0, 0, 0}};
#pragma unroll
        for (int i = 0; i < 8; i++) packed.word[i / 2] |= static_cast<u32>(T::narrow(w[i])) << 16 * (i % 2);
        *reinterpret_cast<Words4 *>(p.y + at) = packed;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (k + i < p.K) put<T>(p.y, at + i, w[i]);
}

// y = the sums over the parts of K, in order, plus the bias: an element for a thread.
template <class T>
DEVICE void sum_splits(const awq_params &p) {
    const u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x, size = static_cast<u64>(p.M) * p.N;
    if (at >= size) return;
    float sum = p.bias ? number<T>(p.bias, at % p.N) : 0;
    for (int split = 0; split < p.splits; split++) sum += p.partial[split * size + at];
    put<T>(p.y, at, sum);
}

// y += bias.
template <class T>
DEVICE void add_bias(const awq_params &p) {
    const u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < static_cast<u64>(p.M) * p.N) put<T>(p.y, at, number<T>(p.y, at) + number<T>(p.bias, at % p.N));
}

}  // namespace plain

// The functions of awq_onnx/kernels/primitives.cuh on the CPU, see machine.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <tuple>

#include "machine.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE inline
#define KERNEL(name, threads, blocks)                                                                                  \
    void name(const awq_params p);                                                                                     \
    static const machine::Registration registered_##name(#name, name);                                                 \
    void name(const awq_params p)
#define threadIdx (machine::block->running->index)
#define blockIdx (machine::block->index)
#define blockDim (machine::block->dimension)
#define gridDim (machine::block->grid)

using std::min;

template <int WORDS>
struct alignas(4 * WORDS) Pack {
    u32 word[WORDS];
};
typedef Pack<4> Words4;

inline u8 *shared_memory() {
    return reinterpret_cast<u8 *>((reinterpret_cast<uintptr_t>(machine::block->shared.data()) + 15) / 16 * 16);
}

inline void copy_16(void *to, const void *from, int bytes) { machine::copy(to, from, 16, bytes); }
inline void copy_8(void *to, const void *from) { machine::copy(to, from, 8, 8); }
inline void copy_4(void *to, const void *from, int bytes) { machine::copy(to, from, 4, bytes); }
inline void close_group_of_copies() { machine::close_group(); }

template <int YOUNGEST>
void wait_for_copies() {
    machine::land_all_but(YOUNGEST);
}

inline void warp_barrier() { machine::meet(machine::warp().barrier, machine::warp().size); }
inline void block_barrier() { machine::meet_block(); }

inline Words4 load_16(const void *from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    return *static_cast<const Words4 *>(from);
}

inline u32 select_bytes(u32 low, u32 high, u32 which) {
    const u64 both = static_cast<u64>(high) << 32 | low;
    u32 selected = 0;
    for (int i = 0; i < 4; i++) selected |= static_cast<u32>(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return selected;
}

inline u32 right(u32 low, u32 high, u32 bits) {
    if (bits > 31) std::abort();
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> bits);
}

template <u32 MASK, u32 BITS>
u32 bits_under(u32 word) {
    return (word & MASK) | BITS;
}

inline float sum_of_warp(float value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        u32 bits;
        std::memcpy(&bits, &value, 4);
        const auto shown = machine::exchange(&bits, 1);
        float other;
        std::memcpy(&other, &shown[machine::lane() ^ distance][0], 4);
        value += other;
    }
    return value;
}

// `T` as in the file that this one replaces; here only the bits of one number differ.
template <class T>
struct Pairs {
    static u32 multiply_add(u32 x, u32 y, u32 z) {
        u32 sum = 0;
        for (int i = 0; i < 32; i += 16)
            sum |=
                static_cast<u32>(T::rounded(static_cast<double>(T::wide(x >> i)) * T::wide(y >> i) + T::wide(z >> i)))
                << i;
        return sum;
    }
    static u32 multiply(u32 x, u32 y) { return multiply_add(x, y, 0x80008000u); }
    static void multiply_tiles(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
        const auto shown = machine::exchange(mine, 6);
        const int g = machine::lane() / 4, t = machine::lane() % 4;
        for (int i = 0; i < 4; i++) {
            const int low = i / 2, column = 2 * t + i % 2;
            for (int k = 0; k < 16; k++) {
                const u32 left = shown[4 * g + k % 8 / 2][k / 8 * 2 + low] >> 16 * (k % 2);
                const u32 right = shown[4 * column + k % 8 / 2][4 + k / 8] >> 16 * (k % 2);
                sums[i] += T::wide(left) * T::wide(right);
            }
        }
    }
};

struct Half : Pairs<Half> {
    static float wide(u16 bits) {
        _Float16 value;
        std::memcpy(&value, &bits, 2);
        return value;
    }
    static u16 rounded(double exact) {
        const _Float16 value = exact;
        u16 bits;
        std::memcpy(&bits, &value, 2);
        return bits;
    }
    static u16 narrow(float value) { return rounded(value); }
};

struct Bfloat : Pairs<Bfloat> {
    static float wide(u16 bits) {
        const u32 all = static_cast<u32>(bits) << 16;
        float value;
        std::memcpy(&value, &all, 4);
        return value;
    }
    static u16 narrow(float value) {
        u32 bits;
        std::memcpy(&bits, &value, 4);
        if (std::isnan(value)) return bits >> 16 | 0x40;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    // Products of two bfloat16 and sums with a third that are exact here, or rounded once to odd on the way.
    static u16 rounded(double exact) {
        float value = static_cast<float>(exact);
        u32 bits;
        std::memcpy(&bits, &value, 4);
        if (static_cast<double>(value) != exact && !(bits & 1)) {
            const bool too_far = std::abs(static_cast<double>(value)) > std::abs(exact);
            bits += too_far ? -1 : 1;
            std::memcpy(&value, &bits, 4);
        }
        return narrow(value);
    }
};

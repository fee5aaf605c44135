#include "reference.h"

#include <stdlib.h>
#include <string.h>

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13); /* infinite, or NaN */
    /* The exponent is 112 too small as a float's: scaling mends that, for subnormal numbers too. */
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

/* To the nearest, of two the even one, as everywhere in IEEE 754. */
static uint16_t to_half(float value) {
    const uint16_t sign = (uint16_t)(bits_of(value) >> 16 & 0x8000);
    uint32_t magnitude = bits_of(value) & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= bits_of(65520.0f)) return sign | 0x7c00;
    if (magnitude < bits_of(0x1p-14f)) /* adding 0.5 leaves the bits of a subnormal number at the end, rounded */
        return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return sign | (uint16_t)((magnitude >> 13) - (112 << 10));
}

static float from_bfloat16(uint16_t value) { return float_of((uint32_t)value << 16); }

static uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float load(const void *values, int64_t index, int type) {
    if (type == AWQ_FLOAT32) return ((const float *)values)[index];
    const uint16_t bits = ((const uint16_t *)values)[index];
    return type == AWQ_FLOAT16 ? from_half(bits) : from_bfloat16(bits);
}

static void store(void *values, int64_t index, int type, float value) {
    if (type == AWQ_FLOAT32) ((float *)values)[index] = value;
    else ((uint16_t *)values)[index] = type == AWQ_FLOAT16 ? to_half(value) : to_bfloat16(value);
}

/* Of two in a byte, the first in the low half. */
static int nibble(const void *packed, int64_t index) {
    return ((const uint8_t *)packed)[index / 2] >> index % 2 * 4 & 15;
}

/* Row n of the weight: K numbers. */
static void dequantize_row(const struct awq_weight *weight, const struct awq_call *call, int64_t n, float *row) {
    const int64_t G = (weight->K + weight->block_size - 1) / weight->block_size;
    for (int64_t k = 0; k < weight->K; k++) {
        const int64_t g = k / weight->block_size;
        const int code = nibble(call->codes, n * G * weight->block_size + k);
        const int zero_point = call->zero_points ? nibble(call->zero_points, n * (G + G % 2) + g) : 8;
        row[k] = (float)(code - zero_point) * load(call->scales, n * G + g, weight->type);
    }
}

const char *awq_reference(const struct awq_weight *weight, const struct awq_call *call) {
    if (call->M == 0) return NULL;
    float *row = malloc((size_t)weight->K * sizeof *row);
    if (!row) return "there is no memory left for a row of the weight";
    for (int64_t n = 0; n < weight->N; n++) {
        dequantize_row(weight, call, n, row);
        for (int64_t m = 0; m < call->M; m++) {
            float sum = 0;
            for (int64_t k = 0; k < weight->K; k++) sum += load(call->a, m * weight->K + k, weight->type) * row[k];
            if (call->bias) sum += load(call->bias, n, weight->type);
            store(call->y, m * weight->N + n, weight->type, sum);
        }
    }
    free(row);
    return NULL;
}

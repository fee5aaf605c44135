/* MatMulNBits on the CPU, plain C: what reference.py computes, for tests of all that surrounds a kernel. Not fast. */
#ifndef AWQ_ONNX_REFERENCE_H
#define AWQ_ONNX_REFERENCE_H

#include "launch.h"

/* Why such a weight is not served, a sentence; NULL where it is. */
const char *awq_reference_refusal(const struct awq_weight *weight);

/* The product, its pointers in the CPU's memory, summed in float32. Returns NULL, or a sentence. */
const char *awq_reference(const struct awq_weight *weight, const struct awq_call *call);

#endif

/* MatMulNBits on the CPU, plain C: what reference.py computes, for tests of all that surrounds a kernel. Not fast. */
#ifndef AWQ_ONNX_REFERENCE_H
#define AWQ_ONNX_REFERENCE_H

#include "launch.h"

/* The product of a weight that is not refused (awq_refusal), its pointers in the CPU's memory, summed in float32. Returns NULL, or a sentence. */
const char *awq_reference(const struct awq_weight *weight, const struct awq_call *call);

#endif

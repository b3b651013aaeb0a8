// Passes beside the GEMM: conv1x1 + activation + global average pooling, the masked gradient, and dgrad's zeros.
#pragma once

#include "../plan/plan.h"

namespace conv1x1 {

// out(image, c) = mean over pixels of activation(W x + bias); (batch, C_out) contiguous. NaN where there are no pixels.
// The (N, C_out, H, W) tensor never exists: each finished tile is summed while it is in L1. Writes p.pool_mask, if any.
Status avg_pool(const Conv1x1Problem& p, void* out, int threads, const KernelSet& kernels);

// Gradients of avg_pool, adding to dw and dbias, which the caller has zeroed; p.dy has no pixel strides. It works in
// chunks of a bounded workspace. The mask comes from p.pool_mask; without one the pre-activation is recomputed.
Status avg_pool_backward(const Conv1x1Problem& p, int threads, const KernelSet& kernels);

// Stores dz = dy under the mask of y.
void mask_grad(const Conv1x1Problem& p, const ActivationView& dz, int threads, const KernelSet& kernels);

// dx = 0: with a stride, dgrad writes only the pixels that the forward read.
void zero_fill(const Conv1x1Problem& p, int threads);

}  // namespace conv1x1

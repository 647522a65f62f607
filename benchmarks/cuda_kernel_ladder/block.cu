// Step 3 of 4, block: one block per row, and the maximum and the sum in ONE pass ("online" softmax).
//
// For row r with weight w, target y and logits z, V of them:
//     losses[r] = w * (ln sum_v exp(z_v) - z_y)                 E9
//     z_v      <- w * (softmax(z)_v - [v == y])                 E10, over the logits
// A row of weight 0 is never read: loss 0, gradient 0. Targets must lie in [0, V).
//
// Memory: two passes instead of three: 8 + 4 bytes per logit. A thread keeps the pair (maximum so far, sum of
// exp(z - maximum so far)); when the maximum grows, the old sum is multiplied by exp(old - new). Two pairs merge by the
// same rule, so any tree of merges gives the row's pair. The price: two exponentials per logit where there was one.
// A row now belongs to a whole block: fewer rows are open at a time, so the second pass finds more of its row in the L2
// cache (arithmetic in README.md), and the row's share of one thread gets small enough for step 4.
// Across warps the pairs meet in shared memory, after a barrier.
//
// Grid: one block per row, block size a multiple of 32 up to 1024.

#ifndef WCE_HOST  // the CPU emulation brings its own
#define SHARED(type, name, count) __shared__ type name[count]
#endif

struct Pair { float maximum, sum; };

static __device__ Pair merge(Pair a, Pair b)
{
    const float maximum = fmaxf(a.maximum, b.maximum);
    return {maximum, a.sum * expf(a.maximum - maximum) + b.sum * expf(b.maximum - maximum)};
}

static __device__ Pair warp_merge(Pair pair)
{
    for (int offset = 16; offset > 0; offset /= 2) {
        const Pair other = {__shfl_xor_sync(0xffffffffu, pair.maximum, offset),
                            __shfl_xor_sync(0xffffffffu, pair.sum, offset)};
        pair = merge(pair, other);
    }
    return pair;
}

extern "C" __global__ void __launch_bounds__(1024) ladder_block(
    float* logits, long long stride, int vocabulary_size,
    const long long* target_ids, const float* loss_weights, float* losses, int rows)
{
    SHARED(Pair, warp_pairs, 32);
    SHARED(float, shared_target_score, 1);
    const int row = blockIdx.x;  // everything that decides about an early return is the same for the whole block:
    if (row >= rows) return;     // a thread that left would be waited for at the barrier
    float* z = logits + row * stride;
    const float weight = loss_weights[row];
    if (weight == 0.0f) {
        for (int v = threadIdx.x; v < vocabulary_size; v += blockDim.x) z[v] = 0.0f;
        if (threadIdx.x == 0) losses[row] = 0.0f;
        return;
    }

    const int target = (int)target_ids[row];
    Pair pair = {-3.402823466e38f, 0.0f};  // a thread without a logit merges as nothing: its sum is 0
    for (int v = threadIdx.x; v < vocabulary_size; v += blockDim.x) {
        const float logit = z[v];
        pair = merge(pair, {logit, 1.0f});
        if (v == target) shared_target_score[0] = logit;  // one thread writes, thread 0 reads after the barrier
    }
    pair = warp_merge(pair);
    if (threadIdx.x % 32 == 0) warp_pairs[threadIdx.x / 32] = pair;
    __syncthreads();  // without it a warp merges pairs that others have not written yet
    pair = warp_pairs[0];
    for (int warp = 1; warp < blockDim.x / 32; warp++) pair = merge(pair, warp_pairs[warp]);  // same order everywhere
    if (threadIdx.x == 0)
        losses[row] = weight * (logf(pair.sum) - (shared_target_score[0] - pair.maximum));  // E9

    const float scale = weight / pair.sum;
    for (int v = threadIdx.x; v < vocabulary_size; v += blockDim.x) {
        const float gradient = scale * expf(z[v] - pair.maximum);
        z[v] = v == target ? gradient - weight : gradient;  // E10
    }
}

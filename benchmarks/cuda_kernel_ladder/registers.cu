// Step 4 of 4, registers: one block per row, the row held in the block's registers.
//
// For row r with weight w, target y and logits z, V of them:
//     losses[r] = w * (ln sum_v exp(z_v) - z_y)                 E9
//     z_v      <- w * (softmax(z)_v - [v == y])                 E10, over the logits
// A row of weight 0 is never read: loss 0, gradient 0. Targets must lie in [0, V).
//
// Memory: every logit is read once and written once: 4 + 4 bytes per logit, the least there is while logits live
// in memory. 1024 threads hold 8 vectors of 16 bytes each: 32 of the 64 registers that a thread of such a block may
// have, 32,768 logits in all. A 16-byte load per lane is 512 bytes per warp, 16 sectors in one instruction, and
// the 8 loads of a thread do not wait for one another: 128 KiB are on their way at once.
// With the row at hand a second look at it is free, so the online softmax of step 3 goes: first the maximum, then the
// sum; each exponential is computed once, stays in the logit's register and becomes the gradient.
// `i` below must be known to the compiler (full unrolling): a register has no address, and an array indexed at
// run time is put into memory ("spilled"), where the whole gain is lost. So the target's logit is read from memory
// (4 bytes per row) instead of being searched, and its gradient is put right by the thread that stored its vector.
//
// Grid: one block of exactly 1024 threads per row. V a multiple of 4 and at most 32,768; logits and stride * 4
// multiples of 16 bytes. (train/cuda/csrc has the other cases.)

#ifndef WCE_HOST  // the CPU emulation brings its own
#define SHARED(type, name, count) __shared__ type name[count]
#endif

constexpr int THREADS = 1024, VECTORS = 8, WARPS = THREADS / 32;
constexpr float LOWEST = -3.402823466e38f;

struct alignas(16) Vector { float value[4]; };

static __device__ float warp_max(float x)
{
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

static __device__ float warp_sum(float x)
{
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) ladder_registers(
    float* logits, long long stride, int vocabulary_size,
    const long long* target_ids, const float* loss_weights, float* losses, int rows)
{
    SHARED(float, warp_maxima, WARPS);
    SHARED(float, warp_sums, WARPS);  // an array of its own: reusing the first would need one more barrier
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (row >= rows) return;
    float* z = logits + row * stride;
    Vector* z_vectors = reinterpret_cast<Vector*>(z);
    const int vectors = vocabulary_size / 4;
    const float weight = loss_weights[row];
    if (weight == 0.0f) {
        for (int at = threadIdx.x; at < vectors; at += THREADS) z_vectors[at] = Vector{};
        if (threadIdx.x == 0) losses[row] = 0.0f;
        return;
    }

    Vector held[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = threadIdx.x + i * THREADS;
        if (at < vectors) held[i] = z_vectors[at];
        else held[i] = {LOWEST, LOWEST, LOWEST, LOWEST};  // never the maximum, and exp(LOWEST - maximum) is 0
    }
    const int target = (int)target_ids[row];
    const int target_owner = target / 4 % THREADS;
    float target_logit = 0.0f;
    if (threadIdx.x == 0 || threadIdx.x == target_owner) target_logit = z[target];  // stores come two barriers later

    float maximum = LOWEST;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        for (int j = 0; j < 4; j++) maximum = fmaxf(maximum, held[i].value[j]);
    maximum = warp_max(maximum);
    if (lane == 0) warp_maxima[warp] = maximum;
    __syncthreads();
    maximum = warp_max(warp_maxima[lane]);  // 32 warps, 32 lanes: every warp reduces all of them itself

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        for (int j = 0; j < 4; j++) sum += held[i].value[j] = expf(held[i].value[j] - maximum);
    sum = warp_sum(sum);
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    sum = warp_sum(warp_sums[lane]);
    if (threadIdx.x == 0) losses[row] = weight * (logf(sum) - (target_logit - maximum));  // E9

    const float scale = weight / sum;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = threadIdx.x + i * THREADS;
        for (int j = 0; j < 4; j++) held[i].value[j] *= scale;
        if (at < vectors) z_vectors[at] = held[i];
    }
    if (threadIdx.x == target_owner) z[target] = scale * expf(target_logit - maximum) - weight;  // E10, own vector
}

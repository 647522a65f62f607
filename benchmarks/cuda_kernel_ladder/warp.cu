// Step 2 of 4, warp: one warp per row. The same three passes as naive.cu, walked by 32 lanes side by side.
//
// For row r with weight w, target y and logits z, V of them:
//     losses[r] = w * (ln sum_v exp(z_v) - z_y)                 E9
//     z_v      <- w * (softmax(z)_v - [v == y])                 E10, over the logits
// A row of weight 0 is never read: loss 0, gradient 0. Targets must lie in [0, V).
//
// Memory: still 12 + 4 bytes per logit asked for, but lane l takes logit l, l + 32, ...: a warp's load is one
// piece of 128 bytes, 4 sectors, all used. What moves is what was asked for.
// The price: the maximum and the sum live in 32 parts, put together by 5 shuffles each. A butterfly (xor) leaves the
// result in every lane, in one fixed order of additions: the same bits in every run.
//
// Grid: ceil(rows * 32 / blockDim.x) blocks, block size a multiple of 32.

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

extern "C" __global__ void ladder_warp(
    float* logits, long long stride, int vocabulary_size,
    const long long* target_ids, const float* loss_weights, float* losses, int rows)
{
    const int lane = threadIdx.x % 32;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;  // a whole warp leaves: no lane is missed by the shuffles below
    float* z = logits + row * stride;
    const float weight = loss_weights[row];
    if (weight == 0.0f) {
        for (int v = lane; v < vocabulary_size; v += 32) z[v] = 0.0f;
        if (lane == 0) losses[row] = 0.0f;
        return;
    }

    float maximum = -3.402823466e38f;
    for (int v = lane; v < vocabulary_size; v += 32) maximum = fmaxf(maximum, z[v]);
    maximum = warp_max(maximum);

    const int target = (int)target_ids[row];
    float sum = 0.0f, target_score = 0.0f;  // only one lane meets the target, so a sum of the lanes hands it round
    for (int v = lane; v < vocabulary_size; v += 32) {
        const float score = z[v] - maximum;
        sum += expf(score);
        if (v == target) target_score = score;
    }
    sum = warp_sum(sum);
    target_score = warp_sum(target_score);
    if (lane == 0) losses[row] = weight * (logf(sum) - target_score);  // E9

    const float scale = weight / sum;
    for (int v = lane; v < vocabulary_size; v += 32) {  // every lane overwrites only logits that it alone has read
        const float gradient = scale * expf(z[v] - maximum);
        z[v] = v == target ? gradient - weight : gradient;  // E10
    }
}

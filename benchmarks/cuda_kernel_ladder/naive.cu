// Step 1 of 4, naive: one thread per row.
//
// For row r with weight w, target y and logits z, V of them:
//     losses[r] = w * (ln sum_v exp(z_v) - z_y)                 E9
//     z_v      <- w * (softmax(z)_v - [v == y])                 E10, over the logits
// A row of weight 0 is never read: loss 0, gradient 0. Targets must lie in [0, V).
//
// Memory: three passes read the row, the last one writes it: 12 + 4 bytes per logit asked for. But the 32 lanes of
// a warp are in 32 rows, so one load instruction touches 32 far apart sectors of 32 bytes to use 4 of each:
// 8 times the bytes move. A cache that keeps a sector for its next seven users would help; 32 sectors for each warp
// of an SM (2048 threads: 64 KiB at one instant) leave it little room.
// Parallelism: as many threads as rows, each of them walking V logits alone.
//
// Grid: ceil(rows / blockDim.x) blocks, any block size.

extern "C" __global__ void ladder_naive(
    float* logits, long long stride, int vocabulary_size,
    const long long* target_ids, const float* loss_weights, float* losses, int rows)
{
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float* z = logits + row * stride;  // 64-bit: row * stride passes 2^31 after 67,075 rows of 32,016
    const float weight = loss_weights[row];
    if (weight == 0.0f) {
        for (int v = 0; v < vocabulary_size; v++) z[v] = 0.0f;
        losses[row] = 0.0f;
        return;
    }

    float maximum = -3.402823466e38f;  // exp of anything above 88 is inf in fp32, hence a pass for the maximum
    for (int v = 0; v < vocabulary_size; v++) maximum = fmaxf(maximum, z[v]);

    const int target = (int)target_ids[row];
    float sum = 0.0f, target_score = 0.0f;
    for (int v = 0; v < vocabulary_size; v++) {
        const float score = z[v] - maximum;
        sum += expf(score);
        if (v == target) target_score = score;  // picked up in passing, before the row is overwritten
    }
    losses[row] = weight * (logf(sum) - target_score);  // E9: the maximum cancels

    const float scale = weight / sum;
    for (int v = 0; v < vocabulary_size; v++) {
        const float gradient = scale * expf(z[v] - maximum);
        z[v] = v == target ? gradient - weight : gradient;  // E10
    }
}

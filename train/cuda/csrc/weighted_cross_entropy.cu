// Weighted cross-entropy of rows of logits: loss and gradient of a row in one launch (docs/math.md, E9 and E10).
//
//   loss_i        = w_i * (ln sum_j exp(x_ij) - x_i[target_i])                                                      E9
//   gradient_ij   = w_i * upstream * (softmax(x_i)_j - [j == target_i])                                             E10
//
// One text for nvcc, for NVRTC and for the CPU check in tests/support/cuda_shim: therefore no #include, no templates in
// the names that are launched, and every line that a CPU cannot run is in the block "What only the GPU has".
//
// Kernels, one block per row (grid.x = rows). Bytes per logit are those to and from device memory.
//
//   name                      threads  logits a row may have, bf16 and fp16 / fp32   reads + writes of a logit
//   wce_row_<dtype>_128x1       128       1,024 /    512                             1 + 1
//   wce_row_<dtype>_128x2       128       2,048 /  1,024                             1 + 1
//   wce_row_<dtype>_128x4       128       4,096 /  2,048                             1 + 1
//   wce_row_<dtype>_256x4       256       8,192 /  4,096                             1 + 1
//   wce_row_<dtype>_256x8       256      16,384 /  8,192                             1 + 1
//   wce_row_<dtype>_512x8       512      32,768 / 16,384                             1 + 1
//   wce_row_<dtype>_1024x8     1024      65,536 / 32,768                             1 + 1
//   wce_stream_<dtype>          512      any                                         2 + 1
//   wce_scale_<dtype>           any      any number, any grid                        1 + 1, nothing if the factor is 1
//
// Row kernels: the first logit and the first gradient of every row are 16-byte aligned (base and stride). Rows may have
// any length up to the table's: after the last whole vector each thread takes one logit.
// Stream kernels: any length and any alignment that the element type allows.
//
// Promises of both: no logit of a row of weight 0 is read and its target may be anything; its gradient, loss and
// logsumexp are 0. A target outside [0, V) on a row with weight gives loss and logsumexp NaN, gradient 0, and *bad_row
// becomes the largest such row + 1. gradient == logits is allowed, any other overlap is not. Arithmetic is fp32, row
// offsets are 64-bit (16,384 rows of 151,936 logits are more than 2^31), nothing is added by atomics: equal input,
// equal bits. A row that holds +inf or NaN, or only -inf, gives NaN in that row alone. Finite logits above 2.3e38 count
// as +inf, because they overflow when multiplied by log2(e).
//
// Legend: column = position in the row; vector = 16 bytes of consecutive logits (8 of bf16 and fp16, 4 of fp32).

// ---------------------------------------------------------------------------------------------- What only the GPU has
#ifndef WCE_HOST  // tests/support/cuda_shim brings its own lines for the CPU
#define SHARED(type, name, count) __shared__ type name[count]

__device__ __forceinline__ float exp2_approximate(float x) {  // one instruction, relative error 2^-22
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {  // one instruction rounds two values
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ unsigned pack_fp16(float low, float high) {
    unsigned result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ float unpack_fp16(unsigned short bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}

// No instruction: the compiler only may not assume that the word is still the same. Without it the compiler remembers
// the 64 unpacked floats of a thread from one phase to the next instead of unpacking 32 words again, and spills.
__device__ __forceinline__ void forget(unsigned& word) { asm volatile("" : "+r"(word)); }

// No instruction either: the compiler moves no store past this line. Vectors and single logits are accesses of
// different types to the same memory, which C++ allows it to exchange.
__device__ __forceinline__ void keep_stores_in_order() { asm volatile("" ::: "memory"); }
#endif

// ------------------------------------------------------------------------------------------------------- Element types
#define MINUS_INFINITY __uint_as_float(0xff800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fffffffu)

struct alignas(16) Vector {
    unsigned words[4];
};

__device__ __forceinline__ Vector vector_of(unsigned word) { return Vector{{word, word, word, word}}; }

struct Bf16 {  // the upper half of an fp32
    typedef unsigned short Storage;
    static constexpr int PER_VECTOR = 8;
    static constexpr unsigned MINUS_INFINITY_WORD = 0xff80ff80u;
    static __device__ __forceinline__ float load(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
    static __device__ __forceinline__ unsigned short round(float value) { return pack_bf16(value, 0.f) & 0xffffu; }
    static __device__ __forceinline__ void unpack(const Vector& vector, float* values) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = __uint_as_float(vector.words[i] << 16);
            values[2 * i + 1] = __uint_as_float(vector.words[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ void pack(const float* values, Vector& vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) vector.words[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
    }
};

struct Fp16 {
    typedef unsigned short Storage;
    static constexpr int PER_VECTOR = 8;
    static constexpr unsigned MINUS_INFINITY_WORD = 0xfc00fc00u;
    static __device__ __forceinline__ float load(unsigned short bits) { return unpack_fp16(bits); }
    static __device__ __forceinline__ unsigned short round(float value) { return pack_fp16(value, 0.f) & 0xffffu; }
    static __device__ __forceinline__ void unpack(const Vector& vector, float* values) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = unpack_fp16(vector.words[i] & 0xffffu);
            values[2 * i + 1] = unpack_fp16(vector.words[i] >> 16);
        }
    }
    static __device__ __forceinline__ void pack(const float* values, Vector& vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) vector.words[i] = pack_fp16(values[2 * i], values[2 * i + 1]);
    }
};

struct Fp32 {
    typedef float Storage;
    static constexpr int PER_VECTOR = 4;
    static constexpr unsigned MINUS_INFINITY_WORD = 0xff800000u;
    static __device__ __forceinline__ float load(float value) { return value; }
    static __device__ __forceinline__ float round(float value) { return value; }
    static __device__ __forceinline__ void unpack(const Vector& vector, float* values) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(vector.words[i]);
    }
    static __device__ __forceinline__ void pack(const float* values, Vector& vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) vector.words[i] = __float_as_uint(values[i]);
    }
};

template <int COUNT>
__device__ __forceinline__ void forget_unpacked(Vector* vectors) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) forget(vectors[k].words[i]);
}

template <class Storage>
__device__ __forceinline__ Vector load_vector(const Storage* start, long long index) {
    return reinterpret_cast<const Vector*>(start)[index];
}

template <class Storage>
__device__ __forceinline__ void store_vector(Storage* start, long long index, const Vector& vector) {
    reinterpret_cast<Vector*>(start)[index] = vector;
}

// A run of elements as: single ones up to the next 16-byte border, whole vectors, single ones after them.
struct Split {
    int n_head;
    long long n_vectors;
    long long tail_start;
    long long n_single;  // head and tail together
    __device__ __forceinline__ long long single(long long i) const { return i < n_head ? i : i - n_head + tail_start; }
};

template <class Dtype>
__device__ __forceinline__ Split split_at_borders(const typename Dtype::Storage* start, long long count) {
    const int bytes_over = (int)(reinterpret_cast<unsigned long long>(start) % 16);
    Split split;
    split.n_head = bytes_over ? (16 - bytes_over) / (int)sizeof(typename Dtype::Storage) : 0;
    if (split.n_head > count) split.n_head = (int)count;
    split.n_vectors = (count - split.n_head) / Dtype::PER_VECTOR;
    split.tail_start = split.n_head + split.n_vectors * Dtype::PER_VECTOR;
    split.n_single = split.n_head + count - split.tail_start;
    return split;
}

// --------------------------------------------------------------------------------------------- Exponentials in base 2
// exp(x - maximum) as 2^(x * log2(e) - shift): one fused multiply-add and one ex2. shift = maximum * log2(e) is
// rounded, at a maximum of 1e4 by up to 5e-4; taken for the exact maximum it would cost 4 digits of every loss. But all
// terms of a row, the target's too, use the same shift, the multiply-add rounds only its (small) result, and in
// ln(sum) - ln(2) * target_score and in term / sum the shift cancels.
#define LOG2_E 1.44269504f
#define LN_2 0.69314718f

__device__ __forceinline__ float score_of(float logit, float shift) { return fmaf(logit, LOG2_E, -shift); }

// ---------------------------------------------------------------------------------------------------- Block reductions
// Both give every thread the same bits: a + b == b + a, so the two partners of an exchange agree, and the tree is
// fixed. Each has its own shared array: with one array a fast warp would store its sum over a maximum that a slow warp
// still has to read, and a third barrier would be needed.
template <int THREADS>
__device__ __forceinline__ float block_maximum(float value, float* warp_maxima) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    if (threadIdx.x % 32 == 0) warp_maxima[threadIdx.x / 32] = value;
    __syncthreads();  // barrier 1: all maxima are stored before any is read; without it a thread reads old memory
    value = warp_maxima[threadIdx.x % (THREADS / 32)];
#pragma unroll
    for (int distance = THREADS / 64; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

template <int THREADS>
__device__ __forceinline__ float block_sum(float value, float* warp_sums) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();  // barrier 2: the same for the sums
    value = warp_sums[threadIdx.x % (THREADS / 32)];
#pragma unroll
    for (int distance = THREADS / 64; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// ------------------------------------------------------------------------------------ What both kinds of kernel share
template <class Dtype>
struct Arguments {
    const typename Dtype::Storage* logits;  // (rows, V), logits_stride elements from row to row
    long long logits_stride;
    typename Dtype::Storage* gradient;      // (rows, V), may be logits; null: no gradient wanted
    long long gradient_stride;
    int vocabulary_size;                    // V
    const long long* target_ids;            // (rows)
    const float* loss_weights;              // (rows), already normalised, may be negative
    const float* upstream;                  // one number that multiplies the gradient before rounding; null: 1
    float* losses;                          // (rows)
    float* logsumexps;                      // (rows) or null
    int* bad_row;                           // one int, 0 before the launch, or null
};

template <class Dtype>
struct Row {
    const typename Dtype::Storage* logits;
    typename Dtype::Storage* gradient;
    float weight;
    int target;
    float factor;  // weight * upstream
};

// Finds the block's row; false if nothing in it has to be computed. The answer is the same in all threads of the block,
// so that none waits at a barrier for one that has returned.
template <class Dtype>
__device__ __forceinline__ bool open_row(const Arguments<Dtype>& call, Row<Dtype>& row) {
    const long long i = blockIdx.x;  // 64-bit: i * stride passes 2^31
    row.logits = call.logits + i * call.logits_stride;
    row.gradient = call.gradient ? call.gradient + i * call.gradient_stride : nullptr;
    row.weight = call.loss_weights[i];  // three loads that do not wait for one another
    const long long target = call.target_ids[i];
    row.factor = row.weight * (call.upstream ? *call.upstream : 1.f);
    row.target = (int)target;
    if (row.weight != 0.f && target >= 0 && target < call.vocabulary_size) return true;

    if (row.gradient) {
        const Split split = split_at_borders<Dtype>(row.gradient, call.vocabulary_size);
        for (int k = threadIdx.x; k < split.n_vectors; k += blockDim.x)
            store_vector(row.gradient + split.n_head, k, vector_of(0));
        for (int k = threadIdx.x; k < split.n_single; k += blockDim.x) row.gradient[split.single(k)] = 0;
    }
    if (threadIdx.x == 0) {
        const float result = row.weight == 0.f ? 0.f : NOT_A_NUMBER;
        call.losses[i] = result;
        if (call.logsumexps) call.logsumexps[i] = result;
        if (row.weight != 0.f && call.bad_row) atomicMax(call.bad_row, (int)i + 1);
    }
    return false;
}

// By the one thread that wrote the target's column, over that earlier store of its own: neither a barrier nor a
// comparison per logit is needed.
template <class Dtype>
__device__ __forceinline__ void finish_row(
    const Arguments<Dtype>& call, const Row<Dtype>& row, float target_logit, float shift, float sum) {
    const float target_score = score_of(target_logit, shift);
    const float log_sum = logf(sum);  // not __logf: its absolute error would be most of a small loss
    float loss = fmaf(-LN_2, target_score, log_sum);
    loss = loss < 0.f ? 0.f : loss;  // rounding of a probability near 1; written so that NaN stays NaN
    call.losses[blockIdx.x] = row.weight * loss;  // E9
    if (call.logsumexps) call.logsumexps[blockIdx.x] = fmaf(LN_2, shift, log_sum);
    if (row.gradient) {
        const float term = exp2_approximate(target_score);
        keep_stores_in_order();
        row.gradient[row.target] = Dtype::round(fmaf(row.factor / sum, term, -row.factor));  // E10: one rounding
    }
}

// --------------------------------------------------------------------------------------------- Row held in registers
// Thread t holds vectors t, t + THREADS, t + 2 * THREADS, ...: a warp reads 512 consecutive bytes at a time. In place
// no barrier protects the logits: a thread overwrites only what it has loaded itself, and the target's logit, which one
// thread loads once more, is in that thread's own vectors.
// Maximum first, then sum: both run over registers, without the rescaling of a running (online) softmax.
template <class Dtype, int THREADS, int VECTORS>
__device__ __forceinline__ void row_kernel(const Arguments<Dtype>& call) {
    constexpr int PER_VECTOR = Dtype::PER_VECTOR;
    SHARED(float, warp_maxima, THREADS / 32);
    SHARED(float, warp_sums, THREADS / 32);
    Row<Dtype> row;
    if (!open_row(call, row)) return;

    // 1. Load. Vectors after the row's end are -inf: they change no maximum and add 2^-inf = 0.
    const int n_vectors = call.vocabulary_size / PER_VECTOR;
    const int tail_start = n_vectors * PER_VECTOR;
    const int tail_column = tail_start + threadIdx.x;
    const bool has_tail = tail_column < call.vocabulary_size;
    const int target_owner = row.target < tail_start ? row.target / PER_VECTOR % THREADS : row.target - tail_start;
    const bool owns_target = threadIdx.x == target_owner;
    Vector vectors[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int index = threadIdx.x + k * THREADS;
        vectors[k] = index < n_vectors ? load_vector(row.logits, index) : vector_of(Dtype::MINUS_INFINITY_WORD);
    }
    const float tail = has_tail ? Dtype::load(row.logits[tail_column]) : MINUS_INFINITY;
    const float target_logit = owns_target ? Dtype::load(row.logits[row.target]) : 0.f;  // before it is overwritten

    // 2. Maximum.
    float values[PER_VECTOR];
    float maximum = tail;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        Dtype::unpack(vectors[k], values);
#pragma unroll
        for (int j = 0; j < PER_VECTOR; ++j) maximum = fmaxf(maximum, values[j]);
    }
    const float shift = block_maximum<THREADS>(maximum, warp_maxima) * LOG2_E;

    // 3. Sum of exponentials.
    forget_unpacked<VECTORS>(vectors);
    float sum = exp2_approximate(score_of(tail, shift));
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        Dtype::unpack(vectors[k], values);
#pragma unroll
        for (int j = 0; j < PER_VECTOR; ++j) sum += exp2_approximate(score_of(values[j], shift));
    }
    sum = block_sum<THREADS>(sum, warp_sums);

    // 4. Gradient, as if no column were the target's; the exponentials are made again, they did not fit in registers.
    if (row.gradient) {
        const float scale = row.factor / sum;
        forget_unpacked<VECTORS>(vectors);
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            const int index = threadIdx.x + k * THREADS;
            Dtype::unpack(vectors[k], values);
#pragma unroll
            for (int j = 0; j < PER_VECTOR; ++j)
                values[j] = scale * exp2_approximate(score_of(values[j], shift));  // E10, softmax
            Dtype::pack(values, vectors[k]);
            if (index < n_vectors) store_vector(row.gradient, index, vectors[k]);
        }
        if (has_tail) row.gradient[tail_column] = Dtype::round(scale * exp2_approximate(score_of(tail, shift)));
    }

    // 5. The target's column, the loss and the logsumexp.
    if (owns_target) finish_row(call, row, target_logit, shift, sum);
}

// --------------------------------------------------------------------------------------------------- Row of any length
// Two reads and one write of each logit. The first pass keeps the maximum and the sum of what a thread has seen so far,
// so that one pass does for both (online softmax).
constexpr int STREAM_THREADS = 512;

// Adds COUNT logits to a thread's running shift and sum. A shift of -inf means that only -inf was seen (or nothing):
// subtracting it would make NaN of 2^(-inf + inf), where 0 is meant.
template <int COUNT>
__device__ __forceinline__ void add_logits(const float* logits, float& shift, float& sum) {
    float maximum = logits[0];
#pragma unroll
    for (int j = 1; j < COUNT; ++j) maximum = fmaxf(maximum, logits[j]);
    const float new_shift = fmaxf(shift, maximum * LOG2_E);
    const float base = new_shift == MINUS_INFINITY ? 0.f : new_shift;
    sum *= exp2_approximate(shift - base);
#pragma unroll
    for (int j = 0; j < COUNT; ++j) sum += exp2_approximate(score_of(logits[j], base));
    shift = new_shift;
}

template <class Dtype>
__device__ __forceinline__ void stream_kernel(const Arguments<Dtype>& call) {
    constexpr int PER_VECTOR = Dtype::PER_VECTOR;
    constexpr int THREADS = STREAM_THREADS;
    SHARED(float, warp_maxima, THREADS / 32);
    SHARED(float, warp_sums, THREADS / 32);
    Row<Dtype> row;
    if (!open_row(call, row)) return;

    // 1. Who does which column, in both passes. Vectors where logits and gradient lie alike relative to the 16-byte
    // borders (in place always); single elements for the whole row otherwise.
    Split split = split_at_borders<Dtype>(row.logits, call.vocabulary_size);
    const unsigned long long difference =
        reinterpret_cast<unsigned long long>(row.logits) ^ reinterpret_cast<unsigned long long>(row.gradient);
    const int V = call.vocabulary_size;
    if (row.gradient && difference % 16 != 0) split = {V, 0, V, V};
    const int n_head = split.n_head, n_vectors = (int)split.n_vectors, n_single = (int)split.n_single;
    const int tail_start = (int)split.tail_start;
    int target_index = row.target;  // which vector, or which of the single elements
    if (row.target >= tail_start) target_index = row.target - tail_start + n_head;
    else if (row.target >= n_head) target_index = (row.target - n_head) / PER_VECTOR;
    const bool owns_target = threadIdx.x == target_index % THREADS;
    const float target_logit = owns_target ? Dtype::load(row.logits[row.target]) : 0.f;  // before it is overwritten

    // 2. First pass: maximum and sum.
    float values[PER_VECTOR];
    float shift = MINUS_INFINITY, sum = 0.f;
    for (int k = threadIdx.x; k < n_vectors; k += THREADS) {
        Dtype::unpack(load_vector(row.logits + n_head, k), values);
        add_logits<PER_VECTOR>(values, shift, sum);
    }
    for (int k = threadIdx.x; k < n_single; k += THREADS) {
        values[0] = Dtype::load(row.logits[split.single(k)]);
        add_logits<1>(values, shift, sum);
    }
    const float thread_shift = shift;
    shift = block_maximum<THREADS>(shift, warp_maxima);
    sum = block_sum<THREADS>(sum * exp2_approximate(thread_shift - shift), warp_sums);

    // 3. Second pass: gradient. A thread overwrites only columns that it alone reads. Vectors from the row's end to its
    // start: the end was read last and is still in the L2 cache where the rows in work do not fit in it together.
    if (row.gradient) {
        const float scale = row.factor / sum;
        const int first_behind = (n_vectors + THREADS - 1 - (int)threadIdx.x) / THREADS * THREADS + (int)threadIdx.x;
        for (int k = first_behind - THREADS; k >= 0; k -= THREADS) {
            Vector vector = load_vector(row.logits + n_head, k);
            Dtype::unpack(vector, values);
#pragma unroll
            for (int j = 0; j < PER_VECTOR; ++j)
                values[j] = scale * exp2_approximate(score_of(values[j], shift));  // E10, softmax
            Dtype::pack(values, vector);
            store_vector(row.gradient + n_head, k, vector);
        }
        for (int k = threadIdx.x; k < n_single; k += THREADS) {
            const long long column = split.single(k);
            const float score = score_of(Dtype::load(row.logits[column]), shift);
            row.gradient[column] = Dtype::round(scale * exp2_approximate(score));
        }
    }

    // 4. The target's column, the loss and the logsumexp.
    if (owns_target) finish_row(call, row, target_logit, shift, sum);
}

// ---------------------------------------------------------------------------------------------------- values *= factor
// The backward pass multiplies a stored gradient by the incoming one, which is 1 unless the caller scaled the loss.
// Each block reads the factor on the device: no wait of the host, and no pass over the values if nothing is to be done.
template <class Dtype>
__device__ __forceinline__ void scale_kernel(typename Dtype::Storage* values, long long count, const float* factor) {
    const float scale = *factor;
    if (scale == 1.f) return;
    constexpr int PER_VECTOR = Dtype::PER_VECTOR;
    const Split split = split_at_borders<Dtype>(values, count);
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long step = (long long)gridDim.x * blockDim.x;
    float unpacked[PER_VECTOR];
    for (long long k = first; k < split.n_vectors; k += step) {
        Vector vector = load_vector(values + split.n_head, k);
        Dtype::unpack(vector, unpacked);
#pragma unroll
        for (int j = 0; j < PER_VECTOR; ++j) unpacked[j] *= scale;
        Dtype::pack(unpacked, vector);
        store_vector(values + split.n_head, k, vector);
    }
    for (long long k = first; k < split.n_single; k += step) {
        const long long i = split.single(k);
        values[i] = Dtype::round(Dtype::load(values[i]) * scale);
    }
}

// -------------------------------------------------------------------------------------------------- The launched names
// Plain pointers and integers in this order; __launch_bounds__(threads, 1024 / threads) keeps registers at 64 a thread,
// so that 1,024 threads share a multiprocessor at any block size.
#define ROW_PARAMETERS(Dtype)                                                                                  \
    const Dtype::Storage *logits, long long logits_stride, Dtype::Storage *gradient, long long gradient_stride, \
        int vocabulary_size, const long long *target_ids, const float *loss_weights, const float *upstream,    \
        float *losses, float *logsumexps, int *bad_row
#define ROW_ARGUMENTS                                                                                         \
    {logits, logits_stride, gradient, gradient_stride, vocabulary_size, target_ids, loss_weights, upstream, losses, \
     logsumexps, bad_row}

#define ROW_KERNEL(name, Dtype, threads, vectors)                                                           \
    extern "C" __global__ void __launch_bounds__(threads, 1024 / threads)                                   \
        wce_row_##name##_##threads##x##vectors(ROW_PARAMETERS(Dtype)) {                                     \
        row_kernel<Dtype, threads, vectors>(ROW_ARGUMENTS);                                                 \
    }
#define STREAM_AND_SCALE_KERNELS(name, Dtype)                                                               \
    extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 2)                                         \
        wce_stream_##name(ROW_PARAMETERS(Dtype)) {                                                          \
        stream_kernel<Dtype>(ROW_ARGUMENTS);                                                                \
    }                                                                                                       \
    extern "C" __global__ void wce_scale_##name(Dtype::Storage* values, long long count, const float* factor) { \
        scale_kernel<Dtype>(values, count, factor);                                                         \
    }

ROW_KERNEL(bf16, Bf16, 128, 1)
ROW_KERNEL(bf16, Bf16, 128, 2)
ROW_KERNEL(bf16, Bf16, 128, 4)
ROW_KERNEL(bf16, Bf16, 256, 4)
ROW_KERNEL(bf16, Bf16, 256, 8)
ROW_KERNEL(bf16, Bf16, 512, 8)
ROW_KERNEL(bf16, Bf16, 1024, 8)
STREAM_AND_SCALE_KERNELS(bf16, Bf16)

ROW_KERNEL(fp16, Fp16, 128, 1)
ROW_KERNEL(fp16, Fp16, 128, 2)
ROW_KERNEL(fp16, Fp16, 128, 4)
ROW_KERNEL(fp16, Fp16, 256, 4)
ROW_KERNEL(fp16, Fp16, 256, 8)
ROW_KERNEL(fp16, Fp16, 512, 8)
ROW_KERNEL(fp16, Fp16, 1024, 8)
STREAM_AND_SCALE_KERNELS(fp16, Fp16)

ROW_KERNEL(fp32, Fp32, 128, 1)
ROW_KERNEL(fp32, Fp32, 128, 2)
ROW_KERNEL(fp32, Fp32, 128, 4)
ROW_KERNEL(fp32, Fp32, 256, 4)
ROW_KERNEL(fp32, Fp32, 256, 8)
ROW_KERNEL(fp32, Fp32, 512, 8)
ROW_KERNEL(fp32, Fp32, 1024, 8)
STREAM_AND_SCALE_KERNELS(fp32, Fp32)

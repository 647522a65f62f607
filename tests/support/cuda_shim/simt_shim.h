// Runs the text of a CUDA kernel on one CPU core, for tests: one fiber (ucontext) per CUDA thread, one block at a time.
//
// What it has: threadIdx, blockIdx, blockDim, gridDim (.x only), __syncthreads, __shfl_{xor,down}_sync and __shfl_sync
// of 32 lanes, atomicMax(int), SHARED(type, name, count) instead of __shared__.
// What it adds to a GPU: the order in which ready threads run is chosen (lowest first, highest first, random with a
// seed), shared memory starts as NaN, a barrier that not all threads of the block reach is an error that names lines
// and threads. Under -fsanitize=address every SHARED array has its exact size and a poisoned border; under
// -fsanitize=thread only __syncthreads orders memory, blocks are not ordered at all: a race is a report even if the
// values came out right. With -DSIMT_COUNT (and -fsanitize=thread for the compiler, but not for the linker) the
// compiler's hooks count the bytes that a kernel reads and writes of watched arrays.
// What it cannot show: the weak memory model inside a block, rounding of the GPU's own instructions, speed.
//
// Include this file, then the kernels' text, then one SIMT_KERNEL(name) per kernel; tests/support/cuda_build.py writes
// that.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "simt_api.h"

#define WCE_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define UNTRACED __attribute__((no_sanitize("thread")))  // the shim's own memory is no business of the race detector

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__) && !defined(SIMT_COUNT)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define SIMT_TSAN 1
#else
#define SIMT_TSAN 0
#endif

namespace simt {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t SHARED_BYTES = 48 * 1024;  // static shared memory of one block
constexpr size_t SHARED_BORDER = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr int MAX_SHARED_ARRAYS = 16;

enum State { READY, AT_BARRIER, IN_SHUFFLE, RETURNED };

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    char* stack;
    Index thread_index;
    State state;
    int line;              // of the barrier or shuffle it waits in
    uint64_t sent, received;
    unsigned source_lane;  // of the shuffle
    unsigned lanes;        // that take part in the shuffle
    void* tsan = nullptr;
    void* asan = nullptr;
};

struct Shared {
    int line;
    char* start;
};

struct Machine {  // one launch at a time; plain arrays, because the race detector would look into std::vector
    Index block_index, block_size, grid_size;
    Fiber fibers[MAX_THREADS];
    uint64_t ready[MAX_THREADS / 64];  // one bit per thread
    Fiber* running = nullptr;
    ucontext_t host;  // the code that launched
    void *host_tsan = nullptr, *host_asan = nullptr;
    const void* host_stack = nullptr;
    size_t host_bytes = 0;
    int order = SIMT_ASCENDING;
    unsigned at_barrier = 0, returned = 0;
    char barrier_generation[2];  // addresses for the race detector; two, or barrier n + 1 would order what follows n
    unsigned generation = 0;
    char launch_end;  // address for the race detector: what the host reads after a launch is ordered behind all threads
    char* stacks = nullptr;
    char* shared_memory = nullptr;
    size_t shared_used = 0;
    Shared shared[MAX_SHARED_ARRAYS];
    int n_shared = 0;
    void (*call)(void**) = nullptr;
    void** parameters = nullptr;
    bool failed = false;
    std::string error;
    uint64_t random_state = 0;
};

// static, not inline: g++ makes one object of all inline variables of a process, and two libraries of kernels loaded
// into it would find each other's kernels.
static Machine machine;

UNTRACED inline void make_ready(Fiber& fiber) {
    fiber.state = READY;
    machine.ready[fiber.thread_index.x / 64] |= uint64_t{1} << fiber.thread_index.x % 64;
}

// --------------------------------------------------------------------------------------------------- Switching fibers
UNTRACED inline uint64_t random_bits() {  // splitmix64
    uint64_t bits = machine.random_state += 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return bits ^ bits >> 31;
}

// The ready thread to run next; nullptr if there is none. Always the lowest (or highest) one: its warp runs as far
// ahead as it can, the warps before it wait at the barrier, those behind it have not begun.
UNTRACED inline Fiber* next_fiber() {
    constexpr unsigned WORDS = MAX_THREADS / 64;
    const unsigned start = machine.order == SIMT_RANDOM ? random_bits() % machine.block_size.x : 0;
    for (unsigned i = 0; i <= WORDS; ++i) {  // the random start's word comes twice: first its upper bits, last all
        const bool down = machine.order == SIMT_DESCENDING;
        const unsigned word = down ? (WORDS - 1 - i) % WORDS : (start / 64 + i) % WORDS;
        uint64_t bits = machine.ready[word];
        if (i == 0) bits &= ~uint64_t{0} << start % 64;
        if (bits) return &machine.fibers[word * 64 + (down ? 63 - __builtin_clzll(bits) : __builtin_ctzll(bits))];
    }
    return nullptr;
}

UNTRACED inline void switch_fibers(Fiber* from, Fiber* to) {  // nullptr: the code that launched
    machine.running = to;
#if SIMT_ASAN
    void** keep = !from ? &machine.host_asan : from->state == RETURNED ? nullptr : &from->asan;
    __sanitizer_start_switch_fiber(keep, to ? to->stack : machine.host_stack, to ? STACK_BYTES : machine.host_bytes);
#endif
#if SIMT_TSAN
    __tsan_switch_to_fiber(to ? to->tsan : machine.host_tsan, 1);  // 1: the switch orders no memory
#endif
    swapcontext(from ? &from->context : &machine.host, to ? &to->context : &machine.host);
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(from ? from->asan : machine.host_asan, nullptr, nullptr);
#endif
}

UNTRACED inline void let_others_run() {
    Fiber* self = machine.running;
    Fiber* next = machine.failed ? nullptr : next_fiber();
    if (next) machine.ready[next->thread_index.x / 64] &= ~(uint64_t{1} << next->thread_index.x % 64);
    if (next != self) switch_fibers(self, next);
}

UNTRACED inline void fiber_main() {
#if SIMT_ASAN
    const void* stack;  // of whoever switched here; the first one to do so is the host
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (!machine.host_stack) machine.host_stack = stack, machine.host_bytes = bytes;
#endif
    machine.call(machine.parameters);
#if SIMT_TSAN
    __tsan_release(&machine.launch_end);
#endif
    machine.running->state = RETURNED;
    ++machine.returned;
    let_others_run();
}

UNTRACED inline void fail(const std::string& what) {
    machine.error = what;
    machine.failed = true;
}

// ------------------------------------------------------------------------------------------------ What a kernel calls
UNTRACED inline void barrier(int line) {
    Fiber* self = machine.running;
    self->state = AT_BARRIER;
    self->line = line;
#if SIMT_TSAN
    __tsan_release(&machine.barrier_generation[machine.generation % 2]);
    void* order = &machine.barrier_generation[machine.generation % 2];
#endif
    if (++machine.at_barrier == machine.block_size.x) {
        for (unsigned i = 0; i < machine.block_size.x; ++i) {
            Fiber& other = machine.fibers[i];
            if (other.line != line)
                fail("__syncthreads in line " + std::to_string(line) + " by thread " +
                     std::to_string(self->thread_index.x) + ", in line " + std::to_string(other.line) + " by thread " +
                     std::to_string(other.thread_index.x));
            make_ready(other);
        }
        machine.at_barrier = 0;
        ++machine.generation;
    }
    let_others_run();
#if SIMT_TSAN
    __tsan_acquire(order);
#endif
}

// The value that lane `source_lane` of the same warp brings to the same line; waits for all of `lanes`.
template <class Value>
UNTRACED Value shuffle(unsigned lanes, Value value, unsigned source_lane, int line) {
    Fiber* self = machine.running;
    const unsigned lane = self->thread_index.x % 32;
    Fiber* warp = self - lane;
    const unsigned behind = machine.block_size.x - (self->thread_index.x - lane);
    const unsigned warp_lanes = behind < 32 ? behind : 32;
    self->state = IN_SHUFFLE;
    self->line = line;
    self->lanes = lanes;
    self->source_lane = source_lane;
    memcpy(&self->sent, &value, sizeof(Value));
    bool complete = lanes >> lane & 1;
    for (unsigned other = 0; other < 32; ++other)
        if (lanes >> other & 1)
            complete = complete && other < warp_lanes && warp[other].state == IN_SHUFFLE &&
                       warp[other].line == line && warp[other].lanes == lanes;
    if (complete)
        for (unsigned other = 0; other < warp_lanes; ++other)
            if (lanes >> other & 1) {
                warp[other].received = warp[warp[other].source_lane % 32].sent;
                make_ready(warp[other]);
            }
    let_others_run();
    memcpy(&value, &self->received, sizeof(Value));
    return value;
}

template <class Value>
UNTRACED Value shuffle_down(unsigned lanes, Value value, unsigned distance, int line) {
    const unsigned lane = machine.running->thread_index.x % 32;
    return shuffle(lanes, value, lane + distance < 32 ? lane + distance : lane, line);
}

UNTRACED inline void* shared_array(size_t bytes, int line) {
    for (int i = 0; i < machine.n_shared; ++i)
        if (machine.shared[i].line == line) return machine.shared[i].start;
    char* start = machine.shared_memory + machine.shared_used + SHARED_BORDER;
    machine.shared_used = (start + bytes + 15 - machine.shared_memory) / 16 * 16;
    if (machine.shared_used + SHARED_BORDER > SHARED_BYTES || machine.n_shared == MAX_SHARED_ARRAYS) {
        fprintf(stderr, "shared arrays of the block exceed %zu bytes or %d arrays in line %d\n", SHARED_BYTES,
                MAX_SHARED_ARRAYS, line);
        abort();
    }
#if SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(start, bytes);
#endif
    machine.shared[machine.n_shared++] = {line, start};
    return start;
}

UNTRACED inline int atomic_max(int* address, int value) {
    const int old = *address;
    if (value > old) *address = value;
    return old;
}

// --------------------------------------------------------------------------------------------------- Blocks and grids
UNTRACED inline std::string what_it_does(const Fiber& fiber) {
    const std::string thread = "thread " + std::to_string(fiber.thread_index.x);
    const std::string line = " in line " + std::to_string(fiber.line);
    if (fiber.state == AT_BARRIER) return thread + " waits at __syncthreads" + line;
    if (fiber.state == IN_SHUFFLE) return thread + " waits in a shuffle" + line;
    return thread + (fiber.state == RETURNED ? " has returned" : " is ready");
}

// Nobody is ready: two threads that wait for different things, or one that waits for a thread that has returned.
UNTRACED inline std::string describe_deadlock() {
    for (unsigned i = 0; i < machine.block_size.x; ++i)
        for (unsigned j = 0; j < machine.block_size.x; ++j) {
            const Fiber &fiber = machine.fibers[i], &other = machine.fibers[j];
            if (fiber.state != RETURNED && (other.state != fiber.state || other.line != fiber.line))
                return what_it_does(fiber) + ", " + what_it_does(other);
        }
    return what_it_does(machine.fibers[0]) + ", and so do all others: lanes of the mask are missing";
}

UNTRACED inline void prepare_block(unsigned block, unsigned threads) {
    machine.block_index.x = block;
    machine.at_barrier = machine.returned = machine.generation = 0;
    machine.n_shared = 0;
    machine.shared_used = 0;
    if (!machine.shared_memory) machine.shared_memory = static_cast<char*>(aligned_alloc(64, SHARED_BYTES));
#if SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(machine.shared_memory, SHARED_BYTES);
#endif
    memset(machine.shared_memory, 0xff, SHARED_BYTES);  // every float is NaN until someone writes it
#if SIMT_ASAN
    ASAN_POISON_MEMORY_REGION(machine.shared_memory, SHARED_BYTES);
#endif
    if (!machine.stacks) machine.stacks = static_cast<char*>(malloc((SIMT_TSAN ? threads : MAX_THREADS) * STACK_BYTES));
#if SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(machine.stacks, threads * STACK_BYTES);
#endif
    memset(machine.ready, 0, sizeof machine.ready);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = machine.fibers[i];
        fiber.thread_index.x = i;
        make_ready(fiber);
        fiber.line = 0;
        fiber.stack = machine.stacks + i * STACK_BYTES;
#if SIMT_TSAN
        fiber.tsan = __tsan_create_fiber(0);
#endif
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
}

UNTRACED inline void finish_block() {
#if SIMT_TSAN  // Stacks and shared memory used again would look like memory that two blocks race for; they are left to
               // the end of the (short) program, because freeing them looks like a write.
    for (unsigned i = 0; i < machine.block_size.x; ++i) __tsan_destroy_fiber(machine.fibers[i].tsan);
    machine.stacks = machine.shared_memory = nullptr;
#endif
}

UNTRACED inline bool run_block(unsigned block) {
    prepare_block(block, machine.block_size.x);
    let_others_run();  // returns when no thread can go on
    if (!machine.failed && machine.returned != machine.block_size.x) fail(describe_deadlock());
    if (machine.failed) machine.error += " (block " + std::to_string(block) + ")";
    finish_block();
    return !machine.failed;
}

UNTRACED inline bool run_grid() {
    std::vector<unsigned> blocks(machine.grid_size.x);
    const bool down = machine.order == SIMT_DESCENDING;
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = down ? blocks.size() - 1 - i : i;
    if (machine.order == SIMT_RANDOM)
        for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_bits() % i]);
    for (unsigned block : blocks)
        if (!run_block(block)) return false;
    return true;
}

// -------------------------------------------------------------------------------------------------------- Kernel table
struct Kernel {
    const char* name;
    void (*call)(void** parameters);
};

static std::vector<Kernel> kernels;

template <class... Types, size_t... I>
UNTRACED inline void call_with(void (*kernel)(Types...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<Types>*>(parameters[I])...);
}

template <class... Types>
UNTRACED inline void call_packed(void (*kernel)(Types...), void** parameters) {  // types: the kernel's own signature
    call_with(kernel, parameters, std::index_sequence_for<Types...>{});
}

struct Registration {
    Registration(const char* name, void (*call)(void**)) { kernels.push_back({name, call}); }
};

#define SIMT_KERNEL_AS(label, name) \
    static const simt::Registration register_##name( \
        label, [](void** parameters) { simt::call_packed(name, parameters); });
#define SIMT_KERNEL(name) SIMT_KERNEL_AS(#name, name)

}  // namespace simt

// -------------------------------------------------------------------------------------------------------- CUDA's names
#define threadIdx (simt::machine.running->thread_index)
#define blockIdx (simt::machine.block_index)
#define blockDim (simt::machine.block_size)
#define gridDim (simt::machine.grid_size)
#define SHARED(type, name, count) type* name = static_cast<type*>(simt::shared_array(sizeof(type) * (count), __LINE__))
#define __syncthreads() simt::barrier(__LINE__)
#define __shfl_xor_sync(lanes, value, distance) \
    simt::shuffle(lanes, value, simt::machine.running->thread_index.x % 32 ^ (distance), __LINE__)
#define __shfl_down_sync(lanes, value, distance) simt::shuffle_down(lanes, value, distance, __LINE__)
#define __shfl_sync(lanes, value, source) simt::shuffle(lanes, value, source, __LINE__)
#define atomicMax(address, value) simt::atomic_max(address, value)

// --------------------------------------------------------------------------------------------------------- simt_api.h
extern "C" {

UNTRACED int simt_launch(const char* name, unsigned grid, unsigned block, void** parameters, int order, uint64_t seed) {
    using simt::machine;
    machine.error.clear();
    machine.failed = false;
    machine.call = nullptr;
    for (const simt::Kernel& kernel : simt::kernels)
        if (!strcmp(kernel.name, name)) machine.call = kernel.call;
    if (!machine.call) machine.error = std::string("no kernel ") + name;
    if (block < 1 || block > 1024) machine.error = "block size " + std::to_string(block) + ", expected 1 to 1024";
    if (!machine.error.empty()) return 1;
    machine.parameters = parameters;
    machine.grid_size.x = grid;
    machine.block_size.x = block;
    machine.order = order;
    machine.random_state = seed;
#if SIMT_TSAN
    machine.host_tsan = __tsan_get_current_fiber();
#endif
    const bool done = simt::run_grid();
#if SIMT_TSAN
    __tsan_acquire(&machine.launch_end);
#endif
    return done ? 0 : 1;
}

int simt_has_kernel(const char* name) {
    for (const simt::Kernel& kernel : simt::kernels)
        if (!strcmp(kernel.name, name)) return 1;
    return 0;
}

const char* simt_error(void) { return simt::machine.error.c_str(); }
}

#include "simt_count.h"

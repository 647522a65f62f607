// Traffic of a kernel as the warps of a GPU would cause it, counted without a change to the kernel's text.
//
// -fsanitize=thread makes the compiler call a hook before every memory access of the kernel. Here the hooks are ours
// and the race detector itself is not linked. A hook knows the address, the size, which CUDA thread the emulation is
// running and, from where it returns to, the place in the program. So the n-th access of each lane of a warp at one
// place is one instruction of the warp, a "request". The memory system serves a request in sectors of 32 bytes: how
// many different ones it touches is what coalescing is about.
// This file itself is compiled without the hooks.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" void ladder_where(unsigned* block, unsigned* thread);  // emulate.cpp: who is running

namespace {

constexpr uintptr_t SECTOR_BYTES = 32;
constexpr unsigned MAX_WARPS = 32;

struct Request {
    std::array<uintptr_t, 32> first_byte{};  // by lane, 0 where the lane took no part
    uintptr_t bytes = 0;                     // of one lane
};

struct Warp {
    std::vector<Request> requests;
    std::array<size_t, 32> accesses{};  // of each lane so far
};

struct Place {  // a load or a store in the program
    const void* address;
    std::array<Warp, MAX_WARPS> warps;
};

struct Totals {
    long long bytes, requests, sectors;
    long long widest_bytes, widest_sectors;  // of the request that asked for most
};

uintptr_t watched_start = 0, watched_bytes = 0;
unsigned open_block = ~0u;
std::vector<Place> places[2];  // loads, stores
Totals totals[2];

void add(const Request& request, Totals& total)
{
    std::vector<uintptr_t> sectors;
    long long bytes = 0;
    for (uintptr_t first : request.first_byte) {
        if (first == 0) continue;
        bytes += request.bytes;
        for (uintptr_t sector = first / SECTOR_BYTES; sector <= (first + request.bytes - 1) / SECTOR_BYTES; ++sector)
            sectors.push_back(sector);
    }
    std::sort(sectors.begin(), sectors.end());
    const long long n_sectors = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    total.bytes += bytes;
    total.requests += 1;
    total.sectors += n_sectors;
    if (bytes > total.widest_bytes) total.widest_bytes = bytes, total.widest_sectors = n_sectors;
}

void close_block()  // blocks run one after another: a block's requests are complete when the next one begins
{
    for (int kind = 0; kind < 2; ++kind) {
        for (const Place& place : places[kind])
            for (const Warp& warp : place.warps)
                for (const Request& request : warp.requests) add(request, totals[kind]);
        places[kind].clear();
    }
}

void record(int kind, const void* address, size_t bytes, const void* where)
{
    const uintptr_t first = reinterpret_cast<uintptr_t>(address);
    if (first - watched_start >= watched_bytes) return;
    unsigned block, thread;
    ladder_where(&block, &thread);
    if (block != open_block) close_block();
    open_block = block;
    auto place = std::find_if(places[kind].begin(), places[kind].end(), [&](Place& p) { return p.address == where; });
    if (place == places[kind].end()) {
        places[kind].push_back({where, {}});
        place = places[kind].end() - 1;
    }
    Warp& warp = place->warps[thread / 32];
    const size_t number = warp.accesses[thread % 32]++;
    if (warp.requests.size() <= number) warp.requests.resize(number + 1);
    warp.requests[number].first_byte[thread % 32] = first;
    warp.requests[number].bytes = bytes;
}

}  // namespace

extern "C" {

// Counts from here on what lies in [start, start + bytes).
void ladder_watch(const void* start, long long bytes)
{
    watched_start = reinterpret_cast<uintptr_t>(start);
    watched_bytes = bytes;
    open_block = ~0u;
    for (int kind = 0; kind < 2; ++kind) {
        places[kind].clear();
        totals[kind] = {};
    }
}

// Of the loads, then of the stores: bytes, requests, sectors, and bytes and sectors of the widest request.
void ladder_counted(long long* figures)
{
    close_block();
    memcpy(figures, totals, sizeof totals);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define HOOKS(kind, access)                                                                         \
    void __tsan_##access##1(void* at) { record(kind, at, 1, __builtin_return_address(0)); }         \
    void __tsan_##access##2(void* at) { record(kind, at, 2, __builtin_return_address(0)); }         \
    void __tsan_##access##4(void* at) { record(kind, at, 4, __builtin_return_address(0)); }         \
    void __tsan_##access##8(void* at) { record(kind, at, 8, __builtin_return_address(0)); }         \
    void __tsan_##access##16(void* at) { record(kind, at, 16, __builtin_return_address(0)); }       \
    void __tsan_##access##_range(void* at, size_t bytes) { record(kind, at, bytes, __builtin_return_address(0)); }
HOOKS(0, read)
HOOKS(1, write)
HOOKS(0, unaligned_read)
HOOKS(1, unaligned_write)
}

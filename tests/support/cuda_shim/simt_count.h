// Traffic of a kernel, counted without a change to its text: -fsanitize=thread makes the compiler call a hook before
// each memory access; here the hooks are ours and the real run time is not linked.
#pragma once

namespace simt {

struct Watched {
    uintptr_t start;
    long long bytes, read, written;
};

constexpr int MAX_WATCHED = 16;
static Watched watched[MAX_WATCHED];
static int n_watched = 0;

UNTRACED inline void count(const void* address, size_t bytes, long long Watched::*counter) {
    const uintptr_t position = reinterpret_cast<uintptr_t>(address);
    for (int i = 0; i < n_watched; ++i)
        if (position >= watched[i].start && position - watched[i].start < static_cast<uintptr_t>(watched[i].bytes))
            watched[i].*counter += bytes;
}

}  // namespace simt

extern "C" {

UNTRACED void simt_watch(const void* start, long long bytes) {
    if (simt::n_watched == simt::MAX_WATCHED) abort();
    simt::watched[simt::n_watched++] = {reinterpret_cast<uintptr_t>(start), bytes, 0, 0};
}

UNTRACED void simt_counted(int index, long long* read, long long* written) {
#ifdef SIMT_COUNT
    *read = simt::watched[index].read;
    *written = simt::watched[index].written;
#else
    (void)index;
    *read = *written = -1;
#endif
}

UNTRACED void simt_forget_watched(void) { simt::n_watched = 0; }

#ifdef SIMT_COUNT
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define COUNT_HOOKS(bytes)                                                                                            \
    UNTRACED void __tsan_read##bytes(void* address) { simt::count(address, bytes, &simt::Watched::read); }            \
    UNTRACED void __tsan_write##bytes(void* address) { simt::count(address, bytes, &simt::Watched::written); }        \
    UNTRACED void __tsan_unaligned_read##bytes(void* address) { simt::count(address, bytes, &simt::Watched::read); }  \
    UNTRACED void __tsan_unaligned_write##bytes(void* address) { simt::count(address, bytes, &simt::Watched::written); }
COUNT_HOOKS(1)
COUNT_HOOKS(2)
COUNT_HOOKS(4)
COUNT_HOOKS(8)
COUNT_HOOKS(16)
UNTRACED void __tsan_read_range(void* address, size_t bytes) { simt::count(address, bytes, &simt::Watched::read); }
UNTRACED void __tsan_write_range(void* address, size_t bytes) { simt::count(address, bytes, &simt::Watched::written); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
#endif
}

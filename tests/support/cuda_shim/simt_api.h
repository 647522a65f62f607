// What a library built from a kernel text and simt_shim.h offers; plain C, for ctypes and for other C++ files.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SIMT_ASCENDING = 0, SIMT_DESCENDING = 1, SIMT_RANDOM = 2 };

// Runs all blocks of one launch. `parameters` as for cuLaunchKernel: one pointer to each argument; an int may be
// the lower half of 8 bytes. Returns 0, or 1 with a text in simt_error().
int simt_launch(const char* name, unsigned grid, unsigned block, void** parameters, int order, uint64_t seed);
int simt_has_kernel(const char* name);
const char* simt_error(void);

// Bytes that kernels read and write inside watched arrays; all counts are -1 in a library built without SIMT_COUNT.
void simt_watch(const void* start, long long bytes);           // the next free index, from 0
void simt_counted(int index, long long* read, long long* written);
void simt_forget_watched(void);

#ifdef __cplusplus
}
#endif

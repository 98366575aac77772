/* Work shared between the calling thread and helpers that are already awake. */
#pragma once
#include <stdint.h>

typedef void (*Task)(void *context, int64_t index, int thread);

/* Calls task(context, i, t) once for each i below `count`, from up to `threads` threads; t < threads tells them apart.
 * Returns when all have been done. Indices are taken in order, by whoever is free. */
void vrm_parallel(Task task, void *context, int64_t count, int threads);

/* The counters, and the time that a launch takes of the host. */
#include "fake_gpu.h"
#include <stdlib.h>
#include <time.h>

_Atomic long counters[COUNTERS];
static const char *const names[COUNTERS + 1] = {
  [TRITON] = "triton", [KERNELS] = "kernels", [GEMMS] = "gemms", [COPIES] = "copies",
  [MEMSETS] = "memsets", [WAITS] = "waits", [EVENTS] = "events", [MALLOCS] = "mallocs",
  [CAPTURED] = "captured", [REFUSED] = "refused", [GRAPHS] = "graphs", [REPLAYS] = "replays",
  [REPLAYED] = "replayed",
};

const char *fake_gpu_counter_name(int i) { return names[i]; } /* NULL after the last */
void fake_gpu_counts(long *out) {
  for (int i = 0; i < COUNTERS; i++) out[i] = counters[i];
}

static long launch_ns;
__attribute__((constructor)) static void read_environment(void) {
  const char *given = getenv("FAKE_GPU_LAUNCH_NS");
  launch_ns = given ? atol(given) : 0;
}
static long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000l + t.tv_nsec;
}
void spin(void) {
  if (!launch_ns) return;
  for (long end = now_ns() + launch_ns; now_ns() < end;) {}
}

static _Atomic uintptr_t handles = 0x10000;
void *handle(void) { return (void *)atomic_fetch_add(&handles, 16); }

static _Thread_local int last_error;
int fail(int error) {
  if (error) last_error = error;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
  int error = last_error;
  last_error = 0;
  return error;
}

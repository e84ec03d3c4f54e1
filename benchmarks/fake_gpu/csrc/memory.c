/* Memory: reserved address space of the host, of which only what copies touch becomes real.
 *
 * FAKE_GPU_COPIES=1 carries copies and memsets out; then what a program copied to the device can be copied back. Without it
 * they cost nothing, and a copy to the host delivers bytes of 1: true, and small finite numbers of every type.
 *
 * Kernels write nothing, so their results are whatever their memory held. One is worth a guess: a single byte is a flag,
 * such as "all are finite". It reads as 1 unless a copy or memset of a single byte set it. */
#include "fake_gpu.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RESERVED (1ull << 45) /* addresses are given once: what a process may ask for in all */
#define SEGMENT (2ull << 20)
#define CAPACITY (139ull << 30) /* an H200's */

static char *pool;
static int copies_are_real;
static _Atomic uint64_t given, in_use;
static uint64_t sizes[RESERVED / SEGMENT]; /* of each allocation, by its first segment */

__attribute__((constructor)) static void reserve(void) {
  const int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  pool = mmap(0, RESERVED, access, kind, -1, 0);
  if (pool == MAP_FAILED) abort();
  const char *asked = getenv("FAKE_GPU_COPIES");
  copies_are_real = asked && atoi(asked);
}

int on_device(const void *p) { return (const char *)p >= pool && (const char *)p < pool + RESERVED; }

void *take(size_t bytes) {
  bytes = (bytes + SEGMENT - 1) & ~(SEGMENT - 1);
  counters[MALLOCS]++;
  if (in_use + bytes > CAPACITY || given + bytes > RESERVED) return NULL;
  in_use += bytes;
  uint64_t at = atomic_fetch_add(&given, bytes);
  sizes[at / SEGMENT] = bytes;
  return pool + at;
}

static void give_back(void *p) {
  if (!p || !on_device(p)) return;
  uint64_t *size = &sizes[((char *)p - pool) / SEGMENT];
  madvise(p, *size, MADV_DONTNEED);
  in_use -= *size;
  *size = 0;
}

#define FLAGS 65536
static const char *_Atomic flags[FLAGS]; /* addresses of single bytes that were set; a newer one replaces an older */
static const char *_Atomic *flag_of(const void *p) { return &flags[((uintptr_t)p >> 9) % FLAGS]; }

void carry_out(struct transfer t) {
  static const char yes = 1;
  const int to_host = !on_device(t.to), from_host = t.from && !on_device(t.from);
  if (copies_are_real && t.bytes == 1) {
    if (t.from && !from_host && *flag_of(t.from) != t.from) t.from = &yes;
    if (!to_host) *flag_of(t.to) = t.to;
  }
  if (!t.from) {
    if (copies_are_real) memset(t.to, t.value, t.bytes);
  } else if (copies_are_real || (to_host && from_host)) {
    memmove(t.to, t.from, t.bytes);
  } else if (to_host) {
    memset(t.to, 1, t.bytes);
  }
}

/* ---------------- the runtime's functions ---------------- */
#undef cudaMalloc
#undef cudaMallocHost
static cudaError_t allocate(void **p, size_t bytes) {
  int error = unsafe_call();
  if (error) return error;
  *p = take(bytes);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaMalloc(void **p, size_t n) { return allocate(p, n); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) {
  *p = take(n);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *p) {
  int error = unsafe_call();
  if (!error) give_back(p);
  return error;
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) {
  give_back(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *unused, size_t *all) {
  *all = CAPACITY;
  *unused = CAPACITY - in_use;
  return cudaSuccess;
}
/* Pinned memory of the host: that it is pinned is all that is known of it. */
#define PINNED 4096
static struct { char *begin, *end; } pinned[PINNED];
static pthread_mutex_t pinning = PTHREAD_MUTEX_INITIALIZER;
static int is_pinned(const void *p) {
  int found = 0;
  pthread_mutex_lock(&pinning);
  for (int i = 0; i < PINNED && !found; i++) found = (char *)p >= pinned[i].begin && (char *)p < pinned[i].end;
  pthread_mutex_unlock(&pinning);
  return found;
}
static void note_pinned(void *freed, void *begin, size_t n) {
  pthread_mutex_lock(&pinning);
  for (int i = 0; i < PINNED; i++)
    if (pinned[i].begin == freed) {
      pinned[i].begin = begin;
      pinned[i].end = (char *)begin + n;
      break;
    }
  pthread_mutex_unlock(&pinning);
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) {
  int error = unsafe_call();
  if (error) return error;
  *p = aligned_alloc(4096, (n + 4095) & ~4095ul);
  if (!*p) return fail(cudaErrorMemoryAllocation);
  note_pinned(NULL, *p, n);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
  note_pinned(p, NULL, 0);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  *p = take(SEGMENT);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  const enum cudaMemoryType of_host = is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->type = on_device(p) ? cudaMemoryTypeDevice : of_host;
  a->devicePointer = (void *)p;
  return cudaSuccess;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute a, CUdeviceptr p) {
  if (!on_device((void *)p)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = p;
  return CUDA_SUCCESS;
}

/* A copy that waits is refused where a wait would be; one that is queued becomes part of the graph. */
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) {
  int error = unsafe_call();
  if (error) return error;
  counters[WAITS]++;
  return transferred(COPIES, (struct transfer){to, from, n, 0}, 0);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
  return transferred(COPIES, (struct transfer){to, from, n, 0}, s);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int d, const void *from, int e, size_t n, cudaStream_t s) {
  return transferred(COPIES, (struct transfer){to, from, n, 0}, s);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind k, cudaStream_t s) {
  int error = 0;
  for (size_t i = 0; i < height && !error; i++) {
    struct transfer row = {(char *)to + i * to_pitch, (const char *)from + i * from_pitch, width, 0};
    error = transferred(COPIES, row, s);
  }
  if (height) counters[COPIES] -= height - 1; /* one call */
  return error;
}
cudaError_t cudaMemset(void *to, int value, size_t n) {
  return transferred(MEMSETS, (struct transfer){to, NULL, n, value}, 0);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t s) {
  return transferred(MEMSETS, (struct transfer){to, NULL, n, value}, s);
}

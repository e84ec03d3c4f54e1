/* What the device says of itself: an H200 (sm_90). */
#include "fake_gpu.h"
#include <dlfcn.h>
#include <string.h>

static const struct { int attribute, value; } ATTRIBUTES[] = {
  {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
  {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
  {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
  {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
  {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
  {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
  {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
  {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
  {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
  {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
  {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
  {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 3201000},
  {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 6144},
  {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
  {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 62914560},
};
static int attribute(int wanted) {
  for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
    if (ATTRIBUTES[i].attribute == wanted) return ATTRIBUTES[i].value;
  return 1; /* most others ask whether something is supported */
}

/* ---------------- the driver's API ---------------- */
#define CONTEXT ((CUcontext)0x1000)
#define SAY(name, type, value) CUresult name(type *out) { *out = value; return CUDA_SUCCESS; }
#undef cuCtxPopCurrent
#undef cuCtxPushCurrent
SAY(cuDriverGetVersion, int, 13000)
SAY(cuDeviceGetCount, int, 1)
SAY(cuCtxGetCurrent, CUcontext, CONTEXT)
SAY(cuCtxPopCurrent, CUcontext, CONTEXT)
SAY(cuCtxGetDevice, CUdevice, 0)
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) {
  *v = 1 << 20;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *d, int i) {
  *d = 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = attribute(a);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  *c = CONTEXT;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *running) {
  *flags = 0;
  *running = 1;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = 66;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int threads, size_t shared) {
  *n = 4;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *m, CUtensorMapDataType t, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s,
                                CUtensorMapL2promotion l, CUtensorMapFloatOOBfill fill) {
  memset(m, 0, sizeof *m);
  return CUDA_SUCCESS;
}

/* ---------------- the runtime's API ---------------- */
#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  *p = (struct cudaDeviceProp){
    .name = "Fake H200", .totalGlobalMem = 139ull << 30, .major = 9, .minor = 0,
    .multiProcessorCount = 132, .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048,
    .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .maxBlocksPerMultiProcessor = 32,
    .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .sharedMemPerBlock = 49152,
    .sharedMemPerBlockOptin = 232448, .sharedMemPerMultiprocessor = 233472, .reservedSharedMemPerBlock = 1024,
    .totalConstMem = 65536, .l2CacheSize = 62914560, .memoryBusWidth = 6144, .textureAlignment = 512,
    .unifiedAddressing = 1, .concurrentKernels = 1, .canMapHostMemory = 1, .cooperativeLaunch = 1,
  };
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  *v = attribute((int)a); /* both APIs number them alike */
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int n, int d) {
  strncpy(text, "0000:00:00.0", n);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  *a = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90,
                                   .maxDynamicSharedSizeBytes = 232448};
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) {
  *n = 4;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared,
                                                                  unsigned flags) {
  *n = 4;
  return cudaSuccess;
}
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

static const struct { int error; const char *name, *text; } ERRORS[] = {
  {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
  {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
  {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
   "operation not permitted when stream is capturing"},
  {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
   "operation failed due to a previous error during capture"},
  {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge",
   "operation would result in a merge of separate capture sequences"},
  {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched", "capture was not ended in the same stream as it began"},
  {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined",
   "capturing stream has unjoined work"},
  {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
   "dependency created on uncaptured work in another stream"},
  {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
   "operation not permitted on an event last recorded in a capturing stream"},
  {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
   "attempt to terminate a thread-local capture sequence from another thread"},
};
static const char *told(int error, int name) {
  for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
    if (ERRORS[i].error == error) return name ? ERRORS[i].name : ERRORS[i].text;
  return error ? "an error that the fake GPU does not name" : "no error";
}
const char *cudaGetErrorName(cudaError_t e) { return told(e, 1); }
const char *cudaGetErrorString(cudaError_t e) { return told(e, 0); }
CUresult cuGetErrorName(CUresult e, const char **s) { *s = told(e, 1); return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = told(e, 0); return CUDA_SUCCESS; }

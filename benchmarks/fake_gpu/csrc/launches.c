/* Launches and cuBLAS products: counted, on their stream, and nothing else. */
#include "fake_gpu.h"
#include <stdlib.h>
#include <string.h>

/* ---------------- the driver's API: Triton ---------------- */
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) {
  return launched(TRITON, (cudaStream_t)c->hStream);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **p, void **x) {
  return launched(TRITON, (cudaStream_t)s);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream s, void **p) {
  return launched(TRITON, (cudaStream_t)s);
}
/* Loading machine code is forbidden next to a capture: the first launch of a Triton kernel inside one fails. */
static CUresult load(CUmodule *m) {
  *m = handle();
  return unsafe_call();
}
CUresult cuModuleLoad(CUmodule *m, const char *file) { return load(m); }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { return load(m); }
CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) { return load(m); }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = handle();
  return CUDA_SUCCESS;
}

/* ---------------- the runtime's API: PyTorch's own kernels ---------------- */
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t s) {
  return launched(KERNELS, s);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t s) {
  return launched(KERNELS, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
  return launched(KERNELS, c->stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t s) {
  return launched(KERNELS, s);
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
/* f<<<grid, block, shared, stream>>>() is a push, and in the stub it calls, a pop. */
struct call {
  dim3 grid, block;
  size_t shared;
  void *stream;
};
static _Thread_local struct call calls[8];
static _Thread_local unsigned depth;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared, struct CUstream_st *s) {
  calls[depth++ % 8] = (struct call){g, b, shared, s};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *shared, void *s) {
  struct call *c = &calls[--depth % 8];
  *g = c->grid;
  *b = c->block;
  *shared = c->shared;
  *(void **)s = c->stream;
  return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *f) { return handle(); }
char __cudaInitModule(void **h) { return 1; }

/* ---------------- cuBLAS: Triton's wheel has no header for it ---------------- */
struct blas { cudaStream_t stream; };
int cublasCreate_v2(struct blas **h) {
  *h = calloc(1, sizeof **h);
  return 0;
}
int cublasDestroy_v2(struct blas *h) {
  free(h);
  return 0;
}
int cublasSetStream_v2(struct blas *h, cudaStream_t s) {
  h->stream = s;
  return 0;
}
int cublasGetStream_v2(struct blas *h, cudaStream_t *s) {
  *s = h->stream;
  return 0;
}
int cublasGetMathMode(void *h, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { return *mode = 0; }
static int product(cudaStream_t s) { return launched(GEMMS, s) ? 13 : 0; } /* 13: CUBLAS_STATUS_EXECUTION_FAILED */
#define PRODUCT(name) int name(struct blas *h) { return product(h->stream); } /* other arguments are not looked at */
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
size_t cublasLtGetVersion(void) { return 130101; }
int cublasLtCreate(void **h) {
  *h = handle();
  return 0;
}
int cublasLtMatmulDescCreate(void **d, int compute, int scale) {
  *d = handle();
  return 0;
}
int cublasLtMatrixLayoutCreate(void **d, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *d = handle();
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **d) {
  *d = handle();
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int asked,
                                   char *results, int *found) {
  const size_t result = 96; /* bytes of a cublasLtMatmulHeuristicResult_t */
  memset(results, 0, asked > 0 ? result : 0);
  *found = 1;
  return 0;
}
int cublasLtMatmul(void *h, void *d, void *alpha, void *a, void *ad, void *b, void *bd, void *beta, void *c, void *cd,
                   void *out, void *outd, void *algorithm, void *workspace, size_t bytes, cudaStream_t s) {
  return product(s);
}

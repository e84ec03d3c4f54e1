/* A GPU that computes nothing: what the parts of the driver share. README.md, one folder up, says what is modelled. */
#pragma once
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* What is counted. counters.c names them; Python reads the names from there. */
enum counter {
  TRITON,    /* launches through the driver's API: Triton's */
  KERNELS,   /* launches through the runtime's API: PyTorch's */
  GEMMS,     /* cuBLAS products */
  COPIES,    /* cudaMemcpy and its variants */
  MEMSETS,
  WAITS,     /* the host waited for a stream, an event or the device */
  EVENTS,    /* events recorded */
  MALLOCS,   /* cudaMalloc, not PyTorch's reuse of what it holds */
  CAPTURED,  /* of the launches and products: those that went into a graph and did not run */
  REFUSED,   /* calls that a capture forbids */
  GRAPHS,    /* graphs instantiated */
  REPLAYS,   /* graphs launched */
  REPLAYED,  /* kernels in the graphs launched */
  COUNTERS
};
extern _Atomic long counters[COUNTERS];
void spin(void); /* what a launch costs a host: FAKE_GPU_LAUNCH_NS, by default nothing */

/* Memory (memory.c). */
void *take(size_t bytes); /* NULL: the device is full */
int on_device(const void *p);

/* One copy or memset, as a stream or a graph carries it out. */
struct transfer {
  void *to;
  const void *from; /* NULL: a memset */
  size_t bytes;
  int value;
};
void carry_out(struct transfer t);

/* Streams and captures (capture.c). A handle that PyTorch holds is the address of one of these. */
struct graph {
  _Atomic long kernels;
  long transfers, room;
  struct transfer *list;
};
struct capture {
  unsigned long long id;
  struct stream *origin;
  pthread_t thread;
  enum cudaStreamCaptureMode mode;
  int active, invalid;
  struct graph *graph;
  struct capture *next;
};
struct stream {
  struct capture *capture; /* NULL: work runs */
  _Atomic long work;       /* how much was put on it */
  long joined;             /* up to which work another stream of the capture waits for it */
  struct stream *next;
};
struct stream *stream_of(cudaStream_t handle);
int launched(enum counter kind, cudaStream_t handle);
int transferred(enum counter kind, struct transfer t, cudaStream_t handle);
int unsafe_call(void);        /* 0, or the error of a call that a capture somewhere forbids */
int fail(int error);          /* remembers an error for cudaGetLastError */
void *handle(void);           /* a handle that stands for nothing */

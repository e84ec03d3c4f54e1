/* Streams, events, and the capture of graphs with what it forbids.
 *
 * A capture belongs to the stream that began it and to those that waited for an event of it. Work on them is counted as
 * captured, and does not run. A forbidden call returns the error that CUDA returns and makes the capture invalid, so that
 * ending it fails too. */
#include "fake_gpu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct event {
  struct capture *capture; /* the capture it was last recorded in, or NULL */
  struct stream *stream;
  long work; /* of that stream, when it was recorded */
  double at_ms;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream legacy; /* the default stream */
static struct stream *streams = &legacy;
static struct capture *captures;
static _Atomic int active, active_global;
static unsigned long long ids;
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static _Thread_local int own; /* captures that this thread began, not in relaxed mode */

struct stream *stream_of(cudaStream_t handle) {
  return (uintptr_t)handle <= 2 ? &legacy : (struct stream *)handle;
}

/* ---------------- what is forbidden ---------------- */
static int invalidate(struct capture *only, int error) {
  pthread_mutex_lock(&lock);
  for (struct capture *c = captures; c; c = c->next) {
    const int meant = only ? c == only : c->mode != cudaStreamCaptureModeRelaxed;
    if (c->active && meant) c->invalid = 1;
  }
  pthread_mutex_unlock(&lock);
  counters[REFUSED]++;
  return fail(error);
}
/* The rule of cudaThreadExchangeStreamCaptureMode for calls that are unsafe next to a capture. */
int unsafe_call(void) {
  if (!active || thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  if (own || (thread_mode == cudaStreamCaptureModeGlobal && active_global))
    return invalidate(NULL, cudaErrorStreamCaptureUnsupported);
  return 0;
}
static int unsafe_on(struct stream *s) {
  if (s->capture) return invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
  return unsafe_call();
}
static int unsafe_for(struct event *e) {
  if (e->capture) return invalidate(e->capture, cudaErrorCapturedEvent);
  return unsafe_call();
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

/* ---------------- work ---------------- */
int launched(enum counter kind, cudaStream_t handle) {
  struct stream *s = stream_of(handle);
  struct capture *c = s->capture;
  counters[kind]++;
  if (!c) {
    spin();
    return 0;
  }
  if (c->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  s->work++;
  counters[CAPTURED]++;
  c->graph->kernels++;
  return 0;
}
int transferred(enum counter kind, struct transfer t, cudaStream_t handle) {
  struct stream *s = stream_of(handle);
  struct capture *c = s->capture;
  counters[kind]++;
  if (!c) {
    spin();
    carry_out(t);
    return 0;
  }
  if (c->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  s->work++;
  pthread_mutex_lock(&lock);
  struct graph *g = c->graph;
  if (g->transfers == g->room) {
    g->room = 2 * g->room + 64;
    g->list = realloc(g->list, g->room * sizeof *g->list);
  }
  g->list[g->transfers++] = t;
  pthread_mutex_unlock(&lock);
  return 0;
}

/* ---------------- streams and events ---------------- */
static cudaError_t new_stream(cudaStream_t *out) {
  struct stream *s = calloc(1, sizeof *s);
  pthread_mutex_lock(&lock);
  s->next = streams;
  streams = s;
  pthread_mutex_unlock(&lock);
  *out = (cudaStream_t)s;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_stream(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return new_stream(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { return new_stream(s); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
  *p = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s) { return unsafe_on(stream_of(s)); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  counters[WAITS]++;
  return unsafe_on(stream_of(s));
}
cudaError_t cudaDeviceSynchronize(void) {
  counters[WAITS]++;
  return active ? invalidate(NULL, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
  if (!stream_of(s)->capture) f(data);
  return cudaSuccess;
}

static cudaError_t new_event(cudaEvent_t *e) {
  *e = (cudaEvent_t)calloc(1, sizeof(struct event));
  return cudaSuccess;
}
#undef cudaEventCreateWithFlags
cudaError_t cudaEventCreate(cudaEvent_t *e) { return new_event(e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return new_event(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  free(e);
  return cudaSuccess;
}
static cudaError_t record(cudaEvent_t handle, cudaStream_t on) {
  struct event *e = (struct event *)handle;
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  e->stream = stream_of(on);
  e->capture = e->stream->capture;
  e->work = e->stream->work;
  e->at_ms = t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
  counters[EVENTS]++;
  return e->capture && e->capture->invalid ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return record(e, s); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return record(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return unsafe_for((struct event *)e); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  counters[WAITS]++;
  return unsafe_for((struct event *)e);
}
/* A device that does nothing has no time of its own: the host's between the two records. */
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  const double taken = ((struct event *)b)->at_ms - ((struct event *)a)->at_ms;
  *ms = taken > 1e-4 ? taken : 1e-4;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  struct stream *s = stream_of(handle);
  struct event *e = (struct event *)event;
  struct capture *of = e->capture && e->capture->active ? e->capture : NULL;
  if (s->capture && s->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (!e->stream) return cudaSuccess; /* never recorded: nothing to wait for */
  if (!of) return s->capture ? invalidate(s->capture, cudaErrorStreamCaptureIsolation) : cudaSuccess;
  if (s->capture && s->capture != of) return invalidate(s->capture, cudaErrorStreamCaptureMerge);
  if (!s->capture) { /* the stream is forked into the capture */
    s->joined = s->work;
    s->capture = of;
  }
  if (e->stream != s && e->work > e->stream->joined) e->stream->joined = e->work;
  return cudaSuccess;
}

/* ---------------- captures ---------------- */
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  struct stream *s = stream_of(handle);
  if (s == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
  if (s->capture) return fail(cudaErrorIllegalState);
  struct capture *c = calloc(1, sizeof *c); /* kept: events may point to it */
  c->origin = s;
  c->thread = pthread_self();
  c->mode = mode;
  c->active = 1;
  c->graph = calloc(1, sizeof *c->graph);
  pthread_mutex_lock(&lock);
  c->id = ++ids;
  c->next = captures;
  captures = c;
  pthread_mutex_unlock(&lock);
  s->capture = c;
  own += mode != cudaStreamCaptureModeRelaxed;
  active_global += mode == cudaStreamCaptureModeGlobal;
  active++;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  struct stream *s = stream_of(handle);
  struct capture *c = s->capture;
  *graph = NULL;
  if (!c) return fail(cudaErrorIllegalState);
  if (c->origin != s) return invalidate(c, cudaErrorStreamCaptureUnmatched);
  const int relaxed = c->mode == cudaStreamCaptureModeRelaxed;
  if (!relaxed && !pthread_equal(c->thread, pthread_self()))
    return invalidate(c, cudaErrorStreamCaptureWrongThread);
  int unjoined = 0;
  pthread_mutex_lock(&lock);
  for (struct stream *one = streams; one; one = one->next)
    if (one->capture == c) {
      unjoined |= one != s && one->work > one->joined;
      one->capture = NULL;
    }
  c->active = 0;
  pthread_mutex_unlock(&lock);
  own -= !relaxed;
  active_global -= c->mode == cudaStreamCaptureModeGlobal;
  active--;
  if (c->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (unjoined) return fail(cudaErrorStreamCaptureUnjoined);
  *graph = (cudaGraph_t)c->graph;
  return cudaSuccess;
}
static enum cudaStreamCaptureStatus status(cudaStream_t handle) {
  struct capture *c = stream_of(handle)->capture;
  if (!c) return cudaStreamCaptureStatusNone;
  return c->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *out) {
  *out = status(s);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *out, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  struct capture *c = stream_of(s)->capture;
  *out = status(s);
  if (id) *id = c ? c->id : 0;
  if (graph) *graph = c ? (cudaGraph_t)c->graph : NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  struct graph *g = (struct graph *)graph;
  *count = g->kernels + g->transfers;
  return cudaSuccess;
}

/* An instantiated graph is the graph: destroying either frees nothing. */
#undef cudaGraphInstantiate
static cudaError_t instantiate(cudaGraphExec_t *out, cudaGraph_t graph) {
  int error = unsafe_call();
  if (error) return error;
  counters[GRAPHS]++;
  *out = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags) {
  return instantiate(e, g);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags) {
  return instantiate(e, g);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  struct graph *g = (struct graph *)exec;
  struct stream *on = stream_of(s);
  if (on->capture) return invalidate(on->capture, cudaErrorStreamCaptureUnsupported);
  counters[REPLAYS]++;
  counters[REPLAYED] += g->kernels;
  spin();
  for (long i = 0; i < g->transfers; i++) carry_out(g->list[i]);
  return cudaSuccess;
}

// A CUDA runtime, cuBLAS and cuDNN that compute nothing. Preloaded, they make torch's CUDA build see
// one NVIDIA H200 on a machine without a GPU: torch chooses kernels, compiles and launches as it
// would there. What it asks for is counted and, if wanted, listed.
//
// Device memory is address space that nobody writes: it reads as zeros, and so does a copy to the
// host. Everything is done at once, unless nullgpu_lag() says how far the device is behind.
//
//   nullgpu_counts(out)   the counts since the start, in the order of `enum Kind`
//   nullgpu_log(path)     list every event in this file from now on; NULL ends the list
//   nullgpu_lag(n)        an event is reached only n launches after it was recorded
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef cudaError_t E;
static E last;

// --- counts, and the list ---

// `PAGEABLE`: copies from or to host memory that is not pinned, H2D and D2H alike: the host waits
// for these. `LAUNCH` includes products and what a replayed graph holds, not Triton's kernels.
enum Kind { LAUNCH, PRODUCT, TRITON, SYNC, H2D, D2H, D2D, PAGEABLE, MEMSET, MALLOC, REPLAY, KINDS };
typedef struct { atomic_long of[KINDS]; } Counts;

static Counts total;
FILE *nullgpu_list;
#define LOG(...) do { if (nullgpu_list) fprintf(nullgpu_list, __VA_ARGS__); } while (0)

void nullgpu_counts(long *out) { for (int i = 0; i < KINDS; i++) out[i] = total.of[i]; }
void nullgpu_log(const char *path) {
  FILE *old = nullgpu_list;
  nullgpu_list = path ? fopen(path, "w") : NULL;
  if (old) fclose(old);
}

// --- streams, events and graphs ---

static struct { cudaStream_t stream; unsigned long id; Counts *graph; } capture;

void nullgpu_count(enum Kind kind) {
  Counts *to = capture.graph && kind != MALLOC ? capture.graph : &total;
  to->of[kind]++;
}

static long lag;
typedef struct { long recorded; } Event;
void nullgpu_lag(long n) { lag = n; }
static long issued(void) { return total.of[LAUNCH] + total.of[TRITON]; }
static atomic_long waited_for;  // what was issued before the last wait is done
static E refused(void) { return last = cudaErrorStreamCaptureUnsupported; }
static E wait(const char *what) {
  waited_for = issued();
  total.of[SYNC]++;
  LOG("SYNC %s\n", what);
  return cudaSuccess;
}

E cudaStreamCreate(cudaStream_t *s) { *s = malloc(1); return 0; }
E cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = malloc(1); return 0; }
E cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = malloc(1); return 0; }
E cudaStreamDestroy(cudaStream_t s) { return 0; }
E cudaStreamQuery(cudaStream_t s) { return 0; }
E cudaStreamSynchronize(cudaStream_t s) {
  return capture.graph && s == capture.stream ? refused() : wait("stream");
}
E cudaDeviceSynchronize(void) { return capture.graph ? refused() : wait("device"); }
E cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { return 0; }
E cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return 0; }
E cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
E cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) { f(data); return 0; }

E cudaEventCreate(cudaEvent_t *e) { *e = calloc(1, sizeof(Event)); return 0; }
E cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return cudaEventCreate(e); }
E cudaEventDestroy(cudaEvent_t e) { free(e); return 0; }
E cudaEventRecord(cudaEvent_t e, cudaStream_t s) { ((Event *)e)->recorded = issued(); return 0; }
E cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaEventRecord(e, s); }
E cudaEventQuery(cudaEvent_t e) {
  long at = ((Event *)e)->recorded;
  return at <= waited_for || issued() >= at + lag ? cudaSuccess : cudaErrorNotReady;
}
E cudaEventSynchronize(cudaEvent_t e) {
  if (capture.graph) return refused();
  return cudaEventQuery(e) == cudaSuccess ? cudaSuccess : wait("event");
}
E cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1.f; return 0; }

static unsigned long graphs;
E cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  capture.stream = s, capture.id = ++graphs, capture.graph = calloc(1, sizeof(Counts));
  LOG("CAPTURE begins\n");
  return 0;
}
E cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  *g = (cudaGraph_t)capture.graph;
  capture.graph = NULL;
  LOG("CAPTURE ends\n");
  return 0;
}
E cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
  *c = capture.graph && s == capture.stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
E cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id,
                           cudaGraph_t *g, const cudaGraphNode_t **nodes,
                           const cudaGraphEdgeData **edges, size_t *n) {
  cudaStreamIsCapturing(s, c);
  if (id) *id = capture.id;
  if (g) *g = (cudaGraph_t)capture.graph;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (n) *n = 0;
  return 0;
}
E cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return 0; }
E cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) { *n = ((Counts *)g)->of[LAUNCH] + ((Counts *)g)->of[TRITON]; return 0; }
E cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long f) {
  *x = malloc(sizeof(Counts));
  memcpy((void *)*x, (void *)g, sizeof(Counts));
  return 0;
}
E cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long f) { return cudaGraphInstantiate(x, g, f); }
E cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
  for (int i = 0; i < KINDS; i++) total.of[i] += ((Counts *)x)->of[i];
  nullgpu_count(REPLAY);
  LOG("REPLAY of %ld kernels\n", ((Counts *)x)->of[LAUNCH] + ((Counts *)x)->of[TRITON]);
  return 0;
}
E cudaGraphExecDestroy(cudaGraphExec_t x) { free((void *)x); return 0; }
E cudaGraphDestroy(cudaGraph_t g) { free((void *)g); return 0; }

// --- kernels: registered, with their names, when their library is loaded ---

enum { MOST_KERNELS = 400000 };
static struct { const void *host; const char *name; } kernel[MOST_KERNELS];
static int kernels;

static const char *name_of(const void *host) {
  for (int i = 0; i < kernels; i++) if (kernel[i].host == host) return kernel[i].name;
  return "?";
}
void **__cudaRegisterFatBinary(void *p) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterVar() {}
void __cudaRegisterFunction(void **h, const char *host, char *dev, const char *name, int limit,
                            void *a, void *b, void *c, void *d, int *w) {
  if (kernels == MOST_KERNELS) return;
  kernel[kernels].host = host;
  kernel[kernels++].name = name;
}
E __cudaGetKernel(void **k, const void *host) { *k = (void *)host; return 0; }

// The arguments of a launch in <<<…>>> pass through here.
static __thread struct { dim3 grid, block; size_t shared; void *stream; } call[8];
static __thread int calls;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  call[calls].grid = grid, call[calls].block = block;
  call[calls].shared = shared, call[calls++].stream = stream;
  return 0;
}
E __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  calls--;
  *grid = call[calls].grid, *block = call[calls].block;
  *shared = call[calls].shared, *(void **)stream = call[calls].stream;
  return 0;
}
static E launched(const void *k, dim3 grid) {
  nullgpu_count(LAUNCH);
  LOG("KERNEL %s grid=%u,%u,%u\n", name_of(k), grid.x, grid.y, grid.z);
  return 0;
}
E __cudaLaunchKernel(void *k, dim3 g, dim3 b, void **a, size_t n, void *s) { return launched(k, g); }
E cudaLaunchKernel(const void *k, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return launched(k, g); }
E cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *k, void **a) { return launched(k, c->gridDim); }
E cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *k) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return 0;
}
E cudaFuncSetAttribute(const void *k, enum cudaFuncAttribute a, int v) { return 0; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *k, int b, size_t s, unsigned f) { *n = 2; return 0; }

// --- the device: what an H200 says of itself ---

E cudaGetDeviceCount(int *n) { *n = 1; return 0; }
E cudaGetDevice(int *d) { *d = 0; return 0; }
E cudaSetDevice(int d) { return 0; }
E cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
E cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
E cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200");
  p->major = 9, p->minor = 0;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = 150000000000ul;
  p->totalConstMem = 65536;
  p->l2CacheSize = 62914560;
  p->memoryBusWidth = 6144;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->concurrentKernels = p->unifiedAddressing = 1;
  p->textureAlignment = 512;
  return 0;
}
E cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 233472; break;
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *v = 0; break;
    case cudaDevAttrMaxGridDimY: *v = 65535; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    default: *v = 1;
  }
  return 0;
}
E cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
E cudaDeviceGetPCIBusId(char *p, int n, int d) { strncpy(p, "0000:00:00.0", n); return 0; }
E cudaMemGetInfo(size_t *free, size_t *all) { *free = 148000000000ul; *all = 150000000000ul; return 0; }
E cudaGetLastError(void) { E e = last; last = 0; return e; }
E cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(E e) { return e == cudaErrorStreamCaptureUnsupported ? "not permitted while a stream is captured" : "an error of the null GPU"; }
const char *cudaGetErrorName(E e) { return "nullgpu"; }
E cudaGetSymbolAddress(void **p, const void *s) { *p = (void *)s; return 0; }
E cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags,
                                   enum cudaDriverEntryPointQueryResult *found) {
  *f = 0;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  return 0;
}
E cudaProfilerStart(void) { return 0; }
E cudaProfilerStop(void) { return 0; }

// --- memory ---

enum { MOST_BLOCKS = 100000 };
typedef struct { struct { char *at; size_t size; } block[MOST_BLOCKS]; int n; } Table;
static Table device, pinned;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t pages(size_t n) { return n ? (n + 4095) & ~4095ul : 4096; }
static void *reserve(size_t n) {
  void *p = mmap(0, pages(n), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? NULL : p;
}
static int add(Table *t, void *p, size_t n) {
  pthread_mutex_lock(&lock);
  int room = t->n < MOST_BLOCKS;
  if (room) t->block[t->n].at = p, t->block[t->n++].size = n;
  pthread_mutex_unlock(&lock);
  return room;
}
static size_t drop(Table *t, void *p) {  // its size, 0 where it is not in the table
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < t->n && !size; i++)
    if (t->block[i].at == p) size = pages(t->block[i].size), t->block[i] = t->block[--t->n];
  pthread_mutex_unlock(&lock);
  return size;
}
static int in(Table *t, const void *p) {
  int found = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < t->n && !found; i++)
    found = (char *)p >= t->block[i].at && (char *)p < t->block[i].at + t->block[i].size;
  pthread_mutex_unlock(&lock);
  return found;
}
static atomic_size_t used;
static E take(Table *t, void **p, size_t n) {
  if (t == &device && used + pages(n) > 148000000000ul) return last = cudaErrorMemoryAllocation;
  *p = reserve(n);
  if (!*p || !add(t, *p, n)) return last = cudaErrorMemoryAllocation;
  if (t == &device) used += pages(n);
  return 0;
}
static E give(Table *t, void *p) {
  size_t size = p ? drop(t, p) : 0;
  if (size) munmap(p, size);
  if (t == &device) used -= size;
  return 0;
}

E cudaMalloc(void **p, size_t n) { nullgpu_count(MALLOC); LOG("MALLOC %zu\n", n); return take(&device, p, n); }
E cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
E cudaFree(void *p) { return give(&device, p); }
E cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
E cudaHostAlloc(void **p, size_t n, unsigned f) { return take(&pinned, p, n); }
E cudaFreeHost(void *p) { return give(&pinned, p); }
E cudaHostRegister(void *p, size_t n, unsigned f) { return add(&pinned, p, n) ? 0 : cudaErrorMemoryAllocation; }
E cudaHostUnregister(void *p) { drop(&pinned, p); return 0; }
E cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = in(&device, p) ? cudaMemoryTypeDevice
          : in(&pinned, p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = a->hostPointer = (void *)p;
  return 0;
}

static void copy(void *to, const void *from, size_t n) {
  int down = in(&device, from), up = in(&device, to);
  if (up && down) { nullgpu_count(D2D); LOG("COPY d2d %zu\n", n); return; }
  if (!up && !down) { memcpy(to, from, n); return; }
  int slow = !in(&pinned, up ? from : to);
  nullgpu_count(up ? H2D : D2H);
  if (slow) nullgpu_count(PAGEABLE);
  LOG("COPY %s %zu %s\n", up ? "h2d" : "d2h", n, slow ? "PAGEABLE" : "pinned");
  if (down) memset(to, 0, n);
}
E cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { copy(to, from, n); return capture.graph ? refused() : wait("copy"); }
E cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { copy(to, from, n); return 0; }
E cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h, enum cudaMemcpyKind k, cudaStream_t s) { copy(to, from, w); return 0; }
E cudaMemcpyToSymbol(const void *a, const void *b, size_t n, size_t at, enum cudaMemcpyKind k) { return 0; }
E cudaMemset(void *p, int v, size_t n) { nullgpu_count(MEMSET); LOG("MEMSET %zu\n", n); return 0; }
E cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) { return cudaMemset(p, v, n); }

// --- cuBLAS: the products that torch asks for ---

typedef int S;
static int math_mode;
static S product(void) { nullgpu_count(PRODUCT); nullgpu_count(LAUNCH); return 0; }

S cublasCreate_v2(void **h) { *h = &math_mode; return 0; }
S cublasDestroy_v2(void *h) { return 0; }
S cublasSetStream_v2(void *h, void *s) { return 0; }
S cublasSetWorkspace_v2(void *h, void *w, size_t n) { return 0; }
S cublasSetMathMode(void *h, int m) { math_mode = m; return 0; }
S cublasGetMathMode(void *h, int *m) { *m = math_mode; return 0; }
S cublasSetPointerMode_v2(void *h, int m) { return 0; }
S cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return 0; }
S cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *A, int at,
               int lda, const void *B, int bt, int ldb, const void *beta, void *C, int ct, int ldc,
               int compute, int algorithm) {
  LOG("PRODUCT m=%d n=%d k=%d ta=%d tb=%d type=%d out=%d\n", m, n, k, ta, tb, at, ct);
  return product();
}
S cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *A,
                 int lda, const float *B, int ldb, const float *beta, float *C, int ldc) {
  LOG("PRODUCT m=%d n=%d k=%d ta=%d tb=%d type=0 out=0\n", m, n, k, ta, tb);
  return product();
}
S cublasGemmStridedBatchedEx() { LOG("PRODUCT batched\n"); return product(); }
S cublasSgemmStridedBatched() { LOG("PRODUCT batched type=0\n"); return product(); }
S cublasSdot_v2() { LOG("PRODUCT dot\n"); return product(); }
S cublasSgemv_v2() { LOG("PRODUCT vector\n"); return product(); }

// A layout's memory is its type and sides, so that a product can be listed with them.
typedef struct { int type; unsigned long rows, columns; } Layout;
S cublasLtMatmulDescCreate(void **d, int compute, int scale) { *d = malloc(64); return 0; }
S cublasLtMatmulDescDestroy(void *d) { free(d); return 0; }
S cublasLtMatmulDescSetAttribute(void *d, int a, const void *v, size_t n) { return 0; }
S cublasLtMatmulPreferenceCreate(void **d) { *d = malloc(64); return 0; }
S cublasLtMatmulPreferenceDestroy(void *d) { free(d); return 0; }
S cublasLtMatmulPreferenceSetAttribute(void *d, int a, const void *v, size_t n) { return 0; }
S cublasLtMatrixLayoutCreate(void **d, int type, unsigned long rows, unsigned long columns, long ld) {
  Layout *l = *d = malloc(64);
  *l = (Layout){type, rows, columns};
  return 0;
}
S cublasLtMatrixLayoutDestroy(void *d) { free(d); return 0; }
S cublasLtMatrixLayoutSetAttribute(void *d, int a, const void *v, size_t n) { return 0; }
S cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *p,
                                 int asked, void *result, int *found) {
  memset(result, 0, 64);
  *found = 1;
  return 0;
}
S cublasLtMatmul(void *h, void *op, void *alpha, void *A, Layout *a, void *B, Layout *b, void *beta,
                 void *C, Layout *c, void *D, Layout *d) {
  LOG("PRODUCT m=%lu n=%lu k=%lu type=%d,%d out=%d\n", d->rows, d->columns,
      d->rows == a->columns ? a->rows : a->columns, a->type, b->type, d->type);
  return product();
}

// --- cuDNN: its attention, by the interface of graphs. One engine is had for everything ---

enum { INT64 = 3, NUMERICAL_NOTE = 11, BEHAVIOR_NOTE = 19, INT32 = 23 };  // cudnn_graph.h
S cudnnCreate(void **h) { *h = malloc(1); return 0; }
S cudnnDestroy(void *h) { free(h); return 0; }
S cudnnSetStream(void *h, void *s) { return 0; }
S cudnnBackendCreateDescriptor(int type, void **d) { *d = calloc(1, 16); return 0; }
S cudnnBackendDestroyDescriptor(void *d) { free(d); return 0; }
S cudnnBackendSetAttribute(void *d, int name, int type, long n, const void *v) { return 0; }
S cudnnBackendFinalize(void *d) { return 0; }
S cudnnBackendGetAttribute(void *d, int name, int type, long asked, long *n, void *v) {
  if (n) *n = type != NUMERICAL_NOTE && type != BEHAVIOR_NOTE;
  if (v && asked && type == INT64) *(long *)v = 0;  // a workspace's size, among others
  if (v && asked && type == INT32) *(int *)v = 0;
  return 0;
}
S cudnnBackendExecute(void *h, void *plan, void *pack) {
  nullgpu_count(LAUNCH);
  LOG("KERNEL cudnn\n");
  return 0;
}

// The driver's library, libcuda.so.1, as far as Triton needs it to load what it compiled and to
// launch it. It is one library with runtime.c, whose counts these launches are in.
#include <stdio.h>
#include <string.h>

enum { TRITON = 2 };  // of runtime.c's `enum Kind`
void nullgpu_count(int kind);
extern FILE *nullgpu_list;

// A function's handle is its name.
enum { MOST = 20000 };
static char names[MOST][256];
static int named;
int cuModuleLoadData(void **m, const void *image) { *m = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) {
  if (named == MOST) return 2;  // out of memory
  strncpy(names[named], name, 255);
  *f = names[named++];
  return 0;
}
int cuFuncGetAttribute(int *v, int a, void *f) {
  *v = a == 4 ? 32 : a == 0 ? 1024 : 0;  // registers, threads a block
  return 0;
}
static int launched(const char *name, unsigned x, unsigned y, unsigned z) {
  nullgpu_count(TRITON);
  if (nullgpu_list) fprintf(nullgpu_list, "TRITON %s grid=%u,%u,%u\n", name, x, y, z);
  return 0;
}
int cuLaunchKernelEx(const unsigned *grid, void *f, void **args, void **extra) {
  return launched(f, grid[0], grid[1], grid[2]);
}
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z) { return launched(f, x, y, z); }
int cuLaunchCooperativeKernel(void *f, unsigned x, unsigned y, unsigned z) { return launched(f, x, y, z); }

int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "an error of the null GPU"; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
  switch (a) {
    case 8: *v = 49152; break;     // shared memory a block
    case 10: *v = 32; break;       // warp
    case 12: *v = 65536; break;    // registers a block
    case 13: *v = 1980000; break;  // clock, kHz
    case 16: *v = 132; break;      // multiprocessors
    case 36: *v = 3201000; break;  // memory clock, kHz
    case 37: *v = 6144; break;     // memory bus, bits
    case 75: *v = 9; break;        // compute capability
    case 76: *v = 0; break;
    case 81: *v = 233472; break;   // shared memory a multiprocessor
    case 82: *v = 65536; break;    // registers a multiprocessor
    case 97: *v = 232448; break;   // shared memory a block, opted in
    default: *v = 1;
  }
  return 0;
}
int cuPointerGetAttribute(void *v, int a, unsigned long p) { *(unsigned long *)v = p; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 2; return 0; }
int cuOccupancyMaxActiveClusters(int *n) { *n = 16; return 0; }
int cuGetProcAddress(const char *s, void **p, int v, unsigned long f) { *p = 0; return 500; }
int cuGetProcAddress_v2(const char *s, void **p, int v, unsigned long f, void *r) { *p = 0; return 500; }

#define NOTHING(name) int name() { return 0; }
NOTHING(cuInit)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetName)
NOTHING(cuDevicePrimaryCtxGetState)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxPopCurrent_v2)
NOTHING(cuCtxPushCurrent_v2)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuCtxSynchronize)
NOTHING(cuFuncGetModule)
NOTHING(cuFuncGetName)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuMemGetInfo_v2)
NOTHING(cuModuleLoad)
NOTHING(cuModuleLoadDataEx)
NOTHING(cuModuleUnload)
NOTHING(cuStreamSynchronize)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapReplaceAddress)

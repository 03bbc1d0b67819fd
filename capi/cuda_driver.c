#include "cuda_driver.h"

#include <stdio.h>

#if defined(__linux__)

#include <dlfcn.h>
#include <pthread.h>

/* Names, results and arguments as in NVIDIA's manual of the driver API. A CUdeviceptr is an unsigned 64-bit number. */
#define FUNCTIONS(X)                                                                                                       \
    X(cuInit, (unsigned))                                                                                                  \
    X(cuDriverGetVersion, (int *))                                                                                         \
    X(cuDeviceGetCount, (int *))                                                                                           \
    X(cuDeviceGet, (int *, int))                                                                                           \
    X(cuDeviceGetAttribute, (int *, int, int))                                                                             \
    X(cuCtxGetCurrent, (void **))                                                                                          \
    X(cuCtxGetDevice, (int *))                                                                                             \
    X(cuGetErrorName, (int, const char **))                                                                                \
    X(cuModuleLoadData, (void **, const void *))                                                                           \
    X(cuModuleGetFunction, (void **, void *, const char *))                                                                \
    X(cuLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **)) \
    X(cuMemHostAlloc, (void **, size_t, unsigned))                                                                         \
    X(cuMemFreeHost, (void *))                                                                                             \
    X(cuMemAlloc_v2, (uint64_t *, size_t))                                                                                 \
    X(cuMemFree_v2, (uint64_t))                                                                                            \
    X(cuPointerGetAttribute, (void *, int, uint64_t))                                                                      \
    X(cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, void *))                                                      \
    X(cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, void *))                                                            \
    X(cuMemsetD32Async, (uint64_t, unsigned, size_t, void *))                                                              \
    X(cuStreamCreate, (void **, unsigned))                                                                                 \
    X(cuStreamDestroy_v2, (void *))                                                                                        \
    X(cuStreamSynchronize, (void *))                                                                                       \
    X(cuStreamWaitEvent, (void *, void *, unsigned))                                                                       \
    X(cuEventCreate, (void **, unsigned))                                                                                  \
    X(cuEventRecord, (void *, void *))                                                                                     \
    X(cuEventSynchronize, (void *))                                                                                        \
    X(cuEventDestroy_v2, (void *))

#define MEMBER(name, arguments) int(*name) arguments;
static struct { FUNCTIONS(MEMBER) } cu;

enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, MEMORY_TYPE = 2, MEMORY_HOST = 1, PORTABLE = 1, NON_BLOCKING = 1, NO_TIMING = 2 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char missing[256];

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(missing, sizeof missing, "there is no CUDA driver: %.180s", dlerror());
        return;
    }
#define FIND(name, arguments)                                                              \
    if (missing[0] == 0 && (*(void **)&cu.name = dlsym(library, #name)) == NULL) {         \
        snprintf(missing, sizeof missing, "the CUDA driver is too old: it lacks %s", #name); \
    }
    FUNCTIONS(FIND)
}

const char *cuda_load(void) {
    pthread_once(&once, load);
    return missing[0] == 0 ? NULL : missing;
}

int cuda_init(void) { return cu.cuInit(0); }
int cuda_driver_version(int *version) { return cu.cuDriverGetVersion(version); }
int cuda_device_count(int *count) { return cu.cuDeviceGetCount(count); }

int cuda_capability(int ordinal, int *capability) {
    int device, major, minor, r = cu.cuDeviceGet(&device, ordinal);
    if (r == 0) r = cu.cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device);
    if (r == 0) r = cu.cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device);
    if (r == 0) *capability = 10 * major + minor;
    return r;
}

int cuda_current(uint64_t *context, int *ordinal) {
    void *current = NULL;
    int r = cu.cuCtxGetCurrent(&current);
    *context = (uint64_t)(uintptr_t)current;
    if (r == 0 && current != NULL) r = cu.cuCtxGetDevice(ordinal); /* a CUdevice is its ordinal */
    return r;
}

const char *cuda_error_name(int result) {
    const char *name = NULL;
    return cu.cuGetErrorName(result, &name) == 0 && name != NULL ? name : "unknown error";
}

int cuda_module_load(void **module, const char *ptx) { return cu.cuModuleLoadData(module, ptx); }
int cuda_function(void **function, void *module, const char *name) { return cu.cuModuleGetFunction(function, module, name); }

int cuda_launch(void *function, unsigned ctas, unsigned threads, void *stream, uint64_t *args, int n_args) {
    void *at[8]; /* little-endian: a u32 begins where the u64 does that holds it */
    for (int i = 0; i < n_args && i < 8; i++) at[i] = &args[i];
    return cu.cuLaunchKernel(function, ctas, 1, 1, threads, 1, 1, 0, stream, at, NULL);
}

int cuda_host_alloc(void **address, size_t n) { return cu.cuMemHostAlloc(address, n, PORTABLE); }
int cuda_host_free(void *address) { return cu.cuMemFreeHost(address); }
int cuda_alloc(uint64_t *address, size_t n) { return cu.cuMemAlloc_v2(address, n); }
int cuda_free(uint64_t address) { return cu.cuMemFree_v2(address); }

int cuda_page_locked(const void *address) {
    unsigned type = 0;
    return cu.cuPointerGetAttribute(&type, MEMORY_TYPE, (uint64_t)(uintptr_t)address) == 0 && type == MEMORY_HOST;
}

int cuda_copy_to(uint64_t dst, const void *src, size_t n, void *stream) { return cu.cuMemcpyHtoDAsync_v2(dst, src, n, stream); }
int cuda_copy_from(void *dst, uint64_t src, size_t n, void *stream) { return cu.cuMemcpyDtoHAsync_v2(dst, src, n, stream); }
int cuda_fill(uint64_t dst, unsigned value, size_t n, void *stream) { return cu.cuMemsetD32Async(dst, value, n, stream); }

int cuda_stream_create(void **stream) { return cu.cuStreamCreate(stream, NON_BLOCKING); }
int cuda_stream_destroy(void *stream) { return cu.cuStreamDestroy_v2(stream); }
int cuda_stream_sync(void *stream) { return cu.cuStreamSynchronize(stream); }

int cuda_event_record(void **event, void *stream) {
    int r = cu.cuEventCreate(event, NO_TIMING);
    if (r != 0) return r;
    if ((r = cu.cuEventRecord(*event, stream)) != 0) cu.cuEventDestroy_v2(*event);
    return r;
}

int cuda_event_destroy(void *event) { return cu.cuEventDestroy_v2(event); }
int cuda_event_sync(void *event) { return cu.cuEventSynchronize(event); }
int cuda_stream_wait(void *stream, void *event) { return cu.cuStreamWaitEvent(stream, event, 0); }

#else

const char *cuda_load(void) { return "this build decodes on CUDA devices under Linux only"; }

/* Never reached without a driver. */
int cuda_init(void) { return -1; }
int cuda_driver_version(int *version) { return -1; }
int cuda_device_count(int *count) { return -1; }
int cuda_capability(int ordinal, int *capability) { return -1; }
int cuda_current(uint64_t *context, int *ordinal) { return -1; }
const char *cuda_error_name(int result) { return ""; }
int cuda_module_load(void **module, const char *ptx) { return -1; }
int cuda_function(void **function, void *module, const char *name) { return -1; }
int cuda_launch(void *function, unsigned ctas, unsigned threads, void *stream, uint64_t *args, int n_args) { return -1; }
int cuda_host_alloc(void **address, size_t n) { return -1; }
int cuda_host_free(void *address) { return -1; }
int cuda_alloc(uint64_t *address, size_t n) { return -1; }
int cuda_free(uint64_t address) { return -1; }
int cuda_page_locked(const void *address) { return 0; }
int cuda_copy_to(uint64_t dst, const void *src, size_t n, void *stream) { return -1; }
int cuda_copy_from(void *dst, uint64_t src, size_t n, void *stream) { return -1; }
int cuda_fill(uint64_t dst, unsigned value, size_t n, void *stream) { return -1; }
int cuda_stream_create(void **stream) { return -1; }
int cuda_stream_destroy(void *stream) { return -1; }
int cuda_stream_sync(void *stream) { return -1; }
int cuda_event_record(void **event, void *stream) { return -1; }
int cuda_event_destroy(void *event) { return -1; }
int cuda_event_sync(void *event) { return -1; }
int cuda_stream_wait(void *stream, void *event) { return -1; }

#endif

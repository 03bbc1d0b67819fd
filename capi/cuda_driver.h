/* The few functions of the CUDA driver that the library calls, found in libcuda.so.1 when it is first asked for: nothing
 * of CUDA is needed to build or to start. Results are the driver's CUresult, 0 for success. */
#ifndef BS_CUDA_DRIVER_H
#define BS_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

/* Loads the driver once and says what is missing, or NULL. */
const char *cuda_load(void);

int cuda_init(void);
int cuda_driver_version(int *version);
int cuda_device_count(int *count);
/* Major * 10 + minor of device number `ordinal`. */
int cuda_capability(int ordinal, int *capability);
/* The context that is current in this thread (0: none), and the number of its device. */
int cuda_current(uint64_t *context, int *ordinal);
const char *cuda_error_name(int result);

int cuda_module_load(void **module, const char *ptx);
int cuda_function(void **function, void *module, const char *name);
int cuda_launch(void *function, unsigned ctas, unsigned threads, void *stream, uint64_t *args, int n_args);

int cuda_host_alloc(void **address, size_t n);
int cuda_host_free(void *address);
int cuda_alloc(uint64_t *address, size_t n);
int cuda_free(uint64_t address);
int cuda_page_locked(const void *address);
int cuda_copy_to(uint64_t dst, const void *src, size_t n, void *stream);
int cuda_copy_from(void *dst, uint64_t src, size_t n, void *stream);
int cuda_fill(uint64_t dst, unsigned value, size_t n, void *stream);

int cuda_stream_create(void **stream);
int cuda_stream_destroy(void *stream);
int cuda_stream_sync(void *stream);
/* An event after all that is in the stream. */
int cuda_event_record(void **event, void *stream);
int cuda_event_destroy(void *event);
int cuda_event_sync(void *event);
int cuda_stream_wait(void *stream, void *event);

#endif

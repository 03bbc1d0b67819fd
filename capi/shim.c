/*
 * The public functions. Each looks at the fork flag and passes on to the Go export of the same name with a go_ prefix,
 * which nothing outside can see. A call into the Go runtime of a forked child would hang for ever.
 */
#define BS_BUILDING 1
#include "shim.h"

#include <stdio.h>

#include "_cgo_export.h"

#if !defined(_WIN32)
#include <pthread.h>

static volatile int forked;

static void after_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(NULL, NULL, after_fork); }
#else
enum { forked = 0 };
#endif

static bs_status refuse(bs_error *error) {
    if (error != NULL) {
        error->status = BS_FORKED;
        error->os_error = 0;
        snprintf(error->text, sizeof error->text,
                 "called in a child of fork(): load the library anew in the child, or start it with spawn or forkserver");
    }
    return BS_FORKED;
}

int32_t bs_abi_version(void) { return BS_ABI_VERSION; }

const char *bs_version(void) { return forked ? "" : go_version(); }

int32_t bs_workers(void) {
    return forked ? 0 : go_workers();
}

bs_status bs_set_workers(int32_t workers) {
    if (forked) return BS_FORKED;
    return (bs_status)go_set_workers(workers);
}

const char *bs_cpu(void) { return forked ? "" : go_cpu(); }

bs_status bs_set_cpu(const char *name, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_set_cpu((void *)name, error);
}

bs_status bs_reader_open(const char *path, const char *base, bs_reader **reader, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_open((void *)path, (void *)base, reader, error);
}

bs_status bs_reader_open_memory(const bs_memory_file *files, size_t n_files, const char *base, bs_reader **reader,
                                bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_open_memory((void *)files, n_files, (void *)base, reader, error);
}

void bs_reader_close(bs_reader *reader) {
    if (!forked && reader != NULL) go_reader_close(reader);
}

bs_status bs_reader_count(bs_reader *reader, uint64_t *count, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_count(reader, count, error);
}

bs_status bs_reader_find(bs_reader *reader, const char *name, uint64_t *index, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_find(reader, (void *)name, index, error);
}

bs_status bs_reader_describe(bs_reader *reader, uint64_t index, bs_tensor *tensor, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_describe(reader, index, tensor, error);
}

bs_status bs_reader_locate(bs_reader *reader, uint64_t index, uint64_t *file, uint64_t *offset, uint64_t *n_bytes,
                           bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_locate(reader, index, file, offset, n_bytes, error);
}

bs_status bs_reader_name(bs_reader *reader, uint64_t index, char *dst, size_t dst_cap, size_t *len, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_name(reader, index, dst, dst_cap, len, error);
}

bs_status bs_reader_metadata(bs_reader *reader, char *dst, size_t dst_cap, size_t *len, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_metadata(reader, dst, dst_cap, len, error);
}

bs_status bs_reader_info(bs_reader *reader, char *dst, size_t dst_cap, size_t *len, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_info(reader, dst, dst_cap, len, error);
}

bs_status bs_reader_breakdown(bs_reader *reader, int32_t modes, char *dst, size_t dst_cap, size_t *len,
                              const bs_job *job, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_breakdown(reader, modes, dst, dst_cap, len, (bs_job *)job, error);
}

bs_status bs_reader_decode(bs_reader *reader, uint64_t index, void *dst, size_t dst_cap, const bs_job *job,
                           bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_decode(reader, index, dst, dst_cap, (void *)job, error);
}

bs_status bs_reader_decode_range(bs_reader *reader, uint64_t index, uint64_t first, uint64_t count, void *dst,
                                 size_t dst_cap, const bs_job *job, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_decode_range(reader, index, first, count, dst, dst_cap, (void *)job, error);
}

bs_status bs_reader_decode_many(bs_reader *reader, const bs_decode_item *items, size_t n_items, const bs_job *job,
                                bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_decode_many(reader, (void *)items, n_items, (void *)job, error);
}

bs_status bs_reader_decode_verified(bs_reader *reader, uint64_t index, void *dst, size_t dst_cap, const bs_job *job,
                                    bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_decode_verified(reader, index, dst, dst_cap, (void *)job, error);
}

uint64_t bs_compress_bound(uint64_t source_bytes, uint64_t n_tensors, uint64_t name_bytes) {
    return forked ? 0 : go_compress_bound(source_bytes, n_tensors, name_bytes);
}

bs_status bs_writer_open(const char *path, const bs_tensor_spec *specs, size_t n_specs, const char *metadata,
                         const bs_compress_options *options, bs_writer **writer, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_writer_open((void *)path, (void *)specs, n_specs, (void *)metadata, (void *)options, writer,
                                     error);
}

bs_status bs_writer_put(bs_writer *writer, uint64_t index, const void *src, size_t src_len, const bs_job *job,
                        bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_writer_put(writer, index, (void *)src, src_len, (void *)job, error);
}

bs_status bs_writer_finish(bs_writer *writer, bs_result *result, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_writer_finish(writer, result, error);
}

void bs_writer_close(bs_writer *writer) {
    if (!forked && writer != NULL) go_writer_close(writer);
}

bs_status bs_compress(const char *src, const char *dst, const bs_compress_options *options, const bs_job *job,
                      bs_result *result, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_compress((void *)src, (void *)dst, (void *)options, (void *)job, result, error);
}

bs_status bs_compress_delta(const char *src, const char *base, const char *dst, const bs_compress_options *options,
                            const bs_job *job, bs_result *result, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_compress_delta((void *)src, (void *)base, (void *)dst, (void *)options, (void *)job, result,
                                        error);
}

bs_status bs_decompress(const char *src, const char *dst, const bs_decompress_options *options, const bs_job *job,
                        bs_result *result, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_decompress((void *)src, (void *)dst, (void *)options, (void *)job, result, error);
}

bs_status bs_verify(const char *path, const char *source, const char *base, const bs_job *job,
                    bs_verify_result *result, char *report, size_t report_cap, size_t *report_len, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_verify((void *)path, (void *)source, (void *)base, (void *)job, result, report, report_cap,
                                report_len, error);
}

/* ---- texts that need no Go ---- */

const char *bs_status_name(int32_t status) {
    switch (status) {
    case BS_OK: return "ok";
    case BS_INVALID_ARGUMENT: return "invalid_argument";
    case BS_DST_TOO_SMALL: return "dst_too_small";
    case BS_NOT_FOUND: return "not_found";
    case BS_UNSUPPORTED_VERSION: return "unsupported_version";
    case BS_UNSUPPORTED_CODEC: return "unsupported_codec";
    case BS_UNSUPPORTED_FEATURE: return "unsupported_feature";
    case BS_CORRUPT: return "corrupt";
    case BS_TRUNCATED: return "truncated";
    case BS_CHECKSUM: return "checksum";
    case BS_WRONG_BASE: return "wrong_base";
    case BS_IO: return "io";
    case BS_CANCELLED: return "cancelled";
    case BS_NO_DEVICE: return "no_device";
    case BS_DEVICE: return "device";
    case BS_POISONED: return "poisoned";
    case BS_INTERNAL: return "internal";
    case BS_FORKED: return "forked";
    default: return "unknown";
    }
}

const char *bs_dtype_name(int32_t dtype) {
    static const char *const names[] = {
        "unknown",         "bool",          "uint8",         "int8",        "uint16",          "int16",
        "uint32",          "int32",         "uint64",        "int64",       "float16",         "bfloat16",
        "float32",         "float64",       "complex64",     "float8_e4m3fn", "float8_e5m2",   "float8_e4m3fnuz",
        "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "float6_e2m3fn", "float6_e3m2fn"};
    const int32_t count = (int32_t)(sizeof names / sizeof names[0]);
    return names[dtype > 0 && dtype < count ? dtype : 0];
}

bs_status bs_cuda_available(bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_cuda_available(error);
}

bs_status bs_reader_decode_cuda(bs_reader *reader, const bs_cuda_item *items, size_t n_items, const bs_cuda_job *cuda,
                                const bs_job *job, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_decode_cuda(reader, (void *)items, n_items, (void *)cuda, (void *)job, error);
}

bs_status bs_reader_weight_bytes(bs_reader *reader, uint64_t index, size_t *n_bytes, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_weight_bytes(reader, index, n_bytes, error);
}

bs_status bs_weight_open(bs_reader *reader, uint64_t index, uint64_t device_memory, size_t device_cap,
                         const bs_cuda_job *cuda, const bs_job *job, bs_weight **weight, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_weight_open(reader, index, device_memory, device_cap, (void *)cuda, (void *)job, weight, error);
}

bs_status bs_weight_decode(bs_weight *weight, uint64_t first, uint64_t count, uint64_t dst, size_t dst_cap, void *stream,
                           bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_weight_decode(weight, first, count, dst, dst_cap, stream, error);
}

bs_status bs_weight_gather(bs_weight *weight, uint64_t ids, uint64_t n_ids, uint64_t row_elements, uint64_t dst,
                           size_t dst_cap, void *stream, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_weight_gather(weight, ids, n_ids, row_elements, dst, dst_cap, stream, error);
}

void bs_weight_close(bs_weight *weight) {
    if (!forked && weight != NULL) go_weight_close(weight);
}

bs_status bs_weight_batch_bytes(bs_weight *const *weights, size_t n_weights, size_t *n_bytes, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_weight_batch_bytes((void *)weights, n_weights, n_bytes, error);
}

bs_status bs_weight_batch_open(bs_weight *const *weights, const uint64_t *dst, size_t n_weights, uint64_t device_memory,
                               size_t device_cap, const bs_cuda_job *cuda, bs_weight_batch **batch, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_weight_batch_open((void *)weights, (void *)dst, n_weights, device_memory, device_cap, (void *)cuda,
                                           batch, error);
}

bs_status bs_weight_batch_decode(bs_weight_batch *batch, void *stream, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_weight_batch_decode(batch, stream, error);
}

void bs_weight_batch_close(bs_weight_batch *batch) {
    if (!forked && batch != NULL) go_weight_batch_close(batch);
}

bs_status bs_reader_plan(bs_reader *reader, uint64_t index, void *payload, size_t payload_cap, void *program,
                         size_t program_cap, size_t *payload_len, size_t *program_len, const bs_job *job, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_plan(reader, index, payload, payload_cap, program, program_cap, payload_len, program_len,
                                     (void *)job, error);
}

bs_status bs_repair(const char *path, const char *dst, const bs_job *job, bs_repair_result *result, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_repair((void *)path, (void *)dst, (void *)job, result, error);
}

bs_status bs_convert(const char *src, const char *dst, const char *base, const bs_compress_options *options, const bs_job *job,
                     bs_result *result, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_convert((void *)src, (void *)dst, (void *)base, (void *)options, (void *)job, result, error);
}

bs_status bs_reader_skip_md5(bs_reader *reader, int32_t skip, bs_error *error) {
    if (forked) return refuse(error);
    return (bs_status)go_reader_skip_md5(reader, skip, error);
}

/*
 * bigsmall.h - lossless compression of neural-network weights.
 *
 * A `.bs` file holds the tensors of one `.safetensors` file in about two thirds of its size and gives them back bit for
 * bit. This header is the whole contract of libbigsmall; nothing else is exported.
 *
 * Conventions
 *   - Every function that can fail returns a bs_status, 0 for success. With a non-NULL `error` it also fills in the
 *     status, the operating system's error number where there is one, and a text that names the file, the tensor and
 *     the numbers. On success `error` is left alone.
 *   - The caller owns every buffer it passes. The library keeps no pointer after a call returns, with these exceptions:
 *     the files given to bs_reader_open_memory stay in use until bs_reader_close, and the device memory given to
 *     bs_weight_open and bs_weight_batch_open until bs_weight_close and bs_weight_batch_close. The library owns only
 *     what a bs_*_open returned, until its bs_*_close. Closing NULL is allowed and does nothing.
 *   - `dst_cap` is room in bytes, `src_len` content in bytes. Nothing is read or written outside those lengths. A
 *     buffer of length 0 may be NULL.
 *   - Texts are UTF-8. Paths and names that come in end with NUL; texts that go out are written without a NUL, and
 *     their whole length goes to `*len` even where the room was too small (BS_DST_TOO_SMALL; nothing is written then).
 *     Call with dst NULL and dst_cap 0 to learn the size.
 *   - Structs the caller fills begin with `size = sizeof(the struct)`, so that a later version can add members at the
 *     end. Members unknown to the caller are taken as 0, members unknown to the library must be 0. A size smaller than
 *     the first version's is refused. In an array the size is the stride, and the same for all.
 *   - Every function may be called from many threads at once, on one reader too. One writer belongs to one thread at a
 *     time. A handle must not be closed while another thread uses it.
 *   - After fork() the library does not work in the child: every call there returns BS_FORKED and does nothing.
 *   - Beside what a function names, all of them may return BS_INVALID_ARGUMENT, BS_FORKED and BS_INTERNAL, and those
 *     that take a handle BS_POISONED. What reads files may return BS_IO, BS_UNSUPPORTED_VERSION, BS_UNSUPPORTED_CODEC,
 *     BS_UNSUPPORTED_FEATURE, BS_CORRUPT, BS_TRUNCATED, BS_CHECKSUM and BS_WRONG_BASE; what writes them BS_IO; what
 *     takes a job BS_CANCELLED; what takes an index BS_NOT_FOUND; what takes room BS_DST_TOO_SMALL. After an error
 *     nothing of what was to be written exists, a handle that was to be opened is NULL, and other results, but a `len`,
 *     are undefined.
 *   - A fault inside the library is caught: the call returns BS_INTERNAL, prints its stack to standard error once, and
 *     the handle it happened on answers BS_POISONED from then on. Other handles go on working.
 *   - What a later version may change, and when BS_ABI_VERSION rises, is in capi/ABI.md of the sources.
 */
#ifndef BIGSMALL_H
#define BIGSMALL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(BS_BUILDING) && defined(_WIN32)
#define BS_API __declspec(dllexport)
#elif defined(BS_BUILDING) && defined(__GNUC__)
#define BS_API __attribute__((visibility("default")))
#else
#define BS_API
#endif

/* Raised by one when a function or struct changes in a way that an existing caller would notice. */
#define BS_ABI_VERSION 4

/* Most dimensions a tensor may have; the limit of numpy and torch. */
#define BS_MAX_DIMS 64

/* What went wrong, and so what to do. The numbers never change. */
typedef enum bs_status {
    BS_OK = 0,
    BS_INVALID_ARGUMENT = 10,    /* the call is wrong: a NULL, an impossible option, a source that is no .safetensors */
    BS_DST_TOO_SMALL = 12,       /* the room given does not hold the result */
    BS_NOT_FOUND = 14,           /* no tensor of that name or index */
    BS_UNSUPPORTED_VERSION = 20, /* a container version or draft this library does not read */
    BS_UNSUPPORTED_CODEC = 22,   /* a tensor's codec is unknown here */
    BS_UNSUPPORTED_FEATURE = 24, /* the file requires a feature that is unknown here, or a dtype is */
    BS_CORRUPT = 30,             /* the bytes contradict the format */
    BS_TRUNCATED = 32,           /* the file ends too early */
    BS_CHECKSUM = 34,            /* stored and computed checksums differ */
    BS_WRONG_BASE = 36,          /* a delta needs a base model, or another one than was given */
    BS_IO = 40,                  /* the operating system said no: see os_error */
    BS_CANCELLED = 50,           /* the cancel flag was set */
    BS_NO_DEVICE = 60,           /* no CUDA driver, no device or context, or one too old: decode on the CPU and copy */
    BS_DEVICE = 62,              /* a function of the CUDA driver failed; the text has its name and its error */
    BS_POISONED = 90,            /* an earlier fault made this handle unusable: close it */
    BS_INTERNAL = 91,            /* a fault of the library: please report it */
    BS_FORKED = 92               /* called in a child of fork(): load the library anew there, or use spawn */
} bs_status;

/* How much work goes into size. Any reader reads every mode. */
typedef enum bs_mode {
    BS_MODE_BALANCED = 0,  /* the default */
    BS_MODE_INFERENCE = 1, /* fastest decoding */
    BS_MODE_STORAGE = 2    /* smallest files */
} bs_mode;

/* Element types. Those of less than a byte are packed; `element` below then means one byte of storage. */
typedef enum bs_dtype {
    BS_BOOL = 1,
    BS_U8 = 2,
    BS_I8 = 3,
    BS_U16 = 4,
    BS_I16 = 5,
    BS_U32 = 6,
    BS_I32 = 7,
    BS_U64 = 8,
    BS_I64 = 9,
    BS_F16 = 10,
    BS_BF16 = 11,
    BS_F32 = 12,
    BS_F64 = 13,
    BS_C64 = 14,
    BS_F8_E4M3 = 15,
    BS_F8_E5M2 = 16,
    BS_F8_E4M3FNUZ = 17,
    BS_F8_E5M2FNUZ = 18,
    BS_F8_E8M0 = 19,
    BS_F4 = 20,     /* two values a byte; shape as torch packs it, last dimension halved */
    BS_F6_E2M3 = 21, /* packed bytes; shape is [bytes] */
    BS_F6_E3M2 = 22  /* packed bytes; shape is [bytes] */
} bs_dtype;

typedef struct bs_error {
    int32_t status;   /* bs_status */
    int32_t os_error; /* errno of a BS_IO, else 0; on Windows ENOENT, EEXIST, EACCES, ENOSPC or EIO */
    char text[2040];  /* ends with NUL; cut on a character where it is longer */
} bs_error;

/* How a long call runs. A NULL job means all defaults. The library reads and writes the counters atomically. */
typedef struct bs_job {
    size_t size;
    int32_t workers;       /* threads to use, 0 for bs_workers() */
    int32_t reserved;      /* 0 */
    const int32_t *cancel; /* may be NULL; polled at every block: a value other than 0 ends the call, BS_CANCELLED */
    int64_t *done;         /* may be NULL; uncompressed bytes finished so far, only grows */
    int64_t *total;        /* may be NULL; uncompressed bytes to do, stored once near the start */
} bs_job;

/* Flags of bs_compress_options and bs_decompress_options. */
#define BS_FLAG_SHA256 1     /* compress: store the SHA-256 of the whole source file; decompress then checks it */
#define BS_FLAG_NO_REPLACE 2 /* refuse to replace an existing file (BS_IO, EEXIST) */
#define BS_FLAG_FORCE 4      /* replace an existing, non-empty target directory */
/* compress, convert: write what release 1.0.0 of the original package reads; no parity, no SHA-256.
 * BS_UNSUPPORTED_FEATURE where that cannot hold a tensor. */
#define BS_FLAG_COMPAT_1_0 8

typedef struct bs_compress_options {
    size_t size;
    int32_t mode;  /* bs_mode */
    int32_t flags; /* BS_FLAG_* */
    int32_t parity;   /* percent of the file, 0 to 100, that is added so that bs_repair can mend it */
    int32_t reserved; /* 0 */
} bs_compress_options;

typedef struct bs_decompress_options {
    size_t size;
    int32_t flags; /* BS_FLAG_* */
    int32_t reserved;
    const char *base; /* the base model of a delta (.safetensors, .bs or directory), else NULL */
} bs_decompress_options;

/* What a compression or decompression did. */
typedef struct bs_result {
    size_t size;
    uint64_t source_bytes; /* bytes of the weight files read */
    uint64_t output_bytes; /* bytes of the weight files written */
    uint64_t n_tensors;
    uint64_t n_files;
} bs_result;

/* ---- the library ---------------------------------------------------------------------------------------------- */

/* BS_ABI_VERSION of the library that is loaded. */
BS_API int32_t bs_abi_version(void);

/* Version of the library, such as "0.1.0". Static, ends with NUL. */
BS_API const char *bs_version(void);

/* Name of a status, such as "checksum", or "unknown". Static, ends with NUL. */
BS_API const char *bs_status_name(int32_t status);

/* Name of a dtype as torch spells it, such as "bfloat16", or "unknown". Static, ends with NUL. */
BS_API const char *bs_dtype_name(int32_t dtype);

/* Threads a call uses where its job does not say; at first the CPUs this process may run on. */
BS_API int32_t bs_workers(void);

/* Sets that number, at least 1; 0 returns to the default. A negative one is BS_INVALID_ARGUMENT. */
BS_API bs_status bs_set_workers(int32_t workers);

/* The instructions that decoding and encoding use: "generic" (plain Go), "avx2" or "avx512". At first the best that
 * this machine and build have, or what the environment variable BIGSMALL_CPU named when the process started; a wrong
 * name there counts as none. What is read and written is the same with all. Static, ends with NUL. */
BS_API const char *bs_cpu(void);

/* Chooses them by name; NULL or "" returns to the best. An unknown name, or one that this machine or build lacks, is
 * BS_INVALID_ARGUMENT and changes nothing. A call that is under way may use either. */
BS_API bs_status bs_set_cpu(const char *name, bs_error *error);

/* ---- reading ---------------------------------------------------------------------------------------------------- */

typedef struct bs_reader bs_reader;

typedef struct bs_tensor {
    size_t size;
    uint64_t n_bytes;       /* decoded size: what dst needs */
    uint64_t n_elements;    /* product of the shape; 1 for a scalar */
    uint64_t payload_bytes; /* compressed size in the file; 0 for a tensor stored under another name */
    int32_t dtype;          /* bs_dtype */
    int32_t n_dims;
    uint64_t shape[BS_MAX_DIMS];
} bs_tensor;

/* Opens a `.bs` file, or a directory of them (with or without bigsmall.index.json) as one model. Only headers are read.
 * base: the base model where the file is a delta, else NULL; without it a delta opens, but its differences do not
 * decode (BS_WRONG_BASE). */
BS_API bs_status bs_reader_open(const char *path, const char *base, bs_reader **reader, bs_error *error);

/* A whole `.bs` file in memory. */
typedef struct bs_memory_file {
    size_t size;
    const char *name; /* its file name within its model, such as "model-00001-of-00002.bs"; NULL for a lone file */
    const void *src;
    size_t src_len;
} bs_memory_file;

/* The same for files in memory, opened as one model: a lone file, or its shards. The memory must stay until the reader
 * is closed. Opening reads all but the payloads. Of the payloads a call reads only those of the tensors that it
 * decodes: what bs_reader_locate tells must be there, and unchanged, until that call returns; elsewhere the memory may
 * hold anything. */
BS_API bs_status bs_reader_open_memory(const bs_memory_file *files, size_t n_files, const char *base,
                                       bs_reader **reader, bs_error *error);

/* Files of the original package (1.0.0 to 4.0.0) hold no checksum but the MD5 of each tensor, so that one is compared
 * whenever such a tensor is decoded. skip other than 0 leaves that out: nothing else tells then that it is damaged. */
BS_API bs_status bs_reader_skip_md5(bs_reader *reader, int32_t skip, bs_error *error);

BS_API void bs_reader_close(bs_reader *reader);

/* Number of tensors, indexed from 0 in the order of the file. */
BS_API bs_status bs_reader_count(bs_reader *reader, uint64_t *count, bs_error *error);

/* Index of the tensor of that name, or BS_NOT_FOUND. */
BS_API bs_status bs_reader_find(bs_reader *reader, const char *name, uint64_t *index, bs_error *error);

BS_API bs_status bs_reader_describe(bs_reader *reader, uint64_t index, bs_tensor *tensor, bs_error *error);

/* Where a tensor's compressed bytes stand: in which file, in the order of bs_reader_info's `files`, at which offset,
 * and how many. Of a tensor stored under another name they are the other's; of one without elements there are none. */
BS_API bs_status bs_reader_locate(bs_reader *reader, uint64_t index, uint64_t *file, uint64_t *offset,
                                  uint64_t *n_bytes, bs_error *error);

/* Name of a tensor. */
BS_API bs_status bs_reader_name(bs_reader *reader, uint64_t index, char *dst, size_t dst_cap, size_t *len,
                                bs_error *error);

/* The source's `__metadata__` as a JSON object, or the text null where it had none. */
BS_API bs_status bs_reader_metadata(bs_reader *reader, char *dst, size_t dst_cap, size_t *len, bs_error *error);

/* Everything the headers say, as one JSON object: format, mode, model_type, base_model, writer, file_bytes,
 * source_bytes, sha256, files, and for every tensor, in the order of the indexes, name, shape, dtype (torch's name),
 * source_dtype and source_shape (safetensors' spelling), n_bytes, compressed_bytes, codec, special, md5, file. */
BS_API bs_status bs_reader_info(bs_reader *reader, char *dst, size_t dst_cap, size_t *len, bs_error *error);

/* Where the bytes of the files go, as one JSON object: "parts", bytes of sign, exponent, mantissa (of floats; a symbol
 * that holds several counts by the entropies of its table), values (of other types), tables, stored (blocks as they
 * are, or by zstd), overhead, header, parity and original (payloads of the original package); "dtypes", the first three
 * with n_bytes and compressed_bytes for each dtype; with `modes` other than 0 "modes", about how many bytes each would
 * make. All payloads are read; with modes every tensor is decoded and looked at as in compressing. 64 KiB hold it. */
BS_API bs_status bs_reader_breakdown(bs_reader *reader, int32_t modes, char *dst, size_t dst_cap, size_t *len,
                                     const bs_job *job, bs_error *error);

/* Decodes a whole tensor into dst, little-endian and in C order; dst_cap must be at least n_bytes. Every block's
 * checksum is verified before it is decoded. On failure the contents of dst are undefined. */
BS_API bs_status bs_reader_decode(bs_reader *reader, uint64_t index, void *dst, size_t dst_cap, const bs_job *job,
                                  bs_error *error);

/* Decodes elements first .. first+count-1 of the flattened tensor. Only the blocks that hold them are read. An element
 * is n_bytes / n_elements bytes; where that is no whole number (sub-byte types) it is one byte. */
BS_API bs_status bs_reader_decode_range(bs_reader *reader, uint64_t index, uint64_t first, uint64_t count, void *dst,
                                        size_t dst_cap, const bs_job *job, bs_error *error);

/* One request of bs_reader_decode_many. */
typedef struct bs_decode_item {
    uint64_t index;
    void *dst;
    size_t dst_cap;
} bs_decode_item;

/* Decodes many tensors at once over all workers; the fastest way to load a model. */
BS_API bs_status bs_reader_decode_many(bs_reader *reader, const bs_decode_item *items, size_t n_items,
                                       const bs_job *job, bs_error *error);

/* Decodes a whole tensor like bs_reader_decode and compares its MD5 with the header's: BS_CHECKSUM where they differ.
 * */
BS_API bs_status bs_reader_decode_verified(bs_reader *reader, uint64_t index, void *dst, size_t dst_cap,
                                           const bs_job *job, bs_error *error);

/* ---- CUDA ---------------------------------------------------------------------------------------------------------
 *
 * Compressed bytes are copied to the device, verified and decoded there. The driver is looked for when one of these is
 * first called; nothing of CUDA is needed before. They work in the CUDA context that is current in the calling
 * thread, which must stay alive as long as the library is used, on a device of compute capability 7.5 or higher.
 * Addresses of its memory are CUdeviceptr, here numbers of 64 bits. */

/* BS_OK where some device of this machine decodes, else BS_NO_DEVICE, whose text says why not. */
BS_API bs_status bs_cuda_available(bs_error *error);

/* Where a call works. A NULL job means all defaults. */
typedef struct bs_cuda_job {
    size_t size;
    void *stream;          /* a CUstream or cudaStream_t of the current context, NULL: the default one; what is on it
                              already is waited for */
    void *host;            /* page-locked memory to stage through; where it does not do, the library takes more for
                              itself */
    size_t host_bytes;
    uint64_t device;       /* the same of the device; 128 MiB of both are always enough */
    size_t device_bytes;
} bs_cuda_job;

/* One request of bs_reader_decode_cuda: dst is memory of the device, at a multiple of the size of an element. */
typedef struct bs_cuda_item {
    uint64_t index;
    uint64_t dst;
    size_t dst_cap;
} bs_cuda_item;

/* bs_reader_decode_many into the memory of the current CUDA device. Reading, copying and decoding overlap. A file in
 * page-locked memory (bs_reader_open_memory) is copied from there. Tensors whose form the device does not decode are
 * decoded on the CPU and copied. When this returns the device has done all of it, whatever is returned; every block's
 * checksum was verified on the device or before. */
BS_API bs_status bs_reader_decode_cuda(bs_reader *reader, const bs_cuda_item *items, size_t n_items,
                                       const bs_cuda_job *cuda, const bs_job *job, bs_error *error);

/* A tensor that stays compressed in the memory of a device. */
typedef struct bs_weight bs_weight;

/* Device memory that bs_weight_open needs for a tensor: about its compressed size and 1 % of its decoded one.
 * BS_UNSUPPORTED_FEATURE where its form is none that a device decodes: keep it decoded then. */
BS_API bs_status bs_reader_weight_bytes(bs_reader *reader, uint64_t index, size_t *n_bytes, bs_error *error);

/* Copies a tensor's compressed bytes to device_memory, at a multiple of 256, and verifies them there. The memory is in
 * use until bs_weight_close; the reader may be closed before. Returns when the device is done. BS_UNSUPPORTED_FEATURE
 * where single blocks are none that a device decodes. */
BS_API bs_status bs_weight_open(bs_reader *reader, uint64_t index, uint64_t device_memory, size_t device_cap,
                                const bs_cuda_job *cuda, const bs_job *job, bs_weight **weight, bs_error *error);

/* Starts decoding elements first .. first+count-1 to dst, and returns at once: what follows on the stream finds them.
 * first is a multiple of 65536, count too or up to the end. Nothing else is done, so that it may be captured in a CUDA
 * graph. The stream is one of the context that the weight was opened in. */
BS_API bs_status bs_weight_decode(bs_weight *weight, uint64_t first, uint64_t count, uint64_t dst, size_t dst_cap,
                                  void *stream, bs_error *error);

/* The same for rows of row_elements elements, at most 16384: row ids[i] goes to place i of dst, for n_ids numbers of
 * type int64 in device memory. Numbers of no row leave their place as it is. Elements have 2 or 4 bytes. */
BS_API bs_status bs_weight_gather(bs_weight *weight, uint64_t ids, uint64_t n_ids, uint64_t row_elements, uint64_t dst,
                                  size_t dst_cap, void *stream, bs_error *error);

/* The kernels that were started must be done. */
BS_API void bs_weight_close(bs_weight *weight);

/* Weights that are decoded together by one launch, each to a place of its own: many small matrices keep a device busy
 * only at the same time. */
typedef struct bs_weight_batch bs_weight_batch;

/* Device memory that bs_weight_batch_open needs. */
BS_API bs_status bs_weight_batch_bytes(bs_weight *const *weights, size_t n_weights, size_t *n_bytes, bs_error *error);

/* Prepares n_weights weights of elements of the same size, weight k to be decoded to dst[k], which has room for all of
 * it. device_memory is at a multiple of 256. It, the destinations and the weights stay until bs_weight_batch_close. */
BS_API bs_status bs_weight_batch_open(bs_weight *const *weights, const uint64_t *dst, size_t n_weights,
                                      uint64_t device_memory, size_t device_cap, const bs_cuda_job *cuda,
                                      bs_weight_batch **batch, bs_error *error);

/* Starts decoding all of them, and returns at once, as bs_weight_decode does. */
BS_API bs_status bs_weight_batch_decode(bs_weight_batch *batch, void *stream, bs_error *error);

/* The kernels that were started must be done. */
BS_API void bs_weight_batch_close(bs_weight_batch *batch);

/* For other devices: the payload of a tensor, verified, and the program by which kernels decode it, as
 * codecs/gpu/gpu.go of the source describes it. Both lengths are always given; with room for neither they are all that
 * is done. BS_UNSUPPORTED_FEATURE where it has to be decoded on the CPU. */
BS_API bs_status bs_reader_plan(bs_reader *reader, uint64_t index, void *payload, size_t payload_cap, void *program,
                                size_t program_cap, size_t *payload_len, size_t *program_len, const bs_job *job,
                                bs_error *error);

/* ---- writing from memory ---------------------------------------------------------------------------------------- */

typedef struct bs_writer bs_writer;

typedef struct bs_tensor_spec {
    size_t size;
    const char *name;
    int32_t dtype;  /* bs_dtype */
    int32_t n_dims; /* 0 to BS_MAX_DIMS */
    const uint64_t *shape;
} bs_tensor_spec;

/* Largest `.bs` file, without parity, that `source_bytes` bytes in n_tensors tensors whose names take name_bytes bytes
 * can become; metadata adds at most twice its length. */
BS_API uint64_t bs_compress_bound(uint64_t source_bytes, uint64_t n_tensors, uint64_t name_bytes);

/* Begins a file of exactly these tensors. metadata: a JSON object of strings, or NULL. Of the flags only
 * BS_FLAG_NO_REPLACE has a meaning here; the others are refused. The target appears, whole, at
 * bs_writer_finish; until then the bytes stand in a temporary file beside it. */
BS_API bs_status bs_writer_open(const char *path, const bs_tensor_spec *specs, size_t n_specs, const char *metadata,
                                const bs_compress_options *options, bs_writer **writer, bs_error *error);

/* Compresses tensor `index` of the specs from memory, little-endian and in C order; src_len must be its exact size.
 * Each tensor is put once, in any order; what is written follows the order of the puts. */
BS_API bs_status bs_writer_put(bs_writer *writer, uint64_t index, const void *src, size_t src_len, const bs_job *job,
                               bs_error *error);

/* Completes and publishes the file. Every tensor must have been put. The writer still has to be closed. */
BS_API bs_status bs_writer_finish(bs_writer *writer, bs_result *result, bs_error *error);

/* Frees the writer; without a bs_writer_finish before, nothing of the file remains. */
BS_API void bs_writer_close(bs_writer *writer);

/* ---- files and directories -------------------------------------------------------------------------------------- */

/* Compresses a `.safetensors` file to a `.bs` file, or a model directory to a new directory. What is written is decoded
 * again and compared before it is published. options, job and result may be NULL. */
BS_API bs_status bs_compress(const char *src, const char *dst, const bs_compress_options *options, const bs_job *job,
                             bs_result *result, bs_error *error);

/* Compresses a fine-tune as its difference to a base model (`.safetensors`, `.bs` or directory). */
BS_API bs_status bs_compress_delta(const char *src, const char *base, const char *dst,
                                   const bs_compress_options *options, const bs_job *job, bs_result *result,
                                   bs_error *error);

/* Restores the `.safetensors` file, or the directory, byte for byte; every tensor's MD5 is checked before the target
 * appears. */
BS_API bs_status bs_decompress(const char *src, const char *dst, const bs_decompress_options *options,
                               const bs_job *job, bs_result *result, bs_error *error);

/* Writes a `.bs` file, or a directory of them, of this package or the original one, anew with other options; every
 * tensor's MD5 is compared on the way. base: the base model where it is a delta, else NULL; what is written is a
 * difference to it again. */
BS_API bs_status bs_convert(const char *src, const char *dst, const char *base, const bs_compress_options *options,
                            const bs_job *job, bs_result *result, bs_error *error);

typedef struct bs_verify_result {
    size_t size;
    uint64_t n_tensors; /* tensors looked at */
    uint64_t n_bad;     /* of them, damaged or different */
} bs_verify_result;

/* Decodes everything, of a directory every `.bs` file below it, and checks every checksum, MD5 and stored SHA-256; with
 * `source` (a `.safetensors` file or directory) compares with it too. Damaged tensors (and headers, with an empty name
 * for the tensor) are counted and listed in `report`, one JSON object {"file", "tensor", "problem"} a line, with
 * "blocks", the numbers of its damaged blocks of 65,536 words, where that is known, as many whole lines as fit
 * report_cap; their length goes to *report_len. BS_OK means that the check ran: look at n_bad. */
BS_API bs_status bs_verify(const char *path, const char *source, const char *base, const bs_job *job,
                           bs_verify_result *result, char *report, size_t report_cap, size_t *report_len,
                           bs_error *error);

typedef struct bs_repair_result {
    size_t size;
    uint64_t n_files;    /* files looked at */
    uint64_t n_repaired; /* of them, written anew */
    uint64_t n_pieces;   /* pieces of 4096 bytes that were damaged */
} bs_repair_result;

/* Makes a damaged file whole by its parity; what is whole stays as it is. The file is written anew, and takes the place
 * of dst, or, where that is NULL, of path, once every checksum in it is right. A directory is repaired in place, every
 * `.bs` file below it; where one cannot be, the others are all the same, and its error is returned. More damage than
 * the parity can make good is BS_CORRUPT, and a damaged file without parity has the status of its damage; nothing
 * changes then. */
BS_API bs_status bs_repair(const char *path, const char *dst, const bs_job *job, bs_repair_result *result,
                           bs_error *error);

#ifdef __cplusplus
}
#endif

#endif /* BIGSMALL_H */

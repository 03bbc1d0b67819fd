/*
 * Drives the whole C interface with buffers of exactly the size that the header asks for, with damaged files and with wrong
 * arguments. Built with the address sanitizer, as the library it is linked to: `make check` runs it.
 *
 *     drive FOLDER    an empty folder to write in
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bigsmall.h"

#define EXPECT(condition, ...)                                          \
    do {                                                                \
        if (!(condition)) {                                             \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                               \
            fputc('\n', stderr);                                        \
            exit(1);                                                    \
        }                                                               \
    } while (0)

#define OK(call)                                                                             \
    do {                                                                                     \
        memset(&error, 0x5a, sizeof error);                                                  \
        int32_t status_ = (int32_t)(call);                                                   \
        EXPECT(status_ == BS_OK, "%s %s", bs_status_name(status_), error.text);              \
        EXPECT(error.status == 0x5a5a5a5a, "an error was filled in on success");             \
    } while (0)

#define FAILS(want, call)                                                                              \
    do {                                                                                               \
        memset(&error, 0x5a, sizeof error);                                                            \
        int32_t status_ = (int32_t)(call);                                                             \
        EXPECT(status_ == (want), "%s, not %s", bs_status_name(status_), bs_status_name(want));        \
        EXPECT(error.status == status_ && strlen(error.text) > 0, "the error is %d", (int)error.status); \
    } while (0)

enum { TENSORS = 5 };

static bs_error error;
static bs_tensor_spec specs[TENSORS];
static uint64_t shapes[TENSORS][2] = {{90, 777}, {70000, 1}, {33, 3}, {0, 4}, {1, 1}};
static unsigned char *data[TENSORS];
static size_t sizes[TENSORS];

static void *room(size_t n) {
    void *p = malloc(n ? n : 1);
    EXPECT(p != NULL, "%lu bytes", (unsigned long)n);
    return p;
}

static uint32_t next_random(void) {
    static uint32_t x = 2463534242u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x;
}

static void make_tensors(void) {
    static const char *const names[TENSORS] = {"weights", "bytes", "numbers", "nothing", "\xc3\xa9 scalar"};
    static const int32_t dtypes[TENSORS] = {BS_BF16, BS_U8, BS_F32, BS_F64, BS_I64};
    static const size_t widths[TENSORS] = {2, 1, 4, 8, 8};
    for (int i = 0; i < TENSORS; i++) {
        specs[i].size = sizeof specs[i];
        specs[i].name = names[i];
        specs[i].dtype = dtypes[i];
        specs[i].n_dims = i == 4 ? 0 : i == 1 ? 1 : 2;
        specs[i].shape = i == 4 ? NULL : shapes[i];
        sizes[i] = (size_t)(shapes[i][0] * shapes[i][1]) * widths[i];
        data[i] = room(sizes[i]);
        for (size_t k = 0; k < sizes[i]; k++) {
            data[i][k] = (unsigned char)(k % 2 == 1 && i == 0 ? 0x3c + (next_random() % 5 == 0) : next_random() >> 11);
        }
    }
}

static void write_file(const char *path, int32_t parity) {
    bs_compress_options options = {sizeof options, BS_MODE_BALANCED, 0, parity, 0};
    bs_result result = {sizeof result, 0, 0, 0, 0};
    bs_writer *writer = NULL;
    OK(bs_writer_open(path, specs, TENSORS, "{\"a\":\"b\"}", &options, &writer, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_writer_finish(writer, &result, &error)); /* some are missing */
    bs_writer_close(writer);
    OK(bs_writer_open(path, specs, TENSORS, NULL, &options, &writer, &error));
    for (int i = TENSORS - 1; i >= 0; i--) {
        FAILS(BS_INVALID_ARGUMENT, bs_writer_put(writer, (uint64_t)i, data[i], sizes[i] + 1, NULL, &error));
        OK(bs_writer_put(writer, (uint64_t)i, sizes[i] ? data[i] : NULL, sizes[i], NULL, &error));
        FAILS(BS_INVALID_ARGUMENT, bs_writer_put(writer, (uint64_t)i, data[i], sizes[i], NULL, &error));
    }
    FAILS(BS_NOT_FOUND, bs_writer_put(writer, TENSORS, data[0], sizes[0], NULL, &error));
    OK(bs_writer_finish(writer, &result, &error));
    EXPECT(result.n_tensors == TENSORS, "%lu", (unsigned long)result.n_tensors);
    bs_writer_close(writer);
}

/* A text function with too little room, and with exactly enough. */
#define TEXT(call_with)                                                          \
    do {                                                                         \
        size_t len = 0;                                                          \
        char *text;                                                              \
        FAILS(BS_DST_TOO_SMALL, call_with(NULL, 0, &len));                       \
        text = room(len);                                                        \
        FAILS(BS_DST_TOO_SMALL, call_with(text, len - 1, &len));                 \
        OK(call_with(text, len, &len));                                          \
        free(text);                                                              \
    } while (0)

static void read_all(bs_reader *reader) {
    uint64_t count = 0, index = 0;
    bs_decode_item items[TENSORS];
    int64_t done = 0, total = 0;
    int32_t cancel = 0;
    bs_job job = {sizeof job, 3, 0, &cancel, &done, &total};
    OK(bs_reader_count(reader, &count, &error));
    EXPECT(count == TENSORS, "%lu tensors", (unsigned long)count);
#define INFO(dst, cap, len) bs_reader_info(reader, dst, cap, len, &error)
    TEXT(INFO);
#define BREAKDOWN(dst, cap, len) bs_reader_breakdown(reader, 1, dst, cap, len, &job, &error)
    TEXT(BREAKDOWN);
#define METADATA(dst, cap, len) bs_reader_metadata(reader, dst, cap, len, &error)
    TEXT(METADATA);
    for (int i = 0; i < TENSORS; i++) {
        bs_tensor tensor = {.size = sizeof tensor};
        size_t n = sizes[i], payload_len = 0, program_len = 0;
        uint64_t file, offset, n_bytes;
        unsigned char *dst = room(n);
        OK(bs_reader_find(reader, specs[i].name, &index, &error));
        OK(bs_reader_describe(reader, index, &tensor, &error));
        EXPECT(tensor.n_bytes == n && tensor.dtype == specs[i].dtype && tensor.n_dims == specs[i].n_dims, "%s", specs[i].name);
#define NAME(dst, cap, len) bs_reader_name(reader, index, dst, cap, len, &error)
        TEXT(NAME);
        OK(bs_reader_locate(reader, index, &file, &offset, &n_bytes, &error));
        OK(bs_reader_decode(reader, index, dst, n, &job, &error));
        EXPECT(memcmp(dst, data[i], n) == 0, "%s differs", specs[i].name);
        memset(dst, 0, n);
        OK(bs_reader_decode_verified(reader, index, dst, n, NULL, &error));
        EXPECT(memcmp(dst, data[i], n) == 0, "%s differs", specs[i].name);
        if (n > 0) {
            FAILS(BS_DST_TOO_SMALL, bs_reader_decode(reader, index, dst, n - 1, NULL, &error));
            FAILS(BS_INVALID_ARGUMENT, bs_reader_decode(reader, index, NULL, n, NULL, &error));
        }
        free(dst);
        for (int k = 0; k < 20 && n > 0; k++) {
            uint64_t first = next_random() % tensor.n_elements, width = n / tensor.n_elements;
            uint64_t some = next_random() % (tensor.n_elements - first + 1);
            dst = room((size_t)(some * width));
            OK(bs_reader_decode_range(reader, index, first, some, dst, (size_t)(some * width), &job, &error));
            EXPECT(memcmp(dst, data[i] + first * width, (size_t)(some * width)) == 0, "a part of %s differs", specs[i].name);
            free(dst);
        }
        FAILS(BS_INVALID_ARGUMENT, bs_reader_decode_range(reader, index, tensor.n_elements, 1, &file, 8, NULL, &error));
        FAILS(BS_INVALID_ARGUMENT, bs_reader_decode_range(reader, index, 1, UINT64_MAX, &file, 8, NULL, &error));
        if (bs_reader_plan(reader, index, NULL, 0, NULL, 0, &payload_len, &program_len, NULL, &error) != BS_UNSUPPORTED_FEATURE) {
            void *payload = room(payload_len), *program = room(program_len);
            int32_t planned = (int32_t)bs_reader_plan(reader, index, payload, payload_len, program, program_len, &payload_len,
                                                      &program_len, NULL, &error);
            EXPECT(planned == BS_OK || planned == BS_UNSUPPORTED_FEATURE, "%s", error.text);
            free(payload);
            free(program);
        }
    }
    for (int i = 0; i < TENSORS; i++) {
        OK(bs_reader_find(reader, specs[i].name, &items[i].index, &error));
        items[i].dst = room(sizes[i]);
        items[i].dst_cap = sizes[i];
    }
    OK(bs_reader_decode_many(reader, items, TENSORS, &job, &error));
    for (int i = 0; i < TENSORS; i++) {
        EXPECT(memcmp(items[i].dst, data[i], sizes[i]) == 0, "%s differs", specs[i].name);
    }
    EXPECT(done > 0 && total > 0, "no progress");
    cancel = 1;
    FAILS(BS_CANCELLED, bs_reader_decode_many(reader, items, TENSORS, &job, &error));
    job.size = 8;
    FAILS(BS_INVALID_ARGUMENT, bs_reader_decode_many(reader, items, TENSORS, &job, &error));
    for (int i = 0; i < TENSORS; i++) free(items[i].dst);
    FAILS(BS_NOT_FOUND, bs_reader_find(reader, "none", &index, &error));
    FAILS(BS_NOT_FOUND, bs_reader_decode(reader, UINT64_MAX, &index, 8, NULL, &error));
}

static unsigned char *file_bytes(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *b;
    EXPECT(f != NULL, "%s", path);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    b = room(*n);
    EXPECT(fread(b, 1, *n, f) == *n, "%s", path);
    fclose(f);
    return b;
}

/* A file in memory of exactly its size: whether it opens, decodes or is refused, nothing outside of it is touched. */
static int refused(const unsigned char *bytes, size_t n) {
    unsigned char *exact = room(n), *dst = room(sizes[0]);
    bs_memory_file file = {sizeof file, NULL, exact, n};
    bs_reader *reader = NULL;
    int bad = 0;
    memcpy(exact, bytes, n);
    if (bs_reader_open_memory(&file, 1, NULL, &reader, &error) != BS_OK) {
        EXPECT(reader == NULL, "a reader in spite of an error");
        bad = 1;
    } else {
        for (uint64_t i = 0; i < TENSORS; i++) {
            bs_tensor tensor = {.size = sizeof tensor};
            OK(bs_reader_describe(reader, i, &tensor, &error));
            if (tensor.n_bytes <= sizes[0] && bs_reader_decode(reader, i, dst, (size_t)tensor.n_bytes, NULL, &error) != BS_OK) {
                EXPECT(error.status == BS_CHECKSUM || error.status == BS_CORRUPT || error.status == BS_TRUNCATED, "%s", error.text);
                bad = 1;
            }
        }
        bs_reader_close(reader);
    }
    free(exact);
    free(dst);
    return bad;
}

static void damage(const char *path) {
    size_t n;
    unsigned char *bytes = file_bytes(path, &n);
    EXPECT(!refused(bytes, n), "%s", error.text);
    for (int k = 0; k < 1500; k++) {
        size_t at = next_random() % (k % 3 == 0 ? 700 : n);
        unsigned char was = bytes[at];
        bytes[at] = (unsigned char)(was ^ 1u << next_random() % 8);
        EXPECT(refused(bytes, n), "a flip of byte %lu of %lu", (unsigned long)at, (unsigned long)n);
        bytes[at] = was;
    }
    for (size_t length = 0; length < n; length += 1 + next_random() % (length < 5000 ? 40 : 2000)) {
        EXPECT(refused(bytes, length), "a cut at %lu of %lu", (unsigned long)length, (unsigned long)n);
    }
    free(bytes);
}

static void nulls(void) {
    uint64_t u = 0;
    size_t z = 0;
    bs_reader *reader = NULL;
    bs_writer *writer = NULL;
    bs_verify_result verified = {sizeof verified, 0, 0};
    bs_reader_close(NULL);
    bs_writer_close(NULL);
    bs_weight_close(NULL);
    bs_weight_batch_close(NULL);
    FAILS(BS_INVALID_ARGUMENT, bs_reader_open(NULL, NULL, &reader, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_reader_open("x", NULL, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_reader_open_memory(NULL, 1, NULL, &reader, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_reader_open_memory(NULL, 0, NULL, &reader, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_reader_count(NULL, &u, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_reader_decode(NULL, 0, NULL, 0, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_reader_info(NULL, NULL, 0, &z, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_writer_open(NULL, NULL, 0, NULL, NULL, &writer, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_writer_open("x", NULL, 3, NULL, NULL, &writer, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_writer_finish(NULL, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_compress(NULL, NULL, NULL, NULL, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_decompress("x", NULL, NULL, NULL, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_verify(NULL, NULL, NULL, NULL, &verified, NULL, 0, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_verify("x", NULL, NULL, NULL, NULL, NULL, 0, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_repair(NULL, NULL, NULL, NULL, &error));
    FAILS(BS_IO, bs_reader_open("/no/such/file", NULL, &reader, &error));
    EXPECT(error.os_error == 2, "%d", (int)error.os_error);
    EXPECT(bs_reader_open("/no/such/file", NULL, &reader, NULL) == BS_IO, "without an error to fill in");
    EXPECT(bs_set_workers(-1) == BS_INVALID_ARGUMENT && bs_workers() > 0, "workers");
    EXPECT(strcmp(bs_status_name(12345), "unknown") == 0 && strcmp(bs_dtype_name(0), "unknown") == 0, "names");
}

static void files(const char *folder) {
    char bs[4096], back[4096], again[4096];
    bs_result result = {sizeof result, 0, 0, 0, 0};
    bs_compress_options options = {sizeof options, BS_MODE_STORAGE, BS_FLAG_SHA256, 10, 0};
    bs_verify_result verified = {sizeof verified, 0, 0};
    bs_repair_result repaired = {sizeof repaired, 0, 0, 0};
    size_t n, m, report_len;
    unsigned char *a, *b;
    char *report = room(100);
    FILE *f;
    sprintf(bs, "%s/parity.bs", folder);
    sprintf(back, "%s/back.safetensors", folder);
    sprintf(again, "%s/again.bs", folder);
    write_file(bs, 20);
    OK(bs_decompress(bs, back, NULL, NULL, &result, &error));
    OK(bs_compress(back, again, &options, NULL, &result, &error));
    options.mode = 9;
    FAILS(BS_INVALID_ARGUMENT, bs_compress(back, again, &options, NULL, NULL, &error));
    options.mode = 0;
    options.parity = 101;
    FAILS(BS_INVALID_ARGUMENT, bs_compress(back, again, &options, NULL, NULL, &error));
    a = file_bytes(again, &n);
    EXPECT((f = fopen(again, "r+b")) != NULL && fseek(f, 5000, SEEK_SET) == 0, "%s", again);
    EXPECT(fwrite("damaged", 1, 7, f) == 7 && fclose(f) == 0, "%s", again);
    OK(bs_verify(again, back, NULL, NULL, &verified, report, 100, &report_len, &error));
    EXPECT(verified.n_bad == 1 && report_len <= 100, "%lu bad", (unsigned long)verified.n_bad);
    OK(bs_verify(again, NULL, NULL, NULL, &verified, NULL, 0, NULL, &error));
    OK(bs_repair(again, NULL, NULL, &repaired, &error));
    EXPECT(repaired.n_files == 1 && repaired.n_repaired == 1 && repaired.n_pieces == 1, "%lu pieces", (unsigned long)repaired.n_pieces);
    b = file_bytes(again, &m);
    EXPECT(n == m && memcmp(a, b, n) == 0, "not what it was");
    OK(bs_repair(again, NULL, NULL, NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_compress(back, back, NULL, NULL, NULL, &error));
    free(a);
    free(b);
    free(report);
}

int main(int argc, char **argv) {
    static const char *const tiers[] = {"generic", "avx2", "avx512"};
    char path[4096];
    EXPECT(argc == 2, "drive FOLDER");
    EXPECT(bs_abi_version() == BS_ABI_VERSION, "header of version %d, library of %d", BS_ABI_VERSION, (int)bs_abi_version());
    sprintf(path, "%s/drive.bs", argv[1]);
    make_tensors();
    nulls();
    for (int i = 0; i < 3; i++) {
        bs_reader *reader = NULL;
        bs_memory_file file = {sizeof file, "name.bs", NULL, 0};
        unsigned char *bytes;
        if (bs_set_cpu(tiers[i], &error) != BS_OK) continue;
        write_file(path, 0);
        OK(bs_reader_open(path, NULL, &reader, &error));
        read_all(reader);
        bs_reader_close(reader);
        bytes = file_bytes(path, &file.src_len);
        file.src = bytes;
        OK(bs_reader_open_memory(&file, 1, NULL, &reader, &error));
        read_all(reader);
        bs_reader_close(reader);
        free(bytes);
    }
    OK(bs_set_cpu(NULL, &error));
    FAILS(BS_INVALID_ARGUMENT, bs_set_cpu("z80", &error));
    damage(path);
    files(argv[1]);
    for (int i = 0; i < TENSORS; i++) free(data[i]);
    printf("driven: BigSmall %s\n", bs_version());
    return 0;
}

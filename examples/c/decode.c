/*
 * Lists the tensors of a .bs file, or of a directory of them, and decodes them into buffers of its own. C99.
 *
 *     decode model.bs                 a line for each tensor
 *     decode model.bs NAME [OUT]      decodes one, prints its first numbers, and writes its bytes to OUT
 */
#include <bigsmall.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bs_error error;

/* Says what went wrong; the text names the file and the tensor. */
static int failed(void) {
    fprintf(stderr, "error: %s (%s)\n", error.text, bs_status_name(error.status));
    return 1;
}

/* The name of a tensor, to be freed: first its length, then the text. NULL where that fails. */
static char *name_of(bs_reader *reader, uint64_t index) {
    size_t len;
    bs_status status = bs_reader_name(reader, index, NULL, 0, &len, &error);
    char *name;
    if (status != BS_OK && status != BS_DST_TOO_SMALL) return NULL;
    if ((name = malloc(len + 1)) == NULL) {
        snprintf(error.text, sizeof error.text, "no memory");
        return NULL;
    }
    if (bs_reader_name(reader, index, name, len, &len, &error) != BS_OK) {
        free(name);
        return NULL;
    }
    name[len] = 0;
    return name;
}

static int list(bs_reader *reader) {
    uint64_t count, i;
    int32_t k;
    if (bs_reader_count(reader, &count, &error) != BS_OK) return failed();
    for (i = 0; i < count; i++) {
        bs_tensor tensor = {0};
        char *name;
        tensor.size = sizeof tensor;
        if (bs_reader_describe(reader, i, &tensor, &error) != BS_OK) return failed();
        if ((name = name_of(reader, i)) == NULL) return failed();
        printf("%s  %s [", name, bs_dtype_name(tensor.dtype));
        for (k = 0; k < tensor.n_dims; k++) printf("%s%" PRIu64, k > 0 ? ", " : "", tensor.shape[k]);
        printf("]  %" PRIu64 " bytes, %" PRIu64 " compressed\n", tensor.n_bytes, tensor.payload_bytes);
        free(name);
    }
    return 0;
}

/* One number of the types that C has or that are halves of one; others are shown as bytes. */
static void print_number(int32_t dtype, const unsigned char *at, size_t n_bytes) {
    uint32_t bits = 0;
    float number;
    double large;
    if (dtype == BS_F32 || dtype == BS_BF16) {
        memcpy((char *)&bits + (dtype == BS_BF16 ? 2 : 0), at, dtype == BS_BF16 ? 2 : 4);
        memcpy(&number, &bits, sizeof number);
        printf(" %.9g", number);
    } else if (dtype == BS_F64) {
        memcpy(&large, at, sizeof large);
        printf(" %.17g", large);
    } else {
        printf(" ");
        while (n_bytes > 0) printf("%02x", at[--n_bytes]); /* the highest first */
    }
}

static int decode(bs_reader *reader, const char *name, const char *out) {
    bs_tensor tensor = {0};
    uint64_t index, i;
    unsigned char *data;
    int result = 0;
    if (bs_reader_find(reader, name, &index, &error) != BS_OK) return failed();
    tensor.size = sizeof tensor;
    if (bs_reader_describe(reader, index, &tensor, &error) != BS_OK) return failed();
    if ((data = malloc(tensor.n_bytes > 0 ? tensor.n_bytes : 1)) == NULL) {
        fprintf(stderr, "error: no memory for %" PRIu64 " bytes\n", tensor.n_bytes);
        return 1;
    }
    /* Every checksum is verified; on failure what is in the buffer is not to be used. */
    if (bs_reader_decode(reader, index, data, tensor.n_bytes, NULL, &error) != BS_OK) {
        free(data);
        return failed();
    }
    printf("%s:", name);
    for (i = 0; i < tensor.n_elements && i < 8 && tensor.n_bytes % tensor.n_elements == 0; i++) {
        size_t element = (size_t)(tensor.n_bytes / tensor.n_elements);
        print_number(tensor.dtype, data + i * element, element);
    }
    printf("%s\n", tensor.n_elements > 8 ? " ..." : "");
    if (out != NULL) {
        FILE *file = fopen(out, "wb");
        int whole = file != NULL && fwrite(data, 1, tensor.n_bytes, file) == tensor.n_bytes;
        if (file == NULL || fclose(file) != 0 || !whole) {
            perror(out);
            result = 1;
        }
    }
    free(data);
    return result;
}

int main(int argc, char **argv) {
    bs_reader *reader;
    int result;
    if (argc < 2 || argc > 4) {
        fprintf(stderr, "usage: %s FILE.bs [TENSOR [OUT]]\n", argv[0]);
        return 2;
    }
    if (bs_abi_version() != BS_ABI_VERSION) {
        fprintf(stderr, "error: built for ABI %d of libbigsmall, running with %d\n", BS_ABI_VERSION, (int)bs_abi_version());
        return 1;
    }
    if (bs_reader_open(argv[1], NULL, &reader, &error) != BS_OK) return failed();
    result = argc == 2 ? list(reader) : decode(reader, argv[2], argc == 4 ? argv[3] : NULL);
    bs_reader_close(reader);
    return result;
}

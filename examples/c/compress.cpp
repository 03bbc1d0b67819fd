// Compresses floats from memory into a .bs file, which any reader of BigSmall loads. C++17.
//
//     compress OUT.bs [ROWS COLUMNS]

#include <bigsmall.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// An error of the library as an exception: the text names the file, the tensor and the numbers.
void check(bs_status status, const bs_error &error) {
    if (status != BS_OK) throw std::runtime_error(std::string(error.text) + " (" + bs_status_name(status) + ")");
}

struct CloseWriter {
    void operator()(bs_writer *writer) const { bs_writer_close(writer); }
};

struct Tensor {
    std::string name;
    std::vector<std::uint64_t> shape;
    std::vector<float> values;
};

// The file appears whole at bs_writer_finish; where anything fails before, nothing of it remains.
bs_result compress(const std::string &path, const std::vector<Tensor> &tensors) {
    std::vector<bs_tensor_spec> specs;
    for (const Tensor &t : tensors) {
        bs_tensor_spec spec{};
        spec.size = sizeof spec;
        spec.name = t.name.c_str();
        spec.dtype = BS_F32;
        spec.n_dims = static_cast<std::int32_t>(t.shape.size());
        spec.shape = t.shape.data();
        specs.push_back(spec);
    }
    bs_compress_options options{};
    options.size = sizeof options;
    options.mode = BS_MODE_BALANCED;

    bs_error error{};
    bs_writer *opened = nullptr;
    check(bs_writer_open(path.c_str(), specs.data(), specs.size(), R"({"format": "pt"})", &options, &opened, &error), error);
    const std::unique_ptr<bs_writer, CloseWriter> writer(opened);
    for (std::size_t i = 0; i < tensors.size(); i++) {
        const std::vector<float> &values = tensors[i].values;
        check(bs_writer_put(writer.get(), i, values.data(), values.size() * sizeof(float), nullptr, &error), error);
    }
    bs_result result{};
    result.size = sizeof result;
    check(bs_writer_finish(writer.get(), &result, &error), error);
    return result;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2 && argc != 4) {
        std::fprintf(stderr, "usage: %s OUT.bs [ROWS COLUMNS]\n", argv[0]);
        return 2;
    }
    try {
        const std::uint64_t rows = argc == 4 ? std::stoull(argv[2]) : 512, columns = argc == 4 ? std::stoull(argv[3]) : 512;
        std::mt19937 random(1);
        std::normal_distribution<float> weight(0.0F, 0.02F);
        Tensor layer{"layer.weight", {rows, columns}, std::vector<float>(rows * columns)};
        for (float &value : layer.values) value = weight(random);
        const Tensor bias{"layer.bias", {8}, {0.0F, 1.0F, -1.5F, 2.0F, -0.0F, 3.0F, 0.25F, -8.0F}};

        const bs_result result = compress(argv[1], {layer, bias});
        std::printf("%s: %llu bytes of %llu, %llu tensors\n", argv[1], static_cast<unsigned long long>(result.output_bytes),
                    static_cast<unsigned long long>(result.source_bytes), static_cast<unsigned long long>(result.n_tensors));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}

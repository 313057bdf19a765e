// Runs csrc/cuda on the host under the shim: a command on the command line, arrays in on stdin, arrays out on stdout.
// Arrays are heap blocks of their exact size, so that AddressSanitizer sees a step outside.
#include <stdio.h>

#include <string>
#include <vector>

#include "cuda/ops.h"

namespace {

template <class T>
std::vector<T> read(size_t count) {
    std::vector<T> data(count);
    if (fread(data.data(), sizeof(T), count, stdin) != count) abort();
    data.shrink_to_fit();
    return data;
}

template <class T>
void write(const std::vector<T>& data) {
    if (fwrite(data.data(), sizeof(T), data.size(), stdout) != data.size()) abort();
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<int64_t> n;
    for (int i = 2; i < argc; ++i) n.push_back(atoll(argv[i]));
    if (argv[1] == std::string("factor")) {
        // H's elements, its strides, the corner; the pulls' elements, parts and strides; the inverse's elements and
        // strides; and how many matrices
        auto H = read<float>(n[0]), pulls = read<float>(n[5]), inverse = read<float>(n[10]);
        auto status = read<int32_t>(n[13]);
        const int error = rac_cuda_factor_corner(
            H.data(), n[1], n[2], n[3], static_cast<int>(n[4]), pulls.data(), static_cast<int>(n[6]), n[7], n[8], n[9],
            inverse.data(), n[11], n[12], status.data(), n[13], nullptr);
        write(H), write(inverse), write(status);
        return error;
    }
    // how often on the same state, the number of scores, and each group's count and k
    const size_t groups = (n.size() - 2) / 2;
    std::vector<int64_t> counts, k, last(groups);
    for (size_t g = 0; g < groups; ++g) counts.push_back(n[2 + 2 * g]), k.push_back(n[3 + 2 * g]);
    const auto scores = read<float>(n[1]);
    std::vector<float> thresholds(groups);
    std::vector<int64_t> state(std::min<size_t>(groups, rac_cuda_select_groups()) * rac_cuda_select_state() / 8);
    int error = 0;
    for (int64_t time = 0; time < n[0]; ++time) {
        error |= rac_cuda_select(scores.data(), groups, counts.data(), k.data(), state.data(), thresholds.data(),
                                 last.data(), nullptr);
        write(thresholds), write(last);
    }
    return error;
}

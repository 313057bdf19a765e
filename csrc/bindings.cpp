// The only file that knows Python. Tensors come as raw pointers, sizes and strides (in elements), so nothing of torch
// is needed to build; what they say has been checked by rac_kernels. Every operation runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/types.h"
#if defined(RAC_HAVE_AMX) && !defined(__linux__)
#undef RAC_HAVE_AMX  // other systems are not known how to ask
#endif
#if defined(RAC_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(RAC_CUDA)
#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace rac {
namespace baseline {
#include "cpu/ops.h"
}
namespace avx2 {
#include "cpu/ops.h"
}
namespace avx512 {
#include "cpu/ops.h"
}
namespace avx512bf16 {
#include "cpu/ops.h"
}
namespace amx {
#include "cpu/ops.h"
}
}  // namespace rac

#if defined(RAC_HAVE_AVX2)
#define RAC_AVX2(x) x
#else
#define RAC_AVX2(x) 0
#endif
#if defined(RAC_HAVE_AVX512)
#define RAC_AVX512(x) x
#else
#define RAC_AVX512(x) 0
#endif
#if defined(RAC_HAVE_AVX512BF16)
#define RAC_AVX512BF16(x) x
#else
#define RAC_AVX512BF16(x) 0
#endif
#if defined(RAC_HAVE_AMX)
#define RAC_AMX(x) x
#else
#define RAC_AMX(x) 0
#endif

namespace {

// Rising order; the same as in setup.py.
const char* const kIsas[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int kIsaCount = 5;

#if defined(RAC_HAVE_AMX)
// Whether the processor has AMX, and the system lets this process have the large registers, for which it must be asked.
bool may_use_tiles() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;  // of leaf 7, EDX
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBf16 | kTiles | kInt8)) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Whether the instruction set was built and this processor (and its operating system) can run it.
bool usable(int isa) {
    switch (isa) {
        case 0: return true;
        case 1: return RAC_AVX2(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));  // F16C is older
        case 2:
            return usable(1) && RAC_AVX512(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"));
        case 3:
            return usable(2) &&
                   RAC_AVX512BF16(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"));
        default: return usable(3) && RAC_AMX(may_use_tiles());
    }
}

int best_isa() {
    int isa = kIsaCount - 1;
    while (!usable(isa)) --isa;
    return isa;
}

int chosen_isa = best_isa();

void choose_isa(const std::string& name) {
    for (int isa = 0; isa < kIsaCount; ++isa) {
        if (name != kIsas[isa]) continue;
        if (!usable(isa)) throw std::invalid_argument("this build or this processor has no " + name);
        chosen_isa = isa;
        return;
    }
    throw std::invalid_argument("no instruction set is called " + name);
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> found;
    for (int isa = 0; isa < kIsaCount; ++isa)
        if (usable(isa)) found.push_back(kIsas[isa]);
    return found;
}

template <class F>
struct Versions {
    F of[kIsaCount];
};

// An instruction set's version of an operation; the chosen one's.
#define RAC_OP_OF(op, isa)                                                                                       \
    (Versions<decltype(&rac::baseline::op)>{{&rac::baseline::op, RAC_AVX2(&rac::avx2::op),                       \
                                             RAC_AVX512(&rac::avx512::op), RAC_AVX512BF16(&rac::avx512bf16::op), \
                                             RAC_AMX(&rac::amx::op)}}                                            \
         .of[isa])
#define RAC_OP(op) RAC_OP_OF(op, chosen_isa)

// The instruction set for packed matrices, whose version with bf16 needs VBMI2 as well: Cooper Lake has none.
int expanding_isa() {
    static const bool expands =
        RAC_AVX512BF16(__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"));
    return expands || chosen_isa < 3 ? chosen_isa : 2;
}

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// How an operation ended, as python has it; running out of memory is an exception.
int status(rac::Status ended) {
    if (ended == rac::Status::no_memory) throw std::bad_alloc();
    return static_cast<int>(ended);
}

// `parts`: where index, mask, scales and values of the first row, and of the values the first of all, lie.
rac::PackedRows packed_rows(const std::vector<std::uintptr_t>& parts, int dtype, int values, int64_t rows,
                            int64_t columns, int64_t group) {
    return {pointer<const uint32_t>(parts[0]),
            pointer<const uint64_t>(parts[1]),
            pointer<const uint16_t>(parts[2]),
            pointer<const uint8_t>(parts[3]),
            static_cast<rac::DType>(dtype),
            static_cast<rac::Values>(values),
            rows,
            columns,
            group};
}

#if defined(RAC_CUDA)
void check_cuda(int error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + rac_cuda_error(error));
}
#endif

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.def("isas", usable_isas, "Instruction sets that this build and this processor share, weakest first");
    m.def("isa", [] { return std::string(kIsas[chosen_isa]); }, "The instruction set in use");
    m.def("choose_isa", choose_isa, "Use another instruction set from now on");
    m.attr("build") = RAC_BUILD;
    m.attr("openmp") =
#if defined(RAC_OPENMP)
        true;
#else
        false;
#endif

    m.def(
        "hessian",
        [](Address H, int64_t h_stride, Address X, int dtype, int64_t tokens, int64_t n, int64_t row_stride,
           int64_t column_stride, Address weights, int threads) {
            status(RAC_OP(hessian)(pointer<float>(H), h_stride, pointer<const void>(X), static_cast<rac::DType>(dtype),
                                   tokens, n, row_stride, column_stride, pointer<const float>(weights), threads));
        },
        NoGil());
    m.def(
        "cross",
        [](Address C, int64_t c_stride, Address X, Address Y, int dtype, int64_t tokens, int64_t n, int64_t m,
           int64_t x_row_stride, int64_t x_column_stride, int64_t y_row_stride, int64_t y_column_stride,
           Address weights, int threads) {
            status(RAC_OP(cross)(pointer<float>(C), c_stride, pointer<const void>(X), pointer<const void>(Y),
                                 static_cast<rac::DType>(dtype), tokens, n, m, x_row_stride, x_column_stride,
                                 y_row_stride, y_column_stride, pointer<const float>(weights), threads));
        },
        NoGil());
    m.def(
        "refine_step",
        [](Address Q, Address R, Address P, Address A, Address mask, Address inverse, Address sizes, Address done_at,
           Address counts, int64_t rows, int64_t n, int threads) {
            return RAC_OP(refine_step)(pointer<float>(Q), pointer<float>(R), pointer<float>(P), pointer<const float>(A),
                                       pointer<const uint8_t>(mask), pointer<const float>(inverse),
                                       pointer<double>(sizes), pointer<const double>(done_at), pointer<int32_t>(counts),
                                       rows, n, threads);
        },
        NoGil());
    m.def(
        "refine_begin",
        [](Address E, Address A, Address mask, Address diagonal, Address inverse, Address R, Address P, Address found,
           int64_t rows, int64_t n, int threads) {
            RAC_OP(refine_begin)(pointer<const float>(E), pointer<const float>(A), pointer<const uint8_t>(mask),
                                 pointer<const float>(diagonal), pointer<const float>(inverse), pointer<float>(R),
                                 pointer<float>(P), pointer<double>(found), rows, n, threads);
        },
        NoGil());
    m.def(
        "refine_end",
        [](Address Q, Address start, Address E, Address A, Address mask, Address first, Address diagonal,
           Address inverse, Address begun, Address found, int64_t rows, int64_t n, int threads) {
            RAC_OP(refine_end)(pointer<float>(Q), pointer<const float>(start), pointer<const float>(E),
                               pointer<const float>(A), pointer<const uint8_t>(mask), pointer<const float>(first),
                               pointer<const float>(diagonal), pointer<const float>(inverse),
                               pointer<const double>(begun), pointer<double>(found), rows, n, threads);
        },
        NoGil());
    m.def(
        "grid_walk",
        [](Address Q, int64_t q_stride, Address pull, int64_t pull_stride, Address mask, int64_t mask_stride,
           Address scales, int64_t scale_stride, Address H, Address inverse, int64_t largest, int dtype, int64_t rows,
           int64_t columns, int threads) {
            RAC_OP(grid_walk)(pointer<float>(Q), q_stride, pointer<float>(pull), pull_stride,
                              pointer<const uint8_t>(mask), mask_stride, pointer<const float>(scales), scale_stride,
                              pointer<const float>(H), pointer<const float>(inverse), largest,
                              static_cast<rac::DType>(dtype), rows, columns, threads);
        },
        NoGil());
    m.def("int16_sizes", [](int64_t rows, int64_t n) {
        const rac::Int16Sizes sizes = RAC_OP(int16_sizes)(rows, n);
        return py::make_tuple(sizes.packed, sizes.scales, sizes.matrix);
    });
    m.def(
        "int16_matrix",
        [](Address M, Address U, int64_t u_stride, Address scale, int64_t n, float share, int threads) {
            RAC_OP(int16_matrix)(pointer<int32_t>(M), pointer<const float>(U), u_stride, pointer<const float>(scale), n,
                                 share, threads);
        },
        NoGil());
    m.def(
        "int16_columns",
        [](Address M, Address norms, Address H, int64_t h_stride, Address scale, Address diagonal, int64_t n,
           int threads) {
            RAC_OP(int16_columns)(pointer<int32_t>(M), pointer<float>(norms), pointer<const float>(H), h_stride,
                                  pointer<const float>(scale), pointer<const float>(diagonal), n, threads);
        },
        NoGil());
    m.def(
        "int16_rows",
        [](Address packed, Address scales, Address P, Address scale, int64_t rows, int64_t n, int threads) {
            if (!RAC_OP(int16_rows)(pointer<int32_t>(packed), pointer<float>(scales), pointer<const float>(P),
                                    pointer<const float>(scale), rows, n, threads))
                throw std::bad_alloc();
        },
        NoGil());
    m.def(
        "int16_gemm",
        [](Address V, Address from, Address packed, Address scales, Address M, Address norms, int64_t rows, int64_t n,
           int threads) {
            RAC_OP(int16_gemm)(pointer<float>(V), pointer<const float>(from), pointer<const int32_t>(packed),
                               pointer<const float>(scales), pointer<const int32_t>(M), pointer<const float>(norms),
                               rows, n, threads);
        },
        NoGil());
    m.def(
        "admm_step",
        [](Address T, Address V, Address kept, Address goal, Address packed, Address scales, int64_t rows, int64_t n,
           int64_t zeros, int64_t keep, int64_t group, float relaxation, float shrink, int threads) {
            if (!RAC_OP(admm_step)(pointer<float>(T), pointer<float>(V), pointer<uint8_t>(kept),
                                   pointer<const float>(goal), pointer<int32_t>(packed), pointer<float>(scales), rows,
                                   n, zeros, keep, group, relaxation, shrink, threads))
                throw std::bad_alloc();
        },
        NoGil());
    m.def(
        "column_norm",
        [](Address s, Address X, int dtype, int64_t tokens, int64_t n, int64_t row_stride, int64_t column_stride,
           Address weights, int threads) {
            RAC_OP(column_norm)(pointer<float>(s), pointer<const void>(X), static_cast<rac::DType>(dtype), tokens, n,
                                row_stride, column_stride, pointer<const float>(weights), threads);
        },
        NoGil());
    m.def(
        "attention",
        [](Address out, Address q, Address k, Address v, int64_t d, int64_t e, const std::vector<int64_t>& heads,
           const std::vector<int64_t>& strides, double scale, const std::vector<int64_t>& starts, int threads) {
            const rac::AttentionSizes sizes{heads[0],
                                            heads[1],
                                            d,
                                            e,
                                            strides[0],
                                            strides[1],
                                            strides[2],
                                            strides[3],
                                            strides[4],
                                            strides[5],
                                            static_cast<float>(scale)};
            if (!RAC_OP(attention)(pointer<void>(out), pointer<const void>(q), pointer<const void>(k),
                                   pointer<const void>(v), sizes, starts.data(),
                                   static_cast<int64_t>(starts.size()) - 1, threads))
                throw std::bad_alloc();
        },
        NoGil());
    m.def(
        "packed_matmul",
        [](Address Y, int64_t y_stride, Address X, int dtype, int64_t tokens, int64_t x_stride,
           const std::vector<Address>& parts, int w_dtype, int values, int64_t rows, int64_t columns, int64_t group,
           Address bias, int threads) {
            if (!RAC_OP_OF(packed_matmul, expanding_isa())(pointer<void>(Y), y_stride, pointer<const void>(X),
                                                           static_cast<rac::DType>(dtype), tokens, x_stride,
                                                           packed_rows(parts, w_dtype, values, rows, columns, group),
                                                           pointer<const float>(bias), threads))
                throw std::bad_alloc();
        },
        NoGil());
    m.def(
        "packed_tiles",
        [](Address Y, int64_t y_stride, Address X, int dtype, int64_t tokens, int64_t x_stride,
           const std::vector<Address>& parts, int w_dtype, int values, int64_t rows, int64_t columns, int64_t group,
           Address bias, int threads) {
            if (!RAC_OP_OF(packed_tiles, expanding_isa())(pointer<void>(Y), y_stride, pointer<const void>(X),
                                                          static_cast<rac::DType>(dtype), tokens, x_stride,
                                                          packed_rows(parts, w_dtype, values, rows, columns, group),
                                                          pointer<const float>(bias), threads))
                throw std::bad_alloc();
        },
        NoGil());
    m.def(
        "packed_expand",
        [](Address out, int dtype, const std::vector<Address>& parts, int w_dtype, int values, int64_t rows,
           int64_t columns, int64_t group, int threads) {
            if (!RAC_OP_OF(packed_expand, expanding_isa())(pointer<void>(out), static_cast<rac::DType>(dtype),
                                                           packed_rows(parts, w_dtype, values, rows, columns, group),
                                                           threads))
                throw std::bad_alloc();
        },
        NoGil());
    m.def(
        "kth_smallest",
        [](Address scores, int64_t count, int64_t k, int threads) {
            float result;
            if (!RAC_OP(kth_smallest)(pointer<const float>(scores), count, k, &result, threads)) throw std::bad_alloc();
            return result;
        },
        NoGil());
    m.def(
        "sweep",
        [](Address Q, Address W, int dtype, int64_t n, int64_t w_stride, Address U, int64_t u_stride, Address dead,
           double sparsity, int64_t keep, int64_t group, int64_t block_size, const std::vector<int64_t>& row_groups,
           int threads) {
            return status(RAC_OP(sweep)(pointer<float>(Q), pointer<const void>(W), static_cast<rac::DType>(dtype), n,
                                        w_stride, pointer<const float>(U), u_stride, pointer<const uint8_t>(dead),
                                        sparsity, keep, group, block_size, row_groups.data(),
                                        static_cast<int64_t>(row_groups.size()), threads));
        },
        NoGil());
    m.def(
        "factor",
        [](Address H, int64_t n, int64_t h_stride, int threads) {
            return status(RAC_OP(factor)(pointer<float>(H), n, h_stride, threads));
        },
        NoGil());
    m.def(
        "inverse",
        [](Address U, int64_t n, int64_t u_stride, int threads) {
            status(RAC_OP(inverse)(pointer<float>(U), n, u_stride, threads));
        },
        NoGil());
    m.def(
        "mirror",
        [](Address H, int64_t n, int64_t h_stride, bool down, int threads) {
            return status(RAC_OP(mirror)(pointer<float>(H), n, h_stride, down, threads));
        },
        NoGil());

#if defined(RAC_CUDA)
    m.attr("cuda") = RAC_CUDA;
    m.attr("cuda_missing") = "";
    m.def("cuda_check", [](int device) { check_cuda(rac_cuda_usable(device)); }, "Raise unless it can run the kernels");
    m.attr("cuda_select_groups") = rac_cuda_select_groups();
    m.attr("cuda_select_state") = rac_cuda_select_state();
    m.def(
        "cuda_factor_corner",
        [](Address H, int64_t h_stride, int64_t matrix_stride, int64_t first, int size, Address pulls, int parts,
           int64_t part_stride, int64_t pull_stride, int64_t pull_matrix_stride, Address inverse,
           int64_t inverse_stride, int64_t inverse_matrix_stride, Address status, int64_t batch, Address stream) {
            check_cuda(rac_cuda_factor_corner(
                pointer<float>(H), h_stride, matrix_stride, first, size, pointer<const float>(pulls), parts,
                part_stride, pull_stride, pull_matrix_stride, pointer<float>(inverse), inverse_stride,
                inverse_matrix_stride, pointer<int32_t>(status), batch, pointer<void>(stream)));
        },
        NoGil());
    m.def(
        "cuda_select",
        [](Address scores, const std::vector<int64_t>& counts, const std::vector<int64_t>& k, Address state,
           Address thresholds, Address last, Address stream) {
            check_cuda(rac_cuda_select(pointer<const float>(scores), static_cast<int64_t>(counts.size()), counts.data(),
                                       k.data(), pointer<void>(state), pointer<float>(thresholds),
                                       pointer<int64_t>(last), pointer<void>(stream)));
        },
        NoGil());
#else
    m.attr("cuda") = "";
    m.attr("cuda_missing") = RAC_CUDA_MISSING;
#endif
}

// A diagonal block of H = U U^T with U upper triangular, and the block's inverse: rac_kernels/ops/factor.py has the
// mathematics. The blocks of a matrix follow each other, so what counts here is latency: n/128 of these stand in a row.
//
// One thread block a matrix, everything in shared memory, in sub-blocks of 32 by 32 from the last to the first. Warp 0
// factors and inverts the sub-block on the diagonal in its registers, a lane a row, and that is the chain of dependent
// steps that sets the time. The other warps meanwhile do every product that does not need it: the updates of earlier
// sub-blocks (right-looking) and the sums behind the inverse. Both triangles pad to whole sub-blocks with the identity.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace {

constexpr int kSide = kWarp;  // of a sub-block
constexpr int kBlocks = 4;    // sub-blocks a side
constexpr int kSize = kSide * kBlocks;
constexpr int kSlots = kBlocks * (kBlocks + 1) / 2;  // sub-blocks in the upper triangle
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kStrip = 8;  // rows of a sub-block that a warp multiplies at a time
constexpr int kStrips = kSide / kStrip;
constexpr int kRows = kSize / kWarps;  // that a warp loads
constexpr int kSchedulers = 4;         // of a multiprocessor; warps go to them in turn
constexpr int kHelpers = kWarps - kWarps / kSchedulers;
static_assert(kStrips * (kBlocks - 1) <= kWarps, "a warp finishes no more than one strip");
// Rows are float4-aligned, and eight lanes that read a float4 each, one row below the other, meet every bank once.
constexpr int kStride = kSide + 4;
constexpr int kArea = kSide * kStride;

struct alignas(16) Shared {  // float4s are read from it
    float U[kSlots][kArea];  // what is left of H's corner, and U where it is done
    float V[kSlots][kArea];  // inv(U)
    float column[2][kSide];
    int failed;
};
static_assert(sizeof(Shared) <= 99 * 1024, "the smallest devices (compute capability 8.6) give a block no more");

__host__ __device__ constexpr int slot(int i, int j) { return j * (j + 1) / 2 + i; }

// held[k] = block[lane][k]
__device__ __forceinline__ void hold_row(float (&held)[kSide], const float* block, int lane) {
#pragma unroll
    for (int k = 0; k < kSide; k += 4) {
        const float4 x = *reinterpret_cast<const float4*>(block + lane * kStride + k);
        held[k] = x.x, held[k + 1] = x.y, held[k + 2] = x.z, held[k + 3] = x.w;
    }
}

// held[k] = block[k][lane]
__device__ __forceinline__ void hold_column(float (&held)[kSide], const float* block, int lane) {
#pragma unroll
    for (int k = 0; k < kSide; ++k) held[k] = block[k * kStride + lane];
}

// sum[r] += rows[r] . held: the rows are read by all lanes at once, what differs between lanes is in registers.
__device__ __forceinline__ void multiply(float (&sum)[kStrip], const float* rows, const float (&held)[kSide]) {
#pragma unroll
    for (int k = 0; k < kSide; k += 4)
#pragma unroll
        for (int r = 0; r < kStrip; ++r) {
            const float4 x = *reinterpret_cast<const float4*>(rows + r * kStride + k);
            sum[r] += x.x * held[k];
            sum[r] += x.y * held[k + 1];
            sum[r] += x.z * held[k + 2];
            sum[r] += x.w * held[k + 3];
        }
}

// block = sum or block -= sum, for the strip's rows.
__device__ __forceinline__ void put(float* rows, const float (&sum)[kStrip], int lane) {
#pragma unroll
    for (int r = 0; r < kStrip; ++r) rows[r * kStride + lane] = sum[r];
}
__device__ __forceinline__ void take_off(float* rows, const float (&sum)[kStrip], int lane) {
#pragma unroll
    for (int r = 0; r < kStrip; ++r) rows[r * kStride + lane] -= sum[r];
}

// One warp: D -> U with D = U U^T (zeros below the diagonal), V = inv(U). Returns 0 or 1 + the first column that fails.
//
// Lane r keeps, for row r of D and column r of V, the sums to be taken off. Column c of U, once there, goes into both
// alike: d[k] += U[r][c] U[k][c] and, the back substitution by columns, v[k] += V[c][r] U[k][c]. Sums that start from
// zero round less than elements that lose a bit at every column. The next pivot does not wait for this to go through
// shared memory: a shuffle carries the one element that it needs.
__device__ __forceinline__ int factor_and_invert(float* D, float* V, float (&columns)[2][kSide], int lane) {
    float d[kSide] = {}, v[kSide] = {};
    float* row = D + lane * kStride;
    float pivot = __shfl_sync(kAllLanes, row[kSide - 1], kSide - 1);
#pragma unroll
    for (int c = kSide - 1; c >= 0; --c) {
        // Division by the pivot's root, as good as rounding allows: the hardware's 1 / root errs by 2 units in the last
        // place, and a Newton step takes that off the root and off each quotient. A pivot that is not positive and
        // finite gives NaN here, and that goes on into every column that follows.
        const float inverse = rsqrtf(pivot);
        const float dividend = lane <= c ? row[c] - d[c] : 0;
        const float other = lane == c ? 1 : -v[c];  // (lane == c) - v[c] would have 32 constants kept in registers
        float root = pivot * inverse;
        root += 0.5f * inverse * (pivot - root * root);
        float u = dividend * inverse, x = other * inverse;
        u += inverse * (dividend - u * root);
        x += inverse * (other - x * root);
        row[c] = u;
        V[c * kStride + lane] = x;
        // Looking now and then is enough for stopping early. It also keeps the compiler from putting off updates, with
        // all that they need in registers, to the far end of one long stretch of code.
        if (c == 0 || (c % 8 == 0 && !(root > 0))) break;
        const float next = __shfl_sync(kAllLanes, u, c - 1);
        pivot = D[(c - 1) * (kStride + 1)] - (__shfl_sync(kAllLanes, d[c - 1], c - 1) + next * next);
        float* column = columns[c % 2];  // in turn: a lane may still be reading the one before
        column[lane] = u;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < c; k += 4) {
            const float4 four = *reinterpret_cast<const float4*>(column + k);
            const float y[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (k + e < c) {
                    d[k + e] += u * y[e];
                    v[k + e] += x * y[e];
                }
        }
    }
    const unsigned failed = __ballot_sync(kAllLanes, !(row[lane] > 0));
    return kWarp - __clz(failed);
}

// The work that can be done while sub-block b on the diagonal is being factored; helper counts from 0 to kHelpers - 1.
//   V[b][j] = sum of U[b][k] V[k][j] over b < k <= j, which times -inv(U[b][b]) is the inverse's sub-block
//   U[i][k] -= U[i][b + 1] U[k][b + 1]^T for i <= k <= b: column b + 1 comes off all that is left, except [b][b], which
//   has been seen to
__device__ __forceinline__ void work_ahead(Shared& shared, int b, int blocks, int helper, int lane) {
    const int sums = blocks - 1 - b;
    const int updates = sums ? slot(b, b) : 0;
    for (int task = helper; task < (sums + updates) * kStrips; task += kHelpers) {
        const int strip = task % kStrips * kStrip * kStride;
        float held[kSide], sum[kStrip] = {};
        if (task < sums * kStrips) {
            const int j = blocks - 1 - task / kStrips;  // the longest first
            for (int k = b + 1; k <= j; ++k) {
                hold_column(held, shared.V[slot(k, j)], lane);
                multiply(sum, shared.U[slot(b, k)] + strip, held);
            }
            put(shared.V[slot(b, j)] + strip, sum, lane);
        } else {
            const int target = task / kStrips - sums;
            int k = 0;
            while (slot(0, k + 1) <= target) ++k;
            hold_row(held, shared.U[slot(k, b + 1)], lane);
            multiply(sum, shared.U[slot(target - slot(0, k), b + 1)] + strip, held);
            take_off(shared.U[target] + strip, sum, lane);
        }
    }
}

// With sub-block b factored: U[i][b] = U[i][b] inv(U[b][b])^T for i < b and V[b][j] = -inv(U[b][b]) V[b][j] for j > b.
// Both are in place and other warps read the same sub-blocks, so results wait in registers until all are there.
__device__ __forceinline__ void finish_row_and_column(Shared& shared, int b, int blocks, int warp, int lane) {
    const int other = warp / kStrips, strip = warp % kStrips * kStrip * kStride;
    const float* inverse = shared.V[slot(b, b)];
    float* target = nullptr;
    float held[kSide], sum[kStrip] = {};
    if (other < b) {
        target = shared.U[slot(other, b)] + strip;
        hold_row(held, inverse, lane);
        multiply(sum, target, held);
    } else if (other < blocks - 1) {
        float* block = shared.V[slot(b, other + 1)];
        target = block + strip;
        hold_column(held, block, lane);
#pragma unroll
        for (int k = 0; k < kSide; ++k) held[k] = -held[k];
        multiply(sum, inverse + strip, held);
    }
    __syncthreads();
    if (target) put(target, sum, lane);
}

__global__ void __launch_bounds__(kThreads, 1)
    factor_corner(float* H, int64_t h_stride, int64_t matrix_stride, int64_t first, int size, const float* pulls,
                  int parts, int64_t part_stride, int64_t pull_stride, int64_t pull_matrix_stride, float* inverse,
                  int64_t inverse_stride, int64_t inverse_matrix_stride, int32_t* status) {
    RAC_SHARED(Shared, memory);
    Shared& shared = memory[0];
    const int lane = threadIdx.x % kWarp;
    // By a shuffle, so that the compiler knows it to be the same in all lanes and makes no code for lanes gone apart.
    const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
    if (status[blockIdx.x]) return;
    H += blockIdx.x * matrix_stride + first * (h_stride + 1);
    pulls += blockIdx.x * pull_matrix_stride + first * pull_stride;
    inverse += blockIdx.x * inverse_matrix_stride;

    // All loads before the first use: one trip to memory, not one a row. Below the diagonal nothing of H is read.
    float loaded[kRows][kBlocks];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = i * kWarps / kSide; j < kBlocks; ++j) {
            const int row = i * kWarps + warp, column = j * kSide + lane;
            loaded[i][j] = row <= column && column < size ? H[row * h_stride + column] : row == column;
        }
    for (int part = 0; part < parts; ++part, pulls += part_stride)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = i * kWarps / kSide; j < kBlocks; ++j) {
                const int row = i * kWarps + warp, column = j * kSide + lane;
                if (row <= column && column < size) loaded[i][j] -= pulls[row * pull_stride + column];
            }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = i * kWarps / kSide; j < kBlocks; ++j)
            shared.U[slot(i * kWarps / kSide, j)][(i * kWarps % kSide + warp) * kStride + lane] = loaded[i][j];
    __syncthreads();

    const int blocks = (size + kSide - 1) / kSide;
    for (int b = blocks - 1; b >= 0; --b) {
        if (warp == 0) {
            const int failed = factor_and_invert(shared.U[slot(b, b)], shared.V[slot(b, b)], shared.column, lane);
            if (lane == 0) shared.failed = failed;
        } else if (warp % kSchedulers) {  // what shares a scheduler with warp 0 keeps out of its way
            work_ahead(shared, b, blocks, warp - 1 - warp / kSchedulers, lane);
        }
        __syncthreads();
        if (shared.failed) {
            if (threadIdx.x == 0) status[blockIdx.x] = static_cast<int32_t>(first + b * kSide + shared.failed);
            return;
        }
        finish_row_and_column(shared, b, blocks, warp, lane);
        __syncthreads();
        if (b == 0) break;
        // The next sub-block on the diagonal is the one thing that cannot wait.
        if (warp < kStrips) {
            const float* above = shared.U[slot(b - 1, b)];
            const int strip = warp * kStrip * kStride;
            float held[kSide], sum[kStrip] = {};
            hold_row(held, above, lane);
            multiply(sum, above + strip, held);
            take_off(shared.U[slot(b - 1, b - 1)] + strip, sum, lane);
        }
        __syncthreads();
    }

    // Not unrolled whole: the addresses would be those of the loads, and live in registers all the while.
#pragma unroll 4
    for (int row = warp; row < size; row += kWarps)
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const int column = j * kSide + lane, place = row % kSide * kStride + lane;
            if (column >= size) break;
            if (row <= column) H[row * h_stride + column] = shared.U[slot(row / kSide, j)][place];
            inverse[row * inverse_stride + column] = row <= column ? shared.V[slot(row / kSide, j)][place] : 0;
        }
}

}  // namespace

const char* rac_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int rac_cuda_usable(int device) {
    int before = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && device >= 0) error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, factor_corner);
    if (device >= 0) cudaSetDevice(before);
    cudaGetLastError();  // or whoever asks next is told of it
    return error;
}

int rac_cuda_factor_corner(float* H, int64_t h_stride, int64_t matrix_stride, int64_t first, int size,
                           const float* pulls, int parts, int64_t part_stride, int64_t pull_stride,
                           int64_t pull_matrix_stride, float* inverse, int64_t inverse_stride,
                           int64_t inverse_matrix_stride, int32_t* status, int64_t batch, void* stream) {
    if (size == 0 || batch == 0) return cudaSuccess;
    // More than 48 KiB has to be asked for, on each device; asking again costs less than remembering.
    const cudaError_t error =
        cudaFuncSetAttribute(factor_corner, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error != cudaSuccess) return error;
    return launch(factor_corner, Blocks::independent, batch, kThreads, sizeof(Shared), stream, H, h_stride,
                  matrix_stride, first, size, pulls, parts, part_stride, pull_stride, pull_matrix_stride, inverse,
                  inverse_stride, inverse_matrix_stride, status);
}

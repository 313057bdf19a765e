// Exact selection of the k smallest scores of each group, by radix on keys, which are in the floats' order. Three
// passes take 11, 11 and 10 bits, each counting the scores that share the bits found so far.
//
// A group is the work of a team of blocks. A pass ends with the team's counts in one histogram in global memory; all
// blocks meet there, and each works out for itself where the k-th falls: meeting once a pass is all that they have to
// say to each other. One launch does it all, so nothing waits for the host. Whatever order the blocks count in, sums of
// integers are the same, so the result is too.
#include <cuda/atomic>

#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace {

constexpr int kPasses = 3;
constexpr int kBins = 2048;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerMultiprocessor = 2;  // blocks: enough loads under way for all of L2's bandwidth
constexpr int64_t kPerBlock = 4096;    // scores, at least: fewer are not worth a block's share of the meeting
constexpr int kMaxBlocks = 1024;       // in a team
constexpr int kMaxGroups = 64;         // in a launch
constexpr int kLoads = 16;             // under way in a thread

// State of a group in global memory: all zero between launches, except `equal`, which is written before it is read.
struct State {
    uint32_t histogram[kPasses][kBins];
    uint32_t arrived;            // at meetings, all of them together
    uint32_t left;               // blocks that have read their last
    uint32_t equal[kMaxBlocks];  // of each block's scores, how many are the k-th smallest
};

struct Team {
    int64_t begin, count;  // its scores
    int64_t k;
    int first_block, blocks;
};
struct Teams {
    int count;
    Team of[kMaxGroups];
};

struct Found {
    uint32_t bin, before, equal;  // the k-th is in bin, `before` are in bins below it, `equal` in it
};

struct Shared {
    uint32_t histogram[kBins];  // of the block's own scores
    uint32_t sums[kWarps];
    Found found;
    uint32_t before;
    bool last;
};

using Counter = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;
using cuda::std::memory_order_acq_rel;
using cuda::std::memory_order_acquire;
using cuda::std::memory_order_relaxed;
using cuda::std::memory_order_release;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7f800000;

// Unsigned integers in the order of the floats that they stand for; -0 is 0, NaN of either sign is largest. In
// integers, since what compares floats may take denormal numbers for zeros.
__device__ __forceinline__ uint32_t key_of(float score) {
    const uint32_t bits = __float_as_uint(score), size = bits & ~kSign;
    if (size > kInfinity) return ~0u;
    return bits > kSign ? ~bits : bits | kSign;
}
__device__ __forceinline__ float score_of(uint32_t key) { return __uint_as_float(key & kSign ? key ^ kSign : ~key); }

// All blocks of a team wait here for each other; what any of their threads wrote before, all of their threads may read
// after. The barriers carry the order between a block's threads, release and acquire that between the blocks.
__device__ void meet(uint32_t* arrived, uint32_t target) {
    __syncthreads();
    if (threadIdx.x == 0) {
        Counter counter(*arrived);
        counter.fetch_add(1, memory_order_release);
        while (counter.load(memory_order_acquire) < target) __nanosleep(20);
    }
    __syncthreads();
}

// The whole block: the bin of the wanted-th (from 1) of what `histogram` counts, into shared.found.
__device__ void find(Shared& shared, uint32_t* histogram, int bins, uint32_t wanted) {
    constexpr int kMost = kBins / kThreads;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int own = bins / kThreads, first = threadIdx.x * own;
    uint32_t counts[kMost], sum = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        counts[i] = i < own ? Counter(histogram[first + i]).load(memory_order_relaxed) : 0;
        sum += counts[i];
    }
    uint32_t through = sum;  // this thread's bins and all before
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, through, step);
        if (lane >= step) through += other;
    }
    if (lane == kWarp - 1) shared.sums[warp] = through;
    __syncthreads();
    for (int i = 0; i < warp; ++i) through += shared.sums[i];
    uint32_t before = through - sum;
    if (before < wanted && wanted <= through) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            if (wanted <= before) break;
            shared.found = {static_cast<uint32_t>(first + i), before, counts[i]};
            before += counts[i];
        }
    }
    __syncthreads();
}

// The whole block: the position of the wanted-th (from 1) of scores[0] .. scores[count - 1] whose key is `key`; one
// thread passes it to `tell`.
template <class Tell>
__device__ void locate(Shared& shared, const float* scores, int64_t count, uint32_t key, uint32_t wanted, Tell tell) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int64_t base = 0; base < count; base += kThreads) {
        const int64_t i = base + threadIdx.x;
        const bool is = i < count && key_of(scores[i]) == key;
        const unsigned lanes = __ballot_sync(kAllLanes, is);
        if (lane == 0) shared.sums[warp] = __popc(lanes);
        __syncthreads();
        uint32_t rank = __popc(lanes & ((2u << lane) - 1)), all = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) rank += shared.sums[w];
            all += shared.sums[w];
        }
        if (is && rank == wanted) tell(i);
        if (wanted <= all) return;
        wanted -= all;
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads, kPerMultiprocessor)
    select(const float* scores, const __grid_constant__ Teams teams, State* states, float* thresholds, int64_t* last) {
    RAC_SHARED(Shared, memory);
    Shared& shared = memory[0];
    int group = 0;
    while (group + 1 < teams.count && teams.of[group + 1].first_block <= static_cast<int>(blockIdx.x)) ++group;
    const Team& team = teams.of[group];
    const int rank = static_cast<int>(blockIdx.x) - team.first_block;
    const bool speaks = rank == 0 && threadIdx.x == 0;
    if (team.k == 0) {
        if (speaks) thresholds[group] = __uint_as_float(kSign | kInfinity), last[group] = -1;
        return;
    }
    State& state = states[group];
    // Each block has a stretch of its own, so that ranks among equals follow positions.
    const int64_t share = (team.count + team.blocks - 1) / team.blocks;
    const int64_t begin = rank * share < team.count ? rank * share : team.count;
    const int64_t count = share < team.count - begin ? share : team.count - begin;
    scores += team.begin + begin;

    uint32_t key = 0, known = 0;                      // the leading bits found so far, and which these are
    uint32_t wanted = static_cast<uint32_t>(team.k);  // rank among the scores that have them
    int shift = 32;                                   // bits not found yet
    for (int pass = 0; pass < kPasses; ++pass) {
        const int bits = pass < 2 ? 11 : 10, bins = 1 << bits;
        shift -= bits;
        for (int bin = threadIdx.x; bin < bins; bin += kThreads) shared.histogram[bin] = 0;
        __syncthreads();
        for (int64_t base = 0; base < count; base += kThreads * kLoads) {
            uint32_t keys[kLoads];
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int64_t at = base + i * kThreads + threadIdx.x;
                keys[i] = at < count ? key_of(scores[at]) : 0;
            }
#pragma unroll
            for (int i = 0; i < kLoads; ++i)
                // Scores crowd in few bins, but lanes that add 1 to the same one are added up.
                if (base + i * kThreads + threadIdx.x < count && (keys[i] & known) == key)
                    atomicAdd(&shared.histogram[keys[i] >> shift & (bins - 1)], 1u);
        }
        __syncthreads();
        for (int bin = threadIdx.x; bin < bins; bin += kThreads)
            if (const uint32_t some = shared.histogram[bin]) atomicAdd(&state.histogram[pass][bin], some);
        meet(&state.arrived, (pass + 1) * team.blocks);
        find(shared, state.histogram[pass], bins, wanted);
        key |= shared.found.bin << shift;
        known |= (bins - 1u) << shift;
        wanted -= shared.found.before;
    }

    if (speaks) thresholds[group] = score_of(key);
    if (wanted == shared.found.equal) {
        if (speaks) last[group] = team.count - 1;  // all of them
    } else {
        // Not all that equal the threshold may go: the block that has the last one looks for it.
        const uint32_t mine = shared.histogram[shared.found.bin];
        if (threadIdx.x == 0) state.equal[rank] = mine, shared.before = 0;
        meet(&state.arrived, (kPasses + 1) * team.blocks);
        uint32_t before = 0;
        for (int i = threadIdx.x; i < rank; i += kThreads) before += state.equal[i];
        if (before) atomicAdd(&shared.before, before);
        __syncthreads();
        before = shared.before;
        if (before < wanted && wanted <= before + mine)
            locate(shared, scores, count, key, wanted - before, [&](int64_t i) { last[group] = begin + i; });
    }

    // The last block to have read everything leaves the state as all found it.
    __syncthreads();
    if (threadIdx.x == 0)
        shared.last = Counter(state.left).fetch_add(1, memory_order_acq_rel) + 1 == static_cast<uint32_t>(team.blocks);
    __syncthreads();
    if (!shared.last) return;
    for (int i = threadIdx.x; i < kPasses * kBins; i += kThreads) state.histogram[i / kBins][i % kBins] = 0;
    if (threadIdx.x == 0) state.arrived = 0, state.left = 0;
}

}  // namespace

int rac_cuda_select_groups(void) { return kMaxGroups; }
int64_t rac_cuda_select_state(void) { return sizeof(State); }

int rac_cuda_select(const float* scores, int64_t groups, const int64_t* counts, const int64_t* k, void* state,
                    float* thresholds, int64_t* last, void* stream) {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    const int64_t resident = kPerMultiprocessor * multiprocessors;  // as launch bounds and shared memory allow
    int64_t begin = 0;
    for (int64_t done = 0; done < groups && error == cudaSuccess;) {
        Teams teams{};
        teams.count = static_cast<int>(min_of(groups - done, min_of(kMaxGroups, resident)));
        double total = 0;
        for (int g = 0; g < teams.count; ++g) total += static_cast<double>(counts[done + g]);
        // Each group has a block; the others go by size.
        int blocks = 0;
        for (int g = 0; g < teams.count; ++g) {
            const int64_t count = counts[done + g];
            const int64_t share = total ? static_cast<int64_t>((resident - teams.count) * (count / total)) : 0;
            const int64_t useful = min_of(kMaxBlocks, (count + kPerBlock - 1) / kPerBlock);
            const bool idle = !k[done + g] || !useful;
            teams.of[g] = {begin, count, k[done + g], blocks, static_cast<int>(idle ? 1 : min_of(1 + share, useful))};
            begin += count;
            blocks += teams.of[g].blocks;
        }
        error = launch(select, Blocks::cooperative, blocks, kThreads, sizeof(Shared), stream, scores, teams,
                       static_cast<State*>(state), thresholds + done, last + done);
        done += teams.count;
    }
    return error;
}

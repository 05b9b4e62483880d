// AdamW over flat memory, and the sum of squares for the gradients' norm. The contract stands in adamw.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. One pass for everything: p, m, v and g are read and p, m, v written, 28 bytes per parameter; array code would
//      move three times that. 124 million parameters: 3.5 GB, 0.81 ms.
//   2. One launch for all runs of parameters that are treated alike, norms and matrices in turns: the borders between
//      them are looked up while the loads are on their way.
//   3. 16-byte accesses, 8 of them on their way per thread, that leave the cache first: nothing of it is needed soon.
//      Predicted at least 85 percent of a copy. The exact root and division are free: 190 instructions would fit.
//   4. What is another in each update is made where it is read: the factor that clips the gradients, the count of
//      updates, and what both betas come to. Nothing waits for them, and a CUDA graph holds the update.
#include "common.cuh"

constexpr int THREADS = 256, PACKS = 2;  // packs of each array per thread

// What comes next is update number *steps + 1: its schedule, a run per thread in turns, in float64. It counts where the
// scale is finite, because only then `step` makes it. One warp.
template <typename T>
__global__ void __launch_bounds__(32)
advance(const double* rates, int runs, double beta1, double beta2, const float* scale, int* steps, T* schedule) {
    const int number = *steps + 1;
    __syncwarp();  // all lanes have read it
    const double rest1 = 1 - pow(beta1, static_cast<double>(number)), rest2 = 1 - pow(beta2, static_cast<double>(number));
    for (int run = threadIdx.x; run < runs; run += 32) {
        const double lr = rates[2 * run], weight_decay = rates[2 * run + 1];
        schedule[3 * run] = from_float<T>(static_cast<float>(1 - lr * weight_decay));
        schedule[3 * run + 1] = from_float<T>(static_cast<float>(lr / rest1));
        schedule[3 * run + 2] = from_float<T>(static_cast<float>(1 / sqrt(rest2)));
    }
    if (threadIdx.x == 0 && *scale - *scale == 0) *steps = number;
}

// The run that a thread is at: where it ends, and its row of the schedule.
struct Run {
    const float* schedule;
    const long long* borders;  // where runs 1, 2, ... begin
    int last, at;
    long long n, end;
    float keep, rate, root;

    __device__ __forceinline__ void take(int run) {
        at = run, end = run < last ? borders[run] : n;
        keep = schedule[3 * run], rate = schedule[3 * run + 1], root = schedule[3 * run + 2];
    }

    // To that of element j < n, wherever it is.
    __device__ __forceinline__ void find(long long j) {
        int low = 0, high = last;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (borders[middle] <= j) low = middle + 1;
            else high = middle;
        }
        take(low);
    }

    // To that of element j < n, where it is this one or a later one.
    __device__ __forceinline__ void follow(long long j) {
        while (j >= end) take(at + 1);
    }
};

struct Constants {
    float beta1, rest1, beta2, rest2, eps, scale;

    // One parameter's update; in the same order as the Numba version's.
    __device__ __forceinline__ void step(const Run& run, float& p, float& m, float& v, float g) const {
        g *= scale;
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * g * g;
        p = run.keep * p - run.rate * m / (sqrtf(v) * run.root + eps);
    }
};

// The update of n parameters in `runs` runs, in packs of N and what is left one by one. A pack may lie across borders.
// A scale that is not finite changes nothing.
template <int N>
__global__ void __launch_bounds__(THREADS)
step(float* p, float* m, float* v, const float* g, long long n, float beta1, float rest1, float beta2, float rest2,
     float eps, const float* scale, const float* schedule, const long long* borders, int runs) {
    const Constants constants = {beta1, rest1, beta2, rest2, eps, *scale};
    const long long first = (static_cast<long long>(blockIdx.x) * (PACKS * THREADS) + threadIdx.x) * N;
    Pack<float, N> ps[PACKS], ms[PACKS], vs[PACKS], gs[PACKS];
#pragma unroll
    for (int u = 0; u < PACKS; ++u) {
        const long long j = first + u * THREADS * N;
        if (j + N <= n) {
            ps[u] = load_pack_streaming<N>(p + j), ms[u] = load_pack_streaming<N>(m + j);
            vs[u] = load_pack_streaming<N>(v + j), gs[u] = load_pack_streaming<N>(g + j);
        }
    }
    if (constants.scale - constants.scale != 0) return;
    Run run = {schedule, borders, runs - 1, 0, n};
    run.find(first);
#pragma unroll
    for (int u = 0; u < PACKS; ++u) {
        const long long j = first + u * THREADS * N;
        if (j + N <= n) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                run.follow(j + k);
                constants.step(run, ps[u].v[k], ms[u].v[k], vs[u].v[k], gs[u].v[k]);
            }
            store_pack_streaming(p + j, ps[u]), store_pack_streaming(m + j, ms[u]), store_pack_streaming(v + j, vs[u]);
        }
    }
    const int rest = n % N;
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x < rest) {
        const long long j = n - rest + threadIdx.x;
        run.find(j);
        constants.step(run, p[j], m[j], v[j], g[j]);
    }
}

// The sum of squares of each block's part of x. Which part is a matter of the grid and so of n alone, not of the GPU.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
squares(const T* x, long long n, float* partial) {
    SHARED(float, sums, THREADS / 32);
    constexpr int LOADS = 4;
    const long long stride = static_cast<long long>(gridDim.x) * THREADS * N;
    float total[LOADS] = {};
    const long long first = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * N;
    for (long long j0 = first; j0 < n; j0 += LOADS * stride) {
        Pack<T, N> packs[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const long long j = j0 + u * stride;
            packs[u] = j + N <= n ? load_pack_streaming<N>(x + j) : Pack<T, N>{};
        }
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) total[u] = fmaf(to_float(packs[u].v[k]), to_float(packs[u].v[k]), total[u]);
    }
    const int rest = n % N;
    if (blockIdx.x == 0 && threadIdx.x < rest) {
        const float last = to_float(x[n - rest + threadIdx.x]);
        total[0] = fmaf(last, last, total[0]);
    }
    const float sum = block_sum<THREADS>((total[0] + total[1]) + (total[2] + total[3]), sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block of 1024 threads adds at most as many parts.
__global__ void __launch_bounds__(1024)
add_parts(const float* partial, int parts, float* total) {
    SHARED(float, sums, 32);
    const float sum = block_sum<1024>(threadIdx.x < parts ? partial[threadIdx.x] : 0.f, sums);
    if (threadIdx.x == 0) total[0] = sum;
}

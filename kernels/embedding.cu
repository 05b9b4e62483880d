// Rows of a table by id, and the gradient that adds them up again. The contract stands in embedding.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. forward: 16-byte accesses, 4 on their way per thread; 4 bytes per bf16 element, less where rows repeat. 32,768
//      tokens of 768: 0.023 ms.
//   2. backward with an atomic addition per element: as many bytes, but another sum in every run, and a token that is a
//      tenth of all makes its row a queue.
//   3. Sorted: the positions of the tokens are sorted by id, stably, so a row of dweight is the sum of a run of sorted
//      positions, added in token order. The sort moves 8 bytes per token and pass, its gradient has 1536.
//   4. The work is cut by position, PIECE of them to each thread, not by id: a run within a piece is added up and
//      written there, the parts of a run over several pieces are added in order by the last kernel, which also writes
//      the rows of the ids that do not occur. So no id, however frequent, holds up the rest. dy is read once and dweight
//      written once: 32,768 tokens of 768 and 50,304 ids 0.030 ms, and nine launches of small kernels around it;
//      predicted 0.06 to 0.08 ms in all.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int PIECE = 32;   // sorted positions of a thread
constexpr int TILE = 1024;  // keys of a block in a pass of the sort

// An id outside of the table is an error that is told of later (device.py, check_ids); nothing may be read there.
__device__ __forceinline__ int inside(int id, int V) { return min(max(id, 0), V - 1); }

template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
forward(const T* weight, long long weight_stride, const int* ids, int tokens_per_block, int tokens, int V, int D,
        T* y) {
    Pack<T, N> packs[4];
    each_of_rows<N, 4, THREADS>(
        tokens_per_block, tokens, D,
        [&](int u, long long i, int d) { packs[u] = load_pack<N>(weight + inside(ids[i], V) * weight_stride + d); },
        [&](int u, long long i, int d) { store_pack(y + i * D + d, packs[u]); });
}

// ------------------------------------------------------------------ the sort

// Least significant digit first, `bits` at a time: count the digits in every tile, add the counts up (by digit, then by
// tile), and put each token where its count says. A block has one thread per digit, and each of them walks the tile's
// keys in order: slow per key, but there are few, and the order within a digit is kept.
// order may be null: the tokens as they came.

// The tile's digits, and (where it is not null) `from`, its tokens; both to shared memory. Returns how many they are.
__device__ __forceinline__ int load_tile(const int* ids, const int* order, int tokens, int V, int shift, int* digits,
                                         int* from) {
    const int first = blockIdx.x * TILE, count = min(TILE, tokens - first);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int token = order ? order[first + i] : first + i;
        digits[i] = inside(ids[token], V) >> shift & (static_cast<int>(blockDim.x) - 1);
        if (from) from[i] = token;
    }
    __syncthreads();
    return count;
}

// counts[digit, tile] = how many keys of the tile have this digit
__global__ void __launch_bounds__(1024)
count_digits(const int* ids, const int* order, int tokens, int V, int shift, int* counts) {
    SHARED(int, digits, TILE);
    const int count = load_tile(ids, order, tokens, V, shift, digits, nullptr);
    int found = 0;
    for (int i = 0; i < count; ++i) found += digits[i] == static_cast<int>(threadIdx.x);
    counts[threadIdx.x * gridDim.x + blockIdx.x] = found;
}

// counts[i] = the sum of counts[0..i): one block of 1024 threads, each of which has a run of them
__global__ void __launch_bounds__(1024)
add_up(int* counts, int n) {
    SHARED(int, sums, 32);
    const int share = (n + 1023) / 1024;
    const int first = min(n, static_cast<int>(threadIdx.x) * share), last = min(n, first + share);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int own = 0;
    for (int i = first; i < last; ++i) own += counts[i];
    int before = own;  // with those of the lanes below
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int below = __shfl_up_sync(FULL_WARP, before, lanes);
        if (lane >= lanes) before += below;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    before -= own;
    for (int w = 0; w < warp; ++w) before += sums[w];
    for (int i = first; i < last; ++i) {
        const int here = counts[i];
        counts[i] = before;
        before += here;
    }
}

// sorted = order, moved to where the counts say; sorted_ids (where it is not null) = their ids
__global__ void __launch_bounds__(1024)
move(const int* ids, const int* order, int tokens, int V, int shift, const int* counts, int* sorted, int* sorted_ids) {
    SHARED(int, digits, TILE);
    SHARED(int, from, TILE);
    const int count = load_tile(ids, order, tokens, V, shift, digits, from);
    int to = counts[threadIdx.x * gridDim.x + blockIdx.x];
    for (int i = 0; i < count; ++i) {
        if (digits[i] != static_cast<int>(threadIdx.x)) continue;
        sorted[to] = from[i];
        if (sorted_ids) sorted_ids[to] = inside(ids[from[i]], V);
        ++to;
    }
}

// ------------------------------------------------------------------ the sums

// first[v] = the first sorted position whose id is v or more, for v = 0 ... V
__global__ void __launch_bounds__(THREADS)
find_first(const int* sorted_ids, int tokens, int V, int* first) {
    const int v = blockIdx.x * THREADS + threadIdx.x;
    if (v > V) return;
    int low = 0, high = tokens;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (sorted_ids[middle] < v) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    first[v] = low;
}

// Of PIECE sorted positions and N columns: rows of dweight that lie within the piece, and in `parts` (pieces, 2, D) the
// sums of a run that began before it (0) and of one that begins here and goes on behind it (1).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
add_pieces(const T* dy, const int* sorted, const int* sorted_ids, int tokens, int D, T* dweight, float* parts) {
    constexpr int LOADS = 8;
    const int packs = D / N;
    const long long item = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x, piece = item / packs;
    if (piece * PIECE >= tokens) return;
    const int d = item % packs * N, begin = piece * PIECE, end = min(begin + PIECE, tokens);
    bool from_before = begin > 0 && sorted_ids[begin - 1] == sorted_ids[begin];
    float sum[N] = {};
    for (int i0 = begin; i0 < end; i0 += LOADS) {
        Pack<T, N> rows[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (i0 + u < end) rows[u] = load_pack_streaming<N>(dy + static_cast<long long>(sorted[i0 + u]) * D + d);
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const int i = i0 + u;
            if (i >= end) break;
#pragma unroll
            for (int k = 0; k < N; ++k) sum[k] += to_float(rows[u].v[k]);
            const int id = sorted_ids[i];
            const bool goes_on = i + 1 < tokens && sorted_ids[i + 1] == id;
            if (goes_on && i + 1 < end) continue;
            if (from_before || goes_on) {
                Pack<float, N> part;
#pragma unroll
                for (int k = 0; k < N; ++k) part.v[k] = sum[k];
                store_pack(parts + (2 * piece + !from_before) * D + d, part);
            } else {
                Pack<T, N> row;
#pragma unroll
                for (int k = 0; k < N; ++k) row.v[k] = from_float<T>(sum[k]);
                store_pack(dweight + static_cast<long long>(id) * D + d, row);
            }
            from_before = false;
#pragma unroll
            for (int k = 0; k < N; ++k) sum[k] = 0;
        }
    }
}

// The other rows of dweight: zeros where an id does not occur, and runs over several pieces.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
add_parts(const int* first, const float* parts, int V, int D, T* dweight) {
    const int packs = D / N;
    const long long item = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x, v = item / packs;
    if (v >= V) return;
    const int d = item % packs * N, begin = first[v], end = first[v + 1];
    float sum[N] = {};
    if (begin < end) {
        const int piece = begin / PIECE, last = (end - 1) / PIECE;
        if (piece == last) return;
        const Pack<float, N> part = load_pack<N>(parts + (2 * static_cast<long long>(piece) + 1) * D + d);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] = part.v[k];
#pragma unroll 4
        for (int p = piece + 1; p <= last; ++p) {
            const Pack<float, N> next = load_pack<N>(parts + 2 * static_cast<long long>(p) * D + d);
#pragma unroll
            for (int k = 0; k < N; ++k) sum[k] += next.v[k];
        }
    }
    Pack<T, N> row;
#pragma unroll
    for (int k = 0; k < N; ++k) row.v[k] = from_float<T>(sum[k]);
    store_pack(dweight + v * D + d, row);
}

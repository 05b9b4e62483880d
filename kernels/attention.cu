// Attention in CUDA C++: the contract, the equations and the names are those of attention.py, beside which this is the
// next rung. Tiles of queries and keys meet as in its Numba version; a block of threads owns a tile of one side and
// streams over the tiles of the other side that anybody in its own sees:
//
//     forward            owns queries, streams keys      s = q k^T            acc += p v
//     backward_queries   owns queries, streams keys      s, dp = do v^T       dq  += ds k
//     backward_keys      owns keys, streams queries      s^T, dp^T = v do^T   dv  += p^T do     dk += ds^T q
//
// So everything is made of two products, `products` (rows of one tile with rows of another) and `accumulate` (rows
// weighed and added), and these are written three times: for the tensor cores (16-bit numbers), by a warp or, on Hopper,
// by four at once, and for float.
//
// Rungs, each in what it adds to the one before. Predicted for an H200, never measured: TFLOP/s of the forward at
// D = 128, T = 4096, all keys seen; of the forward at D = 64, T = 1024, causal; of the backward at D = 128.
//     float, tiles in shared memory                                                         5-12     3-7      2-6
//     tensor cores, which take a 16 x 16 tile per instruction                               50-90   40-60    30-50
//     ldmatrix from swizzled rows: 8 rows of one column lie in 8 different groups of banks 210-260 130-160  100-130
//     the next tile arrives (cp.async) while this one is worked on; own rows in registers  240-285 145-175  110-150
//     32 rows per warp, which halves what is read of the streamed tile; tiles that nobody
//       sees are skipped, and the masking where all see all; long blocks start first       285-330 170-205  150-190
//     addresses by one XOR from a lane's own; acc is corrected only where a maximum has
//       grown by much: of 620 (D = 64) and 610 (D = 128) instructions per pair of tiles
//       and warp, 128 of them on tensor cores, 560 and 480 are left                       310-360 190-220
//     backward in one pass (ONE_PASS): 5 products per pair of tiles, not 7; dq by atomics                    170-230
//     Hopper's products by four warps (WGMMA), which take no register for their operands and
//       reach all of its tensor cores' rate, where mma reaches 63 % (arXiv 2501.12084)     400-540 210-290  260-370
#include "common.cuh"

// An operand (B, T, H, D) whose last axis is contiguous, and its strides in numbers.
#define VIEW(x) const T *x, long long x##_b, long long x##_t, long long x##_h

// ------------------------------------------------------------------ who sees whom

// The columns [first, end) that a row sees. As start never falls, neither of the two does from one row to the next.
struct Seen {
    int first, end;
};

struct KeysOfQuery {
    const int* start;
    int rows, shift;
    __device__ Seen operator()(int i) const { return i < rows ? Seen{start[i], i + shift + 1} : Seen{0, 0}; }
};

struct QueriesOfKey {
    const int* end;  // of each key: the first query behind all that see it or an earlier key
    int rows, shift;
    __device__ Seen operator()(int j) const { return j < rows ? Seen{max(j - shift, 0), end[j]} : Seen{0, 0}; }
};

// What some of several rows see, and what each of them does.
struct Sight {
    Seen some, all;
    __device__ bool any(int column, int columns) const { return column < some.end && column + columns > some.first; }
    __device__ bool whole(int column, int columns) const { return column >= all.first && column + columns <= all.end; }
};

template <typename Rows> __device__ __forceinline__ Sight sight(const Rows& seen, int row, int count) {
    if (row >= seen.rows) return {{0, 0}, {0, 0}};
    Seen top = seen(row), bottom = seen(min(row + count, seen.rows) - 1);
    return {{top.first, bottom.end}, {bottom.first, top.end}};
}

// end[b, j] = how many queries have start <= j: as start never falls, the queries before it and no others.
__global__ void ends(const int* start, int* end, int B, int Tq, int Tk) {
    long long n = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (n >= (long long)B * Tk) return;
    const int* row = start + n / Tk * Tq;
    int j = n % Tk, low = 0, high = Tq;
    while (low < high) {
        int middle = (low + high) / 2;
        if (row[middle] <= j) low = middle + 1;
        else high = middle;
    }
    end[n] = low;
}

// ------------------------------------------------------------------ tiles on the tensor cores

// Where a product finds the own rows: in shared memory, each time again, or in registers; or Hopper's instruction for
// four warps, which reads shared memory itself.
enum Way { REREAD, HELD, WGMMA };

// ROWS own rows and COLUMNS streamed ones, of Dp numbers each; a warp has WARP_ROWS of the own ones, in M times 16.
template <typename T, int Dp, int ROWS, int COLUMNS, int WARPS, Way WAY> struct Tiles {
    static constexpr int THREADS = WARPS * 32, WARP_ROWS = ROWS / WARPS, M = WARP_ROWS / 16;
    static constexpr int R = 2 * M, WIDTH = 4;  // rows of a thread; lanes that share them
    static constexpr int TEAM = 1;              // warps that multiply together

    // Where chunk c (16 bytes, 8 numbers) of a tile's row lies. Chunks trade places within GROUP, by an XOR with the
    // row, so that the same chunk of 8 neighbouring rows, which ldmatrix reads at once, comes from all 32 banks.
    static constexpr int CHUNKS = Dp / 8, GROUP = Dp % 64 ? 4 : 8;
    template <int CHUNKS_OF_ROW = CHUNKS> static __device__ __forceinline__ u32 at(int row, int chunk) {
        constexpr int GROUP_OF_ROW = CHUNKS_OF_ROW % 8 ? 4 : 8;
        int turn = GROUP_OF_ROW == 8 ? row % 8 : row / 2 % 4;
        return (row * CHUNKS_OF_ROW + (chunk ^ turn)) * 16;
    }
    // The address of the chunk that is `chunks` after another, where these have no bit in common.
    static __device__ __forceinline__ u32 along(u32 address, int chunks) {
        return (address ^ chunks % GROUP * 16) + chunks / GROUP * GROUP * 16;
    }

    static constexpr int ROW = Dp * 2;  // bytes

    // Rows [first, first + COUNT) of `total`, into a tile; beyond them, and beyond the D columns there are, zeros.
    template <int COUNT>
    static __device__ __forceinline__ void load(unsigned char* tile, const T* from, long long stride, int first,
                                                int total, int D) {
        load_to<COUNT>(tile, from, stride, first, total, D, [](int row, int chunk) { return at(row, chunk); });
    }
    template <int COUNT, typename Place>
    static __device__ __forceinline__ void load_to(unsigned char* tile, const T* from, long long stride, int first,
                                                   int total, int D, Place place) {
        constexpr int STEP = THREADS / CHUNKS;
        int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from += (first + row) * stride + chunk * 8;
        u32 to = shared_address(tile);
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP, from += STEP * stride)
            if ((THREADS % CHUNKS == 0 || row < STEP) && (COUNT % STEP == 0 || row + i < COUNT))
                cp_async_16(to + place(row + i, chunk), from, first + row + i < total && chunk * 8 < D);
    }

    // 16 M rows of 8 N columns as mma leaves them: a thread has R of the rows and C of the columns.
    template <int N> struct Fragment {
        static constexpr int C = 2 * N;
        float v[M][N][4];
        __device__ __forceinline__ float& operator()(int r, int c) { return v[r / 2][c / 2][2 * (r % 2) + c % 2]; }
    };
    typedef Fragment<COLUMNS / 8> Scores;
    typedef Fragment<Dp / 8> Sums;

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int row(int r) {
        return warp() * WARP_ROWS + r / 2 * 16 + r % 2 * 8 + lane() / 4;
    }
    static __device__ __forceinline__ int column(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }

    // The rows and chunks whose addresses a lane gives to ldmatrix: 16 rows of 2 chunks, ordered in two ways.
    static __device__ __forceinline__ u32 rows_first() { return at(lane() % 16, lane() / 16); }
    static __device__ __forceinline__ u32 chunks_first() { return at(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2); }

    // The warp's own rows of a tile, as mma's first operand.
    struct Own {
        u32 address, kept[WAY == HELD ? Dp / 16 : 1][M][4];
        __device__ __forceinline__ explicit Own(const unsigned char* tile) {
            address = shared_address(tile) + warp() * WARP_ROWS * ROW + rows_first();
            if constexpr (WAY == HELD)
#pragma unroll
                for (int d = 0; d < Dp / 16; ++d) read(kept[d], d);
        }
        __device__ __forceinline__ void read(u32 (&a)[M][4], int d) const {
#pragma unroll
            for (int m = 0; m < M; ++m) ldmatrix_x4(a[m], along(address + m * 16 * ROW, 2 * d));
        }
    };

    // s = the products of the own rows and the streamed ones
    static __device__ __forceinline__ void products(Scores& s, Own& own, const unsigned char* streamed) {
        u32 address = shared_address(streamed) + chunks_first();
        s = {};
#pragma unroll
        for (int d = 0; d < Dp / 16; ++d) {
            u32 a[M][4], b[4];
            if constexpr (WAY != HELD) own.read(a, d);
#pragma unroll
            for (int n = 0; n < COLUMNS / 16; ++n) {
                ldmatrix_x4(b, along(address + n * 16 * ROW, 2 * d));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const u32(&rows)[4] = WAY == HELD ? own.kept[WAY == HELD ? d : 0][m] : a[m];
                    mma_16x8x16<T>(s.v[m][2 * n], rows, b[0], b[1]);
                    mma_16x8x16<T>(s.v[m][2 * n + 1], rows, b[2], b[3]);
                }
            }
        }
    }

    // Columns 16 k to 16 k + 15 of 16 rows of p as a first operand: a thread needs just what a product left in it.
    static __device__ __forceinline__ void pack(u32 (&a)[4], Scores& p, int m, int k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int r = 2 * m + e % 2, c = 4 * k + e / 2 * 2;
            a[e] = pack_two<T>(p(r, c), p(r, c + 1));
        }
    }

    // acc += p times the streamed rows
    static __device__ __forceinline__ void accumulate(Sums& acc, Scores& p, const unsigned char* streamed,
                                                      unsigned char*) {
        u32 address = shared_address(streamed) + rows_first();
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
            u32 a[M][4], b[4];
#pragma unroll
            for (int m = 0; m < M; ++m) pack(a[m], p, m, k);
#pragma unroll
            for (int n = 0; n < Dp / 16; ++n) {
                ldmatrix_x4_trans(b, along(address + k * 16 * ROW, 2 * n));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_16x8x16<T>(acc.v[m][2 * n], a[m], b[0], b[1]);
                    mma_16x8x16<T>(acc.v[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // Row r of factor acc, to the D numbers at `to`.
    static __device__ __forceinline__ void store(T* to, Sums& acc, int r, float factor, int D) {
#pragma unroll
        for (int c = 0; c < Sums::C; c += 2)
            if (column(c) < D)
                *reinterpret_cast<u32*>(to + column(c)) = pack_two<T>(factor * acc(r, c), factor * acc(r, c + 1));
    }
};

// ------------------------------------------------------------------ tiles for four warps at once

// The same with Hopper's instruction, which four warps, a team, ask for together: 64 own rows with all streamed ones.
// It reads the tiles itself, so that a streamed tile is read once for 64 rows, not once for 16 or 32, and no register
// holds an operand but p. A tile lies in panels of 64 columns, 128 bytes to a row; chunks trade places as above.
template <typename T, int Dp, int ROWS, int COLUMNS, int WARPS>
struct Tiles<T, Dp, ROWS, COLUMNS, WARPS, WGMMA> : Tiles<T, Dp, ROWS, COLUMNS, WARPS, REREAD> {
    typedef Tiles<T, Dp, ROWS, COLUMNS, WARPS, REREAD> Warps;
    typedef typename Warps::Scores Scores;
    typedef typename Warps::Sums Sums;
    static constexpr int TEAM = 4, PANEL_ROW = 128;
    static_assert(Dp % 64 == 0 && ROWS == WARPS * 16 && WARPS % TEAM == 0, "whole panels and teams, M = 1");

    template <int COUNT>
    static __device__ __forceinline__ void load(unsigned char* tile, const T* from, long long stride, int first,
                                                int total, int D) {
        Warps::template load_to<COUNT>(tile, from, stride, first, total, D, [](int row, int chunk) {
            return (chunk / 8 * COUNT + row) * PANEL_ROW + (chunk % 8 ^ row % 8) * 16;
        });
    }

    // A tile of COUNT rows as an operand, and where in it the 16 columns from 16 d on are.
    template <int COUNT> static __device__ __forceinline__ u32 operand(const unsigned char* tile) {
        return wgmma_operand(shared_address(tile), COUNT * PANEL_ROW);
    }
    template <int COUNT> static __device__ __forceinline__ u32 columns(int d) {
        return (d / 4 * COUNT * PANEL_ROW + d % 4 * 32) / 16;
    }

    // The team's own rows of a tile.
    struct Own {
        u32 rows;
        __device__ __forceinline__ explicit Own(const unsigned char* tile) {
            rows = operand<ROWS>(tile + Warps::warp() / TEAM * TEAM * 16 * PANEL_ROW);
        }
    };

    static __device__ __forceinline__ void products(Scores& s, Own& own, const unsigned char* streamed) {
        const u32 rows = operand<COLUMNS>(streamed);
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < Dp / 16; ++d)
            wgmma_rows<T>(s.v[0], own.rows + columns<ROWS>(d), rows + columns<COLUMNS>(d), d > 0);
        wgmma_commit();
        wgmma_wait<0>(s.v);
    }

    static __device__ __forceinline__ void accumulate(Sums& acc, Scores& p, const unsigned char* streamed,
                                                      unsigned char*) {
        u32 a[COLUMNS / 16][4];
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) Warps::pack(a[k], p, 0, k);
        const u32 rows = operand<COLUMNS>(streamed);
        wgmma_fence(acc.v, a);
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) wgmma_sums<T>(acc.v[0], a[k], rows + k * 16 * PANEL_ROW / 16);
        wgmma_commit();
        wgmma_wait<0>(acc.v);
    }
};

// ------------------------------------------------------------------ tiles of floats

// The same without tensor cores: half a warp shares R rows, its lanes take every 16th column.
template <int Dp, int ROWS, int COLUMNS, int WARPS, Way WAY> struct Tiles<float, Dp, ROWS, COLUMNS, WARPS, WAY> {
    static constexpr int THREADS = WARPS * 32, WARP_ROWS = ROWS / WARPS, R = WARP_ROWS / 2, WIDTH = 16, TEAM = 1;
    static constexpr int STRIDE = Dp + 4, SCRATCH_STRIDE = COLUMNS + 4;  // 4 more, so that rows begin in other banks
    static constexpr int ROW = STRIDE * 4;

    template <int COUNT>
    static __device__ __forceinline__ void load(unsigned char* tile, const float* from, long long stride, int first,
                                                int total, int D) {
        float* to = reinterpret_cast<float*>(tile);
        if (D % 4 == 0) {
            for (int n = threadIdx.x; n < COUNT * Dp / 4; n += THREADS) {
                int row = n / (Dp / 4), d = n % (Dp / 4) * 4;
                bool valid = first + row < total && d < D;
                cp_async_16(shared_address(to + row * STRIDE + d), from + (first + row) * stride + d, valid);
            }
        } else {  // rows that do not begin at multiples of 16 bytes
            for (int n = threadIdx.x; n < COUNT * Dp; n += THREADS) {
                int row = n / Dp, d = n % Dp;
                bool valid = first + row < total && d < D;
                to[row * STRIDE + d] = valid ? from[(first + row) * stride + d] : 0;
            }
        }
    }

    template <int N> struct Fragment {
        static constexpr int C = N;
        float v[R][N];
        __device__ __forceinline__ float& operator()(int r, int c) { return v[r][c]; }
    };
    typedef Fragment<COLUMNS / 16> Scores;
    typedef Fragment<Dp / 16> Sums;

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int row(int r) { return warp() * WARP_ROWS + lane() / 16 * R + r; }
    static __device__ __forceinline__ int column(int c) { return lane() % 16 + 16 * c; }

    struct Own {
        const float* rows;
        __device__ __forceinline__ explicit Own(const unsigned char* tile) {
            rows = reinterpret_cast<const float*>(tile) + row(0) * STRIDE;
        }
    };

    static __device__ __forceinline__ void products(Scores& s, Own& own, const unsigned char* streamed) {
        const float* columns = reinterpret_cast<const float*>(streamed) + column(0) * STRIDE;
        s = {};
#pragma unroll 2
        for (int d = 0; d < Dp; d += 4) {
            Pack<float> a[R];
#pragma unroll
            for (int r = 0; r < R; ++r) a[r] = load_pack(own.rows + r * STRIDE + d);
#pragma unroll
            for (int c = 0; c < Scores::C; ++c) {
                Pack<float> b = load_pack(columns + c * 16 * STRIDE + d);
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s(r, c) = fmaf(a[r].v[e], b.v[e], s(r, c));
            }
        }
    }

    // Here p goes from the lanes that made it to the others of its rows, by way of shared memory.
    static __device__ __forceinline__ void accumulate(Sums& acc, Scores& p, const unsigned char* streamed,
                                                      unsigned char* scratch) {
        const float* rows = reinterpret_cast<const float*>(streamed) + column(0);
        float* shared_p = reinterpret_cast<float*>(scratch) + row(0) * SCRATCH_STRIDE;
        __syncwarp();  // what was there has been read
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int c = 0; c < Scores::C; ++c) shared_p[r * SCRATCH_STRIDE + column(c)] = p(r, c);
        __syncwarp();
#pragma unroll 2
        for (int k = 0; k < COLUMNS; k += 4) {
            Pack<float> a[R];
#pragma unroll
            for (int r = 0; r < R; ++r) a[r] = load_pack(shared_p + r * SCRATCH_STRIDE + k);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int n = 0; n < Sums::C; ++n) {
                    float b = rows[(k + e) * STRIDE + 16 * n];
#pragma unroll
                    for (int r = 0; r < R; ++r) acc(r, n) = fmaf(a[r].v[e], b, acc(r, n));
                }
        }
    }

    static __device__ __forceinline__ void store(float* to, Sums& acc, int r, float factor, int D) {
#pragma unroll
        for (int c = 0; c < Sums::C; ++c)
            if (column(c) < D) to[column(c)] = factor * acc(r, c);
    }
};

// ------------------------------------------------------------------ what all three kernels do with scores

// What was loaded is here, for all threads, and all have read what they were to read before. A team's products read
// shared memory themselves, not through the threads that filled it.
template <typename E> __device__ __forceinline__ void arrive() {
    cp_async_wait<0>();
    if constexpr (E::TEAM > 1) fence_proxy_async();
    __syncthreads();
}

// What the rows see that this thread's warp, or its team of warps, multiplies together, of a tile that begins at `row`.
template <typename E, typename Rows> __device__ __forceinline__ Sight sight_of_team(const Rows& seen, int row) {
    constexpr int TEAM_ROWS = E::TEAM * E::WARP_ROWS;
    return sight(seen, row + E::warp() / E::TEAM * TEAM_ROWS, TEAM_ROWS);
}

// Scores of columns that a row does not see become -inf.
template <typename E, typename Rows>
__device__ __forceinline__ void hide(typename E::Scores& s, const Rows& seen, int row, int column) {
#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        Seen columns = seen(row + E::row(r));
#pragma unroll
        for (int c = 0; c < E::Scores::C; ++c) {
            int j = column + E::column(c);
            if (j < columns.first || j >= columns.end) s(r, c) = -INF;
        }
    }
}

// ------------------------------------------------------------------ forward

// s becomes p = 2^(scale2 s - top), and top (a maximum of scale2 s in the row), total and acc go on as attention.py
// says, but in powers of 2: scale2 is scale log2(e), so that a score costs a multiply-add and an ex2. Where the maximum
// grows by 8 at most it stays what it was: p is at most 2^8 then, and where that is so in all rows of the warp, acc
// needs no correction, which is as much work as the scores are. Each row decides for itself, so that its result does
// not depend on others. `total` is that of the thread's columns alone until the end.
template <typename E>
__device__ __forceinline__ void online_softmax(typename E::Scores& s, typename E::Sums& acc, float (&top)[E::R],
                                               float (&total)[E::R], float scale2) {
    float highest[E::R];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        highest[r] = s(r, 0);
#pragma unroll
        for (int c = 1; c < E::Scores::C; ++c) highest[r] = fmaxf(highest[r], s(r, c));
        highest[r] = fmaxf(top[r], scale2 * warp_max<E::WIDTH>(highest[r]));
        if (highest[r] <= top[r] + 8) highest[r] = top[r];
        grown |= highest[r] > top[r];
    }
    if (__ballot_sync(FULL_WARP, grown)) {
#pragma unroll
        for (int r = 0; r < E::R; ++r) {
            // where nothing has been seen yet: 2^(-inf - 0) is 0, 2^(-inf + inf) would be NaN
            const float correction = exp2_fast(top[r] - (highest[r] == -INF ? 0 : highest[r]));
            top[r] = highest[r], total[r] *= correction;
#pragma unroll
            for (int c = 0; c < E::Sums::C; ++c) acc(r, c) *= correction;
        }
    }
#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const float at = top[r] == -INF ? 0 : top[r];
        float sum = 0;
#pragma unroll
        for (int c = 0; c < E::Scores::C; ++c) {
            s(r, c) = exp2_fast(fmaf(scale2, s(r, c), -at));
            sum += s(r, c);
        }
        total[r] += sum;
    }
}

// Grid: (B H, tiles of queries). The last tiles see the most keys and start first, so that the short ones fill up.
template <typename T, int Dp, int BQ, int BK, int WARPS, int BLOCKS, Way WAY>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
forward(VIEW(q), VIEW(k), VIEW(v), const int* start, float scale2, T* o, float* lse, int Tq, int Tk, int H, int Hk,
        int D) {
    using E = Tiles<T, Dp, BQ, BK, WARPS, WAY>;
    DYNAMIC_SHARED(qs, 1024);
    unsigned char *ks = qs + BQ * E::ROW, *vs = ks + 2 * BK * E::ROW, *scratch = vs + 2 * BK * E::ROW;
    const int b = blockIdx.x / H, h = blockIdx.x % H, hk = h / (H / Hk), i0 = (gridDim.y - 1 - blockIdx.y) * BQ;
    const KeysOfQuery seen = {start + (long long)b * Tq, Tq, Tk - Tq};
    const Sight block = sight(seen, i0, BQ), own = sight_of_team<E>(seen, i0);
    k += b * k_b + hk * k_h, v += b * v_b + hk * v_h;

    auto fetch = [&](int j0, int stage) {
        E::template load<BK>(ks + stage * BK * E::ROW, k, k_t, j0, Tk, D);
        E::template load<BK>(vs + stage * BK * E::ROW, v, v_t, j0, Tk, D);
        cp_async_commit();
    };
    int j0 = block.some.first / BK * BK, stage = 0;
    E::template load<BQ>(qs, q + b * q_b + h * q_h, q_t, i0, Tq, D);
    fetch(j0, stage);
    arrive<E>();

    typename E::Own own_q(qs);
    typename E::Sums acc = {};
    float top[E::R], total[E::R];
#pragma unroll
    for (int r = 0; r < E::R; ++r) top[r] = -INF, total[r] = 0;

    for (; j0 < block.some.end; j0 += BK, stage ^= 1) {
        if (j0 + BK < block.some.end) fetch(j0 + BK, stage ^ 1);
        if (own.any(j0, BK)) {
            typename E::Scores s;
            E::products(s, own_q, ks + stage * BK * E::ROW);
            if (!own.whole(j0, BK)) hide<E>(s, seen, i0, j0);
            online_softmax<E>(s, acc, top, total, scale2);
            E::accumulate(acc, s, vs + stage * BK * E::ROW, scratch);
        }
        arrive<E>();
    }

#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const int i = i0 + E::row(r);
        const float l = warp_sum<E::WIDTH>(total[r]);
        if (i >= Tq) continue;
        E::store(o + (((long long)b * Tq + i) * H + h) * D, acc, r, l == 0 ? 0 : 1 / l, D);
        if (E::lane() % E::WIDTH == 0) lse[((long long)b * H + h) * Tq + i] = LN2 * (top[r] + log2f(l));
    }
}

// ------------------------------------------------------------------ backward

// Per query, with rows padded to a length Tp that whole tiles fit in: delta = do . o, and lse of powers of 2; +inf for
// the queries that see nothing or are not there, whose p = 2^(s - lse) is 0 then. Eight lanes have a query.
template <typename T>
__global__ void __launch_bounds__(256)
rows_of_backward(VIEW(dout), VIEW(o), const float* lse, float* lse2, float* delta, int B, int H, int Tq, int Tp,
                 int D) {
    const long long n = blockIdx.x * 32LL + threadIdx.x / 8, bh = n / Tp;
    const int i = n % Tp, b = bh / H, h = bh % H;
    const bool valid = b < B && i < Tq;
    float total = 0;
    if (valid) {
        const T *x = dout + b * dout_b + i * dout_t + h * dout_h, *y = o + b * o_b + i * o_t + h * o_h;
        if constexpr (sizeof(T) == 2) {
            for (int d = threadIdx.x % 8 * 8; d < D; d += 64) {
                Pack<T> a = load_pack(x + d), c = load_pack(y + d);
#pragma unroll
                for (int e = 0; e < 8; ++e) total = fmaf(to_float(a.v[e]), to_float(c.v[e]), total);
            }
        } else {
            for (int d = threadIdx.x % 8; d < D; d += 8) total = fmaf(x[d], y[d], total);
        }
    }
    total = warp_sum<8>(total);
    if (threadIdx.x % 8 == 0 && b < B) {
        const float l = valid ? lse[bh * Tq + i] : -INF;
        lse2[n] = l == -INF ? INF : LOG2E * l;
        delta[n] = total;
    }
}

// Grid: (B H, tiles of queries), as in the forward. dq_t is dq's step from token to token, dk_t that of dk and dv.
template <typename T, int Dp, int BQ, int BK, int WARPS, int BLOCKS, Way WAY>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
backward_queries(VIEW(dout), VIEW(q), VIEW(k), VIEW(v), const float* lse2, const float* delta, const int* start,
                 float scale, float scale2, T* dq, long long dq_t, int Tq, int Tp, int Tk, int H, int Hk, int D) {
    using E = Tiles<T, Dp, BQ, BK, WARPS, WAY>;
    DYNAMIC_SHARED(qs, 1024);
    unsigned char *dos = qs + BQ * E::ROW, *ks = dos + BQ * E::ROW, *vs = ks + 2 * BK * E::ROW;
    unsigned char* scratch = vs + 2 * BK * E::ROW;
    const int b = blockIdx.x / H, h = blockIdx.x % H, hk = h / (H / Hk), i0 = (gridDim.y - 1 - blockIdx.y) * BQ;
    const KeysOfQuery seen = {start + (long long)b * Tq, Tq, Tk - Tq};
    const Sight block = sight(seen, i0, BQ), own = sight_of_team<E>(seen, i0);
    k += b * k_b + hk * k_h, v += b * v_b + hk * v_h;

    auto fetch = [&](int j0, int stage) {
        E::template load<BK>(ks + stage * BK * E::ROW, k, k_t, j0, Tk, D);
        E::template load<BK>(vs + stage * BK * E::ROW, v, v_t, j0, Tk, D);
        cp_async_commit();
    };
    int j0 = block.some.first / BK * BK, stage = 0;
    E::template load<BQ>(qs, q + b * q_b + h * q_h, q_t, i0, Tq, D);
    E::template load<BQ>(dos, dout + b * dout_b + h * dout_h, dout_t, i0, Tq, D);
    fetch(j0, stage);
    arrive<E>();

    typename E::Own own_q(qs), own_do(dos);
    typename E::Sums dq_sum = {};
    float lse_i[E::R], delta_i[E::R];
#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const long long n = ((long long)b * H + h) * Tp + i0 + E::row(r);
        lse_i[r] = lse2[n], delta_i[r] = delta[n];
    }

    for (; j0 < block.some.end; j0 += BK, stage ^= 1) {
        if (j0 + BK < block.some.end) fetch(j0 + BK, stage ^ 1);
        if (own.any(j0, BK)) {
            typename E::Scores p, ds;
            E::products(p, own_q, ks + stage * BK * E::ROW);
            E::products(ds, own_do, vs + stage * BK * E::ROW);
            if (!own.whole(j0, BK)) hide<E>(p, seen, i0, j0);
#pragma unroll
            for (int r = 0; r < E::R; ++r)
#pragma unroll
                for (int c = 0; c < E::Scores::C; ++c)
                    ds(r, c) = exp2_fast(fmaf(scale2, p(r, c), -lse_i[r])) * (ds(r, c) - delta_i[r]);
            E::accumulate(dq_sum, ds, ks + stage * BK * E::ROW, scratch);
        }
        arrive<E>();
    }

#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const int i = i0 + E::row(r);
        if (i < Tq) E::store(dq + ((long long)b * Tq + i) * dq_t + h * D, dq_sum, r, scale, D);
    }
}

// dq += scale ds k for one pair of tiles: ds^T (its BK rows are the block's keys) goes through shared memory, where the
// warps of other keys read it; each warp has 16 of the BQ queries and a share of the columns of k.
template <typename E, typename T, int Dp, int BK, int BQ, int WARPS>
__device__ __forceinline__ void add_to_dq(float* dq, long long stride, int i0, int Tq, int D, float scale,
                                          typename E::Scores& ds, unsigned char* ds_tile, const unsigned char* ks) {
    constexpr int SHARES = WARPS / (BQ / 16), N = Dp / 16 / SHARES;
    static_assert(WARPS % (BQ / 16) == 0 && Dp / 16 % SHARES == 0, "every warp has as much to do");
#pragma unroll
    for (int r = 0; r < E::R; ++r)
#pragma unroll
        for (int c = 0; c < E::Scores::C; c += 2) {
            u32 to = E::template at<BQ / 8>(E::row(r), E::column(c) / 8) + E::column(c) % 8 * 2;
            *reinterpret_cast<u32*>(ds_tile + to) = pack_two<T>(ds(r, c), ds(r, c + 1));
        }
    __syncthreads();
    const int queries = E::warp() % (BQ / 16), share = E::warp() / (BQ / 16), lane = E::lane();
    float sum[2 * N][4] = {};
#pragma unroll
    for (int k = 0; k < BK / 16; ++k) {
        u32 a[4], b[4];
        int key = k * 16 + lane % 8 + lane / 16 * 8, chunk = queries * 2 + lane / 8 % 2;
        ldmatrix_x4_trans(a, shared_address(ds_tile) + E::template at<BQ / 8>(key, chunk));
#pragma unroll
        for (int n = 0; n < N; ++n) {
            u32 row = shared_address(ks) + k * 16 * E::ROW;
            ldmatrix_x4_trans(b, row + E::at(lane % 16, (share * N + n) * 2 + lane / 16));
            mma_16x8x16<T>(sum[2 * n], a, b[0], b[1]);
            mma_16x8x16<T>(sum[2 * n + 1], a, b[2], b[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < 2 * N; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + queries * 16 + half * 8 + lane / 4, d = (share * N * 2 + n) * 8 + lane % 4 * 2;
            float* to = dq + i * stride + d;
            if (i < Tq && d < D) atomic_add_two(to, scale * sum[n][2 * half], scale * sum[n][2 * half + 1]);
        }
}

// Grid: (B Hk, tiles of keys); the first keys are seen by the most queries. Streams the tiles of queries of every head
// that reads the key head hk.
template <typename T, int Dp, int BK, int BQ, int WARPS, int BLOCKS, Way WAY, bool ONE_PASS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
backward_keys(VIEW(dout), VIEW(q), VIEW(k), VIEW(v), const float* lse2, const float* delta, const int* end,
              float scale, float scale2, float* dq, T* dk, T* dv, long long dk_t, int Tq, int Tp, int Tk, int H, int Hk,
              int D) {
    using E = Tiles<T, Dp, BK, BQ, WARPS, WAY>;
    DYNAMIC_SHARED(ks, 1024);
    unsigned char *vs = ks + BK * E::ROW, *qs = vs + BK * E::ROW, *dos = qs + 2 * BQ * E::ROW;
    unsigned char *stats = dos + 2 * BQ * E::ROW, *scratch = stats + 4 * BQ * 4;  // lse2 and delta of two tiles
    const int b = blockIdx.x / Hk, hk = blockIdx.x % Hk, group = H / Hk, j0 = blockIdx.y * BK;
    const QueriesOfKey seen = {end + (long long)b * Tk, Tk, Tk - Tq};
    const Sight block = sight(seen, j0, BK), own = sight_of_team<E>(seen, j0);
    const int first = max(j0 - (Tk - Tq), 0) / BQ * BQ;  // the tile of the first query that sees key j0

    auto fetch = [&](int h, int i0, int stage) {
        E::template load<BQ>(qs + stage * BQ * E::ROW, q + b * q_b + h * q_h, q_t, i0, Tq, D);
        E::template load<BQ>(dos + stage * BQ * E::ROW, dout + b * dout_b + h * dout_h, dout_t, i0, Tq, D);
        const long long at = ((long long)b * H + h) * Tp + i0;
        const int t = threadIdx.x * 4;
        const float* from = t < BQ ? lse2 + at + t : delta + at + t - BQ;
        if (t < 2 * BQ) cp_async_16(shared_address(stats + (stage * 2 * BQ + t) * 4), from, i0 < Tq);
        cp_async_commit();
    };
    E::template load<BK>(ks, k + b * k_b + hk * k_h, k_t, j0, Tk, D);
    E::template load<BK>(vs, v + b * v_b + hk * v_h, v_t, j0, Tk, D);
    int h = hk * group, i0 = first, stage = 0;
    fetch(h, i0, stage);
    arrive<E>();

    typename E::Own own_k(ks), own_v(vs);
    typename E::Sums dk_sum = {}, dv_sum = {};

    while (i0 < block.some.end && h < (hk + 1) * group) {
        int next_h = h, next_i0 = i0 + BQ;
        if (next_i0 >= block.some.end) ++next_h, next_i0 = first;
        if (next_h < (hk + 1) * group) fetch(next_h, next_i0, stage ^ 1);
        const float* stats_of = reinterpret_cast<const float*>(stats) + stage * 2 * BQ;
        typename E::Scores ds = {};
        if (own.any(i0, BQ)) {
            typename E::Scores p;
            E::products(p, own_k, qs + stage * BQ * E::ROW);
            if (!own.whole(i0, BQ)) hide<E>(p, seen, j0, i0);
#pragma unroll
            for (int c = 0; c < E::Scores::C; ++c) {
                const float lse_i = stats_of[E::column(c)];
#pragma unroll
                for (int r = 0; r < E::R; ++r) p(r, c) = exp2_fast(fmaf(scale2, p(r, c), -lse_i));
            }
            E::products(ds, own_v, dos + stage * BQ * E::ROW);  // not before p is done: a register less at D = 64
#pragma unroll
            for (int c = 0; c < E::Scores::C; ++c) {
                const float delta_i = stats_of[BQ + E::column(c)];
#pragma unroll
                for (int r = 0; r < E::R; ++r) ds(r, c) = p(r, c) * (ds(r, c) - delta_i);
            }
            E::accumulate(dv_sum, p, dos + stage * BQ * E::ROW, scratch);
            E::accumulate(dk_sum, ds, qs + stage * BQ * E::ROW, scratch);
        }
        if constexpr (ONE_PASS) {
            float* to = dq + ((long long)b * Tq * H + h) * D;
            add_to_dq<E, T, Dp, BK, BQ, WARPS>(to, (long long)H * D, i0, Tq, D, scale, ds, scratch, ks);
        }
        arrive<E>();
        h = next_h, i0 = next_i0, stage ^= 1;
    }

#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const int j = j0 + E::row(r);
        if (j >= Tk) continue;
        const long long to = ((long long)b * Tk + j) * dk_t + hk * D;
        E::store(dk + to, dk_sum, r, scale, D);
        E::store(dv + to, dv_sum, r, 1, D);
    }
}

#pragma once
// Attention and its tangent in one sweep over the keys, for Hopper (sm_90a). The mathematics, the centre c and the
// names are those of mfkernels/attention/README.md.
//
// A block has three warpgroups. One thread of the first brings tiles into shared memory (TMA); the other two own 64
// queries each and keep everything about them in registers. Blocks are persistent: the producer runs ahead into the
// next work while the consumers finish and store the present one.
//
// Order of one step; p and h are those of tile j - 1:
//
//     issue O += P V, T += P V' + H V       tile j - 1
//     issue S = Q K                         tile j; wait for all four
//     issue tS = Q' K + Q K'                tile j
//     softmax of S, O and T rescaled        under the tangent scores
//     wait for tS
//     c, H = P o (tS - c)                   the tensor cores serve the other warpgroup
//
// Between the issue of tS and its wait there is one basic block and no other wait, or ptxas moves the wait up: no
// branch, no loop on a barrier, and masked tiles have a copy of the code of their own.

#include "attention/schedule.h"
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace mfkernels::attention {

using namespace hopper;

struct Maps {
  TensorMap main, tail;
};

struct ForwardParameters {
  Maps q, k, q_dot, k_dot;
  TensorMap v, v_dot;
  uint16_t* o;      // [batch, N_q, H, D] contiguous
  uint16_t* o_dot;  // likewise
  float* lse;       // [batch, H, N_q] contiguous
  float scale, scale_log2;  // scale_log2 = scale / ln 2
  int first_batch;  // of shape.batches
  int works;
  Shape shape;
};

// Position in a ring of STAGES buffers, and the parity of the round that it is in.
template <int STAGES>
struct Ring {
  uint32_t count = 0;

  DEVICE uint32_t stage() const { return count % STAGES; }
  DEVICE uint32_t parity() const { return count / STAGES % 2; }
};

template <class T_, int D_, bool DUAL_>
struct ForwardKernel {
  using T = T_;
  using Parameters = ForwardParameters;
  using Columns = HeadColumns<D_>;
  static constexpr int D = D_;
  static constexpr bool DUAL = DUAL_;
  static constexpr int WARPGROUP = 128;
  static constexpr int CONSUMERS = 2;
  static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
  static constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
  static constexpr int ROWS = 64;
  static constexpr int BLOCK_M = CONSUMERS * ROWS;
  // O, T, S and tS take PADDED + BLOCK_N of a thread's 240 registers: with more than 208 it would spill. The primal has
  // neither T nor tS.
  static constexpr int BLOCK_N = !DUAL || D <= 80 ? 128 : 192 - Columns::PADDED;
  static constexpr int STAGES = DUAL ? 2 : D <= 96 ? 4 : 3;  // of the primal, as many as fit
  static constexpr int COPIES = DUAL ? 2 : 1;  // each operand with its tangent

  using QueryTile = Tile<ROWS, D>;  // one warpgroup's
  using KeyTile = Tile<BLOCK_N, D>;
  using ValueTile = AcrossTile<BLOCK_N, D>;
  static_assert(ValueTile::BYTES == KeyTile::BYTES);
  static constexpr uint32_t STAGE_BYTES = COPIES * KeyTile::BYTES;
  static constexpr uint32_t Q_OFFSET = 0;
  static constexpr uint32_t K_OFFSET = Q_OFFSET + CONSUMERS * COPIES * QueryTile::BYTES;
  static constexpr uint32_t V_OFFSET = K_OFFSET + STAGES * STAGE_BYTES;
  static constexpr uint32_t BARRIERS_OFFSET = V_OFFSET + STAGES * STAGE_BYTES;
  static constexpr int BARRIERS = 2 * CONSUMERS + 4 * STAGES;
  static constexpr int SHARED_BYTES = BARRIERS_OFFSET + 8 * BARRIERS + SWIZZLE_ALIGNMENT;  // the start gets aligned
  static_assert(SHARED_BYTES <= 232448, "a block of sm_90 has 227 KiB of shared memory");
  static_assert(BLOCK_N % 16 == 0);

  // Full: the bytes have come. Empty: every consumer warp has read them.
  struct Memory {
    uint32_t base;
    DEVICE uint32_t q(uint32_t warpgroup) const { return base + Q_OFFSET + warpgroup * COPIES * QueryTile::BYTES; }
    DEVICE uint32_t k(uint32_t stage) const { return base + K_OFFSET + stage * STAGE_BYTES; }
    DEVICE uint32_t v(uint32_t stage) const { return base + V_OFFSET + stage * STAGE_BYTES; }
    DEVICE uint32_t full_q(uint32_t warpgroup) const { return base + BARRIERS_OFFSET + 16 * warpgroup; }
    DEVICE uint32_t empty_q(uint32_t warpgroup) const { return full_q(warpgroup) + 8; }
    DEVICE uint32_t full_k(uint32_t stage) const { return base + BARRIERS_OFFSET + 8 * (2 * CONSUMERS + stage); }
    DEVICE uint32_t empty_k(uint32_t stage) const { return full_k(stage) + 8 * STAGES; }
    DEVICE uint32_t full_v(uint32_t stage) const { return full_k(stage) + 16 * STAGES; }
    DEVICE uint32_t empty_v(uint32_t stage) const { return full_k(stage) + 24 * STAGES; }
  };

  // A thread's part of the warpgroup's 64 rows: element i is of its row i / 2 % 2.
  using Accumulator = float[Columns::PADDED / 2];
  using Scores = float[BLOCK_N / 2];
  using Probabilities = uint32_t[BLOCK_N / 4];  // 16 bits each, in the layout of a product's first operand

  static DEVICE void block(const Parameters& p) {
    const Memory memory{round_up(dynamic_shared(), uint32_t(SWIZZLE_ALIGNMENT))};
    if (thread_index() == 0) {
      for (int warpgroup = 0; warpgroup < CONSUMERS; ++warpgroup) {
        mbarrier_init(memory.full_q(warpgroup), 1);
        mbarrier_init(memory.empty_q(warpgroup), WARPGROUP / 32);
      }
      for (int stage = 0; stage < STAGES; ++stage) {
        mbarrier_init(memory.full_k(stage), 1);
        mbarrier_init(memory.empty_k(stage), CONSUMER_WARPS);
        mbarrier_init(memory.full_v(stage), 1);
        mbarrier_init(memory.empty_v(stage), CONSUMER_WARPS);
      }
      mbarrier_init_fence();
    }
    block_sync();
    if (thread_index() < WARPGROUP) {
      keep_registers<24>();
      if (thread_index() == 0) produce(p, memory);
    } else {
      take_registers<240>();
      consume(p, memory);
    }
  }

  // ---------------------------------------------------------------------------------------------------- the producer

  template <class... EachMaps>
  static DEVICE void prefetch(const EachMaps&... maps) {
    (tma_prefetch(maps.main), ...);
    if constexpr (Columns::TAIL > 0) (tma_prefetch(maps.tail), ...);
  }

  template <class Tile>
  static DEVICE void load(uint32_t tile, const Maps& maps, uint32_t barrier, int head, int row, int batch) {
    for (int block = 0; block < Columns::MAIN_BLOCKS; ++block) {
      tma_load(tile + block * Tile::BLOCK_BYTES, maps.main, barrier, 64 * block, head, row, batch);
    }
    if constexpr (Columns::TAIL > 0) {
      tma_load(tile + Tile::TAIL_OFFSET, maps.tail, barrier, Columns::MAIN, head, row, batch);
    }
  }

  template <class Tile>
  static DEVICE void load(uint32_t tile, const TensorMap& map, uint32_t barrier, int head, int row, int batch) {
    for (int block = 0; block < Tile::BLOCKS; ++block) {
      tma_load(tile + block * Tile::BLOCK_BYTES, map, barrier, Tile::WIDTH * block, head, row, batch);
    }
  }

  template <class Tile, class Maps>
  static DEVICE void load_with_tangent(uint32_t tile, const Maps& maps, const Maps& dot_maps, uint32_t barrier,
                                       int head, int row, int batch) {
    mbarrier_expect(barrier, COPIES * Tile::LOADED_BYTES);
    load<Tile>(tile, maps, barrier, head, row, batch);
    if constexpr (DUAL) load<Tile>(tile + Tile::BYTES, dot_maps, barrier, head, row, batch);
  }

  static DEVICE void produce(const Parameters& p, const Memory& memory) {
    prefetch(p.q, p.k);
    tma_prefetch(p.v);
    if constexpr (DUAL) {
      prefetch(p.q_dot, p.k_dot);
      tma_prefetch(p.v_dot);
    }
    Ring<1> queries;
    Ring<STAGES> keys, values;
    const int group = p.shape.H / p.shape.H_kv;
    for (int index = block_index(); index < p.works; index += grid_size()) {
      const Work work = work_at<BLOCK_M>(index, p.shape);
      const int tiles = key_tiles<BLOCK_M, BLOCK_N>(work.block_m, p.shape);
      const int batch = p.first_batch + work.batch;
      const int head_kv = work.head / group;

      const auto load_keys = [&](int tile) {
        mbarrier_wait(memory.empty_k(keys.stage()), keys.parity() ^ 1);
        load_with_tangent<KeyTile>(memory.k(keys.stage()), p.k, p.k_dot, memory.full_k(keys.stage()), head_kv,
                                   tile * BLOCK_N, batch);
        ++keys.count;
      };
      load_keys(0);  // before the queries: their buffer is free only when the work before is all but done
      for (int warpgroup = 0; warpgroup < CONSUMERS; ++warpgroup) {
        mbarrier_wait(memory.empty_q(warpgroup), queries.parity() ^ 1);
        load_with_tangent<QueryTile>(memory.q(warpgroup), p.q, p.q_dot, memory.full_q(warpgroup), work.head,
                                     work.block_m * BLOCK_M + warpgroup * ROWS, batch);
      }
      ++queries.count;
      for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) load_keys(tile + 1);
        mbarrier_wait(memory.empty_v(values.stage()), values.parity() ^ 1);
        load_with_tangent<ValueTile>(memory.v(values.stage()), p.v, p.v_dot, memory.full_v(values.stage()), head_kv,
                                     tile * BLOCK_N, batch);
        ++values.count;
      }
    }
  }

  // --------------------------------------------------------------------------------------------------- the consumers

  // s (+)= q k^T of the warpgroup's 64 queries (whose rows start at `q`) and a tile of keys.
  static DEVICE void score(Scores& s, uint32_t q, uint32_t k, bool accumulate) {
    const MatrixDescriptor a = row_descriptor(q, Swizzle::BYTES_128), b = row_descriptor(k, Swizzle::BYTES_128);
#pragma unroll
    for (int block = 0; block < Columns::MAIN_BLOCKS; ++block) {
#pragma unroll
      for (int step = 0; step < 64; step += 16) {
        Wgmma<T, BLOCK_N>::rows(s, a + (block * QueryTile::BLOCK_BYTES + step * ELEMENT_BYTES),
                                b + (block * KeyTile::BLOCK_BYTES + step * ELEMENT_BYTES),
                                accumulate || block > 0 || step > 0);
      }
    }
    if constexpr (Columns::TAIL > 0) {
      const MatrixDescriptor a_tail = row_descriptor(q + QueryTile::TAIL_OFFSET, Columns::TAIL_SWIZZLE);
      const MatrixDescriptor b_tail = row_descriptor(k + KeyTile::TAIL_OFFSET, Columns::TAIL_SWIZZLE);
#pragma unroll
      for (int step = 0; step < Columns::TAIL; step += 16) {
        Wgmma<T, BLOCK_N>::rows(s, a_tail + step * ELEMENT_BYTES, b_tail + step * ELEMENT_BYTES, true);
      }
    }
  }

  // o += p v
  static DEVICE void weigh(Accumulator& o, const Probabilities& p, uint32_t v) {
    const MatrixDescriptor b = column_descriptor(v, ValueTile::BLOCK_BYTES, ValueTile::SWIZZLE);
#pragma unroll
    for (int step = 0; step < BLOCK_N; step += 16) {
      Wgmma<T, Columns::PADDED>::columns(o, p + step / 4, b + step * ValueTile::ROW_BYTES);
    }
  }

  // The four lanes that share a row.
  static DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }
  static DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
  }

  // What is known of a thread's two rows, 8 apart.
  struct Rows {
    float max[2];    // of the scores, unscaled
    float sum[2];    // of p: l
    float old[2];    // l before the present tile, at the present scale
    float centre[2]; // c
    float alpha[2];  // exp of how far the maximum moved
  };

  // s becomes p. `visible`: keys of this tile that each row sees, less the thread's first column.
  template <bool MASKED>
  static DEVICE void softmax(Scores& s, Rows& rows, float scale_log2, const int (&visible)[2]) {
    float max[2] = {rows.max[0], rows.max[1]};
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      if constexpr (MASKED) s[i] = i / 4 * 8 + i % 2 < visible[i / 2 % 2] ? s[i] : -INFINITY;
      max[i / 2 % 2] = fmaxf(max[i / 2 % 2], s[i]);
    }
    // key 0 is visible to every query, so the maximum is finite from the first tile on and nothing is inf - inf
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = quad_max(max[r]);
      rows.alpha[r] = exp2_approx((rows.max[r] - max[r]) * scale_log2);
      rows.max[r] = max[r];
      max[r] *= scale_log2;
    }
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      s[i] = exp2_approx(fmaf(s[i], scale_log2, -max[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.old[r] = rows.sum[r] * rows.alpha[r];
      rows.sum[r] = rows.old[r] + quad_sum(sum[r]);
    }
  }

  static DEVICE void rescale(Accumulator& o, const Rows& rows) {
#pragma unroll
    for (int i = 0; i < Columns::PADDED / 2; ++i) o[i] *= rows.alpha[i / 2 % 2];
  }

  static DEVICE void pack_scores(Probabilities& packed, const Scores& s) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 4; ++i) packed[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // Moves the centre to the mean of the tangent scores over the keys seen so far, this tile included; h = p (ts - c).
  static DEVICE void centre(Probabilities& h, const Scores& p, Scores& ts, const Accumulator& o, Accumulator& t,
                            Rows& rows, float scale) {
    float weighted[2] = {0.f, 0.f}, shift[2];
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) weighted[i / 2 % 2] = fmaf(p[i], ts[i], weighted[i / 2 % 2]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float moved =
          divide_approx(fmaf(rows.centre[r], rows.old[r], quad_sum(weighted[r]) * scale), rows.sum[r]);
      shift[r] = moved - rows.centre[r];
      rows.centre[r] = moved;
    }
    // from the end: ptxas lays h out backwards over ts, and any other order takes registers that are not there
#pragma unroll
    for (int i = BLOCK_N / 2 - 2; i >= 0; i -= 2) {
      const float c = rows.centre[i / 2 % 2];
      h[i / 2] = pack<T>(p[i] * fmaf(ts[i], scale, -c), p[i + 1] * fmaf(ts[i + 1], scale, -c));
    }
#pragma unroll
    for (int i = 0; i < Columns::PADDED / 2; ++i) t[i] = fmaf(-shift[i / 2 % 2], o[i], t[i]);
  }

  struct Consumer {
    const Parameters& parameters;
    const Memory& memory;
    const bool signals;        // one lane of each warp tells the producer
    const uint32_t q, full_q, empty_q;  // the warpgroup's rows
    Ring<1> queries;
    Ring<STAGES> keys;  // the values follow one tile behind
    Scores s, ts;
    Probabilities p, h;
    Accumulator o, t;
    Rows rows;
    int first_row;  // of the warpgroup

    DEVICE Consumer(const Parameters& p, const Memory& memory, int warpgroup, int thread)
        : parameters(p),
          memory(memory),
          signals(thread % 32 == 0),
          q(memory.q(warpgroup)),
          full_q(memory.full_q(warpgroup)),
          empty_q(memory.empty_q(warpgroup)) {}

    static constexpr uint32_t Q_DOT = QueryTile::BYTES, K_DOT = KeyTile::BYTES;

    DEVICE void release(uint32_t barrier) const { mbarrier_arrive_if(barrier, signals); }

    DEVICE void issue_scores() {
      score(s, q, memory.k(keys.stage()), false);
      wgmma_commit();
    }
    DEVICE void issue_tangent_scores() {
      const uint32_t k = memory.k(keys.stage());
      score(ts, q + Q_DOT, k, false);
      score(ts, q, k + K_DOT, true);
      wgmma_commit();
    }

    // Keys of a tile that the thread's rows see, less its first column. Worked out before any product is issued: under
    // them it takes registers that are not there.
    struct Visible {
      int keys[2];
      DEVICE Visible(const Consumer& c, int tile) {
        const Place at = accumulator_place(thread_index_anew() % WARPGROUP, 0);
        for (int r = 0; r < 2; ++r) {
          keys[r] = visible_keys(c.first_row + at.row + 8 * r, c.parameters.shape) - (tile * BLOCK_N + at.column);
        }
      }
    };

    // A warpgroup without queries, in the last block of a head: nothing but its part in the barriers.
    DEVICE void skip(int tiles) {
      mbarrier_wait(full_q, queries.parity());
      release(empty_q);
      ++queries.count;
      for (int tile = 0; tile < tiles; ++tile) {
        mbarrier_wait(memory.full_k(keys.stage()), keys.parity());
        release(memory.empty_k(keys.stage()));
        mbarrier_wait(memory.full_v(keys.stage()), keys.parity());
        release(memory.empty_v(keys.stage()));
        ++keys.count;
      }
    }

    // p, and h of the dual, for the products of values.
    DEVICE void weights() {
      if constexpr (DUAL) centre(h, s, ts, o, t, rows, parameters.scale);
      pack_scores(p, s);
    }

    // What the products of values read is in registers before the fence, not after it (C7519).
    DEVICE void begin_products() {
      hold(o);
      hold(p);
      if constexpr (DUAL) {
        hold(t);
        hold(h);
      }
      wgmma_fence();
    }

    // The first tile of a work: no products of values yet.
    DEVICE void begin() {
      mbarrier_wait(full_q, queries.parity());
      mbarrier_wait(memory.full_k(keys.stage()), keys.parity());
      const Visible visible(*this, 0);
      wgmma_fence();
      issue_scores();
      wgmma_wait<0>(s);
      if constexpr (DUAL) {
        wgmma_fence();
        issue_tangent_scores();
        softmax<true>(s, rows, parameters.scale_log2, visible.keys);
        wgmma_wait<0>(ts);
        release(memory.empty_k(keys.stage()));
      } else {
        release(memory.empty_k(keys.stage()));
        softmax<true>(s, rows, parameters.scale_log2, visible.keys);
      }
      weights();
      ++keys.count;
    }

    template <bool MASKED>
    DEVICE void step(int tile) {
      const Ring<STAGES> values{keys.count - 1};
      mbarrier_wait(memory.full_v(values.stage()), values.parity());
      mbarrier_wait(memory.full_k(keys.stage()), keys.parity());
      const uint32_t v = memory.v(values.stage());
      const Visible visible(*this, tile);
      begin_products();
      if constexpr (DUAL) {
        weigh(o, p, v);
        weigh(t, p, v + ValueTile::BYTES);
        weigh(t, h, v);
        issue_scores();
        wgmma_wait<0>(o, t);
        hold(s);
        wgmma_fence();
        issue_tangent_scores();
        release(memory.empty_v(values.stage()));
        softmax<MASKED>(s, rows, parameters.scale_log2, visible.keys);
        rescale(o, rows);
        rescale(t, rows);
        wgmma_wait<0>(ts);
        release(memory.empty_k(keys.stage()));
      } else {
        issue_scores();
        wgmma_wait<0>(s);
        wgmma_fence();
        weigh(o, p, v);
        wgmma_commit();
        release(memory.empty_k(keys.stage()));
        softmax<MASKED>(s, rows, parameters.scale_log2, visible.keys);
        wgmma_wait<0>(o);
        release(memory.empty_v(values.stage()));
        rescale(o, rows);
      }
      weights();
      ++keys.count;
    }

    // The last tile's products of values.
    DEVICE void end() {
      release(empty_q);
      ++queries.count;
      const Ring<STAGES> values{keys.count - 1};
      mbarrier_wait(memory.full_v(values.stage()), values.parity());
      const uint32_t v = memory.v(values.stage());
      begin_products();
      weigh(o, p, v);
      if constexpr (DUAL) {
        weigh(t, p, v + ValueTile::BYTES);
        weigh(t, h, v);
      }
      wgmma_commit();
      if constexpr (DUAL) {
        wgmma_wait<0>(o, t);
      } else {
        wgmma_wait<0>(o);
      }
      release(memory.empty_v(values.stage()));
    }
  };

  static DEVICE void consume(const Parameters& p, const Memory& memory) {
    const int thread = thread_index() % WARPGROUP;
    const int warpgroup = uniform(thread_index() / WARPGROUP) - 1;
    Consumer c(p, memory, warpgroup, thread);
    for (int index = block_index(); index < p.works; index += grid_size()) {
      const Work work = work_at<BLOCK_M>(index, p.shape);
      const int tiles = key_tiles<BLOCK_M, BLOCK_N>(work.block_m, p.shape);
      c.first_row = work.block_m * BLOCK_M + warpgroup * ROWS;
      if (c.first_row >= p.shape.N_q) {
        c.skip(tiles);
        continue;
      }
      const int whole = whole_tiles<BLOCK_N>(c.first_row, p.shape);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        c.rows.max[r] = -INFINITY;
        c.rows.sum[r] = c.rows.centre[r] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < Columns::PADDED / 2; ++i) c.o[i] = c.t[i] = 0.f;

      c.begin();
      int tile = 1;
      for (; tile < tiles && tile < whole; ++tile) c.template step<false>(tile);
      for (; tile < tiles; ++tile) c.template step<true>(tile);
      c.end();

      store(p, work_at<BLOCK_M>(anew(index), p.shape), c);
    }
  }

  // ------------------------------------------------------------------------------------------------------ the output

  // A quad's 4 x 4 words: lane a's word b becomes lane b's word a.
  static DEVICE void quad_transpose(uint32_t (&x)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool high = lane & bit;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32_t received = shuffle_xor(high ? x[i] : x[i + bit], bit);
        (high ? x[i] : x[i + bit]) = received;
      }
    }
  }

  // One row of a thread's accumulators times `factor`. Four groups of 8 columns go out as 16 bytes a lane.
  static DEVICE void store_row(uint16_t* row, bool exists, const Accumulator& o, int r, float factor, int lane) {
    constexpr int GROUPS = D / 8;
#pragma unroll
    for (int first = 0; first < GROUPS; first += 4) {
      const int groups = GROUPS - first < 4 ? GROUPS - first : 4;
      uint32_t words[4] = {};
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const int i = 4 * (first + g) + 2 * r;
        words[g] = pack<T>(o[i] * factor, o[i + 1] * factor);
      }
      if (groups == 4) {
        quad_transpose(words, lane);
        if (exists) {
          *reinterpret_cast<uint4*>(row + 8 * (first + lane)) = uint4{words[0], words[1], words[2], words[3]};
        }
      } else if (exists) {
#pragma unroll
        for (int g = 0; g < groups; ++g) *reinterpret_cast<uint32_t*>(row + 8 * (first + g) + 2 * lane) = words[g];
      }
    }
  }

  static DEVICE void store(const Parameters& p, const Work& work, const Consumer& c) {
    const int lane = thread_index_anew() % 4;
    const int batch = p.first_batch + work.batch;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = c.first_row + accumulator_place(thread_index_anew() % WARPGROUP, 0).row + 8 * r;
      const bool exists = row < p.shape.N_q;
      const int64_t offset = ((int64_t(batch) * p.shape.N_q + row) * p.shape.H + work.head) * D;
      const float factor = 1.f / c.rows.sum[r];
      store_row(p.o + offset, exists, c.o, r, factor, lane);
      // the centre is now the mean over all keys, so nothing is left to subtract
      if constexpr (DUAL) store_row(p.o_dot + offset, exists, c.t, r, factor, lane);
      if (exists && lane == 0) {
        p.lse[(int64_t(batch) * p.shape.H + work.head) * p.shape.N_q + row] =
            fmaf(c.rows.max[r], p.scale, logf(c.rows.sum[r]));
      }
    }
  }
};

}  // namespace mfkernels::attention

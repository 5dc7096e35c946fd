// The stream phase of `steer`: the maximum of the rows that need it, from the encoder, until every row is settled.
//
// One warp of a block fills the ring. Groups of four warps multiply, a quarter of d_in each, add up through shared
// memory, and raise the rows' maxima. Before each tile the filling warp looks whether any row still waits; what it
// found goes with the tile, so that all warps of the block go the same way.
#pragma once

#include "pipeline.cuh"

namespace dspa {

// Twice what one sum of products loses at a term, truncation counted: a bound for two of them.
constexpr float ROUNDING = 1.f / (1 << 22);

// Residual rows that are streamed for together.
template <class P> struct Batch {
  const Arguments &a;
  int i_first, n_rows;
  uint64_t waiting;

  __device__ const typename P::Row *rows() const {
    const void *p = sizeof(typename P::Row) == 4 ? a.x : a.h;
    return static_cast<const typename P::Row *>(p) + int64_t(i_first) * a.d_in;
  }
};

// Rows of the batch that `m_row` says something of, as bits; thread i of a warp tells of rows i and i + 32.
template <class F> __device__ inline uint64_t rows_where(int n_rows, F &&m_row) {
  uint64_t mask = 0;
  for (int i = 0; i < n_rows; i += 32) {
    const int r = i + lane();
    mask |= uint64_t(ballot(r < n_rows && m_row(r))) << i;
  }
  return mask;
}

// What is known of the batch's rows, and which of them need the encoder.
template <class P> __device__ uint64_t find_waiting(const Batch<P> &batch, const Room<P> &room) {
  const Arguments &a = batch.a;
  for (int r = warp(); r < batch.n_rows; r += n_threads() / 32) {
    const int plan = plan_of(a, batch.i_first + r);
    const Summary s = summarise(a, batch.i_first + r, plan);
    const bool settled = can_settle(a) && !(s.need > a.alpha * s.bound);
    if (lane() == 0) {
      room.plan[r] = plan;
      room.need[r] = settled ? 0.f : s.need;
      room.bound[r] = s.bound;
      room.low[r] = s.low;
    }
  }
  block_barrier();
  return rows_where(batch.n_rows, [&](int r) { return room.need[r] > 0.f; });
}

// Rows of the batch beside each other in shared memory, zeros after their end. By the multiplying warps.
template <class P> __device__ void keep_rows(const Batch<P> &batch, const Room<P> &room) {
  using Row = typename P::Row;
  const int d_in = batch.a.d_in, n_threads = 32 * P::SHAPE.consumers();
  const bool aligned = is_aligned(batch.a);
  for (int r = 0; r < batch.n_rows; r++) {
    const Row *from = batch.rows() + int64_t(r) * d_in;
    for (int o_k = 8 * thread(); o_k * int(sizeof(Row)) < room.row_stride; o_k += 8 * n_threads) {
      Eight<Row> piece;
      if (aligned) piece.template load<true>(from + o_k, d_in - o_k);
      else piece.template load<false>(from + o_k, d_in - o_k);
      memcpy(__builtin_assume_aligned(room.resident + r * room.row_stride + o_k * sizeof(Row), 16), &piece, 16);
    }
  }
  named_barrier(KEPT, n_threads);
}

// The filling warp: tiles of this block, as long as a row waits. Returns how many latents it had read.
template <class P> __device__ int produce(const Batch<P> &batch, const Room<P> &room, Place &place) {
  const Arguments &a = batch.a;
  const bool aligned = is_aligned(a);
  const int filled = n_ahead(a, room);
  if (!P::SHAPE.resident) fence_copies();  // rows in fp32 were written by other blocks
  uint64_t open = batch.waiting;
  int n_read = 0, i = 0;
  for (;; i++, place.advance(room.stages)) {
    const Piece piece = piece_of<P>(a, i);
    if (i >= filled) mbarrier_wait(room.empty + place.stage, place.parity ^ 1);
    if (piece.chunk == 0 && can_settle(a))
      open = rows_where(batch.n_rows, [&](int r) {
        const float now = float_of(load_shared_state(a.maximum + batch.i_first + r));
        return room.need[r] > a.alpha * fmaxf(room.bound[r], now);
      });
    if (!piece.tile.count || !open) break;
    if (i >= filled && aligned) copy_piece<P, true>(a, room, place, piece, batch.rows(), batch.n_rows);
    if (i >= filled && !aligned) copy_piece<P, false>(a, room, place, piece, batch.rows(), batch.n_rows);
    announce(room, place, {piece.tile.first, piece.tile.count, piece.chunk, 0, open});
    n_read += piece.chunk == 0 ? piece.tile.count : 0;
  }
  if (i >= filled) mbarrier_arrive(room.full + place.stage);
  announce(room, place, {0, 0, 0, 0, 0});
  place.advance(room.stages);
  drain(room, i + 1, filled);
  return n_read;
}

// The threads of a group, after a tile: each has latent l of sixteen and row n of eight.
template <class P> struct Group {
  const Batch<P> &batch;
  const Room<P> &room;
  int i_group = warp() / SLICES, i_slice = warp() % SLICES;
  int l = thread() % TILE_L, n = thread() / TILE_L % TILE_N;
  int buffer = 0;
  float bias[P::M], threshold[P::M];

  __device__ Group(const Batch<P> &batch, const Room<P> &room) : batch(batch), room(room) {}
  __device__ void barrier() const { named_barrier(GROUP + i_group, 32 * SLICES); }

  // Place in the tile of latent l of its part m.
  __device__ int place(int m) const { return TILE_L * (i_group * P::M + m) + l; }

  // A tile begins: what will be needed at its end is on its way.
  __device__ void begin(const Header &tile) {
#pragma unroll
    for (int m = 0; m < P::M; m++) {
      const bool exists = place(m) < tile.count;
      bias[m] = exists ? batch.a.b_enc[tile.first + place(m)] : 0.f;
      threshold[m] = exists ? batch.a.threshold[tile.first + place(m)] : 0.f;
    }
  }

  // The sum of all slices for latent l of tile m and row n of tile j.
  __device__ float sum(const P &product, int m, int j) {
    constexpr int size = TILE_L * (TILE_N + 1);
    float *partial = room.partial + (buffer * P::SHAPE.groups + i_group) * SLICES * size;
    product.leave(partial + i_slice * size, m, j);
    barrier();
    buffer ^= 1;  // whoever is slow may still read the other
    float total = 0.f;
    for (int s = 0; s < SLICES; s++) total += partial[s * size + l * (TILE_N + 1) + n];
    return total;
  }

  // Raises the row's maximum; for top-k, counts by how many latents its selected ones are beaten.
  __device__ void regard(float pre, float level, int i_latent, bool m_latent, int r, uint64_t open) const {
    const Arguments &a = batch.a;
    const bool m_row = m_latent && (open >> r & 1);
    float f = m_row && pre > 0.f && (a.k || pre > level) ? pre : 0.f;
#pragma unroll
    for (int mask = TILE_L / 2; mask; mask /= 2) f = fmaxf(f, shuffle_xor(f, mask));
    const int i_row = batch.i_first + r;
    // Numbers >= 0 order like their bits, so that the order of the blocks does not matter.
    if (l == 0 && (open >> r & 1) && f > room.bound[r]) raise(a.maximum + i_row, bits_of(f));
    // To be ahead of a selected latent takes as much as the least of them.
    if (!a.k || !ballot(m_row && pre >= room.low[r])) return;
    const int index = m_latent ? (a.order ? a.order[i_latent] : i_latent) : 0;
    for (int i = 0; i < a.n_slots; i++) {
      bool ahead = false;
      if (m_row) {
        const float theirs = values_of(a, i_row)[i];
        const int slot = a.slots[int64_t(room.plan[r]) * a.n_slots + i];
        const int own = slot >= 0 ? a.columns[slot] : -1;
        ahead = theirs > 0.f && index != own && (pre > theirs || (pre == theirs && index < own));
      }
      const int count = count_bits(ballot(ahead) >> (lane() / TILE_L * TILE_L) & 0xffff);
      if (l == 0 && count) add(a.beaten + int64_t(i_row) * a.n_slots + i, count);
    }
  }

  // Whether the exact value of a latent might matter to row r, by its screened value. What is no number could be
  // anything.
  __device__ bool is_candidate(float z, float level, float now, int i_latent, int r) const {
    const Arguments &a = batch.a;
    const float *of = a.screen_latents + i_latent;
    const float *norms = a.norms + 2 * (batch.i_first + r);
    const float loss = float(a.d_in + 32) * ROUNDING;
    float upper = z * of[0] + of[a.d_sae];
    upper += of[2 * int64_t(a.d_sae)] * norms[0] + of[3 * int64_t(a.d_sae)] * (norms[1] * loss);
    if (a.k) return !(upper < room.low[r]);
    return !(upper <= fmaxf(fmaxf(room.bound[r], now), level));
  }

  // All rows with the latents `m_latent`, as bits, of this group's part of a tile.
  __device__ void regard_all(const P &product, const Header &tile, const uint32_t (&m_latent)[P::M]) {
#pragma unroll
    for (int m = 0; m < P::M; m++)
      for (int j = 0; TILE_N * j < batch.n_rows; j++) {
        const float total = sum(product, m, j);
        const bool wanted = m_latent[m] >> l & 1;
        regard(total + bias[m], threshold[m], tile.first + place(m), wanted, TILE_N * j + n, tile.open);
      }
  }

  // Latents of this group's part of a tile that exist, or of those the candidates.
  __device__ void find_latents(const P &product, const Header &tile, uint32_t (&m_latent)[P::M]) {
#pragma unroll
    for (int m = 0; m < P::M; m++) {
      const int count = tile.count - TILE_L * (i_group * P::M + m);
      m_latent[m] = count >= TILE_L ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
    }
    if constexpr (P::SCREENED) {
#pragma unroll
      for (int m = 0; m < P::M; m++) {
        unsigned found = 0;
        for (int j = 0; TILE_N * j < batch.n_rows; j++) {
          const int r = TILE_N * j + n;
          const bool asked = (m_latent[m] >> l & 1) && (tile.open >> r & 1);
          const float now = asked ? float_of(load_shared_state(batch.a.maximum + batch.i_first + r)) : 0.f;
          const float z = sum(product, m, j);
          found |= ballot(asked && is_candidate(z, threshold[m], now, tile.first + place(m), r));
        }
        if (lane() == 0) room.candidates[warp() * P::M + m] = (found | found >> 16) & 0xffff;
      }
      barrier();
#pragma unroll
      for (int m = 0; m < P::M; m++) {
        m_latent[m] = 0;
        for (int s = 0; s < SLICES; s++) m_latent[m] |= room.candidates[(i_group * SLICES + s) * P::M + m];
      }
    }
  }

  // A whole tile has been multiplied. Returns how many latents were read in full for it, apart from the ring.
  __device__ int finish(P &product, const Header &tile) {
    uint32_t m_latent[P::M];
    find_latents(product, tile, m_latent);
    int n_read = 0;
    if constexpr (P::SCREENED) {
#pragma unroll
      for (int m = 0; m < P::M; m++) n_read += count_bits(m_latent[m]);
      if (!n_read) return 0;
      using Weight = typename P::Weight;
      const int64_t first = tile.first + TILE_L * i_group * P::M;
      product.clear();
      product.gather(static_cast<const Weight *>(batch.a.W_enc), first, m_latent, batch.rows(), batch.a.d_in,
                     batch.n_rows, i_slice, is_aligned(batch.a));
    }
    regard_all(product, tile, m_latent);
    return n_read;
  }
};

// A multiplying warp: whatever the filling warp sends, to the end. Returns how many latents its group read itself.
template <class P> __device__ int consume(const Batch<P> &batch, const Room<P> &room, Place &place) {
  constexpr Shape shape = P::SHAPE;
  const int chunks = n_chunks(batch.a.d_in, shape.block_k);
  Group<P> group(batch, room);
  P product;
  int n_read = 0;
  for (;;) {
    mbarrier_wait(room.full + place.stage, place.parity);
    const Header tile = room.headers[place.stage];
    if (tile.count) {
      if (tile.chunk == 0) {
        product.clear();
        group.begin(tile);
      }
      char *stage = room.stage(place);
      const Operand weights = {stage + group.i_group * P::M * TILE_L * shape.weight_stride(), shape.weight_stride()};
      const char *rows = shape.resident ? room.resident + tile.chunk * shape.block_k * int(sizeof(typename P::Row))
                                        : stage + shape.latents() * shape.weight_stride();
      product.stage(weights, {rows, room.row_stride}, chunk_width(batch.a.d_in, shape.block_k, tile.chunk),
                    group.i_slice, batch.n_rows);
    }
    warp_barrier();
    if (lane() == 0) mbarrier_arrive(room.empty + place.stage);
    place.advance(room.stages);
    if (!tile.count) return n_read;
    if (tile.chunk == chunks - 1) n_read += group.finish(product, tile);
  }
}

// All rows, as many at a time as a block multiplies. Returns how many needed the encoder, the same in every block.
template <class P> __device__ int stream(const Arguments &a, const Room<P> &room) {
  constexpr Shape shape = P::SHAPE;
  Place place = {0, 0};
  int n_waiting = 0, n_read = 0;
  for (int i_first = 0; i_first < a.n_rows; i_first += room.rows) {
    Batch<P> batch = {a, i_first, least(room.rows, a.n_rows - i_first), 0};
    batch.waiting = find_waiting(batch, room);
    if (batch.waiting) {
      n_waiting += count_bits(unsigned(batch.waiting)) + count_bits(unsigned(batch.waiting >> 32));
      if (warp() == shape.consumers()) {
        const int streamed = produce(batch, room, place);
        n_read += P::SCREENED ? 0 : streamed;
      } else {
        if constexpr (shape.resident) keep_rows(batch, room);
        n_read += consume(batch, room, place);
      }
    } else if (warp() == shape.consumers()) {
      drain(room, 0, n_ahead(a, room));
    }
    block_barrier();
  }
  // One thread tells for the filling warp, one for each group.
  const bool tells = warp() == shape.consumers() ? lane() == 0 : thread() % (32 * SLICES) == 0;
  if (a.paths && tells && n_read) add(a.paths + 5, int64_t(n_read));
  return n_waiting;
}

}  // namespace dspa

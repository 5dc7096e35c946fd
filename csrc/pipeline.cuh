// The ring of a block: shared memory by name, and stages that one warp fills with pieces of encoder rows, by copies
// that are under way while others are multiplied.
#pragma once

#include "mma.cuh"

namespace dspa {

// Named barriers: one for all multiplying warps, and from GROUP on one for each group of them.
constexpr int KEPT = 1, GROUP = 2;

// Shared memory, by name.
template <class P> struct Room {
  char *ring, *resident;
  float *partial, *need, *bound, *low;
  int *plan;
  unsigned *candidates;
  Header *headers;
  Mbarrier *full, *empty;
  int rows, stages, stage_bytes, row_stride;

  __device__ Room(const Arguments &a, int rows, int stages) : rows(rows), stages(stages) {
    constexpr Shape shape = P::SHAPE;
    const Layout at = layout_of(shape, rows, a.d_in);
    char *base = shared_memory();
    ring = base + at.ring;
    resident = base + at.resident;
    partial = reinterpret_cast<float *>(base + at.partial);
    need = reinterpret_cast<float *>(base + at.need);
    bound = reinterpret_cast<float *>(base + at.bound);
    low = reinterpret_cast<float *>(base + at.low);
    plan = reinterpret_cast<int *>(base + at.plan);
    candidates = reinterpret_cast<unsigned *>(base + at.candidates);
    headers = reinterpret_cast<Header *>(base + at.headers);
    full = reinterpret_cast<Mbarrier *>(base + at.barriers);
    empty = full + shape.max_stages;
    stage_bytes = shape.stage_bytes(rows, a.d_in);
    row_stride = shape.row_stride(a.d_in);
  }

  // A stage is full when each thread of the filling warp has arrived, and its first once more for the header; empty
  // when each multiplying warp has.
  __device__ void init() const {
    if (thread() == 0) {
      for (int i = 0; i < stages; i++) {
        mbarrier_init(full + i, 32 + 1);
        mbarrier_init(empty + i, P::SHAPE.consumers());
      }
      fence_mbarrier_init();
    }
    block_barrier();
  }

  __device__ char *stage(Place place) const { return ring + place.stage * stage_bytes; }
};

// A warp copies `n` rows that are not aligned, number by number, with zeros up to a whole step.
template <class T>
__device__ void copy_unaligned(char *to, int to_stride, const T *from, int d_in, int n, int width) {
  const int padded = round_up(width, STEP);
  for (int i = lane(); i < n * padded; i += 32) {
    const int r = i / padded, o_k = i % padded;
    T number;
    memset(&number, 0, sizeof(T));
    if (o_k < width) number = from[int64_t(r) * d_in + o_k];
    reinterpret_cast<T *>(to + r * to_stride)[o_k] = number;
  }
}

// What a block reads, in order: chunk after chunk, tile after tile, a stage each.
struct Piece {
  Tile tile;
  int chunk;
};

template <class P> __device__ inline Piece piece_of(const Arguments &a, int i) {
  constexpr Shape shape = P::SHAPE;
  const int chunks = n_chunks(a.d_in, shape.block_k), wave = i / chunks;
  if (wave >= n_waves(a.d_sae, shape.latents(), n_blocks())) return {{0, 0}, 0};
  return {tile_of(a.d_sae, shape.latents(), n_blocks(), wave, block()), i % chunks};
}

// A piece into a stage, and residual rows with it unless they are there. Each thread of the filling warp arrives.
template <class P, bool ALIGNED>
__device__ void copy_piece(const Arguments &a, const Room<P> &room, Place place, Piece piece,
                           const typename P::Row *rows, int n_rows) {
  using Stored = typename P::Stored;
  using Row = typename P::Row;
  constexpr Shape shape = P::SHAPE;
  Mbarrier *full = room.full + place.stage;
  const int width = chunk_width(a.d_in, shape.block_k, piece.chunk), o_k = piece.chunk * shape.block_k;
  const void *base = P::SCREENED ? static_cast<const void *>(a.screen_W_enc) : a.W_enc;
  const Stored *weights = static_cast<const Stored *>(base) + int64_t(piece.tile.first) * a.d_in + o_k;
  char *to_weights = room.stage(place), *to_rows = to_weights + shape.latents() * shape.weight_stride();
  if (shape.resident) n_rows = 0;
  if constexpr (ALIGNED) {
    if (lane() == 0)
      expect_copies(full, width * (piece.tile.count * int(sizeof(Stored)) + n_rows * int(sizeof(Row))));
    warp_barrier();
    copy_rows<true>(to_weights, shape.weight_stride(), reinterpret_cast<const char *>(weights),
                    int64_t(a.d_in) * sizeof(Stored), piece.tile.count, width * sizeof(Stored), full);
    copy_rows<false>(to_rows, room.row_stride, reinterpret_cast<const char *>(rows + o_k),
                     int64_t(a.d_in) * sizeof(Row), n_rows, width * sizeof(Row), full);
    arrive_with_copies(full);
  } else {
    copy_unaligned(to_weights, shape.weight_stride(), weights, a.d_in, piece.tile.count, width);
    copy_unaligned(to_rows, room.row_stride, rows + o_k, a.d_in, n_rows, width);
    mbarrier_arrive(full);
  }
}

// The header of a stage, with which its last arrival comes.
template <class P> __device__ void announce(const Room<P> &room, Place place, const Header &header) {
  if (lane() != 0) return;
  room.headers[place.stage] = header;
  mbarrier_arrive(room.full + place.stage);
}

// How many stages a block fills before it is known whether any row needs them: where that is wanted, and where residual
// rows do not have to come along.
template <class P> __device__ inline int n_ahead(const Arguments &a, const Room<P> &room) {
  if (!P::SHAPE.resident || !a.ahead || !is_aligned(a)) return 0;
  int n = 0;
  while (n < room.stages && piece_of<P>(a, n).tile.count) n++;
  return n;
}

template <class P> __device__ void fill_ahead(const Arguments &a, const Room<P> &room) {
  if (warp() != P::SHAPE.consumers()) return;
  const int n = n_ahead(a, room);
  for (int i = 0; i < n; i++) copy_piece<P, true>(a, room, {i, 0}, piece_of<P>(a, i), nullptr, 0);
}

// Stages from `first` to before `filled` that were filled ahead and that nobody needs: waits until their copies have
// come.
template <class P> __device__ void drain(const Room<P> &room, int first, int filled) {
  for (int i = first; i < filled; i++) {
    announce(room, {i, 0}, {0, 0, 0, 0, 0});
    mbarrier_wait(room.full + i, 0);
  }
}

}  // namespace dspa

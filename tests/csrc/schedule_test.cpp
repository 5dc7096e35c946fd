// Walks the index arithmetic of csrc/schedule.h over every supported shape and some odd ones, on the host.
//
//   schedule_test CHECK
//
// ends with 0 if the check holds, else prints the first thing that does not, with its numbers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <random>
#include <utility>
#include <vector>

#include "supported.h"

using namespace dspa;

namespace {

#define EXPECT(holds, ...)                                             \
  do {                                                                 \
    if (!(holds)) fail(__LINE__, #holds, #__VA_ARGS__, {__VA_ARGS__}); \
  } while (false)

[[noreturn]] void fail(int line, const char *what, const char *names, std::initializer_list<int> values) {
  std::printf("line %d: not %s, where %s =", line, what, names);
  for (int value : values) std::printf(" %d", value);
  std::printf("\n");
  std::exit(1);
}

const int ODD_WIDTHS[] = {1, 19, 48, 257, 272, 1040};
const int D_SAE[] = {1, 67, 4096, 16384, 32768, 65536, 131072, 1000003};
const int N_BLOCKS[] = {1, 3, 108, 114, 132, 144};
const Shape SHAPES[] = {few_rows(1),       few_rows(2),       many_rows(1),     many_rows(2),
                        full_precision(1), full_precision(2), full_precision(4)};

std::vector<int> widths() {
  std::vector<int> all(std::begin(WIDTHS), std::end(WIDTHS));
  all.insert(all.end(), std::begin(ODD_WIDTHS), std::end(ODD_WIDTHS));
  return all;
}

// Whole batches, parts of one, and several.
std::vector<int> row_counts() {
  std::vector<int> all = {65, 100, 128, 640, 1001};
  for (int n_rows = 1; n_rows <= 64; n_rows++) all.push_back(n_rows);
  return all;
}

// Tiles follow each other without gaps, wave by wave and block by block, so that each latent is in one.
void check_tiles_of(int d_sae, int latents, int n_blocks) {
  const int waves = n_waves(d_sae, latents, n_blocks);
  int next = 0;
  for (int wave = 0; wave < waves; wave++) {
    int fewest = latents, largest = 0;
    for (int block = 0; block < n_blocks; block++) {
      const Tile tile = tile_of(d_sae, latents, n_blocks, wave, block);
      EXPECT(tile.first == next, d_sae, latents, n_blocks, wave, block, tile.first, next);
      EXPECT(tile.count >= 0 && tile.count <= latents, d_sae, latents, n_blocks, wave, block, tile.count);
      fewest = least(fewest, tile.count), largest = most(largest, tile.count);
      next += tile.count;
    }
    const int slack = wave == waves - 1 ? 1 : 0;
    EXPECT(largest > 0 && largest - fewest <= slack, d_sae, latents, n_blocks, wave, fewest, largest);
  }
  EXPECT(next == d_sae, d_sae, latents, n_blocks, waves, next);
}

void check_tiles() {
  for (Shape shape : SHAPES)
    for (int d_sae : D_SAE)
      for (int n_blocks : N_BLOCKS) check_tiles_of(d_sae, shape.latents(), n_blocks);
}

// For each slice, the steps of d_in that its warp takes, as their beginnings and sizes.
using Order = std::vector<std::vector<std::pair<int, int>>>;

// As the products of mma.cuh walk the chunks of a tile.
Order order_of(int d_in, int block_k) {
  Order order(SLICES);
  for (int chunk = 0; chunk < n_chunks(d_in, block_k); chunk++) {
    const int width = chunk_width(d_in, block_k, chunk);
    for (int s = 0; s < SLICES; s++)
      for (int o_k = SLICE * s; o_k < width; o_k += ROUND)
        for (int i = 0; i < SLICE && o_k + i < width; i += STEP)
          order[s].emplace_back(chunk * block_k + o_k + i, least(STEP, width - o_k - i));
  }
  return order;
}

Order canonical_order(int d_in) {
  Order order(SLICES);
  for (int k = 0; k < d_in; k += STEP) order[k / SLICE % SLICES].emplace_back(k, least(STEP, d_in - k));
  return order;
}

// An element is summed in one order, whatever the block shape, and each number once.
void check_order() {
  for (Shape shape : SHAPES)
    for (int d_in : widths())
      EXPECT(order_of(d_in, shape.block_k) == canonical_order(d_in), d_in, shape.block_k);
}

// An mbarrier as PTX describes it: when `count` have arrived the phase completes and the next begins; a wait for a
// parity passes once the latest phase of that parity has completed.
struct Barrier {
  int count, pending, parity;
  void arrive() {
    if (--pending == 0) pending = count, parity ^= 1;
  }
  bool passes(int awaited) const { return parity != awaited; }
};

// One warp that fills stages by copies, which arrive in any order, and others that read them, all of them at random.
class Ring {
 public:
  Ring(int stages, int n_consumers, int n_items, unsigned seed)
      : stages(stages), n_items(n_items), random(seed), held(stages, NOTHING), full(stages, Barrier{1, 1, 0}),
        empty(stages, Barrier{n_consumers, n_consumers, 0}), consumers(n_consumers) {
    for (int i = 0; i < n_consumers + 2; i++) laziness.push_back(1 + any(20));
  }

  void run() {
    for (int turn = 0; !done(); turn++) {
      EXPECT(turn < 10000 * n_items, stages, int(consumers.size()), n_items, sent);  // else all wait for each other
      const int actor = any(int(laziness.size()));
      if (any(laziness[actor])) continue;
      if (actor == 0) fill();
      else if (actor == 1) copy();
      else read(consumers[actor - 2]);
    }
  }

 private:
  static constexpr int NOTHING = -1;
  struct Consumer {
    Place place = {0, 0};
    int n_read = 0;
    bool reading = false;
  };

  int stages, n_items;
  std::mt19937 random;
  std::vector<int> held;  // the item in each stage, NOTHING while it is copied
  std::vector<Barrier> full, empty;
  std::vector<Consumer> consumers;
  std::vector<int> laziness;
  std::vector<std::pair<int, int>> copies;  // that are under way: stage and item
  Place place = {0, 0};
  int sent = 0;

  int any(int n) { return int(random() % unsigned(n)); }

  bool done() const {
    return std::all_of(consumers.begin(), consumers.end(), [&](const Consumer &c) { return c.n_read == n_items; });
  }

  void fill() {
    if (sent == n_items || !empty[place.stage].passes(place.parity ^ 1)) return;
    for (const Consumer &consumer : consumers) EXPECT(consumer.n_read > sent - stages, stages, sent, consumer.n_read);
    EXPECT(place.stage == sent % stages, stages, sent, place.stage);
    held[place.stage] = NOTHING;
    copies.emplace_back(place.stage, sent++);
    place.advance(stages);
  }

  void copy() {
    if (copies.empty()) return;
    std::swap(copies[any(int(copies.size()))], copies.back());
    const auto [stage, item] = copies.back();
    copies.pop_back();
    held[stage] = item;
    full[stage].arrive();
  }

  // Reading takes a while, through all of which the stage has to stay as it is.
  void read(Consumer &consumer) {
    Place &at = consumer.place;
    if (consumer.n_read == n_items || (!consumer.reading && !full[at.stage].passes(at.parity))) return;
    EXPECT(held[at.stage] == consumer.n_read, stages, at.stage, at.parity, held[at.stage], consumer.n_read);
    if (!consumer.reading) {
      consumer.reading = true;
      return;
    }
    consumer.reading = false;
    consumer.n_read++;
    empty[at.stage].arrive();
    at.advance(stages);
  }
};

void check_ring() {
  for (Shape shape : SHAPES)
    for (int stages = MIN_STAGES; stages <= shape.max_stages; stages++)
      for (unsigned seed = 0; seed < 20; seed++) Ring(stages, shape.consumers(), 5 * stages + 1, seed).run();
}

struct Region {
  int begin, bytes, alignment;
};

// What each region of shared memory has to hold, in any order.
std::vector<Region> regions_of(Shape shape, int n_rows, int d_in, int stages) {
  const Layout at = layout_of(shape, n_rows, d_in);
  const int group = SLICES * TILE_L * (TILE_N + 1) * 4, of_rows = 4 * shape.rows;
  return {
      {at.resident, shape.resident ? shape.tile_rows(n_rows) * shape.row_stride(d_in) : 0, 16},
      {at.partial, 2 * shape.groups * group, 16},
      {at.need, of_rows, 4},
      {at.bound, of_rows, 4},
      {at.low, of_rows, 4},
      {at.plan, of_rows, 4},
      {at.candidates, 4 * shape.consumers() * shape.m_tiles, 4},
      {at.headers, shape.max_stages * int(sizeof(Header)), 8},
      {at.barriers, 2 * shape.max_stages * 8, 8},
      {at.ring, stages * shape.stage_bytes(n_rows, d_in), 16},
  };
}

void check_layout_of(Shape shape, int n_rows, int d_in, int shared) {
  const int stages = stages_of(shape, n_rows, d_in, shared);
  if (!stages) return;  // supported.h tells where there has to be room
  std::vector<Region> regions = regions_of(shape, n_rows, d_in, stages);
  std::stable_sort(regions.begin(), regions.end(), [](Region a, Region b) { return a.begin < b.begin; });
  int end = 0;
  for (Region each : regions) {
    EXPECT(each.begin >= end, shape.rows, shape.weight_bytes, n_rows, d_in, each.begin, end);
    EXPECT(each.begin % each.alignment == 0, shape.rows, shape.weight_bytes, n_rows, d_in, each.begin);
    end = each.begin + each.bytes;
  }
  EXPECT(stages >= MIN_STAGES && stages <= shape.max_stages, shape.rows, n_rows, d_in, stages);
  const int bytes = shared_bytes(shape, n_rows, d_in, stages);
  EXPECT(end <= bytes && bytes <= shared, shape.rows, shape.weight_bytes, n_rows, d_in, end, bytes, shared);
}

void check_layout() {
  for (Shape shape : SHAPES)
    for (int d_in : widths())
      for (int n_rows : row_counts())
        for (int shared : {SHARED_80, SHARED_90}) check_layout_of(shape, n_rows, d_in, shared);
}

// A matrix is read eight rows at a time, 16 bytes of each: with an odd number of these between rows, from eight
// different groups of banks. A slice is read to its end, of which the last of a chunk may be a part.
void check_rows_of(int stride, int width, int bytes) {
  EXPECT(stride % 32 == 16, stride, width, bytes);
  EXPECT(round_up(width, SLICE) * bytes <= stride, stride, width, bytes);
}

void check_stages() {
  for (Shape shape : SHAPES)
    for (int d_in : widths()) {
      check_rows_of(shape.weight_stride(), least(d_in, shape.block_k), shape.weight_bytes);
      check_rows_of(shape.row_stride(d_in), shape.resident ? d_in : least(d_in, shape.block_k), shape.row_bytes);
      for (int n_rows : row_counts()) {
        const int rows = shape.tile_rows(n_rows), weights = shape.latents() * shape.weight_stride();
        EXPECT(rows % TILE_N == 0 && rows >= least(n_rows, shape.rows), shape.rows, n_rows, rows);
        const int bytes = weights + (shape.resident ? 0 : rows * shape.row_stride(d_in));
        EXPECT(shape.stage_bytes(n_rows, d_in) >= bytes, shape.rows, n_rows, d_in, bytes);
        EXPECT(weights % 16 == 0 && shape.stage_bytes(n_rows, d_in) % 16 == 0, shape.rows, n_rows, d_in, weights);
        EXPECT(bytes < 1 << 20, shape.rows, n_rows, d_in, bytes);  // what an mbarrier can count
      }
    }
}

// One round of the grid barrier in which block 0 comes after `before` others. Atomics wrap around.
uint32_t round_of(uint32_t word, int n_blocks, int before) {
  const uint32_t begin = word;
  for (int i = 0; i < n_blocks; i++) {
    const uint32_t ticket = word;
    EXPECT((ticket ^ begin) >> 31 == 0, n_blocks, before, i);
    const int block = i < before ? i + 1 : i == before ? 0 : i;
    word += uint32_t(arrival(block, n_blocks));
    EXPECT(((word ^ ticket) >> 31 == 1) == (i == n_blocks - 1), n_blocks, before, i, int(begin), int(word));
  }
  return word;
}

// All blocks but one add the same, so that an order is the place of that one.
void check_grid_barrier() {
  for (int block = 2; block < 144; block++) EXPECT(arrival(block, 144) == arrival(1, 144), block);
  for (int n_blocks : N_BLOCKS)
    for (int first = 0; first < n_blocks; first++)
      for (int second = 0; second < n_blocks; second++) {
        const uint32_t word = round_of(round_of(0, n_blocks, first), n_blocks, second);
        EXPECT(word == 0, n_blocks, first, second, int(word));
      }
}

struct Check {
  const char *name;
  void (*run)();
};

const Check CHECKS[] = {{"tiles", check_tiles},   {"order", check_order},   {"ring", check_ring},
                        {"layout", check_layout}, {"stages", check_stages}, {"grid_barrier", check_grid_barrier}};

}  // namespace

int main(int argc, char **argv) {
  for (Check check : CHECKS)
    if (argc == 2 && !std::strcmp(argv[1], check.name)) {
      check.run();
      return 0;
    }
  std::printf("no such check\n");
  return 2;
}

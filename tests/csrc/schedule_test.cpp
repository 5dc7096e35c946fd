// Checks the index arithmetic of csrc/schedule.h on the host, over every supported shape and some odd ones.
//
//   schedule_test CHECK
//
// exits with 0 if the check holds, else prints the first expectation that does not, with its numbers.
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
const KernelTraits ALL_TRAITS[] = {PLAIN, SCREENED};

std::vector<int> widths() {
  std::vector<int> all(std::begin(WIDTHS), std::end(WIDTHS));
  all.insert(all.end(), std::begin(ODD_WIDTHS), std::end(ODD_WIDTHS));
  return all;
}

// Work tiles cover the latents without gaps or overlaps, wave by wave and block by block.
void check_tiles_of(int d_sae, int latents, int n_blocks) {
  const int waves = n_waves(d_sae, latents, n_blocks);
  int next = 0;
  for (int wave = 0; wave < waves; wave++) {
    int fewest = latents, largest = 0;
    for (int block = 0; block < n_blocks; block++) {
      const WorkTile tile = work_tile_of(d_sae, latents, n_blocks, wave, block);
      EXPECT(tile.first == next, d_sae, latents, n_blocks, wave, block, tile.first, next);
      EXPECT(tile.count >= 0 && tile.count <= latents, d_sae, latents, n_blocks, wave, block, tile.count);
      fewest = min(fewest, tile.count), largest = max(largest, tile.count);
      next += tile.count;
    }
    const int slack = wave == waves - 1 ? 1 : 0;
    EXPECT(largest > 0 && largest - fewest <= slack, d_sae, latents, n_blocks, wave, fewest, largest);
  }
  EXPECT(next == d_sae, d_sae, latents, n_blocks, waves, next);
}

void check_tiles() {
  for (KernelTraits traits : ALL_TRAITS)
    for (int d_sae : D_SAE)
      for (int n_blocks : N_BLOCKS) check_tiles_of(d_sae, traits.streamed.latents, n_blocks);
}

// For each slice, the steps of d_in that its warp takes, as offsets and sizes.
using Order = std::vector<std::vector<std::pair<int, int>>>;

// The order in which mma.cuh goes through the k tiles of encoder rows.
Order order_of(int d_in) {
  constexpr StageLayout layout = row_layout();
  Order order(SLICES);
  for (int k_tile = 0; k_tile < layout.n_k_tiles(d_in * NUMBER_BYTES); k_tile++) {
    const int width = layout.k_tile_bytes(d_in * NUMBER_BYTES, k_tile) / NUMBER_BYTES;
    for (int s = 0; s < SLICES; s++)
      for (int o_k = SLICE * s; o_k < width; o_k += ROUND)
        for (int i = 0; i < SLICE && o_k + i < width; i += MMA_K)
          order[s].emplace_back(k_tile * layout.block_bytes / NUMBER_BYTES + o_k + i, min(MMA_K, width - o_k - i));
  }
  return order;
}

Order canonical_order(int d_in) {
  Order order(SLICES);
  for (int k = 0; k < d_in; k += MMA_K) order[k / SLICE % SLICES].emplace_back(k, min(MMA_K, d_in - k));
  return order;
}

// The order of summation does not depend on the stages, and covers each number once.
void check_order() {
  for (int d_in : widths()) EXPECT(order_of(d_in) == canonical_order(d_in), d_in);
}

// An mbarrier as in the PTX ISA: once `count` threads have arrived, the phase completes and the next begins. A wait for
// a parity passes once the latest phase of that parity has completed.
struct Barrier {
  int count, pending, parity;
  void arrive() {
    if (--pending == 0) pending = count, parity ^= 1;
  }
  bool passes(int awaited) const { return parity != awaited; }
};

// A producer that fills stages by copies, which complete in any order, and consumers; they all take turns at random.
class Pipeline {
 public:
  Pipeline(int stages, int n_consumers, int n_items, unsigned seed)
      : stages(stages), n_items(n_items), random(seed), contents(stages, NOTHING), full(stages, Barrier{1, 1, 0}),
        empty(stages, Barrier{n_consumers, n_consumers, 0}), consumers(n_consumers) {
    for (int i = 0; i < n_consumers + 2; i++) laziness.push_back(1 + random_below(20));
  }

  void run() {
    for (int turn = 0; !done(); turn++) {
      EXPECT(turn < 10000 * n_items, stages, int(consumers.size()), n_items, n_produced);  // else a deadlock
      const int actor = random_below(int(laziness.size()));
      if (random_below(laziness[actor])) continue;
      if (actor == 0) produce();
      else if (actor == 1) complete_copy();
      else consume(consumers[actor - 2]);
    }
  }

 private:
  static constexpr int NOTHING = -1;
  struct Consumer {
    PipelineState state = {0, 0};
    int n_consumed = 0;
    bool is_reading = false;
  };

  int stages, n_items;
  std::mt19937 random;
  std::vector<int> contents;  // the item in each stage, NOTHING while it is being copied
  std::vector<Barrier> full, empty;
  std::vector<Consumer> consumers;
  std::vector<int> laziness;
  std::vector<std::pair<int, int>> copies;  // in flight: stage and item
  PipelineState state = {0, 0};
  int n_produced = 0;

  int random_below(int n) { return int(random() % unsigned(n)); }

  bool done() const {
    return std::all_of(consumers.begin(), consumers.end(), [&](const Consumer &c) { return c.n_consumed == n_items; });
  }

  void produce() {
    if (n_produced == n_items || !empty[state.index].passes(state.phase ^ 1)) return;
    for (const Consumer &consumer : consumers)
      EXPECT(consumer.n_consumed > n_produced - stages, stages, n_produced, consumer.n_consumed);
    EXPECT(state.index == n_produced % stages, stages, n_produced, state.index);
    contents[state.index] = NOTHING;
    copies.emplace_back(state.index, n_produced++);
    state.advance(stages);
  }

  void complete_copy() {
    if (copies.empty()) return;
    std::swap(copies[random_below(int(copies.size()))], copies.back());
    const auto [stage, item] = copies.back();
    copies.pop_back();
    contents[stage] = item;
    full[stage].arrive();
  }

  // Reading takes two turns, through which the stage must not change.
  void consume(Consumer &consumer) {
    PipelineState &state = consumer.state;
    if (consumer.n_consumed == n_items || (!consumer.is_reading && !full[state.index].passes(state.phase))) return;
    const int item = contents[state.index];
    EXPECT(item == consumer.n_consumed, stages, state.index, state.phase, item, consumer.n_consumed);
    if (!consumer.is_reading) {
      consumer.is_reading = true;
      return;
    }
    consumer.is_reading = false;
    consumer.n_consumed++;
    empty[state.index].arrive();
    state.advance(stages);
  }
};

void check_pipeline() {
  for (KernelTraits traits : ALL_TRAITS)
    for (int stages = MIN_STAGES; stages <= traits.max_stages; stages++)
      for (unsigned seed = 0; seed < 20; seed++) Pipeline(stages, traits.consumer_warps(), 5 * stages + 1, seed).run();
}

struct Region {
  int begin, bytes, alignment;
};

// The bytes that each region of shared memory has to hold, in any order.
std::vector<Region> regions_of(KernelTraits traits, int d_in, int stages) {
  const SharedLayout layout = shared_layout(traits, d_in);
  const int group_bytes = SLICES * MMA_M * (MMA_N + 1) * 4;
  return {
      {layout.resident_rows, MAX_ROWS * traits.row_stride(d_in), 16},
      {layout.partials, 2 * traits.warpgroups * group_bytes, 16},
      {layout.row_states, MAX_ROWS * int(sizeof(RowState)), 4},
      {layout.exchange, 4 * (traits.consumer_warps() + traits.warpgroups), 4},
      {layout.tile_infos, traits.max_stages * int(sizeof(WorkTileInfo)), 8},
      {layout.barriers, 2 * traits.max_stages * 8, 8},
      {layout.stages, stages * traits.stage_bytes(), 16},
  };
}

void check_layout_of(KernelTraits traits, int d_in, int shared) {
  const int stages = stage_count(traits, d_in, shared);
  if (!stages) return;  // supported.h asserts where rows have to fit
  std::vector<Region> regions = regions_of(traits, d_in, stages);
  std::stable_sort(regions.begin(), regions.end(), [](Region a, Region b) { return a.begin < b.begin; });
  int end = 0;
  for (Region region : regions) {
    EXPECT(region.begin >= end, traits.is_screened, d_in, region.begin, end);
    EXPECT(region.begin % region.alignment == 0, traits.is_screened, d_in, region.begin);
    end = region.begin + region.bytes;
  }
  EXPECT(stages >= MIN_STAGES && stages <= traits.max_stages, traits.is_screened, d_in, stages);
  const int bytes = shared_bytes(traits, d_in, stages);
  EXPECT(end <= bytes && bytes <= shared, traits.is_screened, d_in, end, bytes, shared);
}

void check_layout() {
  for (KernelTraits traits : ALL_TRAITS)
    for (int d_in : widths())
      for (int shared : {SHARED_80, SHARED_86, SHARED_90}) check_layout_of(traits, d_in, shared);
}

// True if `rows` rows of `bytes` each, `stride` bytes apart, lie in different banks, of 128 bytes together.
bool is_free_of_conflicts(int stride, int rows, int bytes) {
  std::vector<bool> taken(128 / bytes);
  for (int i = 0; i < rows; i++) {
    const int place = stride * i % 128;
    if (place % bytes || taken[place / bytes]) return false;
    taken[place / bytes] = true;
  }
  return true;
}

// ldmatrix reads 16 bytes from each of eight rows. Codes are read as 32 bytes from each of four rows at a time, and the
// residual rows that they are multiplied with as 64 bytes from each of two. The last slice of a k tile may be partial, but
// is read to its end.
void check_stages() {
  EXPECT(is_free_of_conflicts(row_layout().stride, 8, 16), row_layout().stride);
  EXPECT(is_free_of_conflicts(code_layout().stride, 4, 32), code_layout().stride);
  for (KernelTraits traits : ALL_TRAITS) {
    const StageLayout layout = traits.streamed;
    EXPECT(layout.block_bytes % 16 == 0 && layout.stride >= layout.block_bytes, layout.stride);
    EXPECT(traits.stage_bytes() >= row_layout().bytes() && traits.stage_bytes() % 128 == 0, traits.stage_bytes());
    EXPECT(traits.stage_bytes() < 1 << 20, traits.stage_bytes());  // the most that an mbarrier counts
    for (int d_in : widths()) {
      const int stride = traits.row_stride(d_in), padded = traits.padded_width(d_in);
      EXPECT(is_free_of_conflicts(stride, traits.is_screened ? 2 : 8, traits.is_screened ? 64 : 16), d_in, stride);
      EXPECT(padded >= d_in && padded % SLICE == 0 && padded * NUMBER_BYTES <= stride, d_in, padded, stride);
      if (traits.is_screened) EXPECT(padded / SCREEN_BLOCK * SCREEN_BLOCK_BYTES == traits.row_bytes(d_in), d_in, padded);
    }
  }
}

// One round of the grid barrier in which block 0 arrives after `n_before` others. Atomics wrap around.
uint32_t barrier_round(uint32_t word, int n_blocks, int n_before) {
  const uint32_t begin = word;
  for (int i = 0; i < n_blocks; i++) {
    const uint32_t token = word;
    EXPECT((token ^ begin) >> 31 == 0, n_blocks, n_before, i);
    const int block = i < n_before ? i + 1 : i == n_before ? 0 : i;
    word += uint32_t(barrier_increment(block, n_blocks));
    EXPECT(((word ^ token) >> 31 == 1) == (i == n_blocks - 1), n_blocks, n_before, i, int(begin), int(word));
  }
  return word;
}

// All blocks but one add the same number, so only the position of that one matters. A round turns the sign alone,
// whatever it was before.
void check_grid_barrier() {
  for (int block = 2; block < 144; block++) EXPECT(barrier_increment(block, 144) == barrier_increment(1, 144), block);
  for (int n_blocks : N_BLOCKS)
    for (int first = 0; first < n_blocks; first++)
      for (uint32_t begin : {0u, 0x80000000u})
        EXPECT(barrier_round(begin, n_blocks, first) == (begin ^ 0x80000000u), n_blocks, first, int(begin));
}

struct Check {
  const char *name;
  void (*run)();
};

const Check CHECKS[] = {{"tiles", check_tiles},   {"order", check_order},   {"pipeline", check_pipeline},
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

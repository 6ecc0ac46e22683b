// Attention forward with a producer warp and two consumer warpgroups, a pipeline as in csrc. q, k,
// v, o: (batch * heads, length, head_dim) BF16.
#pragma once

#include "bugs.h"

namespace attention {

using namespace aapt::hopper;

enum Bug {
  NO_BUG,
  MAP_SWIZZLE,
  DESCRIPTOR_SWIZZLE,
  DESCRIPTOR_STRIDE,
  FRAGMENT_INDEX,
  ROW_REDUCTION,
  NO_INIT_FENCE,
  PRODUCER_PARITY,
  NO_EMPTY_WAIT,
  TRANSACTION_BYTES,
  NO_WGMMA_WAIT,
  NO_FULL_WAIT,
  CONSUMER_PARITY,
  NO_WGMMA_FENCE,
  EARLY_RELEASE,
  FRAGMENT_REUSED,
  ACCUMULATOR_TOUCHED,
  NO_BARRIER_BEFORE_OVERWRITE,
  STORE_SWIZZLE,
  NO_PROXY_FENCE,
  NO_BARRIER_BEFORE_STORE,
  NO_STORE_WAIT,
  NO_STORE_COMMIT,
  TOO_MANY_REGISTERS,
  BARRIER_COUNT,
  ALL_LANES_RELEASE,
  NO_COMMIT,
  WAIT_DEPTH,
  VALUE_STRIDE,
  VALUE_STAGE,
  VALUE_PARITY,
  PLAIN_ARRIVE,
  WRONG_BARRIER,
  NO_INIT_SYNC,
  EVERY_LANE_LOADS,
  ALWAYS_ACCUMULATE,
  DIVERGENT_SHUFFLE,
  ACCUMULATOR_READ,
  LSE_OUT_OF_BOUNDS,
  LATE_PROXY_FENCE,
  SHARED_BARRIER,
};

template <int kHeadDim_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kKeys = 128, kStages = 2, kQueries = 128;
  static constexpr int kHalves = kHeadDim / 64;
  struct Shared {
    alignas(1024) uint16_t q[2][kHalves][64 * 64];  // replaced by the output
    alignas(1024) uint16_t k[kStages][kHalves][kKeys * 64];
    alignas(1024) uint16_t v[kStages][kHalves][kKeys * 64];
    uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
  };
};

struct Params {
  int queries, keys;
  float scale_log2;
  float* lse;
  BuildBugs bug;
};

template <class C>
HOPPER_DEVICE void multiply_qk(float (&s)[C::kKeys / 2], uint32_t q, uint32_t k, BuildBugs bug) {
  HOPPER_UNROLL
  for (int i = 0; i < C::kHeadDim / 16; ++i) {
    const uint32_t q_at = q + (i / 4) * 64 * 128 + (i % 4) * 32;
    const uint32_t k_at = k + (i / 4) * C::kKeys * 128 + (i % 4) * 32;
    const Swizzle swizzle = bug(DESCRIPTOR_SWIZZLE) ? SW_64 : SW_128;
    const uint32_t stride = bug(DESCRIPTOR_STRIDE) ? 512 : 1024;
    wgmma_ss<C::kKeys, 0, 0>(s, make_desc(q_at, 16, 1024, SW_128),
                             make_desc(k_at, 16, stride, swizzle),
                             i != 0 || bug(ALWAYS_ACCUMULATE));
  }
}

// V is stored (keys, 64) for each half of head_dim: MN-major.
template <class C>
HOPPER_DEVICE void multiply_pv(float (&o)[C::kHeadDim / 2], const uint32_t (&p)[C::kKeys / 16][4],
                               uint32_t v, BuildBugs bug) {
  const uint32_t half = C::kKeys * (bug(VALUE_STRIDE) ? 64 : 128);
  HOPPER_UNROLL
  for (int i = 0; i < C::kKeys / 16; ++i) {
    wgmma_rs<C::kHeadDim, 1>(o, p[i], make_desc(v + i * 16 * 128, half, 1024, SW_128), 1);
  }
}

template <class C>
HOPPER_DEVICE void pack(const float (&s)[C::kKeys / 2], uint32_t (&p)[C::kKeys / 16][4],
                        BuildBugs bug) {
  HOPPER_UNROLL
  for (int i = 0; i < C::kKeys / 16; ++i) {
    p[i][0] = pack_bf16(s[i * 8 + 0], s[i * 8 + 1]);
    p[i][1] = pack_bf16(s[i * 8 + 2], s[i * 8 + 3]);
    p[i][2] = pack_bf16(s[i * 8 + 4], s[i * 8 + 5]);
    p[i][3] = bug(FRAGMENT_INDEX) ? pack_bf16(s[i * 8 + 7], s[i * 8 + 6])
                                  : pack_bf16(s[i * 8 + 6], s[i * 8 + 7]);
  }
}

// One tile of the online softmax; returns in `decay` the factor of the output so far.
template <class C>
HOPPER_DEVICE void softmax(float (&s)[C::kKeys / 2], float (&high)[2], float (&sum)[2],
                           float (&decay)[2], int first_key, const Params& params) {
  const int column = (threadIdx.x % 4) * 2;
  if (first_key + C::kKeys > params.keys) {
    HOPPER_UNROLL
    for (int i = 0; i < C::kKeys / 2; ++i) {
      if (first_key + (i / 4) * 8 + column + (i & 1) >= params.keys) s[i] = -INFINITY;
    }
  }
  HOPPER_UNROLL
  for (int r = 0; r < 2; ++r) {
    float row_high = high[r];
    HOPPER_UNROLL
    for (int i = 0; i < C::kKeys / 8; ++i) {
      row_high = fmaxf(row_high, fmaxf(s[i * 4 + r * 2], s[i * 4 + r * 2 + 1]));
    }
    row_high = fmaxf(row_high, shfl_xor(row_high, 1));
    if (!params.bug(ROW_REDUCTION)) row_high = fmaxf(row_high, shfl_xor(row_high, 2));
    const float shift = row_high * params.scale_log2;
    decay[r] = exp2_approx(high[r] * params.scale_log2 - shift);
    high[r] = row_high;
    float tile_sum = 0.0f;
    HOPPER_UNROLL
    for (int i = 0; i < C::kKeys / 8; ++i) {
      HOPPER_UNROLL
      for (int j = i * 4 + r * 2; j < i * 4 + r * 2 + 2; ++j) {
        s[j] = exp2_approx(s[j] * params.scale_log2 - shift);
        tile_sum += s[j];
      }
    }
    sum[r] = sum[r] * decay[r] + tile_sum;
  }
}

template <class C>
HOPPER_DEVICE void scale_rows(float (&o)[C::kHeadDim / 2], const float (&factor)[2]) {
  HOPPER_UNROLL
  for (int i = 0; i < C::kHeadDim / 2; ++i) o[i] *= factor[i / 2 & 1];
}

template <class C>
HOPPER_DEVICE void produce(typename C::Shared& shared, const TensorMap* tq, const TensorMap* tk,
                           const TensorMap* tv, const Params& params, int first_query, int head) {
  const auto& bug = params.bug;
  const int tiles = (params.keys + C::kKeys - 1) / C::kKeys;
  mbar_arrive_expect_tx(&shared.q_full, sizeof(shared.q));
  for (int group = 0; group < 2; ++group) {
    for (int h = 0; h < C::kHalves; ++h) {
      tma_load_3d(shared.q[group][h], tq, &shared.q_full, h * 64, first_query + group * 64, head);
    }
  }
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % C::kStages, phase = tile / C::kStages & 1;
    if (!bug(NO_EMPTY_WAIT)) {
      mbar_wait(&shared.k_empty[stage], bug(PRODUCER_PARITY) ? phase : phase ^ 1);
    }
    mbar_arrive_expect_tx(&shared.k_full[stage],
                          sizeof(shared.k[0]) / (bug(TRANSACTION_BYTES) ? 2 : 1));
    for (int h = 0; h < C::kHalves; ++h) {
      uint64_t* bar = bug(WRONG_BARRIER) ? &shared.v_full[stage] : &shared.k_full[stage];
      tma_load_3d(shared.k[stage][h], tk, bar, h * 64, tile * C::kKeys, head);
    }
    mbar_wait(&shared.v_empty[stage], phase ^ 1);
    if (bug(PLAIN_ARRIVE)) {
      mbar_arrive(&shared.v_full[stage]);
    } else {
      mbar_arrive_expect_tx(&shared.v_full[stage], sizeof(shared.v[0]));
    }
    for (int h = 0; h < C::kHalves; ++h) {
      tma_load_3d(shared.v[stage][h], tv, &shared.v_full[stage], h * 64, tile * C::kKeys, head);
    }
  }
}

template <class C>
HOPPER_DEVICE void store_output(typename C::Shared& shared, const TensorMap* to,
                                const float (&o)[C::kHeadDim / 2], BuildBugs bug, int group,
                                int warp, int first_query, int head) {
  const int lane = threadIdx.x % 32;
  if (!bug(NO_BARRIER_BEFORE_OVERWRITE)) bar_sync(1 + group, bug(BARRIER_COUNT) ? 256 : 128);
  const int row = warp * 16 + lane % 16, column = (lane / 16) * 16;
  HOPPER_UNROLL
  for (int i = 0; i < C::kHeadDim / 16; ++i) {
    const uint32_t byte = (i % 4) * 32 + column;
    const uint32_t offset = bug(STORE_SWIZZLE) ? row * 128 + byte : sw128(row, byte);
    stmatrix_x4(reinterpret_cast<uint8_t*>(shared.q[group][i / 4]) + offset,
                pack_bf16(o[i * 8], o[i * 8 + 1]), pack_bf16(o[i * 8 + 2], o[i * 8 + 3]),
                pack_bf16(o[i * 8 + 4], o[i * 8 + 5]), pack_bf16(o[i * 8 + 6], o[i * 8 + 7]));
  }
  if (!bug(NO_PROXY_FENCE) && !bug(LATE_PROXY_FENCE)) fence_proxy_async();
  if (!bug(NO_BARRIER_BEFORE_STORE)) bar_sync(bug(SHARED_BARRIER) ? 1 : 1 + group, 128);
  if (bug(LATE_PROXY_FENCE)) fence_proxy_async();
  if (warp == 0 && elect_one()) {
    for (int h = 0; h < C::kHalves; ++h) {
      tma_store_3d(to, shared.q[group][h], h * 64, first_query + group * 64, head);
    }
    if (!bug(NO_STORE_COMMIT)) tma_store_commit();
    if (!bug(NO_STORE_WAIT)) tma_store_wait<0>();
  }
}

template <class C>
HOPPER_DEVICE void consume(typename C::Shared& shared, const TensorMap* to, const Params& params,
                           int group, int warp, int first_query, int head) {
  const auto& bug = params.bug;
  const int lane = threadIdx.x % 32;
  const int tiles = (params.keys + C::kKeys - 1) / C::kKeys;
  float s[C::kKeys / 2], o[C::kHeadDim / 2];
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, decay[2];
  uint32_t p[C::kKeys / 16][4];
  HOPPER_UNROLL
  for (int i = 0; i < C::kHeadDim / 2; ++i) o[i] = 0.0f;
  const uint32_t q = smem_u32(shared.q[group]);
  mbar_wait(&shared.q_full, 0);
  mbar_wait(&shared.k_full[0], 0);
  reg_fence(s);
  wgmma_fence();
  multiply_qk<C>(s, q, smem_u32(shared.k[0]), bug);
  wgmma_commit();
  if (!bug(NO_WGMMA_WAIT)) wgmma_wait<0>();
  reg_fence(s);
  if (lane == 0 || bug(ALL_LANES_RELEASE)) mbar_arrive(&shared.k_empty[0]);
  if (bug(DIVERGENT_SHUFFLE) && lane % 2 == 0) s[0] = shfl_xor(s[0], 0);
  softmax<C>(s, high, sum, decay, 0, params);
  pack<C>(s, p, bug);
  for (int tile = 1; tile < tiles; ++tile) {
    const int stage = tile % C::kStages, before = (tile - 1) % C::kStages;
    const int phase = tile / C::kStages & 1;
    if (!bug(NO_FULL_WAIT)) {
      mbar_wait(&shared.k_full[stage], bug(CONSUMER_PARITY) ? phase ^ 1 : phase);
    }
    reg_fence(s);
    if (!bug(NO_WGMMA_FENCE)) wgmma_fence();
    multiply_qk<C>(s, q, smem_u32(shared.k[stage]), bug);
    wgmma_commit();
    mbar_wait(&shared.v_full[before], bug(VALUE_PARITY) ? phase : (tile - 1) / C::kStages & 1);
    reg_fence(o);
    wgmma_fence();
    multiply_pv<C>(o, p, smem_u32(shared.v[bug(VALUE_STAGE) ? stage : before]), bug);
    if (!bug(NO_COMMIT)) wgmma_commit();
    if (bug(EARLY_RELEASE) && lane == 0) mbar_arrive(&shared.v_empty[before]);
    if (bug(WAIT_DEPTH)) {
      wgmma_wait<2>();
    } else {
      wgmma_wait<1>();
    }
    reg_fence(s);
    if (lane == 0) mbar_arrive(&shared.k_empty[stage]);
    softmax<C>(s, high, sum, decay, tile * C::kKeys, params);
    if (bug(FRAGMENT_REUSED)) pack<C>(s, p, bug);
    if (bug(ACCUMULATOR_TOUCHED)) scale_rows<C>(o, decay);
    if (bug(ACCUMULATOR_READ)) sum[0] += o[0] * 0.0f;
    wgmma_wait<0>();
    reg_fence(o);
    if (!bug(EARLY_RELEASE) && lane == 0) mbar_arrive(&shared.v_empty[before]);
    if (!bug(ACCUMULATOR_TOUCHED)) scale_rows<C>(o, decay);
    if (!bug(FRAGMENT_REUSED)) pack<C>(s, p, bug);
  }
  const int last = (tiles - 1) % C::kStages;
  mbar_wait(&shared.v_full[last], (tiles - 1) / C::kStages & 1);
  reg_fence(o);
  wgmma_fence();
  multiply_pv<C>(o, p, smem_u32(shared.v[last]), bug);
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(o);

  float inverse[2];
  HOPPER_UNROLL
  for (int r = 0; r < 2; ++r) {
    sum[r] += shfl_xor(sum[r], 1);
    sum[r] += shfl_xor(sum[r], 2);
    inverse[r] = 1.0f / sum[r];
    const int row = first_query + group * 64 + warp * 16 + lane / 4 + r * 8;
    if (lane % 4 == 0 && (row < params.queries || bug(LSE_OUT_OF_BOUNDS))) {
      params.lse[static_cast<size_t>(head) * params.queries + row] =
          (high[r] * params.scale_log2 + log2_approx(sum[r])) * 0.69314718f;
    }
  }
  scale_rows<C>(o, inverse);
  store_output<C>(shared, to, o, bug, group, warp, first_query, head);
}

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(384, 1)
    forward(HOPPER_GRID_CONSTANT const TensorMap tq, HOPPER_GRID_CONSTANT const TensorMap tk,
            HOPPER_GRID_CONSTANT const TensorMap tv, HOPPER_GRID_CONSTANT const TensorMap to,
            HOPPER_GRID_CONSTANT const Params params) {
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<typename C::Shared*>(raw);
  const auto& bug = params.bug;
  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = shfl_idx(static_cast<int>(threadIdx.x) / 32 % 4, 0);
  const int first_query = blockIdx.x * C::kQueries, head = blockIdx.y;
  if (threadIdx.x == 0) {
    mbar_init(&shared.q_full, 1);
    for (int i = 0; i < C::kStages; ++i) {
      mbar_init(&shared.k_full[i], 1);
      mbar_init(&shared.v_full[i], 1);
      mbar_init(&shared.k_empty[i], 8);
      mbar_init(&shared.v_empty[i], 8);
    }
    if (!bug(NO_INIT_FENCE)) fence_barrier_init();
  }
  if (!bug(NO_INIT_SYNC)) cta_sync();
  if (group == 0) {
    setmaxnreg_dec<24>();
    if (warp == 0 && (elect_one() || bug(EVERY_LANE_LOADS))) {
      produce<C>(shared, &tq, &tk, &tv, params, first_query, head);
    }
  } else {
    if (bug(TOO_MANY_REGISTERS)) {
      setmaxnreg_inc<248>();
    } else {
      setmaxnreg_inc<240>();
    }
    consume<C>(shared, &to, params, group - 1, warp, first_query, head);
  }
}

template <class C>
const char* launch(void* q, void* k, void* v, void* o, float* lse, int heads, int queries, int keys,
                   float scale, int bug, void* stream) {
  const auto make = [&](TensorMap* map, void* base, int length, int rows, Swizzle swizzle) {
    const uint64_t dims[] = {static_cast<uint64_t>(C::kHeadDim), static_cast<uint64_t>(length),
                             static_cast<uint64_t>(heads)};
    const uint64_t strides[] = {C::kHeadDim * 2ull, C::kHeadDim * 2ull * length};
    const uint32_t box[] = {64, static_cast<uint32_t>(rows), 1};
    return make_tensor_map(map, base, 2, 3, dims, strides, box, swizzle);
  };
  TensorMap tq, tk, tv, to;
  const char* error = make(&tq, q, queries, 64, SW_128);
  if (error == nullptr) {
    error = make(&tk, k, keys, C::kKeys, bug == MAP_SWIZZLE ? SW_NONE : SW_128);
  }
  if (error == nullptr) error = make(&tv, v, keys, C::kKeys, SW_128);
  if (error == nullptr) error = make(&to, o, queries, 64, SW_128);
  if (error != nullptr) return error;
  const Params params{queries, keys, scale * 1.44269504f, lse, {bug}};
  const dim3 grid((queries + C::kQueries - 1) / C::kQueries, heads);
  return HOPPER_LAUNCH(forward<C>, grid, dim3(384), sizeof(typename C::Shared), stream, tq, tk, tv,
                       to, params);
}

}  // namespace attention

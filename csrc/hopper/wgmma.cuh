// Warpgroup matrix multiply, 64 x N x 32 bytes, float32 accumulators, for nvcc.
#pragma once

namespace aapt::hopper {

HOPPER_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HOPPER_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
HOPPER_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the next wgmma_wait after the arithmetic that gave `witness`, a number whose sign bit is
// never set. A wait orders memory operations and accumulators, so ptxas moves it above arithmetic
// on other registers, and the warpgroup would sleep through the products that this arithmetic
// should hide behind. Above a memory operation ptxas does not move a wait: this one depends on
// `witness` and never happens. `smem`: any word of shared memory.
HOPPER_DEVICE void settle(uint32_t witness, void* smem) {
  asm volatile("{.reg .pred p; setp.lt.s32 p, %0, 0; @p st.shared.u32 [%1], %0;}" ::"r"(witness),
               "r"(smem_u32(smem))
               : "memory");
}

// Keeps the compiler from moving uses of these registers across this point.
template <int N>
HOPPER_DEVICE void reg_fence(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
struct Wgmma;

// The accumulators are operands %0 to %(N/2-1), as text and as asm operands, in blocks of 8.
#define HOPPER_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HOPPER_D16(i) HOPPER_D8(i), HOPPER_D8(i + 8)
#define HOPPER_D32(i) HOPPER_D16(i), HOPPER_D16(i + 16)
#define HOPPER_OPERANDS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define HOPPER_OPERANDS_16 HOPPER_D8(0)
#define HOPPER_OPERANDS_32 HOPPER_D16(0)
#define HOPPER_OPERANDS_64 HOPPER_D32(0)
#define HOPPER_OPERANDS_80 HOPPER_OPERANDS_64, HOPPER_D8(32)
#define HOPPER_OPERANDS_96 HOPPER_OPERANDS_64, HOPPER_D16(32)
#define HOPPER_OPERANDS_128 HOPPER_OPERANDS_64, HOPPER_D32(32)
#define HOPPER_OPERANDS_160 HOPPER_OPERANDS_128, HOPPER_D16(64)
#define HOPPER_OPERANDS_176 HOPPER_OPERANDS_160, HOPPER_D8(80)
#define HOPPER_OPERANDS_192 HOPPER_OPERANDS_128, HOPPER_D32(64)
#define HOPPER_OPERANDS_224 HOPPER_OPERANDS_192, HOPPER_D16(96)
#define HOPPER_OPERANDS_256 HOPPER_OPERANDS_192, HOPPER_D32(96)

#define HOPPER_TEXT_8 "%0,%1,%2,%3"
#define HOPPER_TEXT_16 HOPPER_TEXT_8 ",%4,%5,%6,%7"
#define HOPPER_TEXT_32 HOPPER_TEXT_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define HOPPER_TEXT_64 \
  HOPPER_TEXT_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define HOPPER_TEXT_80 HOPPER_TEXT_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define HOPPER_TEXT_96 \
  HOPPER_TEXT_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define HOPPER_TEXT_128 \
  HOPPER_TEXT_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define HOPPER_TEXT_160 \
  HOPPER_TEXT_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define HOPPER_TEXT_176 HOPPER_TEXT_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define HOPPER_TEXT_192 HOPPER_TEXT_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define HOPPER_TEXT_224 \
  HOPPER_TEXT_192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define HOPPER_TEXT_256 \
  HOPPER_TEXT_224       \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// i0 to i6: the numbers of the operands after the accumulators.
#define HOPPER_WGMMA(N, i0, i1, i2, i3, i4, i5, i6)                                                \
  template <>                                                                                      \
  struct Wgmma<N> {                                                                                \
    using D = float[N / 2];                                                                        \
    using A = uint32_t[4];                                                                         \
    template <int TA, int TB>                                                                      \
    static HOPPER_DEVICE void ss(D& d, uint64_t a, uint64_t b, int accumulate) {                   \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2                                           \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N                                     \
                   "k16.f32.bf16.bf16 {" HOPPER_TEXT_##N "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3   \
                                                         ", %" #i4 ";}"                            \
                   : HOPPER_OPERANDS_##N                                                           \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));                           \
    }                                                                                              \
    template <int TB>                                                                              \
    static HOPPER_DEVICE void rs(D& d, const A& a, uint64_t b, int accumulate) {                   \
      asm volatile(                                                                                \
          "{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N        \
          "k16.f32.bf16.bf16 {" HOPPER_TEXT_##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3          \
                                                "}, %" #i4 ", p, 1, 1, %" #i6 ";}"                 \
          : HOPPER_OPERANDS_##N                                                                    \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TB));         \
    }                                                                                              \
    static HOPPER_DEVICE void ss_e4m3(D& d, uint64_t a, uint64_t b, int accumulate) {              \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2                                           \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N                                     \
                   "k32.f32.e4m3.e4m3 {" HOPPER_TEXT_##N "}, %" #i0 ", %" #i1 ", p, 1, 1;}"        \
                   : HOPPER_OPERANDS_##N                                                           \
                   : "l"(a), "l"(b), "r"(accumulate));                                             \
    }                                                                                              \
    static HOPPER_DEVICE void rs_e4m3(D& d, const A& a, uint64_t b, int accumulate) {              \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i5                                           \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N                                     \
                   "k32.f32.e4m3.e4m3 {" HOPPER_TEXT_##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 \
                                                         "}, %" #i4 ", p, 1, 1;}"                  \
                   : HOPPER_OPERANDS_##N                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));         \
    }                                                                                              \
  };

HOPPER_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
HOPPER_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
HOPPER_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
HOPPER_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
HOPPER_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
HOPPER_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
HOPPER_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
HOPPER_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
HOPPER_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
HOPPER_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
HOPPER_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
HOPPER_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef HOPPER_WGMMA

// d[64, N] (+)= a[64, 16] b[16, N], BF16; TA, TB: 1 where that operand is stored MN-major.
// accumulate = 0 overwrites d.
template <int N, int TA, int TB>
HOPPER_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  Wgmma<N>::template ss<TA, TB>(d, a, b, accumulate);
}
template <int N, int TB>
HOPPER_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  Wgmma<N>::template rs<TB>(d, a, b, accumulate);
}

// d[64, N] (+)= a[64, 32] b[32, N], E4M3, both K-major.
template <int N>
HOPPER_DEVICE void wgmma_ss_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  Wgmma<N>::ss_e4m3(d, a, b, accumulate);
}
template <int N>
HOPPER_DEVICE void wgmma_rs_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                 int accumulate) {
  Wgmma<N>::rs_e4m3(d, a, b, accumulate);
}

}  // namespace aapt::hopper

// Matrix fragments: ldmatrix and mma, on registers as PTX lays them out.
//
// mma_16x8x16: d[16, 8] += a[16, 16] b[16, 8]. With group = lane / 4 and pair = lane % 4, a lane holds
//     a[0] rows group,     columns 2 pair, 2 pair + 1         b[0] rows 2 pair, 2 pair + 1,         column group
//     a[1] rows group + 8, the same columns                   b[1] rows 2 pair + 8, 2 pair + 9,     column group
//     a[2] rows group,     columns 2 pair + 8, 2 pair + 9     d[0], d[1] row group,     columns 2 pair, 2 pair + 1
//     a[3] rows group + 8, columns 2 pair + 8, 2 pair + 9     d[2], d[3] row group + 8, the same columns
// so a row-major tile of a is one ldmatrix_x4 (lanes 0-15 address rows 0-15 at column 0, lanes 16-31 the same rows at
// column 8), and b is ldmatrix_x2 of the [n, k] tile, or ldmatrix_x2_transposed of the [k, n] tile.
//
// mma_16x8x8_tf32: a[0..3] = (group, pair), (group + 8, pair), (group, pair + 4), (group + 8, pair + 4) of a[16, 8];
// b[0], b[1] = (pair, group), (pair + 4, group) of b[8, 8]; each a float rounded by tf32_bits.
#pragma once
#include "memory.cuh"
#include "numbers.cuh"

// ---- ldmatrix: 8x8 tiles of 16-bit elements. Lane 8 i + j addresses row j of tile i, 16 aligned bytes -------------

#ifdef IOKERNELS_EMULATE
#define LDMATRIX(COUNT, SUFFIX, TRANSPOSED, ...)                                           \
    template <class T>                                                                     \
    DEVICE void ldmatrix_x##COUNT##SUFFIX(u32(&r)[COUNT], Shared<T> row, Here at = HERE) { \
        static_assert(sizeof(T) == 2, "ldmatrix: 16-bit elements");                        \
        emulate::ldmatrix(r, COUNT, TRANSPOSED, row.p, row.begin, row.end, at);            \
    }
#else
#define LDMATRIX(COUNT, SUFFIX, TRANSPOSED, ...)                                        \
    template <class T>                                                                  \
    DEVICE void ldmatrix_x##COUNT##SUFFIX(u32(&r)[COUNT], Shared<T> row, Here = HERE) { \
        static_assert(sizeof(T) == 2, "ldmatrix: 16-bit elements");                     \
        asm volatile(__VA_ARGS__ : "r"(row.address()) : "memory");                      \
    }
#endif

LDMATRIX(1, , false, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]))
LDMATRIX(2, , false, "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]))
LDMATRIX(4, , false, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
         "=r"(r[2]), "=r"(r[3]))
LDMATRIX(1, _transposed, true, "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]))
LDMATRIX(2, _transposed, true, "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
         "=r"(r[1]))
LDMATRIX(4, _transposed, true, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
         "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))

#undef LDMATRIX

// ---- mma: products of 16-bit or tf32 fragments, summed in float32 --------------------------------------------------

template <class T>
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here at = HERE);

#ifdef IOKERNELS_EMULATE

template <>
DEVICE void mma_16x8x16<fp16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here at) {
    emulate::mma(d, a, b, emulate::Operand::fp16, at);
}
template <>
DEVICE void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here at) {
    emulate::mma(d, a, b, emulate::Operand::bf16, at);
}
DEVICE void mma_16x8x8_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here at = HERE) {
    emulate::mma(d, a, b, emulate::Operand::tf32, at);
}

#else

#define MMA(SHAPE_AND_TYPES)                                       \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES               \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
                 "{%0, %1, %2, %3};"                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
DEVICE void mma_16x8x16<fp16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here) {
    MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
DEVICE void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here) {
    MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
DEVICE void mma_16x8x8_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Here = HERE) {
    MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef MMA
#endif

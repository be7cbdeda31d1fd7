// Sixteen- and eight-bit floating point: fp16, bf16, e4m3 (fp8), stored as their bits, and their conversions.
//
// float -> T rounds to nearest even; e4m3 saturates at 448. The device uses PTX cvt (fp8 in hardware from sm_89 on,
// below that the integer code that the host uses as well); the host converts exactly, bit by bit.
#pragma once
#include "platform.cuh"

// ---- fp16 ----------------------------------------------------------------------------------------------------------

DEVICE u16 fp16_bits(float x) {
#ifdef IOKERNELS_EMULATE
    return emulate::fp16_from_float(x);
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

DEVICE float fp16_value(u16 bits) {
#ifdef IOKERNELS_EMULATE
    return emulate::fp16_to_float(bits);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

struct fp16 {
    u16 bits;
    fp16() = default;
    DEVICE explicit fp16(float x) : bits(fp16_bits(x)) {}
    DEVICE explicit operator float() const { return fp16_value(bits); }
};

// ---- bf16 ----------------------------------------------------------------------------------------------------------

DEVICE u16 bf16_bits(float x) {
#ifdef IOKERNELS_EMULATE
    const u32 bits = bits_as<u32>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN, as the hardware writes it
    return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#else
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

struct bf16 {
    u16 bits;
    bf16() = default;
    DEVICE explicit bf16(float x) : bits(bf16_bits(x)) {}
    DEVICE explicit operator float() const { return bits_as<float>(static_cast<u32>(bits) << 16); }
};

// ---- e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, NaN is 0x7f ---------------------------------

DEVICE u8 e4m3_bits(float x) {
    const u32 bits = bits_as<u32>(x);
    const u8 sign = static_cast<u8>((bits >> 24) & 0x80u);
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<u8>(sign | 0x7fu);
    if (magnitude >= 0x43e80000u) return static_cast<u8>(sign | 0x7eu);  // 464 and more, and what ties up to it
    if (magnitude < 0x3c800000u) {                                       // below 2^-6: steps of 2^-9
        const float scaled = bits_as<float>(magnitude) * 512.0f;
        const float shifted = (scaled + 8388608.0f) - 8388608.0f;  // rounds to an integer, ties to even
        return static_cast<u8>(sign | static_cast<u32>(shifted));
    }
    const u32 rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    return static_cast<u8>(sign | (((rounded >> 20) - (120u << 3)) & 0x7fu));
}

DEVICE float e4m3_value(u8 bits) {
    const u32 sign = static_cast<u32>(bits & 0x80u) << 24;
    if ((bits & 0x7fu) == 0x7fu) return bits_as<float>(sign | 0x7fffffffu);
    const float magnitude = bits_as<float>(static_cast<u32>(bits & 0x7fu) << 20) * 1.329227995784916e36f;  // 2^120
    return bits_as<float>(bits_as<u32>(magnitude) | sign);
}

struct e4m3 {
    u8 bits;
    e4m3() = default;
    DEVICE explicit e4m3(float x) : bits(e4m3_bits(x)) {}
    DEVICE explicit operator float() const { return e4m3_value(bits); }
};

// ---- pairs: what one register of a matrix fragment holds, the lower half first ------------------------------------

template <class T>
DEVICE u32 pack(float low, float high) {
    static_assert(sizeof(T) == 2, "pack: two 16-bit numbers make a register");
    return static_cast<u32>(T(low).bits) | (static_cast<u32>(T(high).bits) << 16);
}

#ifndef IOKERNELS_EMULATE
template <>
DEVICE u32 pack<fp16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
template <>
DEVICE u32 pack<bf16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

template <class T>
DEVICE float low_of(u32 pair) {
    T x;
    x.bits = static_cast<u16>(pair);
    return float(x);
}

template <class T>
DEVICE float high_of(u32 pair) {
    T x;
    x.bits = static_cast<u16>(pair >> 16);
    return float(x);
}

// The bits of a float rounded to tf32 (10 bits of mantissa, ties away from zero), an operand of mma_tf32.
DEVICE u32 tf32_bits(float x) {
#ifdef IOKERNELS_EMULATE
    const u32 bits = bits_as<u32>(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#else
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#endif
}

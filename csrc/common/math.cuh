// Elementary functions as the hardware has them: one instruction each, relative error about 2^-22 unless said.
#pragma once
#include "platform.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

DEVICE float infinity() { return bits_as<float>(0x7f800000u); }

// What a softmax subtracts before 2^x: 0 where the maximum is still -inf, because -inf - (-inf) is NaN.
DEVICE float finite_or_0(float m) { return m == -infinity() ? 0.0f : m; }

// 2^x; results below 2^-126 are 0.
DEVICE float exp2_fast(float x) {
#ifdef IOKERNELS_EMULATE
    const float y = emulate::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

DEVICE float log2_fast(float x) {
#ifdef IOKERNELS_EMULATE
    return emulate::log2(x);
#else
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

DEVICE float reciprocal_fast(float x) {
#ifdef IOKERNELS_EMULATE
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / (1 + e^-x), and tanh x, by one exp2 and one reciprocal each. Far below 0 the relative error of sigmoid grows with
// |x|, by the rounding of the exponent; tanh keeps its own near 0, where the quotient would cancel, by a polynomial.
DEVICE float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-LOG2E * x)); }

DEVICE float tanh_exact(float x) {
    const float size = x < 0.0f ? -x : x;
    const float square = x * x;
    const float near_zero =
        x + x * square * (-0.33333333f + square * (0.13333333f + square * (-0.05396825f + square * 0.02186949f)));
    const float e = exp2_fast(-2.0f * LOG2E * size);
    const float far = (1.0f - e) * reciprocal_fast(1.0f + e);
    return size < 0.25f ? near_zero : (x < 0.0f ? -far : far);
}

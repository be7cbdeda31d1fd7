// What the 32 lanes of a warp compute together: shuffles, votes, matrix fragments; and conversions.
#include <math.h>
#include <string.h>

#include "state.h"

namespace emulate {

// ---- numbers -------------------------------------------------------------------------------------------------------

namespace {

float bits_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

}  // namespace

uint16_t fp16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7fff;
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
    if (bits < 0x38800000) {                                              // below 2^-14: steps of 2^-24
        const float steps = nearbyintf(bits_as_float(bits) * 16777216.0f);
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(steps));
    }
    const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

float fp16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return bits_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float magnitude = bits_as_float(rest << 13) * 5.192296858534828e33f;  // 2^112
    return bits & 0x8000 ? -magnitude : magnitude;
}

float exp2(float x) { return exp2f(x); }
float log2(float x) { return log2f(x); }

// ---- shuffles and votes --------------------------------------------------------------------------------------------

namespace {

struct Shuffled {
    void* out;
    const void* value;
    size_t bytes;
    int source;
};

struct Vote {
    bool yes;
    unsigned result;
};

}  // namespace

void shuffle(void* out, const void* value, size_t bytes, int source, Here at) {
    Shuffled mine{out, value, bytes, source};
    gather("a shuffle", at, &mine, [](Warp& warp) {
        for (int l = 0; l < LANES; ++l) {
            if (!(warp.all >> l & 1)) continue;
            const auto& lane = *static_cast<Shuffled*>(warp.given[l]);
            const int source = lane.source & (LANES - 1);
            const bool exists = warp.all >> source & 1;
            memcpy(lane.out, static_cast<Shuffled*>(warp.given[exists ? source : l])->value, lane.bytes);
        }
        return true;
    });
}

unsigned ballot(bool yes, Here at) {
    Vote mine{yes, 0};
    gather("a ballot", at, &mine, [](Warp& warp) {
        unsigned result = 0;
        for (int l = 0; l < LANES; ++l) {
            if (warp.all >> l & 1 && static_cast<Vote*>(warp.given[l])->yes) result |= 1u << l;
        }
        for (int l = 0; l < LANES; ++l) {
            if (warp.all >> l & 1) static_cast<Vote*>(warp.given[l])->result = result;
        }
        return true;
    });
    return mine.result;
}

// ---- matrix fragments ----------------------------------------------------------------------------------------------

namespace {

struct Tiles {
    unsigned* out;
    int count;
    bool transposed;
    const void* row;
    const char *begin, *end;
    Here at;
};

using Row = float __attribute__((vector_size(32)));  // 8 numbers

// The values of all numbers of 16 bits: a product of fragments converts 384 of them.
const float* fp16_values() {
    static const std::vector<float> values = [] {
        std::vector<float> made(1 << 16);
        for (uint32_t bits = 0; bits < made.size(); ++bits) made[bits] = fp16_to_float(static_cast<uint16_t>(bits));
        return made;
    }();
    return values.data();
}

struct Product {
    float* d;
    const unsigned *a, *b;
    Operand operand;
};

void whole(const Warp& warp, const char* what) {
    if (~warp.all) fault(warp.at, "%s needs the 32 lanes of a whole warp", what);
}

template <Operand OPERAND>
float element(unsigned word, int half, const float* values) {
    if constexpr (OPERAND == Operand::fp16) {
        return values[word >> (16 * half) & 0xffff];
    } else if constexpr (OPERAND == Operand::bf16) {
        return bits_as_float(half ? word & 0xffff0000 : word << 16);
    } else {
        return bits_as_float(word & 0xffffe000);
    }
}

template <Operand OPERAND>
void multiply(Warp& warp) {
    constexpr int K = OPERAND == Operand::tf32 ? 8 : 16, EACH = OPERAND == Operand::tf32 ? 1 : 2;
    const float* values = OPERAND == Operand::fp16 ? fp16_values() : nullptr;
    float a[16][K];
    Row b[K];
    for (int l = 0; l < LANES; ++l) {
        const auto& lane = *static_cast<Product*>(warp.given[l]);
        const int group = l / 4, pair = l % 4;
        for (int half = 0; half < EACH; ++half) {
            for (int r = 0; r < 4; ++r) {
                const int k = EACH * pair + half + K / 2 * (r / 2);
                a[group + 8 * (r % 2)][k] = element<OPERAND>(lane.a[r], half, values);
            }
            for (int r = 0; r < 2; ++r) {
                b[EACH * pair + half + K / 2 * r][group] = element<OPERAND>(lane.b[r], half, values);
            }
        }
    }
    Row d[16] = {};
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < K; ++k) d[m] += a[m][k] * b[k];
    }
    for (int l = 0; l < LANES; ++l) {
        const auto& lane = *static_cast<Product*>(warp.given[l]);
        for (int r = 0; r < 4; ++r) lane.d[r] += d[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
    }
}

}  // namespace

void ldmatrix(unsigned* out, int count, bool transposed, const void* row, const char* begin, const char* end, Here at) {
    Tiles mine{out, count, transposed, row, begin, end, at};
    gather("ldmatrix", at, &mine, [](Warp& warp) {
        whole(warp, "ldmatrix");
        const auto& first = *static_cast<Tiles*>(warp.given[0]);
        for (int t = 0; t < first.count; ++t) {
            uint16_t tile[8][8];
            for (int r = 0; r < 8; ++r) {
                const auto& lane = *static_cast<Tiles*>(warp.given[8 * t + r]);
                check_shared(lane.row, 16, lane.begin, lane.end, 16, lane.at, "ldmatrix read");
                touch(lane.row, 16, Access::read, WHOLE_WARP, lane.at);
                memcpy(tile[r], lane.row, 16);
            }
            for (int l = 0; l < LANES; ++l) {
                const int major = l / 4, minor = 2 * (l % 4);
                const uint32_t low = first.transposed ? tile[minor][major] : tile[major][minor];
                const uint32_t high = first.transposed ? tile[minor + 1][major] : tile[major][minor + 1];
                static_cast<Tiles*>(warp.given[l])->out[t] = low | high << 16;
            }
        }
        return true;
    });
}

void mma(float* d, const unsigned* a, const unsigned* b, Operand operand, Here at) {
    Product mine{d, a, b, operand};
    gather("mma", at, &mine, [](Warp& warp) {
        whole(warp, "mma");
        switch (static_cast<Product*>(warp.given[0])->operand) {
            case Operand::fp16:
                multiply<Operand::fp16>(warp);
                break;
            case Operand::bf16:
                multiply<Operand::bf16>(warp);
                break;
            case Operand::tf32:
                multiply<Operand::tf32>(warp);
                break;
        }
        return true;
    });
}

}  // namespace emulate

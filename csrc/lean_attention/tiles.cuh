// The tiles of lean_attention in shared memory: keys and values on their way in, and fragments on their way out.
//
// A warp deals with KEYS keys of every tile of BLOCK_N. They lie as the cache has them, 16-bit numbers or bytes, in
// rows that are 16 bytes longer than their data, so that the eight rows of an ldmatrix lie in different banks. Bytes
// are decoded in registers, where a fragment is made of them: ldmatrix moves pairs of bytes, so the columns of a
// fragment are permuted, and the columns of q (for K) and of the result (for V) are permuted alike.
//
// Where the rows of a cache do not begin at multiples of 16 bytes (ALIGNED is false), elements come one by one, by
// plain loads.
#pragma once
#include "common/tensors.cuh"
#include "common/tiles.cuh"

constexpr int NO_CODE = 0, INT8 = 1, E4M3 = 2;

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

constexpr int WARPS = ROW_WARPS * KEY_WARPS, THREADS = WARP * WARPS;
constexpr int BLOCK_M = 16 * ROW_WARPS;
constexpr int KEYS = BLOCK_N / KEY_WARPS;  // of a tile, for one warp
constexpr int OWN = KEYS / ROW_WARPS;      // of those, what the warp fetches: ROW_WARPS warps share them
constexpr int UNIT = CODE == NO_CODE ? 16 : 32;
constexpr int BLOCK_D = (HEAD_DIM + UNIT - 1) / UNIT * UNIT, BLOCK_V = (VALUE_DIM + UNIT - 1) / UNIT * UNIT;
constexpr int CELL = sizeof(Cache);
constexpr int K_ROW = BLOCK_D * CELL + 16, V_ROW = BLOCK_V * CELL + 16;  // bytes
constexpr int KEYS_BYTES = KEYS * (K_ROW + V_ROW);
constexpr int Q_ROW = padded_row(BLOCK_D);  // elements
constexpr bool Q_HELD = BLOCK_D <= 128;  // q stays in registers, and is read from shared memory where it is wider
static_assert(KEYS % 16 == 0 && KEYS <= WARP && OWN * ROW_WARPS == KEYS, "a warp has 16 or 32 keys of a tile");

// ---- in ------------------------------------------------------------------------------------------------------------

// OWN rows of a cache, of which those from `from` to `there` exist. offset_of(row), which all lanes call, is where a
// row begins.
template <int WIDTH, int PADDED, class Offset>
DEVICE void fetch_rows(Shared<u8> tile, const Cache* source, i64 stride_d, int from, int there,
                       const Offset& offset_of) {
    constexpr int CHUNK = 16 / CELL, CHUNKS = PADDED / CHUNK, ROW = PADDED * CELL + 16;
    constexpr int AT_ONCE = ALIGNED ? 8 : 1;  // elements that come one by one pass through registers
#pragma unroll AT_ONCE
    for (int i = 0; i < (OWN * CHUNKS + WARP - 1) / WARP; ++i) {
        const int chunk = i * WARP + lane_id(), row = chunk / CHUNKS, column = chunk % CHUNKS * CHUNK;
        const i64 offset = offset_of(least(row, OWN - 1));
        if (OWN * CHUNKS % WARP == 0 || row < OWN) {
            copy_chunk<ALIGNED>((tile + (row * ROW + column * CELL)).template as<Cache>(), source, offset, stride_d,
                                column, WIDTH, row >= from && row < there);
        }
    }
}

// ---- out -----------------------------------------------------------------------------------------------------------

// What decoded numbers have to be multiplied with. e4m3 becomes fp16 by moving bits, which leaves the exponent 8 short.
constexpr float UNDECODED = CODE == E4M3 && same<Element, fp16> ? 256.0f : 1.0f;

// A byte of a quantised cache as a float, exactly. The two NaNs of e4m3 become 480.
DEVICE float decoded_float(u32 byte) {
    if constexpr (CODE == INT8) {
        return bits_as<float>(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f;  // 2^23 + 128
    } else {
        const u32 bits = ((byte & 0x80u) << 24) | ((byte & 0x7fu) << 20);
        return bits_as<float>(bits) * 1.329227995784916e36f;  // 2^120: its exponent counts from 7, not from 127
    }
}

// The bytes LOW and HIGH of `four` as a register of a fragment, over UNDECODED.
template <int LOW, int HIGH>
DEVICE u32 decoded(u32 four) {
    const u32 low = (four >> (8 * LOW)) & 0xffu, high = (four >> (8 * HIGH)) & 0xffu;
    if constexpr (CODE == E4M3 && same<Element, fp16>) {
        const u32 both = (low << 8) | (high << 24);
        return (both & 0x80008000u) | ((both & 0x7f007f00u) >> 1);
    } else {
        return pack<Element>(decoded_float(low), decoded_float(high));
    }
}

// The same for values with a factor each.
template <int LOW, int HIGH>
DEVICE u32 decoded(u32 four, Vector<float, 2> factor) {
    const u32 low = (four >> (8 * LOW)) & 0xffu, high = (four >> (8 * HIGH)) & 0xffu;
    return pack<Element>(decoded_float(low) * factor.at[0], decoded_float(high) * factor.at[1]);
}

// The fragment of 16 rows of q for the columns 16 kk to 16 kk + 15, in the order of those of K.
DEVICE Fragment load_q(Shared<Element> rows, int kk) {
    if constexpr (CODE == NO_CODE) {
        return load_left<Q_ROW>(rows, kk);
    } else {
        // Four neighbours of a byte cache belong to one lane.
        const Shared<u32> pairs = (rows + (lane_id() / 4 * Q_ROW + 16 * kk + lane_id() % 4 * 4)).as<u32>();
        const Vector<u32, 2> upper = load_shared_vector<2>(pairs), lower = load_shared_vector<2>(pairs + 4 * Q_ROW);
        return {{upper.at[0], lower.at[0], upper.at[1], lower.at[1]}};
    }
}

// scores += q k^T for 16 keys, over UNDECODED. q_of(kk) returns a fragment of q.
template <class Q>
DEVICE void multiply_keys(float (&scores)[2][4], Shared<u8> keys, const Q& q_of) {
    constexpr int STEPS = BLOCK_D / UNIT, AT_ONCE = Q_HELD ? STEPS : 4;
    if constexpr (CODE == NO_CODE) {
#pragma unroll AT_ONCE
        for (int kk = 0; kk < BLOCK_D / 16; ++kk) {
            u32 b[4];
            load_right_transposed<K_ROW / 2>(b, keys.as<u16>(), kk);
            multiply<Element>(scores[0], scores[1], q_of(kk), b);
        }
    } else {
#pragma unroll AT_ONCE
        for (int kk = 0; kk < BLOCK_D / 16; kk += 2) {
            u32 bytes[4];
            load_right_transposed<K_ROW / 2>(bytes, keys.as<u16>(), kk / 2);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const auto a = q_of(kk + step);
                const u32 left[2] = {decoded<0, 1>(bytes[step]), decoded<2, 3>(bytes[step])};
                const u32 right[2] = {decoded<0, 1>(bytes[2 + step]), decoded<2, 3>(bytes[2 + step])};
                mma_16x8x16<Element>(scores[0], a.at, left);
                mma_16x8x16<Element>(scores[1], a.at, right);
            }
        }
    }
}

// acc += p v for 16 keys, over UNDECODED unless values have factors: those of 16 keys, from `factors` on.
DEVICE void multiply_values(float (&acc)[BLOCK_V / 8][4], const Fragment& p, Shared<u8> values,
                            [[maybe_unused]] Shared<float> factors) {
    [[maybe_unused]] Vector<float, 2> upper, lower;
    if constexpr (V_BY_KEY) {
        upper = load_shared_vector<2>(factors + lane_id() % 4 * 2);
        lower = load_shared_vector<2>(factors + (lane_id() % 4 * 2 + 8));
    }
#pragma unroll
    for (int vv = 0; vv < BLOCK_V / UNIT; ++vv) {
        u32 b[4];
        load_right<V_ROW / 2>(b, (values + 32 * vv).as<u16>());
        if constexpr (CODE == NO_CODE) {
            if constexpr (V_BY_KEY) {
#pragma unroll
                for (int i = 0; i < 4; ++i) b[i] = scaled<Element>(b[i], i % 2 == 0 ? upper : lower);
            }
            multiply<Element>(acc[2 * vv], acc[2 * vv + 1], p, b);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 even[2], odd[2];
                if constexpr (V_BY_KEY) {
                    even[0] = decoded<0, 2>(b[2 * half], upper), even[1] = decoded<0, 2>(b[2 * half + 1], lower);
                    odd[0] = decoded<1, 3>(b[2 * half], upper), odd[1] = decoded<1, 3>(b[2 * half + 1], lower);
                } else {
                    even[0] = decoded<0, 2>(b[2 * half]), even[1] = decoded<0, 2>(b[2 * half + 1]);
                    odd[0] = decoded<1, 3>(b[2 * half]), odd[1] = decoded<1, 3>(b[2 * half + 1]);
                }
                mma_16x8x16<Element>(acc[4 * vv + 2 * half], p.at, even);
                mma_16x8x16<Element>(acc[4 * vv + 2 * half + 1], p.at, odd);
            }
        }
    }
}

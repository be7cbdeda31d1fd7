// The recurrent cells in CUDA C++: their pointwise equations, forward and backward, once.
//
// A cell works on one unit of one sequence. `forward` takes its values (iokernels/ops/flash_rnn/cells.py, which has the
// same equations for PyTorch) and makes the next states of the states. `backward` takes the values, the states before
// and after the step, and the gradients of the states after it; it writes the gradients of the values, and turns those
// of the states into what reaches the states before, not counting what comes through R. Of `before`, h is there only
// where the cell declares READS_H; of `after` it never is. EXACT says that values are exponents and travel to the
// backward pass as floats. Units of padding are zero throughout, and nothing divides by them. A new cell is a struct
// here, and its name in iokernels/ops/flash_rnn/cuda/launch.py.
#pragma once
#include "common/math.cuh"

DEVICE float exp_fast(float x) { return exp2_fast(LOG2E * x); }

// log(1 / (1 + e^-x)), without an exponential that can overflow.
DEVICE float log_sigmoid(float x) { return least(x, 0.0f) - LN2 * log2_fast(1.0f + exp_fast(x < 0.0f ? x : -x)); }

// States h, c; gates i, f, z, o.
struct Lstm {
    static constexpr int GATES = 4, APART = 0, STATES = 2;
    static constexpr bool READS_H = false, EXACT = false;

    DEVICE static void forward(const float (&v)[4], float (&state)[2]) {
        state[1] = sigmoid(v[1]) * state[1] + sigmoid(v[0]) * tanh_exact(v[2]);
        state[0] = sigmoid(v[3]) * tanh_exact(state[1]);
    }

    DEVICE static void backward(const float (&v)[4], const float (&before)[2], const float (&after)[2],
                                float (&dstate)[2], float (&dv)[4]) {
        const float i = sigmoid(v[0]), f = sigmoid(v[1]), z = tanh_exact(v[2]), o = sigmoid(v[3]);
        const float t = tanh_exact(after[1]);
        const float dc = dstate[1] + dstate[0] * o * (1.0f - t * t);
        dv[0] = dc * z * i * (1.0f - i);
        dv[1] = dc * before[1] * f * (1.0f - f);
        dv[2] = dc * i * (1.0f - z * z);
        dv[3] = dstate[0] * t * o * (1.0f - o);
        dstate[0] = 0.0f;
        dstate[1] = dc * f;
    }
};

// State h; gates r and z, then the recurrent and the input part of n.
struct Gru {
    static constexpr int GATES = 3, APART = 1, STATES = 1;
    static constexpr bool READS_H = true, EXACT = false;

    DEVICE static void forward(const float (&v)[4], float (&state)[1]) {
        const float n = tanh_exact(v[3] + sigmoid(v[0]) * v[2]);
        state[0] = n + sigmoid(v[1]) * (state[0] - n);
    }

    DEVICE static void backward(const float (&v)[4], const float (&before)[1], const float (&)[1], float (&dstate)[1],
                                float (&dv)[4]) {
        const float r = sigmoid(v[0]), z = sigmoid(v[1]), n = tanh_exact(v[3] + r * v[2]);
        const float dh = dstate[0], dn = dh * (1.0f - z) * (1.0f - n * n);
        dv[0] = dn * v[2] * r * (1.0f - r);
        dv[1] = dh * (before[0] - n) * z * (1.0f - z);
        dv[2] = dn * r;
        dv[3] = dn;
        dstate[0] = dh * z;
    }
};

// State h; one gate.
struct Elman {
    static constexpr int GATES = 1, APART = 0, STATES = 1;
    static constexpr bool READS_H = false, EXACT = false;

    DEVICE static void forward(const float (&v)[1], float (&state)[1]) { state[0] = tanh_exact(v[0]); }

    DEVICE static void backward(const float (&v)[1], const float (&)[1], const float (&)[1], float (&dstate)[1],
                                float (&dv)[1]) {
        const float h = tanh_exact(v[0]);
        dv[0] = dstate[0] * (1.0f - h * h);
        dstate[0] = 0.0f;
    }
};

// States h, c, n, m; gates i, f, z, o. The stabiliser m counts as a constant; where n is 0 nothing was stored yet, and
// the m of the past means nothing.
struct Slstm {
    static constexpr int GATES = 4, APART = 0, STATES = 4;
    static constexpr bool READS_H = false, EXACT = true;

    DEVICE static void forward(const float (&v)[4], float (&state)[4]) {
        const float past = log_sigmoid(v[1]) + (state[2] == 0.0f ? -infinity() : state[3]);
        state[3] = most(past, v[0]);
        const float i = exp_fast(v[0] - state[3]), f = exp_fast(past - state[3]);
        state[1] = f * state[1] + i * tanh_exact(v[2]);
        state[2] = f * state[2] + i;
        state[0] = sigmoid(v[3]) * state[1] / state[2];
    }

    DEVICE static void backward(const float (&v)[4], const float (&before)[4], const float (&after)[4],
                                float (&dstate)[4], float (&dv)[4]) {
        const float past = log_sigmoid(v[1]) + (before[2] == 0.0f ? -infinity() : before[3]);
        const float i = exp_fast(v[0] - after[3]), f = exp_fast(past - after[3]);
        const float z = tanh_exact(v[2]), o = sigmoid(v[3]);
        const float inverse = 1.0f / (after[2] == 0.0f ? 1.0f : after[2]);
        const float h = o * after[1] * inverse;
        const float dc = dstate[1] + dstate[0] * o * inverse, dn = dstate[2] - dstate[0] * h * inverse;
        dv[0] = i * (z * dc + dn);
        dv[1] = f * sigmoid(-v[1]) * (before[1] * dc + before[2] * dn);
        dv[2] = dc * i * (1.0f - z * z);
        dv[3] = dstate[0] * h * (1.0f - o);
        dstate[0] = 0.0f;
        dstate[1] = dc * f;
        dstate[2] = dn * f;
        dstate[3] = 0.0f;
    }
};

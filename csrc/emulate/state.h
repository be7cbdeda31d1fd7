// The state of the emulated GPU, shared by the files of the machine.
//
// One operating-system thread runs everything. Each CUDA thread is a fiber. Within a warp a lane runs until it comes
// to a collective, then the next lane does; the lane that completes the collective carries it out for all. After that,
// and at barriers, atomics and waits, another warp may be picked at random: the order is a function of the seed.
#pragma once
#include <stdarg.h>

#include <vector>

#include "fiber.h"
#include "machine.h"

namespace emulate {

constexpr int LANES = 32;
constexpr int WARPS = 32;
constexpr int WHOLE_WARP = LANES;   // as the owner of an access: one instruction of the whole warp, such as ldmatrix
constexpr int SEVERAL = LANES + 1;  // several of its lanes, each for itself

struct Block;
struct Warp;

// An asynchronous copy under way.
struct Copy {
    void* target;
    const void* source;
    bool exists;
    Here at;
};

struct Lane {
    Fiber fiber;
    Thread thread;
    Warp* warp = nullptr;
    int number = 0;
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // how many copies each committed group has
    size_t uncommitted = 0;

    uint32_t bit() const { return uint32_t{1} << number; }
};

// clock[v] is the latest step of warp v that happened before what this warp does now; its own counts the barriers and
// __syncwarps it passed. An access by warp v at step c is over for everyone whose clock[v] says at least c.
struct Warp {
    Block* block;
    int index;
    uint32_t all, ready, gathered, finished;
    bool queued;
    int turn;
    const char* collective;
    Here at;
    void* given[LANES];
    uint32_t clock[WARPS];
    int barrier;  // where it waits, or -1
    Lane lane[LANES];
};

struct Barrier {
    int expected = 0, arrived = 0;
    uint32_t waiting = 0;
    Here at{};
    uint32_t clock[WARPS] = {};
};

// One access to two bytes of shared memory: which warp and lane, at which step, from which line.
struct Touch {
    uint32_t step = 0;  // 0: never
    uint8_t warp = 0, lane = 0;
    uint16_t site = 0;
};

struct Cell {
    Touch write;
    Touch read[2];  // the latest of two different warps
    enum : uint8_t { settled, atomic, under_way } state = settled;
};

struct Block {
    Index index;
    uint32_t number = 0;         // in the grid
    uint32_t released = 0;       // how often it counted a counter up
    std::vector<uint32_t> seen;  // by block: how much of what it released this one has seen
    int warps = 0, unfinished = 0;
    std::vector<Warp> warp;
    Barrier barrier[16];
    std::vector<char> memory;
    char* shared = nullptr;
    std::vector<Cell> cells;
};

struct Poller {
    Lane* lane;
    const unsigned* counter;
    unsigned goal;
    Here at;
};

struct Machine {
    Launch* launch;
    Body body;
    uint64_t random_state;
    Fiber scheduler;
    std::vector<Block*> resident;
    std::vector<Warp*> queue;
    std::vector<Poller> pollers;
    bool failed = false;
    int last_argument = 0;

    uint32_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return static_cast<uint32_t>(random_state >> 32);
    }
};

extern Machine* machine;
extern Lane* current;

// Ends the launch with a report on what the current thread did.
[[noreturn]] void fault(Here at, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Appends to the report.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The last folder of a path, and the file.
const char* place(const char* file);

// Suspends the current lane until its warp is ready again.
void leave();
void enqueue(Warp& warp);

// Waits for all lanes of the warp to come to the same call; the last one carries out `complete`, which returns whether
// the warp may go on at once. given[] has what each lane brought.
void gather(const char* collective, Here at, void* given, bool (*complete)(Warp&));

// Marks bytes of shared memory as touched by `lane` (or WHOLE_WARP) of the current warp; faults on a race.
void touch(const void* p, size_t bytes, Access access, int lane, Here at);
Touch touch_of(const Warp& warp, int lane, Here at);
// Whether `before`, in the same block, was over when this lane of the warp came here.
bool over(const Touch& before, const Warp& warp, int lane);
Here site(uint16_t number);
// The same for global memory, of one byte or more; and whether it is watched.
void touch_global(const void* p, size_t bytes, Access access, Here at);
void watch_races(bool on);
const char* name_of_argument(const char* p);
long long offset_in_argument(const char* p);
void check_shared(const void* p, size_t bytes, const char* begin, const char* end, size_t aligned, Here at,
                  const char* did);
void prepare_shared(Block& block);
// As global(), for an access that is not counted.
void check_global(const void* p, size_t bytes, Here at);

}  // namespace emulate

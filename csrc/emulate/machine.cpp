// The scheduler: blocks, warps and lanes, collectives, barriers, deadlocks.
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>

#include "state.h"

namespace emulate {

Thread* self = nullptr;
Lane* current = nullptr;
Machine* machine = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif
constexpr size_t GUARD = 4096;

// Blocks of an ordinary launch that are under way together, so that their atomics interleave.
constexpr size_t TOGETHER = 3;

// Each guard page splits a mapping, of which a process may have some 65,000.
constexpr int MOST_GUARDS = 16384;

std::vector<char*> idle_stacks;
int guards = 0;

char* take_stack() {
    if (idle_stacks.empty()) {
        void* memory =
            mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        if (guards++ < MOST_GUARDS) mprotect(memory, GUARD, PROT_NONE);
        return static_cast<char*>(memory) + GUARD;
    }
    char* stack = idle_stacks.back();
    idle_stacks.pop_back();
    return stack;
}

void resume(Fiber& from, Lane& lane) {
    current = &lane;
    self = &lane.thread;
    from.switch_to(lane.fiber);
}

Lane& next_lane(Warp& warp) {
    const uint32_t turned = (warp.ready >> warp.turn) | (warp.turn ? warp.ready << (LANES - warp.turn) : 0);
    return warp.lane[(__builtin_ctz(turned) + warp.turn) % LANES];
}

void run_lane() {
    current->fiber.arrived();
    machine->body(*machine->launch);
    Warp& warp = *current->warp;
    if (warp.gathered) {
        fault(warp.at, "lane %d has returned while others of its warp wait at this %s", current->number,
              warp.collective);
    }
    warp.ready &= ~current->bit();
    warp.finished |= current->bit();
    if (warp.finished == warp.all) --warp.block->unfinished;
    Fiber& mine = current->fiber;
    if (warp.ready) {
        Lane& next = next_lane(warp);
        current = &next;
        self = &next.thread;
        mine.switch_to(next.fiber, true);
    }
    mine.switch_to(machine->scheduler, true);
    __builtin_unreachable();
}

void begin(Block& block, uint32_t number) {
    const Launch& launch = *machine->launch;
    const Index index{number % launch.grid.x, number / launch.grid.x % launch.grid.y,
                      number / launch.grid.x / launch.grid.y};
    block.index = index;
    block.number = number;
    block.released = 0;
    block.seen.clear();
    block.unfinished = block.warps;
    prepare_shared(block);
    for (Barrier& barrier : block.barrier) barrier = Barrier();
    const int threads = static_cast<int>(launch.block.x);
    for (int w = 0; w < block.warps; ++w) {
        Warp& warp = block.warp[w];
        const int lanes = std::min(LANES, threads - w * LANES);
        warp.block = &block;
        warp.index = w;
        warp.all = warp.ready = lanes == LANES ? ~uint32_t{0} : (uint32_t{1} << lanes) - 1;
        warp.gathered = warp.finished = 0;
        warp.queued = false;
        warp.turn = static_cast<int>(machine->random() % LANES);
        warp.barrier = -1;
        memset(warp.clock, 0, sizeof(warp.clock));
        warp.clock[w] = 1;
        for (int l = 0; l < lanes; ++l) {
            Lane& lane = warp.lane[l];
            lane.warp = &warp;
            lane.number = l;
            lane.copies.clear();
            lane.groups.clear();
            lane.uncommitted = 0;
            lane.thread = {{static_cast<unsigned>(w * LANES + l), 0, 0}, index, launch.block, launch.grid};
            lane.fiber.prepare(run_lane);
        }
        enqueue(warp);
    }
}

bool reached(const Poller& poller) { return static_cast<int>(*poller.counter - poller.goal) >= 0; }

void look_at_pollers() {
    auto& pollers = machine->pollers;
    for (size_t i = 0; i < pollers.size();) {
        if (reached(pollers[i])) {
            Lane& lane = *pollers[i].lane;
            lane.warp->ready |= lane.bit();
            enqueue(*lane.warp);
            pollers[i] = pollers.back();
            pollers.pop_back();
        } else {
            ++i;
        }
    }
}

void tell_lanes(uint32_t lanes) {
    for (int l = 0, told = 0; l < LANES; ++l) {
        if (lanes >> l & 1) say(told++ ? ", %d" : " %d", l);
    }
}

// Who waits for what, block by block, until the report is full.
void deadlock() {
    machine->failed = true;
    say("kernel %s: deadlock: no thread can go on", machine->launch->kernel);
    for (const Block* block : machine->resident) {
        if (!block->unfinished) continue;
        say("\n  block (%u, %u, %u):", block->index.x, block->index.y, block->index.z);
        for (int w = 0; w < block->warps; ++w) {
            const Warp& warp = block->warp[w];
            if (warp.barrier >= 0) {
                const Barrier& barrier = block->barrier[warp.barrier];
                say("\n    warp %d waits at barrier %d, %s:%d, where %d of %d warps arrived", w, warp.barrier,
                    place(warp.at.file), warp.at.line, barrier.arrived, barrier.expected);
            } else if (warp.finished == warp.all) {
                say("\n    warp %d has returned", w);
            } else if (warp.gathered) {
                say("\n    warp %d: at %s, %s:%d, are only the lanes", w, warp.collective, place(warp.at.file),
                    warp.at.line);
                tell_lanes(warp.gathered);
            }
            for (const Poller& poller : machine->pollers) {
                if (poller.lane->warp == &warp) {
                    say("\n    warp %d, lane %d waits for a count of %u, %s:%d, and it is %u", w, poller.lane->number,
                        poller.goal, place(poller.at.file), poller.at.line, *poller.counter);
                }
            }
        }
    }
}

bool differ(const char* one, const char* other) { return one != other && strcmp(one, other); }

// Where the stack of the thread that calls is: a question to the kernel that costs more than a small launch.
void own_stack(Fiber& fiber) {
    static thread_local void* bottom = nullptr;
    static thread_local size_t bytes = 0;
    pthread_attr_t attributes;
    if (!bottom && pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &bottom, &bytes);
        pthread_attr_destroy(&attributes);
    }
    fiber.stack = static_cast<char*>(bottom);
    fiber.bytes = bytes;
}

}  // namespace

const char* place(const char* file) {
    const char *name = file, *folder = file;
    for (const char* c = file; *c; ++c) {
        if (*c == '/') folder = name, name = c + 1;
    }
    return folder;
}

void say(const char* format, ...) {
    const size_t used = strlen(machine->launch->report);
    va_list values;
    va_start(values, format);
    vsnprintf(machine->launch->report + used, machine->launch->report_bytes - used, format, values);
    va_end(values);
}

void fault(Here at, const char* format, ...) {
    machine->failed = true;
    const Lane& lane = *current;
    const Index block = lane.thread.block;
    say("kernel %s, block (%u, %u, %u), thread %u (warp %d), %s:%d: ", machine->launch->kernel, block.x, block.y,
        block.z, lane.thread.thread.x, lane.warp->index, place(at.file), at.line);
    const size_t used = strlen(machine->launch->report);
    va_list values;
    va_start(values, format);
    vsnprintf(machine->launch->report + used, machine->launch->report_bytes - used, format, values);
    va_end(values);
    current->fiber.switch_to(machine->scheduler, true);
    __builtin_unreachable();
}

void enqueue(Warp& warp) {
    if (warp.queued || !warp.ready) return;
    warp.queued = true;
    machine->queue.push_back(&warp);
}

void leave() {
    Lane& me = *current;
    if (me.warp->ready) {
        Lane& next = next_lane(*me.warp);
        if (&next != &me) resume(me.fiber, next);
    } else {
        me.fiber.switch_to(machine->scheduler);
    }
}

void give_way() {
    if (machine->random() & 1) current->fiber.switch_to(machine->scheduler);
}

void gather(const char* collective, Here at, void* given, bool (*complete)(Warp&)) {
    Lane& me = *current;
    Warp& warp = *me.warp;
    if (warp.finished) {
        fault(at, "this lane is at %s, which lanes of its warp can no longer reach: they have returned", collective);
    }
    if (!warp.gathered) {
        warp.collective = collective;
        warp.at = at;
    } else if (warp.collective != collective || warp.at.line != at.line || differ(warp.at.file, at.file)) {
        fault(at, "this lane is at %s, and others of its warp are at %s, %s:%d", collective, warp.collective,
              place(warp.at.file), warp.at.line);
    }
    warp.given[me.number] = given;
    warp.gathered |= me.bit();
    warp.ready &= ~me.bit();
    if (warp.gathered != warp.all) return leave();
    warp.gathered = 0;
    warp.turn = static_cast<int>(machine->random() % LANES);
    if (!complete(warp)) return leave();
    warp.ready = warp.all;
    if ((machine->random() & 3) == 0) me.fiber.switch_to(machine->scheduler);
}

void sync_warp(Here at) {
    gather("__syncwarp", at, nullptr, [](Warp& warp) {
        ++warp.clock[warp.index];
        return true;
    });
}

namespace {

struct Arrival {
    int id, threads;
    bool wait;
    Here at;
};

void join(uint32_t* clock, const uint32_t* other) {
    for (int w = 0; w < WARPS; ++w) clock[w] = std::max(clock[w], other[w]);
}

bool arrive(Warp& warp) {
    const Arrival& arrival = *static_cast<Arrival*>(warp.given[current->number]);
    Block& block = *warp.block;
    if (arrival.id < 0 || arrival.id > 15 || arrival.threads % LANES || arrival.threads > block.warps * LANES) {
        fault(arrival.at,
              "barrier %d for %d threads: there are barriers 0 to 15, for whole warps, of which the block has %d",
              arrival.id, arrival.threads, block.warps);
    }
    Barrier& barrier = block.barrier[arrival.id];
    const int expected = arrival.threads ? arrival.threads / LANES : block.warps;
    if (!barrier.arrived) {
        barrier.expected = expected;
        barrier.at = arrival.at;
    } else if (barrier.expected != expected || (!arrival.threads && barrier.at.line != arrival.at.line)) {
        fault(arrival.at, "barrier mismatch: this warp is at barrier %d for %d warps, others wait at %s:%d for %d",
              arrival.id, expected, place(barrier.at.file), barrier.at.line, barrier.expected);
    }
    join(barrier.clock, warp.clock);
    ++barrier.arrived;
    if (arrival.wait) {
        barrier.waiting |= uint32_t{1} << warp.index;
        warp.barrier = arrival.id;
    } else {
        ++warp.clock[warp.index];
    }
    if (barrier.arrived < barrier.expected) return !arrival.wait;
    for (int w = 0; w < block.warps; ++w) {
        if (!(barrier.waiting >> w & 1)) continue;
        Warp& released = block.warp[w];
        join(released.clock, barrier.clock);
        ++released.clock[w];
        released.barrier = -1;
        released.ready = released.all;
        if (&released != &warp) enqueue(released);
    }
    barrier = Barrier();
    return true;
}

}  // namespace

void barrier(int id, int threads, bool wait, Here at) {
    Arrival arrival{id, threads, wait, at};
    gather(wait ? "a barrier" : "a barrier's arrival", at, &arrival, arrive);
}

void wait_for_count(const unsigned* counter, unsigned goal, Here at) {
    if (!machine->launch->cooperative) {
        fault(at, "blocks wait for one another only in a cooperative launch");
    }
    check_global(counter, sizeof(*counter), at);
    give_way();
    const Poller poller{current, counter, goal, at};
    if (!reached(poller)) {
        machine->pollers.push_back(poller);
        current->warp->ready &= ~current->bit();
        leave();
    }
    acquire(counter);
}

void mistyped(const Launch& launch, int argument, const char* wanted) {
    if (argument < 0) {
        snprintf(launch.report, launch.report_bytes, "kernel %s takes another number of arguments than %d",
                 launch.kernel, launch.arguments);
    } else {
        snprintf(launch.report, launch.report_bytes, "kernel %s: argument %s is not what it takes, which is %s",
                 launch.kernel, launch.argument[argument].name, wanted);
    }
}

int run(Launch& launch, Body body) {
    Machine here{};
    here.launch = &launch;
    here.body = body;
    here.random_state = launch.seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    for (int i = 0; i < 8; ++i) here.random();
    own_stack(here.scheduler);
    machine = &here;
    watch_races(true);
    const uint64_t total = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    const auto threads = static_cast<int>(launch.block.x);
    std::vector<uint32_t> order(total);
    for (uint64_t i = 0; i < total; ++i) order[i] = static_cast<uint32_t>(i);
    for (uint64_t i = total; i > 1; --i) std::swap(order[i - 1], order[here.random() % i]);

    std::vector<std::unique_ptr<Block>> blocks(launch.cooperative ? total : std::min<uint64_t>(total, TOGETHER));
    uint64_t begun = 0;
    for (auto& block : blocks) {
        block = std::make_unique<Block>();
        block->warps = (threads + LANES - 1) / LANES;
        block->warp.resize(block->warps);
        for (int t = 0; t < threads; ++t) {
            Fiber& fiber = block->warp[t / LANES].lane[t % LANES].fiber;
            fiber.stack = take_stack();
            fiber.bytes = STACK;
            if (!fiber.stack) {
                snprintf(launch.report, launch.report_bytes, "kernel %s: no memory for the stacks of its threads",
                         launch.kernel);
                return 1;
            }
        }
        here.resident.push_back(block.get());
        begin(*block, order[begun++]);
    }
    while (!here.failed) {
        if (here.queue.empty() || (here.random() & 15) == 0) look_at_pollers();
        if (here.queue.empty()) {
            if (!here.pollers.empty() ||
                std::any_of(blocks.begin(), blocks.end(), [](auto& b) { return b->unfinished; })) {
                deadlock();
            }
            break;
        }
        const size_t pick = here.random() % here.queue.size();
        Warp& warp = *here.queue[pick];
        here.queue[pick] = here.queue.back();
        here.queue.pop_back();
        warp.queued = false;
        resume(here.scheduler, next_lane(warp));
        if (here.failed) break;
        enqueue(warp);
        if (!warp.block->unfinished && begun < total) begin(*warp.block, order[begun++]);
    }
    for (auto& block : blocks) {
        for (int t = 0; t < threads; ++t) idle_stacks.push_back(block->warp[t / LANES].lane[t % LANES].fiber.stack);
    }
    watch_races(false);
    machine = nullptr;
    self = nullptr;
    return here.failed;
}

}  // namespace emulate

// Global memory: what may be reached, and how many bytes were. Shared memory: bounds, races, asynchronous copies.
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "state.h"

namespace emulate {

// ---- global memory -------------------------------------------------------------------------------------------------

namespace {

bool owns(const Argument& argument, const char* p, size_t bytes) {
    const char* first = static_cast<const char*>(argument.data);
    if (argument.kind != Argument::pointer || p < first || p + bytes > first + argument.extent) return false;
    if (argument.owned) {
        for (size_t i = 0; i < bytes; ++i) {
            if (!argument.owned[p - first + i]) return false;
        }
    }
    return true;
}

Argument* owner(const char* p, size_t bytes) {
    Launch& launch = *machine->launch;
    if (owns(launch.argument[machine->last_argument], p, bytes)) return &launch.argument[machine->last_argument];
    for (int i = 0; i < launch.arguments; ++i) {
        if (owns(launch.argument[i], p, bytes)) {
            machine->last_argument = i;
            return &launch.argument[i];
        }
    }
    return nullptr;
}

const Argument* holder(const char* p) {
    const Argument* found = owner(p, 1);
    return found ? found : &machine->launch->argument[0];
}

[[noreturn]] void stray(const char* p, size_t bytes, const char* did, Here at) {
    const Launch& launch = *machine->launch;
    const Argument* nearest = nullptr;
    long long away = 0;
    for (int i = 0; i < launch.arguments; ++i) {
        const Argument& argument = launch.argument[i];
        if (argument.kind != Argument::pointer || !argument.extent) continue;
        const char* first = static_cast<const char*>(argument.data);
        const long long before = first - p, after = p + bytes - (first + argument.extent);
        const long long distance = std::max(std::max(before, after), 0ll);
        if (!nearest || distance < std::max(away, -away)) {
            nearest = &argument;
            away = before > 0 ? -before : std::max(after, 0ll);
        }
    }
    if (!p) fault(at, "%s %zu bytes at a null pointer", did, bytes);
    if (!nearest) fault(at, "%s %zu bytes at %p, but the kernel was given no memory", did, bytes, (const void*)p);
    if (away > static_cast<long long>(bytes)) {
        fault(at, "%s %zu bytes that begin %lld after the end of %s", did, bytes, away - static_cast<long long>(bytes),
              nearest->name);
    }
    if (away > 0) fault(at, "%s %zu bytes, %lld of them after the end of %s", did, bytes, away, nearest->name);
    if (away < 0) fault(at, "%s %zu bytes that begin %lld before %s", did, bytes, -away, nearest->name);
    fault(at, "%s %zu bytes between the elements of %s", did, bytes, nearest->name);
}

}  // namespace

const char* name_of_argument(const char* p) { return holder(p)->name; }
long long offset_in_argument(const char* p) { return p - static_cast<const char*>(holder(p)->data); }

void global(const void* where, size_t bytes, Access access, Here at) {
    const char* p = static_cast<const char*>(where);
    static const char* const verbs[] = {"read", "wrote", "updated", "read"};
    const char* did = verbs[static_cast<int>(access)];
    Argument* argument = owner(p, bytes);
    if (!argument) stray(p, bytes, did, at);
    if (reinterpret_cast<uintptr_t>(p) % bytes) {
        fault(at, "%s %zu bytes of %s at an address that is no multiple of %zu", did, bytes, argument->name, bytes);
    }
    // As in shared memory, single bytes are not watched.
    if (bytes > 1) touch_global(p, bytes, access, at);
    switch (access) {
        case Access::read:
            argument->read += bytes;
            break;
        case Access::write:
            argument->written += bytes;
            break;
        case Access::atomic:
            argument->updated += bytes;
            break;
        case Access::uniform_read:
            argument->read += current->number == 0 ? bytes : 0;
            break;
    }
}

void check_global(const void* p, size_t bytes, Here at) {
    if (!owner(static_cast<const char*>(p), bytes)) stray(static_cast<const char*>(p), bytes, "read", at);
}

// ---- shared memory -------------------------------------------------------------------------------------------------

namespace {

// Sites are numbered from 1, so that a cell holds one in two bytes. Beyond the last number they share it.
std::vector<Here> sites{{"", 0}};

uint16_t number_of(Here at) {
    static uint16_t known[4096];
    const size_t slot = (reinterpret_cast<uintptr_t>(at.file) / 8 * 31 + static_cast<size_t>(at.line)) % 4096;
    const uint16_t guess = known[slot];
    if (guess && sites[guess].line == at.line && sites[guess].file == at.file) return guess;
    for (size_t i = 1; i < sites.size(); ++i) {
        if (sites[i].line == at.line && sites[i].file == at.file) return known[slot] = static_cast<uint16_t>(i);
    }
    if (sites.size() < 65535) sites.push_back(at);
    return known[slot] = static_cast<uint16_t>(sites.size() - 1);
}

[[noreturn]] void race(const void* p, const char* did, const Touch& before, const char* was, Here at) {
    const long long offset = static_cast<const char*>(p) - current->warp->block->shared;
    const Here there = sites[before.site];
    if (before.lane >= LANES) {
        fault(at, "race: this thread %s byte %lld of shared memory, which warp %d %s at %s:%d, with no barrier between",
              did, offset, before.warp, was, place(there.file), there.line);
    }
    fault(at,
          "race: this thread %s byte %lld of shared memory, which thread %d (warp %d) %s at %s:%d, with no barrier "
          "between",
          did, offset, before.warp * LANES + before.lane, before.warp, was, place(there.file), there.line);
}

void note_read(Cell& cell, const Touch& now) {
    for (Touch& read : cell.read) {
        if (!read.step || read.warp == now.warp) {
            const bool same_step = read.step == now.step && read.lane != WHOLE_WARP;
            if (same_step && now.lane == WHOLE_WARP) return;  // it endangers no write that the older one does not
            const bool several = same_step && read.lane != now.lane;
            read = now;
            if (several) read.lane = SEVERAL;
            return;
        }
    }
    cell.read[0] = cell.read[1];
    cell.read[1] = now;
}

}  // namespace

Here site(uint16_t number) { return sites[number]; }

Touch touch_of(const Warp& warp, int lane, Here at) {
    return {warp.clock[warp.index], static_cast<uint8_t>(warp.index), static_cast<uint8_t>(lane), number_of(at)};
}

bool over(const Touch& before, const Warp& warp, int lane) {
    if (!before.step) return true;
    if (before.warp != warp.index) return warp.clock[before.warp] >= before.step;
    // What one instruction of the whole warp read is read when the next one begins.
    return warp.clock[warp.index] > before.step || before.lane == lane || before.lane == WHOLE_WARP;
}

void touch(const void* p, size_t bytes, Access access, int lane, Here at) {
    const Warp& warp = *current->warp;
    Block& block = *warp.block;
    const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - block.shared);
    const Touch now{warp.clock[warp.index], static_cast<uint8_t>(warp.index), static_cast<uint8_t>(lane),
                    number_of(at)};
    for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
        Cell& cell = block.cells[i];
        const char* byte = block.shared + 2 * i;
        if (cell.state == Cell::under_way) {
            const Here there = sites[cell.write.site];
            fault(at,
                  "this thread touches byte %zu of shared memory, where an asynchronous copy from %s:%d is under way",
                  2 * i, place(there.file), there.line);
        }
        if (access == Access::read) {
            if (!over(cell.write, warp, lane)) race(byte, "reads", cell.write, "wrote", at);
            note_read(cell, now);
            continue;
        }
        const bool both_atomic = access == Access::atomic && cell.state == Cell::atomic;
        if (!both_atomic && !over(cell.write, warp, lane)) race(byte, "writes", cell.write, "wrote", at);
        for (const Touch& read : cell.read) {
            if (!over(read, warp, lane)) race(byte, "writes", read, "read", at);
        }
        cell.write = now;
        cell.state = access == Access::atomic ? Cell::atomic : Cell::settled;
    }
}

void check_shared(const void* where, size_t bytes, const char* begin, const char* end, size_t aligned, Here at,
                  const char* did) {
    const char* p = static_cast<const char*>(where);
    if (p < begin || p + bytes > end) {
        fault(at, "%s %zu bytes at offset %lld of an array of %lld bytes in shared memory", did, bytes,
              static_cast<long long>(p - begin), static_cast<long long>(end - begin));
    }
    if (reinterpret_cast<uintptr_t>(p) % aligned) {
        fault(at, "%s %zu bytes of shared memory at an address that is no multiple of %zu", did, bytes, aligned);
    }
}

void shared(const void* p, size_t bytes, const char* begin, const char* end, Access access, Here at) {
    check_shared(p, bytes, begin, end, bytes, at, access == Access::read ? "read" : "wrote");
    // The cells are two bytes wide, so stores of single bytes by neighbours would look like a race.
    if (bytes > 1 || access == Access::read) touch(p, bytes, access, current->number, at);
}

char* shared_base() { return current->warp->block->shared; }

void shared_taken(int bytes, Here at) {
    const uint64_t given = machine->launch->shared_bytes;
    if (static_cast<uint64_t>(bytes) > given) {
        fault(at, "the kernel takes %d bytes of shared memory, and the launch gives it %llu", bytes,
              static_cast<unsigned long long>(given));
    }
}

void prepare_shared(Block& block) {
    const size_t bytes = machine->launch->shared_bytes;
    block.memory.assign(bytes + 128, static_cast<char>(0xff));  // NaN, whatever the type
    block.shared = block.memory.data() + (128 - reinterpret_cast<uintptr_t>(block.memory.data()) % 128) % 128;
    block.cells.assign(bytes / 2 + 1, Cell());
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

void copy_async(void* target, const char* begin, const char* end, const void* source, bool exists, Here at) {
    check_shared(target, 16, begin, end, 16, at, "copied");
    if (exists) global(source, 16, Access::read, at);
    touch(target, 16, Access::write, current->number, at);
    Block& block = *current->warp->block;
    const size_t first = static_cast<size_t>(static_cast<char*>(target) - block.shared) / 2;
    for (size_t i = first; i < first + 8; ++i) block.cells[i].state = Cell::under_way;
    memset(target, 0xff, 16);
    current->copies.push_back({target, source, exists, at});
    ++current->uncommitted;
}

void commit_copies() {
    current->groups.push_back(current->uncommitted);
    current->uncommitted = 0;
}

void wait_copies(int newest, Here) {
    Lane& lane = *current;
    size_t arrived = 0;
    const size_t over = lane.groups.size() > static_cast<size_t>(newest) ? lane.groups.size() - newest : 0;
    for (size_t g = 0; g < over; ++g) arrived += lane.groups[g];
    lane.groups.erase(lane.groups.begin(), lane.groups.begin() + over);
    Block& block = *lane.warp->block;
    for (size_t i = 0; i < arrived; ++i) {
        const Copy& copy = lane.copies[i];
        if (copy.exists) {
            memcpy(copy.target, copy.source, 16);
        } else {
            memset(copy.target, 0, 16);
        }
        const size_t first = static_cast<size_t>(static_cast<char*>(copy.target) - block.shared) / 2;
        for (size_t c = first; c < first + 8; ++c) {
            block.cells[c].state = Cell::settled;
            block.cells[c].write.step = lane.warp->clock[lane.warp->index];
        }
    }
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + arrived);
}

}  // namespace emulate

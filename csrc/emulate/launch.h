// From the untyped arguments of a launch to the typed ones of a kernel. Compiled with each kernel.
#pragma once

#include "machine.h"

namespace emulate {

template <class T>
struct Is;

template <class T>
struct Is<T*> {
    static constexpr const char* name = "a pointer";
    static bool right(const Argument& a) { return a.kind == Argument::pointer; }
    static T* value(const Argument& a) { return static_cast<T*>(const_cast<void*>(a.data)); }
};

template <class T, int KIND>
struct Number {
    static bool right(const Argument& a) { return a.kind == KIND; }
    static T value(const Argument& a) {
        T value;
        memcpy(&value, a.data, sizeof(T));
        return value;
    }
};

template <>
struct Is<int> : Number<int, Argument::integer32> {
    static constexpr const char* name = "int";
};
template <>
struct Is<long long> : Number<long long, Argument::integer64> {
    static constexpr const char* name = "i64";
};
template <>
struct Is<float> : Number<float, Argument::real32> {
    static constexpr const char* name = "float";
};

// A structure of i64, such as the strides of a tensor.
template <class T>
struct Is {
    static_assert(__is_class(T) && sizeof(T) % 8 == 0,
                  "a kernel takes pointers, int, i64, float and structures of i64");
    static constexpr const char* name = "a structure of as many i64";
    static bool right(const Argument& a) { return a.kind == Argument::integers64 && a.count * 8 == sizeof(T); }
    static T value(const Argument& a) {
        T value;
        memcpy(static_cast<void*>(&value), a.data, sizeof(T));
        return value;
    }
};

template <class T>
struct Plain {
    using type = T;
};
template <class T>
struct Plain<const T> {
    using type = T;
};
template <class T>
struct Plain<T* __restrict> {
    using type = T*;
};

template <size_t...>
struct Places {};
template <size_t N, size_t... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I>
struct Count<0, I...> {
    using type = Places<I...>;
};

template <auto KERNEL, class... P, size_t... I>
void call(void (*)(P...), const Launch& launch, Places<I...>) {
    KERNEL(Is<typename Plain<P>::type>::value(launch.argument[I])...);
}

template <class... P, size_t... I>
bool typed(void (*)(P...), const Launch& launch, Places<I...>) {
    if (launch.arguments != static_cast<int>(sizeof...(P))) return mistyped(launch, -1, ""), false;
    bool right = true;
    (void)((right = right && (Is<typename Plain<P>::type>::right(launch.argument[I]) ||
                              (mistyped(launch, I, Is<typename Plain<P>::type>::name), false))),
           ...);
    return right;
}

template <class... P>
typename Count<sizeof...(P)>::type places(void (*)(P...)) {
    return {};
}

template <auto KERNEL>
int launch(Launch& launch) {
    if (!typed(KERNEL, launch, places(KERNEL))) return 1;
    return run(launch, [](const Launch& l) { call<KERNEL>(KERNEL, l, places(KERNEL)); });
}

}  // namespace emulate

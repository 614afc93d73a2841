// What an instruction set offers to the loops: its vec.h, bits.h, tables.h and compare_key.h. Every set that includes
// the loops is checked here.
#pragma once

#include <concepts>

#include "instruction_set.h"

namespace cg::CG_ISA {

// Vec<A>: numbers of the compute type A, all in one operation. A comparison gives a mask. mul_add is an fma where there
// is one.
template <class V, class A>
concept IsVec = requires(V v, A number, int count) {
  V(number);
  { v + v } -> std::same_as<V>;
  { v - v } -> std::same_as<V>;
  { v / v } -> std::same_as<V>;
  { mul(v, v) } -> std::same_as<V>;
  { mul_add(v, v, v) } -> std::same_as<V>;
  { ceil(v) } -> std::same_as<V>;
  { min_of(v, v) } -> std::same_as<V>;
  { max_of(v, v) } -> std::same_as<V>;
  { shift_bits_left(v, count) } -> std::same_as<V>;
  { select((v < v) & !(v <= v), v, v) } -> std::same_as<V>;
  { select((v > v) | (v != v), v, v) } -> std::same_as<V>;
  { select(is_positive(v), v, v) } -> std::same_as<V>;
};
// Of floats alone: for approximate gradients.
template <class V>
concept IsApproximateVec = requires(V v) {
  { times_pow2(v, v) } -> std::same_as<V>;
  { approximate_reciprocal(v) } -> std::same_as<V>;
};
static_assert(IsVec<Vec<float>, float> && IsVec<Vec<double>, double> && IsApproximateVec<Vec<float>>);

// Lanes<V>: the numbers of a vector one by one: how many, their sum, masks as bits, codes as bytes; exchange<d> has
// each number in the place of the one d lanes away, d a power of two.
template <class L, class V, class A>
concept IsLanes = requires(V v, uint64_t bits, uint8_t* to, const uint8_t* from) {
  requires L::kCount > 0 && kBlock % (2 * L::kCount) == 0;
  { L::sum(v) } -> std::same_as<A>;
  { L::bits(v < v) } -> std::convertible_to<uint64_t>;
  { select(L::mask(bits), v, v) } -> std::same_as<V>;
  { L::load_codes(from) } -> std::same_as<V>;
  L::store_codes(to, v);
  requires L::kCount == 1 || requires {
    { L::template exchange<1>(v) } -> std::same_as<V>;
    { L::template exchange<L::kCount / 2>(v) } -> std::same_as<V>;
  };
};
static_assert(IsLanes<Lanes<Vec<float>>, Vec<float>, float> && IsLanes<Lanes<Vec<double>>, Vec<double>, double>);

// Io<T>: vectors from and to numbers of T; stream goes past the caches, to an aligned place. They store numbers of T,
// and other numbers after round_for_store<T>. Pairs are in an order of their own, and rounded to T as they are stored,
// unless they are numbers of T; codes in that order are stored as bytes.
template <class T, class V = Vec<compute_t<T>>>
concept IsStored = requires(const T* from, T* to, V v, bool stream, uint8_t* codes) {
  { Io<T>::load(from) } -> std::same_as<V>;
  Io<T>::store(to, v);
  Io<T>::stream(to, v);
  { round_for_store<T>(v) } -> std::same_as<V>;
  { round_to<T>(v) } -> std::same_as<V>;
  { round_level<T>(v) } -> std::same_as<V>;
  { round_regular<T>(v) } -> std::same_as<V>;
  { load_pair(from) } -> std::same_as<Pair<V>>;
  store_pair(to, load_pair(from), stream);
  store_rounded_pair(to, load_pair(from), stream);
  store_code_pair<T>(codes, load_pair(from));
};
static_assert(IsStored<float> && IsStored<double> && IsStored<bf16> && IsStored<f16>);

// BlockBits and BlockStates: the saved bits of a block, and its 2-bit states. masked_copy<n> copies n elements from
// `first` on, of any type of the size, and zero where a bit is not set.
template <class U, class Bits>
concept IsMaskedBy = requires(const U* from, U* to, Bits bits, int first, bool stream) {
  masked_copy<kBlock>(from, to, bits, first, stream);
};
template <class S>
concept IsStates = requires(const uint8_t* packed, S states) {
  S(packed);
  requires IsMaskedBy<uint16_t, decltype(states.inside())>;
  requires IsMaskedBy<uint32_t, decltype(states.above())>;
  requires IsMaskedBy<uint64_t, decltype(states.either())>;
};
static_assert(std::constructible_from<BlockBits, uint64_t> && IsMaskedBy<uint16_t, BlockBits> && IsStates<BlockStates>);

// 64 codes of a byte each to kWidth bits each (math/bits.h) and back, and the bits of those that are not 0.
template <int kWidth>
concept HasBitpack = requires(const uint8_t* from, uint8_t* to) {
  bitpack<kWidth>(from, to);
  bitunpack<kWidth>(from, to);
  { nonzero_codes(from) } -> std::same_as<uint64_t>;
};
static_assert(HasBitpack<1> && HasBitpack<2> && HasBitpack<4> && HasBitpack<8>);

// LargeTable<V> looks up to 256 numbers up by a vector's codes, from memory; SmallTable<V> up to kSize ones, from
// registers: by at() too, unless backward_from_slopes_block has an overload for it. kAddsWeighed<V>: add_weighed()
// multiplies by weights looked up by 2 bits, weights_of().
template <class V, class A>
concept HasTables = requires(const A* entries, const uint8_t* codes) {
  { LargeTable<V>(entries, 256).at(codes) } -> std::same_as<V>;
  { SmallTable<V>::kSize } -> std::convertible_to<int>;
  { kAddsWeighed<V> } -> std::convertible_to<bool>;
};
static_assert(HasTables<Vec<float>, float> && HasTables<Vec<double>, double>);

// search_codes<top, shift>(): sums over the codes of whole registers of short magnitudes (weights.h).
template <int kTop>
concept SearchesCodes = requires(const int16_t* from, int count, int32_t inverse, int32_t (&sums)[2]) {
  search_codes<kTop, 4>(from, count, inverse, sums);
};
static_assert(SearchesCodes<7> && SearchesCodes<127>);

// CompareKey<T>: a register of numbers of T as what is compared fast (math/dtype.h). A staircase of up to kCompareBits
// is made by comparisons, one of up to kSearchBits by look-ups, and one of more bits by arithmetic if kArithmetic; if
// none of these, on vectors. floats() makes a Vec or a Pair, in an order of its own; rounded() is the way back.
template <class K, class T>
concept IsCompareKey = (K::kSearchBits == 0 && K::kCompareBits == 0 && !K::kArithmetic) ||
                       requires(K k, typename K::Mask mask, const typename K::Element* from, typename K::Element* to) {
                         requires K::kCount > 0 && kBlock % (2 * K::kCount) == 0;
                         { K::load(from) } -> std::same_as<K>;
                         K::store(to, k);
                         K::stream(to, k);
                         { K::greater(k, k) } -> std::same_as<typename K::Mask>;
                         { K::at_most(mask, k, k) } -> std::same_as<typename K::Mask>;
                         { K::masked(mask, k) } -> std::same_as<K>;
                         { K::select(mask, k, k) } -> std::same_as<K>;
                         { K::max_magnitude(k, k) } -> std::same_as<K>;
                         { K::any_above(k, *from) } -> std::same_as<bool>;
                         { K::rounded(k.floats()) } -> std::same_as<K>;
                       };
// kEntries of a table are in a register. An index begins at kIndexStart and counts in kIndexUnit.
template <class K, class T>
concept IsSearchKey =
    K::kSearchBits <= K::kCompareBits || requires(K k, typename K::Mask mask, typename K::Index index, const K* table) {
      { K::template look_up<1>(table, index) } -> std::same_as<K>;
      { K::raise(index, mask, K::kIndexUnit) } -> std::same_as<typename K::Index>;
      { K::indices(K::kIndexStart) } -> std::same_as<typename K::Index>;
      { K::whole(k) } -> std::same_as<typename K::Index>;
    };
// level() and floor() are two more ways back, load_floats() loads in the order of floats(); numbers of 16 bits are
// clamped.
template <class K, class T>
concept IsArithmeticKey = !K::kArithmetic || requires(K k, const float* alphas) {
  requires sizeof(T) > 2 || requires { K::clamp(k, k, k); };
  { K::level(k.floats()) } -> std::same_as<K>;
  { K::floor(k.floats()) } -> std::same_as<K>;
  { K::load_floats(alphas) } -> std::same_as<decltype(k.floats())>;
};
// Halves: numbers halfway between two of T, and rounding of ties up, for staircases of kHalvesBits or more. Optional.
template <class K>
concept IsHalvesKey = !kHasHalves<K> || requires(K k, typename K::Halves halves, typename K::Mask mask) {
  { halves.halfway_down(k, k, k) } -> std::same_as<decltype(k.floats())>;
  { halves.rounded(k.floats()) } -> std::same_as<K>;
  { K::differ(k.plus(1), K::of(K::masked(mask, K::whole(k.floats())))) } -> std::same_as<typename K::Mask>;
  requires K::kHalvesBits > K::kCompareBits;
};
template <class T, class K = CompareKey<T>>
concept HasCompareKey = IsCompareKey<K, T> && IsSearchKey<K, T> && IsArithmeticKey<K, T> && IsHalvesKey<K>;
static_assert(HasCompareKey<float> && HasCompareKey<double> && HasCompareKey<bf16> && HasCompareKey<f16>);

// kAnyAlpha: whether alphas that are not regular are served. kPrefetchBytes: how far ahead of the loads memory is asked
// for. kChains: of how many pairs a chain of dependent operations is evaluated side by side.
static_assert(std::same_as<decltype(kAnyAlpha), const bool> && kPrefetchBytes >= 0 && (kChains == 1 || kChains == 2));
static_assert(requires { stream_fence(); });

}  // namespace cg::CG_ISA

// An instruction set's layers on codes against sums of products one by one. Built once for each set; those that need
// AVX-512, VNNI or AMX run by avx512_host.h. An argument is the number of random layers, for longer runs. Python tests
// hold the sets that this machine has to the oracle, op by op.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include CG_SOURCE  // the set's integer.cpp

namespace {

using namespace cg;

std::mt19937 generator(1);
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

int64_t codes_checked = 0;

// Numbers behind which no memory can be read or written: a kernel that goes on ends the program, with no sanitizer.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * static_cast<int64_t>(sizeof(T));
    room_ = (bytes + page - 1) / page * page + page;
    void* const from = mmap(nullptr, room_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (from == MAP_FAILED) std::abort();
    from_ = static_cast<uint8_t*>(from);
    mprotect(from_ + room_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(from_ + room_ - page - bytes);
  }
  ~Guarded() { munmap(from_, room_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* data() { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  int64_t count_, room_;
  uint8_t* from_;
  T* data_;
};

struct Case {
  int bits, weight_bits;
  int64_t images, channels, out_channels, groups;
  int64_t size[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t rows_per_task, channels_per_task;
  bool extremes;  // only the largest codes and weights
  bool by_columns;
};

int top_weight(int bits) { return bits == 1 ? 1 : bits == 8 ? 127 : (1 << (bits - 1)) - 1; }
int low_weight(int bits) { return bits == 1 ? -1 : -(1 << (bits - 1)); }

// Extremes have one sign in most channels, where sums are the largest.
int draw_weight(const Case& c, int64_t output) {
  const int top = top_weight(c.weight_bits), low = low_weight(c.weight_bits);
  if (c.extremes && output % 3 < 2) return output % 3 ? top : low;
  if (c.weight_bits == 1 || c.extremes) return draw(0, 1) ? top : low;
  return static_cast<int>(draw(low, top));
}

// A row of packed weights, by the layout of docs/spec.md.
void pack(const std::vector<int>& weights, int bits, uint8_t* row) {
  const int64_t per_block = 32 * 8 / bits;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int field = bits == 1 ? weights[i] > 0 : weights[i] & ((1 << bits) - 1);
    row[i / per_block * 32 + i % 32] |= static_cast<uint8_t>(field << (i % per_block / 32 * bits));
  }
}

bool matches(const Case& c) {
  const int64_t inputs = c.channels / c.groups, outputs = c.out_channels / c.groups;
  const int64_t row_codes = inputs * c.kernel[0] * c.kernel[1];
  IntegerLayer a{};
  a.bits = c.bits, a.weight_bits = c.weight_bits;
  a.images = c.images, a.channels = c.channels, a.out_channels = c.out_channels, a.groups = c.groups;
  for (int i = 0; i < 2; ++i) {
    a.size[i] = c.size[i], a.kernel[i] = c.kernel[i], a.stride[i] = c.stride[i];
    a.padding[i] = c.padding[i], a.dilation[i] = c.dilation[i];
    const int64_t room = c.size[i] + 2 * c.padding[i] - c.dilation[i] * (c.kernel[i] - 1) - 1;
    if (room < 0) return true;
    a.out_size[i] = room / c.stride[i] + 1;
  }
  a.row_bytes = (row_codes * c.weight_bits + 255) / 256 * 32;
  const int64_t rows = c.images * a.out_size[0] * a.out_size[1], top = (1 << c.bits) - 1;
  a.rows_per_task = c.rows_per_task, a.channels_per_task = c.channels_per_task;
  a.by_columns = c.by_columns && CG_KERNELS.by_columns;
  a.depthwise = c.groups == c.channels && c.groups == c.out_channels;
  if (a.depthwise) a.groups = 1, a.channels_per_task = c.channels;

  Guarded<uint8_t> codes(c.images * c.size[0] * c.size[1] * c.channels);
  for (auto& code : codes) code = static_cast<uint8_t>(c.extremes ? top : draw(0, top));
  std::vector<std::vector<int>> weights(c.out_channels, std::vector<int>(row_codes));
  Guarded<uint8_t> packed(c.out_channels * a.row_bytes);
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (auto& weight : weights[o]) weight = draw_weight(c, o);
    pack(weights[o], c.weight_bits, packed.data() + o * a.row_bytes);
  }
  std::vector<int32_t> acc(rows * c.out_channels);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t x = r % a.out_size[1], y = r / a.out_size[1] % a.out_size[0], n = r / (a.out_size[0] * a.out_size[1]);
    for (int64_t o = 0; o < c.out_channels; ++o) {
      int64_t sum = 0;
      for (int64_t k = 0; k < row_codes; ++k) {
        const int64_t at_y = y * c.stride[0] - c.padding[0] + k / inputs / c.kernel[1] * c.dilation[0];
        const int64_t at_x = x * c.stride[1] - c.padding[1] + k / inputs % c.kernel[1] * c.dilation[1];
        if (at_y < 0 || at_y >= c.size[0] || at_x < 0 || at_x >= c.size[1]) continue;
        const int64_t channel = o / outputs * inputs + k % inputs;
        sum += codes[((n * c.size[0] + at_y) * c.size[1] + at_x) * c.channels + channel] * weights[o][k];
      }
      acc[r * c.out_channels + o] = static_cast<int32_t>(sum);
    }
  }
  const int levels = static_cast<int>(draw(1, 255));
  Guarded<float> scale(c.out_channels), offset(c.out_channels);
  Guarded<int32_t> thresholds(c.out_channels * levels);
  for (int64_t o = 0; o < c.out_channels; ++o) {
    const int64_t spread = 1 + std::abs(rows ? acc[draw(0, rows - 1) * c.out_channels + o] : 0);
    scale[o] = static_cast<float>(levels) / static_cast<float>(spread);
    offset[o] = static_cast<float>(draw(-levels, levels));
    int64_t at = rows ? acc[draw(0, rows - 1) * c.out_channels + o] : 0;
    for (int k = 0; k < levels; ++k, at += draw(0, 2)) thresholds[o * levels + k] = static_cast<int32_t>(at);
  }
  a.codes = codes.data(), a.weight = packed.data(), a.scale = scale.data(), a.offset = offset.data();
  a.levels = levels;
  const IntegerShape shape(a);
  const int64_t count = static_cast<int64_t>(acc.size());
  Guarded<float> out(count);
  Guarded<uint8_t> out_codes(count), by_thresholds(count);
  const auto run = [&] {
    Guarded<uint8_t> scratch(IntegerShape::rounded(shape.scratch(a), 64));
    std::memset(scratch.data(), 0xa5, scratch.size());
    const int64_t middle = shape.tasks(a) / 3;  // in two parts, the later first
    CG_KERNELS.layer(a, middle, shape.tasks(a), scratch.data());
    CG_KERNELS.layer(a, 0, middle, scratch.data());
  };
  a.out = out.data();
  run();
  a.out_codes = out_codes.data();
  run();
  a.out_codes = by_thresholds.data(), a.thresholds = thresholds.data();
  run();
  codes_checked += 2 * count;
  for (size_t i = 0; i < acc.size(); ++i) {
    const size_t o = i % c.out_channels;
    const volatile float product = static_cast<float>(acc[i]) * scale[o];
    const float v = product + offset[o];
    int reached = 0;
    for (int k = 0; k < levels; ++k) reached += acc[i] >= thresholds[o * levels + k];
    const int code = static_cast<int>(std::fmin(std::fmax(std::ceil(v), 0.0f), static_cast<float>(levels)));
    if (out[i] == v && out_codes[i] == code && by_thresholds[i] == reached) continue;
    std::printf(
        "%s: bits %d, weights of %d bits, %lld x %lld rows, %lld channels, %lld groups, element %zu of sum %d: ",
        CG_KERNELS.isa, c.bits, c.weight_bits, (long long)rows, (long long)row_codes, (long long)c.out_channels,
        (long long)c.groups, i, acc[i]);
    std::printf("got %g, %d, %d, wanted %g, %d, %d\n", out[i], out_codes[i], by_thresholds[i], v, code, reached);
    return false;
  }
  return true;
}

Case random_case() {
  Case c{};
  c.bits = static_cast<int>(draw(1, 8)), c.weight_bits = 1 << draw(0, 3);
  c.extremes = draw(0, 3) == 0;
  const bool linear = draw(0, 1);
  const bool depthwise = !linear && draw(0, 4) == 0;
  c.groups = linear ? 1 : depthwise ? draw(2, 70) : draw(0, 2) ? 1 : draw(2, 5);
  c.channels = c.groups * (depthwise ? 1 : draw(1, linear ? 700 : 40));
  c.out_channels = c.groups * (depthwise ? 1 : draw(1, linear ? 70 : 20));
  c.images = linear ? draw(0, 70) : draw(1, 2);
  for (int i = 0; i < 2; ++i) {
    c.size[i] = linear ? 1 : draw(1, 8), c.kernel[i] = linear ? 1 : draw(1, 3), c.stride[i] = linear ? 1 : draw(1, 2);
    c.padding[i] = linear ? 0 : draw(0, 2), c.dilation[i] = linear ? 1 : draw(1, 2);
  }
  c.rows_per_task = draw(1, 70), c.channels_per_task = draw(1, 70), c.by_columns = draw(0, 1);
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  int failures = 0;
  for (int i = 0; i < cases && failures < 5; ++i) failures += !matches(random_case());
  // Windows so large that their largest sums leave 16 bits, of each channel by itself.
  for (int bits = 1; bits <= 8; ++bits) {
    for (int weight_bits : {8, 4, 2, 1}) {
      failures +=
          !matches({bits, weight_bits, 1, 35, 35, 35, {9, 9}, {7, 7}, {1, 1}, {3, 3}, {1, 1}, 33, 35, true, false});
    }
  }
  // The same where they lie in the image: whole blocks of channels, and no padding.
  for (int64_t channels : {32, 64}) {
    for (int bits : {4, 8}) {
      for (int64_t stride : {1, 2}) {
        for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {1, 5}, {5, 1}, {3, 3}}) {
          for (bool extremes : {false, true}) {
            failures += !matches({bits,
                                  8,
                                  2,
                                  channels,
                                  channels,
                                  channels,
                                  {9, 11},
                                  {height, width},
                                  {stride, stride},
                                  {0, 0},
                                  {1, stride},
                                  7,
                                  channels,
                                  extremes,
                                  false});
          }
        }
      }
    }
  }
  // 8 bits of both across channels: in parts of some pieces of a window, which share codes with their neighbors or do
  // not, and by more rows than are brought into 16 bits at a time.
  for (int64_t channels : {3, 5, 64, 90}) {
    for (int64_t stride : {1, 2, 4}) {
      for (int64_t padding : {0, 1}) {
        failures += !matches({8,
                              8,
                              2,
                              channels,
                              35,
                              1,
                              {9, 11},
                              {3, 3},
                              {stride, stride},
                              {padding, padding},
                              {1, 1},
                              70,
                              35,
                              false,
                              true});
      }
    }
  }
  failures += !matches({8, 8, 70, 1101, 35, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 70, 35, false, true});
  // Rows so long that they are multiplied in parts.
  for (int weight_bits : {8, 4, 2, 1}) {
    for (bool by_columns : {false, true}) {
      // The largest sums, of rows of which the last codes are not as many as are multiplied at a time.
      for (int bits = 1; bits <= 8; ++bits) {
        const Case c{bits, weight_bits, 5, 75, 19, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 5, 19, true, by_columns};
        failures += !matches(c);
      }
      const Case c{8, weight_bits, 33, 33000, 3, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 33, 3, true, by_columns};
      failures += !matches(c);
    }
  }
  if (failures == 0)
    std::printf("%s: %lld codes of %d random layers are exact\n", CG_KERNELS.isa, (long long)codes_checked, cases);
  return failures != 0;
}

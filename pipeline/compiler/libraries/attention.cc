// Attention behind one C function: a share of softmax(scale * q k' + mask) v, a block of rows at a time.
//
// attention  q, y: batch..., rows, depth; k: batch..., keys, depth; v: batch..., keys, depth of y;
//            scale, a number; mask, where there is one: batch..., rows, keys
//
// Scores live in the cache: those of a few rows are computed, made weights of, and summed over the values before the
// next rows' are. Any strides will do, since keys and values are packed once for each batch. The caller splits the work
// into tasks and calls for each, from a parallel loop of its own.
//
// Needs nothing but the C++ compiler. The widest vectors that the processor has are chosen when it runs.

#include <algorithm>
#include <limits>

#include "shim.h"

#define INLINED inline __attribute__((always_inline))

namespace {

using tvmake::Description;
using tvmake::Done;
using tvmake::Numbers;
using tvmake::Scratch;
using tvmake::Tensor;

// The distance from one index to the next; 0 where a tensor has but one, which is then everybody's.
int64_t stride(const Tensor& tensor, std::size_t at) { return tensor.extents[at] == 1 ? 0 : tensor.strides[at]; }

// One batch of a tensor as rows and columns.
struct Grid {
  int64_t row, column;

  explicit Grid(const Tensor& tensor)
      : row(stride(tensor, tensor.extents.size() - 2)), column(stride(tensor, tensor.extents.size() - 1)) {}
};

struct Pointers {
  const float *q, *k, *v, *mask;
  float* y;
};

class Attention {
 public:
  explicit Attention(const Description& d)
      : q_(d.tensor_at("q")), k_(d.tensor_at("k")), v_(d.tensor_at("v")), y_(d.tensor_at("y")),
        has_mask_(!d.value("mask").empty()), mask_(has_mask_ ? d.tensor_at("mask") : y_),
        q(q_), k(k_), v(v_), y(y_), mask(mask_), scale(tvmake::real(d.value("scale"))) {
    const std::size_t rank = y_.extents.size();
    for (const Tensor* each : {&q_, &k_, &v_, &mask_}) {
      if (rank < 2 || each->extents.size() != rank) throw std::invalid_argument("ranks");
    }
    rows = q_.extents[rank - 2], depth = q_.extents[rank - 1];
    keys = k_.extents[rank - 2], width = v_.extents[rank - 1];
    if (k_.extents[rank - 1] != depth || v_.extents[rank - 2] != keys) throw std::invalid_argument("extents");
    if (y_.extents[rank - 2] != rows || y_.extents[rank - 1] != width) throw std::invalid_argument("extents");
    for (std::size_t i = 0; i + 2 < rank; ++i) batches *= y_.extents[i];
  }

  Pointers batch(const Pointers& all, int64_t number) const {
    return {all.q + offset(q_, number), all.k + offset(k_, number), all.v + offset(v_, number),
            has_mask_ ? all.mask + offset(mask_, number) : nullptr, all.y + offset(y_, number)};
  }

 private:
  int64_t offset(const Tensor& tensor, int64_t number) const {
    int64_t found = 0;
    for (std::size_t i = y_.extents.size() - 2; i-- > 0;) {
      found += number % y_.extents[i] * stride(tensor, i);
      number /= y_.extents[i];
    }
    return found;
  }

  Tensor q_, k_, v_, y_;
  bool has_mask_;
  Tensor mask_;

 public:
  Grid q, k, v, y, mask;
  float scale;
  int64_t rows = 0, keys = 0, depth = 0, width = 0, batches = 1;
};

int64_t rounded(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Vectors of a number of floats, and how many rows of a tile they are best computed for.
template <int kLanes>
struct Vectors {
  using Floats __attribute__((vector_size(4 * kLanes), may_alias)) = float;
  using Integers __attribute__((vector_size(4 * kLanes), may_alias)) = int32_t;

  static constexpr int kWide = 2 * kLanes;  // columns of a tile
  static constexpr int kRows = kLanes == 16 ? 8 : 4;
};

template <int kLanes>
struct Kernel : Vectors<kLanes> {
  using typename Vectors<kLanes>::Floats;
  using typename Vectors<kLanes>::Integers;
  using Vectors<kLanes>::kWide;
  using Vectors<kLanes>::kRows;

  struct Buffers {
    float *keys, *values, *queries, *scores;
  };

  static INLINED Buffers buffers(const Attention& a, Scratch& scratch) {
    const int64_t keys = rounded(a.keys, kWide) * a.depth, values = a.keys * rounded(a.width, kWide);
    const int64_t queries = rounded(kRows * a.depth, kWide), scores = kRows * rounded(a.keys, kWide);
    float* memory = static_cast<float*>(scratch.of(sizeof(float) * (keys + values + queries + scores)));
    return {memory, memory + keys, memory + keys + values, memory + keys + values + queries};
  }

  // count x columns by strides  →  for each kWide columns: count rows of them, zeros after the last column
  static INLINED void pack(const float* from, int64_t count, int64_t columns, int64_t row, int64_t column, float* to) {
    for (int64_t begin = 0; begin < columns; begin += kWide) {
      const int64_t some = std::min<int64_t>(kWide, columns - begin);
      for (int64_t i = 0; i < count; ++i, to += kWide) {
        const float* line = from + i * row + begin * column;
        if (some == kWide && column == 1) {
          for (int64_t j = 0; j < kWide; ++j) to[j] = line[j];
        } else {
          for (int64_t j = 0; j < kWide; ++j) to[j] = j < some ? line[j * column] : 0;
        }
      }
    }
  }

  // As `pack` for what lies column by column: keys, whose columns are a product's rows.
  static INLINED void pack_turned(const float* from, int64_t count, int64_t columns, int64_t row, int64_t column,
                                  float* to) {
    for (int64_t begin = 0; begin < columns; begin += kWide, to += count * kWide) {
      const int64_t some = std::min<int64_t>(kWide, columns - begin);
      for (int64_t j = 0; j < some; ++j) {
        const float* line = from + (begin + j) * column;
        for (int64_t i = 0; i < count; ++i) to[i * kWide + j] = line[i * row];
      }
      for (int64_t i = 0; i < count; ++i) std::fill(to + i * kWide + some, to + (i + 1) * kWide, 0.f);
    }
  }

  // kRows x kWide sums of products: rows of `left` that lie `pitch` apart, times `count` packed lines of `right`.
  static INLINED void product(const float* left, int64_t pitch, const float* right, int64_t count, float* to,
                              int64_t line) {
    Floats sums[kRows][2] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Floats one = *reinterpret_cast<const Floats*>(right + i * kWide);
      const Floats two = *reinterpret_cast<const Floats*>(right + i * kWide + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float factor = left[r * pitch + i];
        sums[r][0] += factor * one;
        sums[r][1] += factor * two;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      *reinterpret_cast<Floats*>(to + r * line) = sums[r][0];
      *reinterpret_cast<Floats*>(to + r * line + kLanes) = sums[r][1];
    }
  }

  // e to the power of x, for x of 0 and less; what is too small for a normal number is the smallest one. After Cephes:
  // x = n ln 2 + r, a polynomial for r, and n added to the exponent. The large number rounds to an integer.
  static INLINED void exponential(Floats& x) {
    const Floats least = Floats{} - 87.3f;
    constexpr float kRounding = 12582912.0f;
    constexpr int32_t kRoundingBits = 0x4B400000;
    x = x < least ? least : x;
    const Floats shifted = x * 1.44269504088896341f + kRounding;
    const Floats n = shifted - kRounding;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Integers power = ((Integers)shifted - (kRoundingBits - 127)) << 23;
    x = p * (Floats)power;  // a cast of vectors keeps their bits
  }

  // A row of scores becomes weights that are not divided by their sum yet; returns that sum.
  static INLINED float weigh(float* row, int64_t keys, const float* mask, int64_t column) {
    if (mask && column == 1) {
      for (int64_t i = 0; i < keys; ++i) row[i] += mask[i];
    } else if (mask) {
      for (int64_t i = 0; i < keys; ++i) row[i] += mask[i * column];
    }
    const int64_t whole = rounded(keys, kLanes);
    for (int64_t i = keys; i < whole; ++i) row[i] = -std::numeric_limits<float>::infinity();
    Floats* vectors = reinterpret_cast<Floats*>(row);
    Floats most = vectors[0], sums = {};
    for (int64_t i = 1; i < whole / kLanes; ++i) most = vectors[i] > most ? vectors[i] : most;
    float highest = most[0];
    for (int i = 1; i < kLanes; ++i) highest = std::max(highest, most[i]);
    for (int64_t i = 0; i < whole / kLanes; ++i) {
      Floats weight = vectors[i] - highest;
      exponential(weight);
      vectors[i] = weight;
      sums += weight;
    }
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    return sum;
  }

  // Rows from `begin` on of one batch.
  static INLINED void rows(const Attention& a, const Pointers& at, const Buffers& b, int64_t begin) {
    const int64_t some = std::min<int64_t>(kRows, a.rows - begin), pitch = rounded(a.keys, kWide);
    for (int64_t r = 0; r < kRows; ++r) {
      const float* from = at.q + (begin + r) * a.q.row;
      float* to = b.queries + r * a.depth;
      if (r >= some) {
        std::fill(to, to + a.depth, 0.f);
      } else if (a.q.column == 1) {
        for (int64_t i = 0; i < a.depth; ++i) to[i] = a.scale * from[i];
      } else {
        for (int64_t i = 0; i < a.depth; ++i) to[i] = a.scale * from[i * a.q.column];
      }
    }
    for (int64_t key = 0; key < pitch; key += kWide) {
      product(b.queries, a.depth, b.keys + key * a.depth, a.depth, b.scores + key, pitch);
    }
    float shares[kRows];
    for (int64_t r = 0; r < some; ++r) {
      const float* mask = at.mask ? at.mask + (begin + r) * a.mask.row : nullptr;
      shares[r] = 1 / weigh(b.scores + r * pitch, a.keys, mask, a.mask.column);
    }
    alignas(64) float tile[kRows * kWide];
    for (int64_t column = 0; column < a.width; column += kWide) {
      product(b.scores, pitch, b.values + column * a.keys, a.keys, tile, kWide);
      for (int64_t r = 0; r < some; ++r) {
        float* to = at.y + (begin + r) * a.y.row + column * a.y.column;
        const int64_t wide = std::min<int64_t>(kWide, a.width - column);
        if (wide == kWide && a.y.column == 1) {
          for (int64_t i = 0; i < kWide; ++i) to[i] = tile[r * kWide + i] * shares[r];
        } else {
          for (int64_t i = 0; i < wide; ++i) to[i * a.y.column] = tile[r * kWide + i] * shares[r];
        }
      }
    }
  }

  static INLINED void run(const Attention& a, const Pointers& all, Scratch& scratch, int64_t task, int64_t tasks) {
    const Buffers b = buffers(a, scratch);
    const int64_t blocks = rounded(a.rows, kRows) / kRows, units = a.batches * blocks;
    int64_t packed = -1;
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      const Pointers at = a.batch(all, unit / blocks);
      if (unit / blocks != packed) {
        pack_turned(at.k, a.depth, a.keys, a.k.column, a.k.row, b.keys);
        pack(at.v, a.keys, a.width, a.v.row, a.v.column, b.values);
        packed = unit / blocks;
      }
      rows(a, at, b, unit % blocks * kRows);
    }
  }
};

using Run = void (*)(const Attention&, const Pointers&, Scratch&, int64_t, int64_t);

void run_narrow(const Attention& a, const Pointers& all, Scratch& scratch, int64_t task, int64_t tasks) {
  Kernel<4>::run(a, all, scratch, task, tasks);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_avx2(const Attention& a, const Pointers& all, Scratch& scratch,
                                                  int64_t task, int64_t tasks) {
  Kernel<8>::run(a, all, scratch, task, tasks);
}

__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))) void run_avx512(const Attention& a, const Pointers& all,
                                                                          Scratch& scratch, int64_t task,
                                                                          int64_t tasks) {
  Kernel<16>::run(a, all, scratch, task, tasks);
}

const char* level() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw")) {
    return "avx512";
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "avx2" : "narrow";
}

Run chosen(const std::string& level) {
  return level == "avx512" ? run_avx512 : level == "avx2" ? run_avx2 : run_narrow;
}
#else
const char* level() { return "narrow"; }
Run chosen(const std::string&) { return run_narrow; }
#endif

tvmake::Sites<Attention>& sites() {
  static auto* made = new tvmake::Sites<Attention>();
  return *made;
}

}  // namespace

TVMAKE_EXPORT int tvmake_attention_plan(const char* description, int, char* answer, std::size_t size) {
  return tvmake::guarded([=] {
    const Attention made{Description(description)};
    return tvmake::answered(std::string("implementation=") + level(), answer, size);
  });
}

TVMAKE_EXPORT int tvmake_attention_run(const char* description, const float* q, const float* k, const float* v,
                                       const float* mask, float* y, int task, int tasks) {
  return tvmake::guarded([=] {
    static const Run run = chosen(level());
    thread_local Scratch scratch;
    run(sites().of(description), {q, k, v, mask, y}, scratch, task, tasks);
    return Done;
  });
}

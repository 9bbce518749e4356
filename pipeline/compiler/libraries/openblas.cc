// OpenBLAS behind one C function: a share of a matrix product and of the steps after it.
//
// matmul  x: batch..., m, k; w: batch..., k, n; y: batch..., m, n; each matrix with one stride of 1
//
// Threads are the caller's: it splits a product into tasks and calls for each, from a parallel loop of its own. So
// OpenBLAS is told once to use no threads itself.

#include <cblas.h>

#include <algorithm>
#include <cmath>

#include "shim.h"

// Builds for SciPy put a prefix before every symbol.
#ifdef BLAS_SYMBOL_PREFIX
#define JOIN_NAMES(a, b) a##b
#define JOINED(a, b) JOIN_NAMES(a, b)
#define BLAS(name) JOINED(BLAS_SYMBOL_PREFIX, name)
#else
#define BLAS(name) name
#endif

// The loops over elements, for the vectors of the processor that they run on: who compiles does not know which.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TVMAKE_FOR_EACH_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TVMAKE_FOR_EACH_ISA
#endif
#define TVMAKE_INLINE __attribute__((always_inline)) inline

namespace {

using tvmake::Description;
using tvmake::Done;
using tvmake::Numbers;
using tvmake::Refused;
using tvmake::Step;
using tvmake::Tensor;

constexpr int kOperands = 4;
// Columns of one task are a multiple of what the kernels compute at once.
constexpr int64_t kGranularity = 32;

// A matrix: extents and strides of rows and columns.
struct Matrix {
  int64_t rows, columns, row, column;

  Matrix transposed() const { return {columns, rows, column, row}; }
  bool is_row_major() const { return column == 1 || columns == 1; }
  bool is_column_major() const { return row == 1 || rows == 1; }
  bool is_plain() const { return is_row_major() || is_column_major(); }
  // The distance between rows, or between columns where these are contiguous; at least what BLAS asks for.
  blasint leading() const {
    return static_cast<blasint>(is_row_major() ? std::max(row, columns) : std::max(column, rows));
  }
  CBLAS_TRANSPOSE flag() const { return is_row_major() ? CblasNoTrans : CblasTrans; }
};

Matrix last_two(const Tensor& tensor) {
  const std::size_t n = tensor.extents.size();
  return {tensor.extents[n - 2], tensor.extents[n - 1], tensor.strides[n - 2], tensor.strides[n - 1]};
}

enum class Kind { Relu, Leaky, Clip, Linear, HardSigmoid, HardSwish, Add, Sub, Mul, Div, Max, Min };

Kind kind_of(const std::string& name) {
  constexpr std::pair<const char*, Kind> kKnown[] = {
      {"relu", Kind::Relu}, {"leaky", Kind::Leaky}, {"clip", Kind::Clip}, {"linear", Kind::Linear},
      {"hardsigmoid", Kind::HardSigmoid}, {"hardswish", Kind::HardSwish}, {"add", Kind::Add}, {"sub", Kind::Sub},
      {"mul", Kind::Mul}, {"div", Kind::Div}, {"max", Kind::Max}, {"min", Kind::Min},
  };
  for (const auto& [known, kind] : kKnown) {
    if (name == known) return kind;
  }
  throw std::invalid_argument("no step " + name);
}

struct After {
  Kind kind;
  float a = 0, b = 0;
  int operand = -1;
  Tensor tensor;
  Matrix at{1, 1, 0, 0};  // strides of the operand along the result's rows and columns, 0 where it broadcasts
};

int64_t broadcast(int64_t extent, int64_t stride) { return extent == 1 ? 0 : stride; }

class Product {
 public:
  explicit Product(const Description& d)
      : y_(d.tensor_at("y")), x_(d.tensor_at("x", y_.extents.size())), w_(d.tensor_at("w", y_.extents.size())) {
    if (d.kind != "matmul" || y_.extents.size() < 2) throw std::invalid_argument(d.kind);
    // A process that uses OpenBLAS elsewhere has that one under another name, with threads of its own.
    BLAS(openblas_set_num_threads)(1);
    left_ = last_two(x_), right_ = last_two(w_), result_ = last_two(y_);
    is_turned_ = !result_.is_row_major();
    if (is_turned_) {  // y' = w' x'
      const Matrix left = left_;
      left_ = right_.transposed(), right_ = left.transposed(), result_ = result_.transposed();
    }
    if (!left_.is_plain() || !right_.is_plain() || !result_.is_row_major()) throw std::invalid_argument("strides");
    batches_ = y_.size() / (result_.rows * result_.columns);
    for (const Step& step : d.steps) add(step);
  }

  int run(const float* x, const float* w, float* y, const float* const* operands, int task, int tasks) const {
    const bool by_columns = result_.columns >= result_.rows;
    const int64_t whole = by_columns ? result_.columns : result_.rows;
    const int64_t most = std::max<int64_t>(1, whole / kGranularity);
    const int64_t pieces = std::min(most, (tasks + batches_ - 1) / batches_);
    const int64_t units = batches_ * pieces;
    const int64_t size = (whole + pieces - 1) / pieces;
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      const int64_t begin = unit % pieces * size, end = std::min(whole, begin + size);
      if (begin >= end) continue;
      const Part part = by_columns ? Part{0, result_.rows, begin, end} : Part{begin, end, 0, result_.columns};
      one(x, w, y, operands, unit / pieces, part);
    }
    return Done;
  }

 private:
  struct Part {
    int64_t top, bottom, left, right;
  };

  void add(const Step& step) {
    After made{kind_of(step.name), 0, 0, -1, {}, {1, 1, 0, 0}};
    if (step.has_operand) {
      made.operand = operands_++;
      made.tensor = step.operand;
      const Matrix at = last_two(step.operand);
      made.at.row = broadcast(at.rows, at.row), made.at.column = broadcast(at.columns, at.column);
      if (is_turned_) std::swap(made.at.row, made.at.column);
    } else {
      made.a = step.numbers.empty() ? 0 : step.numbers[0];
      made.b = step.numbers.size() > 1 ? step.numbers[1] : 0;
    }
    if (operands_ > kOperands) throw std::invalid_argument("operands");
    after_.push_back(made);
  }

  // Where a batch begins in a tensor.
  int64_t offset(const Tensor& tensor, int64_t batch) const {
    int64_t found = 0;
    for (std::size_t i = tensor.extents.size() - 2; i-- > 0;) {
      found += batch % y_.extents[i] * broadcast(tensor.extents[i], tensor.strides[i]);
      batch /= y_.extents[i];
    }
    return found;
  }

  void one(const float* x, const float* w, float* y, const float* const* operands, int64_t batch,
           const Part& part) const {
    const float* a = (is_turned_ ? w + offset(w_, batch) : x + offset(x_, batch)) + part.top * left_.row;
    const float* b = (is_turned_ ? x + offset(x_, batch) : w + offset(w_, batch)) + part.left * right_.column;
    float* c = y + offset(y_, batch) + part.top * result_.row + part.left;
    const blasint m = static_cast<blasint>(part.bottom - part.top), n = static_cast<blasint>(part.right - part.left);
    const blasint k = static_cast<blasint>(left_.columns);
    if (result_.rows == 1) {
      const bool rows_first = right_.is_row_major();
      BLAS(cblas_sgemv)(CblasRowMajor, rows_first ? CblasTrans : CblasNoTrans, rows_first ? k : n, rows_first ? n : k,
                        1, b, right_.leading(), a, static_cast<blasint>(std::max<int64_t>(1, left_.column)), 0, c, 1);
    } else {
      BLAS(cblas_sgemm)(CblasRowMajor, left_.flag(), right_.flag(), m, n, k, 1, a, left_.leading(), b,
                        right_.leading(), 0, c, static_cast<blasint>(std::max(result_.row, result_.columns)));
    }
    for (int64_t row = 0; row < m && !after_.empty(); ++row) {
      for (const After& each : after_) {
        const float* operand = each.operand < 0 ? nullptr
                                                : operands[each.operand] + offset(each.tensor, batch) +
                                                      (part.top + row) * each.at.row + part.left * each.at.column;
        apply(each, c + row * result_.row, n, operand);
      }
    }
  }

  TVMAKE_FOR_EACH_ISA static void apply(const After& step, float* c, int64_t n, const float* operand) {
    const float a = step.a, b = step.b;
    switch (step.kind) {
      case Kind::Relu: return each(c, n, [](float v) { return v > 0 ? v : 0; });
      case Kind::Leaky: return each(c, n, [a](float v) { return v > 0 ? v : a * v; });
      case Kind::Clip: return each(c, n, [a, b](float v) { return std::min(std::max(v, a), b); });
      case Kind::Linear: return each(c, n, [a, b](float v) { return a * v + b; });
      case Kind::HardSigmoid: return each(c, n, [a, b](float v) { return std::min(std::max(a * v + b, 0.f), 1.f); });
      case Kind::HardSwish: return each(c, n, [a, b](float v) { return v * std::min(std::max(a * v + b, 0.f), 1.f); });
      case Kind::Add: return both(c, n, operand, step.at.column, [](float v, float o) { return v + o; });
      case Kind::Sub: return both(c, n, operand, step.at.column, [](float v, float o) { return v - o; });
      case Kind::Mul: return both(c, n, operand, step.at.column, [](float v, float o) { return v * o; });
      case Kind::Div: return both(c, n, operand, step.at.column, [](float v, float o) { return v / o; });
      case Kind::Max: return both(c, n, operand, step.at.column, [](float v, float o) { return std::max(v, o); });
      case Kind::Min: return both(c, n, operand, step.at.column, [](float v, float o) { return std::min(v, o); });
    }
  }

  template <typename F>
  TVMAKE_INLINE static void each(float* c, int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) c[i] = f(c[i]);
  }

  template <typename F>
  TVMAKE_INLINE static void both(float* c, int64_t n, const float* operand, int64_t stride, F f) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) c[i] = f(c[i], operand[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) c[i] = f(c[i], operand[i * stride]);
    }
  }

  Tensor y_, x_, w_;
  Matrix left_, right_, result_;
  bool is_turned_ = false;
  int64_t batches_ = 1;
  int operands_ = 0;
  std::vector<After> after_;
};

tvmake::Sites<Product>& sites() {
  static auto* made = new tvmake::Sites<Product>();
  return *made;
}

}  // namespace

TVMAKE_EXPORT int tvmake_openblas_plan(const char* description, int, char* answer, std::size_t size) {
  return tvmake::guarded([=] {
    const Product product{Description(description)};
    return tvmake::answered("implementation=gemm", answer, size);
  });
}

TVMAKE_EXPORT int tvmake_openblas_run(const char* description, const float* x, const float* w, float* y,
                                      const float* a, const float* b, const float* c, const float* d, int task,
                                      int tasks) {
  return tvmake::guarded([=] {
    const float* operands[kOperands] = {a, b, c, d};
    return sites().of(description).run(x, w, y, operands, task, tasks);
  });
}

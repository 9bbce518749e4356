// XNNPACK behind one C function: a share of a convolution or matrix product, with a bias and bounds.
//
// conv    x, y: batch, channels, spatial dimensions, with channels last; w: out, in, spatial dimensions
// matmul  x: m, k; w: k, n; y: m, n
//
// Threads are the caller's: it splits an operator into tasks, and each computes some rows of the result. XNNPACK packs
// weights when an operator is made, so that there is one for each task and each tensor of weights: only for weights
// that stay as they are. A few of their numbers are compared at each call, since memory may be given to other weights.

#include <xnnpack.h>

#include <algorithm>
#include <limits>
#include <map>
#include <shared_mutex>
#include <tuple>

#include "shim.h"

namespace {

using tvmake::Description;
using tvmake::Done;
using tvmake::Numbers;
using tvmake::Refused;
using tvmake::Step;
using tvmake::Tensor;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void require(xnn_status status) { require(status == xnn_status_success, "XNNPACK refused"); }

// A convolution over two dimensions; a matrix product is one over one pixel for each row.
struct Geometry {
  int64_t height = 1, width = 1, in = 1, out = 1, groups = 1;
  int64_t result_height = 1, result_width = 1;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, dilation[2] = {1, 1}, before[2] = {0, 0}, after[2] = {0, 0};
  bool is_product = false;
};

Geometry geometry(const Description& d) {
  const std::size_t dimensions = d.kind == "matmul" ? 2 : 4;
  const Tensor x = d.tensor_at("x", dimensions), w = d.tensor_at("w", dimensions), y = d.tensor_at("y", dimensions);
  Geometry g;
  if (d.kind == "matmul") {
    require(x.strides[1] == 1 && y.strides[1] == 1, "strides");
    require(x.strides[0] == x.extents[1] && y.strides[0] == y.extents[1], "gaps");
    g.is_product = true;
    g.height = g.result_height = x.extents[0], g.in = x.extents[1], g.out = y.extents[1];
    return g;
  }
  require(d.kind == "conv" && x.extents[0] == 1, "one image");
  g.in = x.extents[1], g.height = x.extents[2], g.width = x.extents[3];
  g.out = y.extents[1], g.result_height = y.extents[2], g.result_width = y.extents[3];
  require(g.in == 1 || x.strides[1] == 1, "channels last");
  require(g.width == 1 || x.strides[3] == g.in, "channels last");
  require(g.out == 1 || y.strides[1] == 1, "channels last");
  require(g.result_width == 1 || y.strides[3] == g.out, "channels last");
  g.groups = d.at("groups")[0];
  const struct {
    const char* name;
    int64_t* to;
  } words[] = {{"stride", g.stride}, {"dilation", g.dilation}, {"before", g.before}, {"after", g.after}};
  for (const auto& [name, to] : words) {
    const Numbers read = d.at(name);
    require(read.size() == 2, name);
    std::copy(read.begin(), read.end(), to);
  }
  g.kernel[0] = w.extents[2], g.kernel[1] = w.extents[3];
  return g;
}

using Made = std::unique_ptr<xnn_operator, decltype(&xnn_delete_operator)>;

// An operator as XNNPACK has it: for some rows of the result and one tensor of weights.
struct Share {
  int64_t first_input_row, input_rows;
  std::vector<float> samples;
  Made made{nullptr, xnn_delete_operator};
  std::mutex running;  // what is set up for a call belongs to it until it has run
};

class Operator {
 public:
  explicit Operator(const Description& d) : g_(geometry(d)), weight_(d.tensor_at("w")) {
    require(xnn_initialize(nullptr));
    low_ = -std::numeric_limits<float>::infinity(), high_ = std::numeric_limits<float>::infinity();
    for (const Step& step : d.steps) {
      const bool first = &step == &d.steps.front(), last = &step == &d.steps.back();
      if (step.name == "add") {
        const std::size_t channel = 1;  // of both kinds
        const bool along = step.operand.extents[channel] == g_.out && step.operand.size() == g_.out;
        require(first && along && (g_.out == 1 || step.operand.strides[channel] == 1), "a bias");
        has_bias_ = true;
      } else {
        require(last && (step.name == "relu" || step.name == "clip"), "bounds");
        low_ = step.name == "relu" ? 0 : step.numbers[0];
        if (step.name == "clip") high_ = step.numbers[1];
      }
    }
  }

  void run(const float* x, const float* w, float* y, const float* bias, int task, int tasks) const {
    const int64_t top = g_.result_height * task / tasks, bottom = g_.result_height * (task + 1) / tasks;
    if (top == bottom) return;
    Share& share = of(w, has_bias_ ? bias : nullptr, top, bottom);
    std::lock_guard<std::mutex> lock(share.running);
    const float* from = x + share.first_input_row * g_.width * g_.in;
    float* to = y + top * g_.result_width * g_.out;
    if (g_.is_product) {
      require(xnn_setup_fully_connected_nc_f32(share.made.get(), bottom - top, from, to, nullptr));
    } else {
      require(xnn_setup_convolution2d_nhwc_f32(share.made.get(), 1, share.input_rows, g_.width, from, to, nullptr));
    }
    require(xnn_run_operator(share.made.get(), nullptr));
  }

 private:
  using Key = std::tuple<const float*, const float*, int64_t, int64_t>;

  Share& of(const float* w, const float* bias, int64_t top, int64_t bottom) const {
    const Key key{w, bias, top, bottom};
    {
      std::shared_lock<std::shared_mutex> lock(guard_);
      const auto known = shares_.find(key);
      if (known != shares_.end() && known->second->samples == samples(w, bias)) return *known->second;
    }
    std::unique_ptr<Share> made = make(w, bias, top, bottom);
    std::unique_lock<std::shared_mutex> lock(guard_);
    std::unique_ptr<Share>& place = shares_[key];
    // Another thread may still run what was here, if it was made for the same memory.
    if (place) outdated_.push_back(std::move(place));
    place = std::move(made);
    return *place;
  }

  std::vector<float> samples(const float* w, const float* bias) const {
    constexpr int64_t kCount = 16;
    std::vector<float> found;
    const int64_t size = weight_.size();
    for (int64_t i = 0; i < kCount; ++i) found.push_back(w[size * i / kCount]);
    for (int64_t i = 0; bias && i < kCount; ++i) found.push_back(bias[g_.out * i / kCount]);
    return found;
  }

  std::unique_ptr<Share> make(const float* w, const float* bias, int64_t top, int64_t bottom) const {
    auto share = std::make_unique<Share>();
    const int64_t begin = top * g_.stride[0] - g_.before[0];
    const int64_t end = (bottom - 1) * g_.stride[0] + g_.dilation[0] * (g_.kernel[0] - 1) + 1 - g_.before[0];
    share->first_input_row = std::max<int64_t>(0, begin);
    share->input_rows = std::min(end, g_.height) - share->first_input_row;
    share->samples = samples(w, bias);
    const std::vector<float> kernel = turned(w);
    xnn_operator_t made = nullptr;
    if (g_.is_product) {
      require(xnn_create_fully_connected_nc_f32(g_.in, g_.out, g_.in, g_.out, kernel.data(), bias, low_, high_, 0,
                                                &made));
    } else {
      require(xnn_create_convolution2d_nhwc_f32(
          std::max<int64_t>(0, -begin), g_.after[1], std::max<int64_t>(0, end - g_.height), g_.before[1], g_.kernel[0],
          g_.kernel[1], g_.stride[0], g_.stride[1], g_.dilation[0], g_.dilation[1], g_.groups, g_.in / g_.groups,
          g_.out / g_.groups, g_.in, g_.out, kernel.data(), bias, low_, high_, 0, &made));
    }
    share->made.reset(made);
    return share;
  }

  // The weights with out first and in last, as XNNPACK reads them.
  std::vector<float> turned(const float* w) const {
    const Numbers& e = weight_.extents;
    const Numbers& s = weight_.strides;
    std::vector<float> made;
    made.reserve(weight_.size());
    if (g_.is_product) {
      for (int64_t o = 0; o < e[1]; ++o) {
        for (int64_t i = 0; i < e[0]; ++i) made.push_back(w[i * s[0] + o * s[1]]);
      }
      return made;
    }
    for (int64_t o = 0; o < e[0]; ++o) {
      for (int64_t h = 0; h < e[2]; ++h) {
        for (int64_t v = 0; v < e[3]; ++v) {
          for (int64_t i = 0; i < e[1]; ++i) made.push_back(w[o * s[0] + i * s[1] + h * s[2] + v * s[3]]);
        }
      }
    }
    return made;
  }

  const Geometry g_;
  const Tensor weight_;
  float low_, high_;
  bool has_bias_ = false;
  mutable std::shared_mutex guard_;
  mutable std::map<Key, std::unique_ptr<Share>> shares_;
  mutable std::vector<std::unique_ptr<Share>> outdated_;
};

tvmake::Sites<Operator>& sites() {
  static auto* made = new tvmake::Sites<Operator>();
  return *made;
}

}  // namespace

TVMAKE_EXPORT int tvmake_xnnpack_plan(const char* description, int, char* answer, std::size_t size) {
  return tvmake::guarded([=] {
    const Operator op{Description(description)};
    return tvmake::answered("implementation=xnnpack", answer, size);
  });
}

TVMAKE_EXPORT int tvmake_xnnpack_run(const char* description, const float* x, const float* w, float* y,
                                     const float* bias, int task, int tasks) {
  return tvmake::guarded([=] {
    sites().of(description).run(x, w, y, bias, task, tasks);
    return static_cast<int>(Done);
  });
}

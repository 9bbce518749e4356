// oneDNN behind three C functions: what it would do with an operator, packing its weights, and running it together with
// the steps after it.
//
// conv    x, y: batch, channels, spatial dimensions; w: out, in, spatial dimensions, of all groups together
// matmul  x: batch..., m, k; w: batch..., k, n; y: batch..., m, n
// pool    x, y: batch, channels, spatial dimensions; `of` is max, mean (of what is inside) or padded mean
// softmax x, y, and the axis
//
// Weights come plain, by the strides of `w`, or, where the description has `packed`, as `tvmake_onednn_pack` wrote them.
// Which format oneDNN likes best depends on the processor and on the number of threads. `packed` is a signature of the
// format and `threads` the number at build time: with another number the weights are laid out again in each call, and
// where oneDNN does not come to that format any more, the call is refused.

#include <omp.h>

#include <algorithm>
#include <oneapi/dnnl/dnnl.hpp>

#include "shim.h"

namespace {

using dnnl::algorithm;
using dnnl::memory;
using tvmake::Description;
using tvmake::Done;
using tvmake::Numbers;
using tvmake::OtherFormat;
using tvmake::Scratch;
using tvmake::Step;
using tvmake::Tensor;

constexpr int kOperands = 4;

// Never destroyed: threads may still compute while the process ends.
const dnnl::engine& engine() {
  static const dnnl::engine* made = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *made;
}

memory::desc described(const Tensor& tensor) {
  // oneDNN tells formats apart by strides, also those of dimensions of extent 1: where a description has none for such a
  // dimension, it is outermost.
  Numbers strides = tensor.strides;
  for (int64_t& stride : strides) stride = stride == 0 ? tensor.size() : stride;
  return memory::desc(tensor.extents, memory::data_type::f32, strides);
}

// Where a group is one channel wide the strides of two dimensions coincide, which is as it should be.
Tensor grouped(const Tensor& weight, int64_t groups) {
  if (groups == 1) return weight;
  Tensor made = weight;
  made.extents[0] /= groups;
  made.extents.insert(made.extents.begin(), groups);
  made.strides.insert(made.strides.begin(), weight.strides[0] * made.extents[1]);
  return made;
}

// 64-bit FNV-1a of all that tells a format from another.
uint64_t signature(const memory::desc& format) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](const Numbers& values) {
    for (int64_t value : values) {
      for (int shift = 0; shift < 64; shift += 8) hash = (hash ^ (value >> shift & 0xff)) * 0x100000001b3u;
    }
    hash = (hash ^ 0xff) * 0x100000001b3u;
  };
  mix(format.get_dims());
  mix(format.get_padded_dims());
  mix(format.get_strides());
  mix(format.get_inner_blks());
  mix(format.get_inner_idxs());
  mix({static_cast<int64_t>(format.get_size()), static_cast<int64_t>(format.get_format_kind())});
  return hash;
}

struct Activation {
  const char* name;
  algorithm kind;
};

constexpr Activation kActivations[] = {
    {"relu", algorithm::eltwise_relu},          {"leaky", algorithm::eltwise_relu},
    {"clip", algorithm::eltwise_clip},          {"linear", algorithm::eltwise_linear},
    {"sigmoid", algorithm::eltwise_logistic},   {"tanh", algorithm::eltwise_tanh},
    {"swish", algorithm::eltwise_swish},        {"gelu_erf", algorithm::eltwise_gelu_erf},
    {"gelu_tanh", algorithm::eltwise_gelu_tanh}, {"hardsigmoid", algorithm::eltwise_hardsigmoid},
    {"hardswish", algorithm::eltwise_hardswish}, {"mish", algorithm::eltwise_mish},
    {"softplus", algorithm::eltwise_soft_relu}, {"elu", algorithm::eltwise_elu},
    {"exp", algorithm::eltwise_exp},            {"log", algorithm::eltwise_log},
    {"sqrt", algorithm::eltwise_sqrt},          {"abs", algorithm::eltwise_abs},
    {"square", algorithm::eltwise_square},
};
constexpr Activation kBinary[] = {
    {"add", algorithm::binary_add}, {"sub", algorithm::binary_sub}, {"mul", algorithm::binary_mul},
    {"div", algorithm::binary_div}, {"max", algorithm::binary_max}, {"min", algorithm::binary_min},
};

template <std::size_t N>
algorithm named(const Activation (&known)[N], const std::string& name) {
  for (const Activation& each : known) {
    if (name == each.name) return each.kind;
  }
  throw std::invalid_argument("no step " + name);
}

// Whether an operand has one number for each index of dimension `at` of the result, one after the other.
bool is_vector_along(const Tensor& operand, std::size_t at) {
  if (operand.strides[at] != 1 && operand.extents[at] != 1) return false;
  return operand.size() == operand.extents[at];
}

// The steps after the sum, as oneDNN takes them: a vector added first is the bias, the others are post-ops.
struct Steps {
  bool has_bias = false;
  std::vector<std::pair<int, memory::desc>> operands;  // name of the argument, format; in the order of the call
  memory::desc bias;
  dnnl::primitive_attr attributes;

  Steps(const std::vector<Step>& steps, const Tensor& result, std::size_t channel, bool bias_is_flat) {
    dnnl::post_ops posts;
    for (const Step& step : steps) {
      const bool first = &step == &steps.front();
      if (first && step.name == "add" && step.operand.extents[channel] == result.extents[channel] &&
          is_vector_along(step.operand, channel)) {
        has_bias = true;
        bias = bias_is_flat ? memory::desc({result.extents[channel]}, memory::data_type::f32, Numbers{1})
                            : described(step.operand);
        operands.emplace_back(DNNL_ARG_BIAS, bias);
      } else if (step.has_operand) {
        const memory::desc format = described(step.operand);
        operands.emplace_back(DNNL_ARG_ATTR_MULTIPLE_POST_OP(posts.len()) | DNNL_ARG_SRC_1, format);
        posts.append_binary(named(kBinary, step.name), format);
      } else {
        const float first_number = step.name == "softplus" ? 1 : step.numbers.empty() ? 0 : step.numbers[0];
        posts.append_eltwise(named(kActivations, step.name), first_number,
                             step.numbers.size() > 1 ? step.numbers[1] : 0);
      }
    }
    attributes.set_post_ops(posts);
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  }
};

// A number of threads for as long as a primitive is made.
class Threads {
 public:
  explicit Threads(int wanted) : before_(omp_get_max_threads()) {
    if (wanted > 0) omp_set_num_threads(wanted);
  }
  ~Threads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

struct Formats {
  memory::desc source, weight, result, scratch;
  std::string implementation;
  dnnl::primitive primitive;
};

template <typename Primitive, typename Made>
Formats formats(const Made& made) {
  return {made.src_desc(), made.weights_desc(), made.dst_desc(), made.scratchpad_desc(), made.impl_info_str(),
          Primitive(made)};
}

Formats convolution(const Description& d, const Steps& steps, const memory::desc& weight) {
  const Numbers stride = d.at("stride"), before = d.at("before"), after = d.at("after");
  Numbers dilation = d.at("dilation");
  for (int64_t& each : dilation) each -= 1;  // oneDNN counts what lies between
  const memory::desc x = described(d.tensor_at("x")), y = described(d.tensor_at("y"));
  using Convolution = dnnl::convolution_forward;
  return formats<Convolution>(Convolution::primitive_desc(
      engine(), dnnl::prop_kind::forward_inference, algorithm::convolution_direct, x, weight, steps.bias, y, stride,
      dilation, before, after, steps.attributes));
}

Formats product(const Description& d, const Steps& steps, const memory::desc& weight) {
  const memory::desc x = described(d.tensor_at("x")), y = described(d.tensor_at("y"));
  return formats<dnnl::matmul>(dnnl::matmul::primitive_desc(engine(), x, weight, steps.bias, y, steps.attributes));
}

// The result, after a look at the dimensions of all tensors.
Tensor result(const Description& d) {
  const std::size_t dimensions = d.tensor_at("y").extents.size();
  if (dimensions < 2 || d.tensor_at("x", dimensions).size() == 0 || d.tensor_at("w", dimensions).size() == 0) {
    throw std::invalid_argument("dimensions");
  }
  return d.tensor_at("y", dimensions);
}

// The dimension of the result that a bias goes along.
std::size_t channel(const Description& d) { return d.kind == "conv" ? 1 : d.tensor_at("y").extents.size() - 1; }

// An operator: its primitive, and how its weights come and are wanted.
class Operator {
 public:
  explicit Operator(const Description& d)
      : steps_(d.steps, result(d), channel(d), d.kind == "conv"),
        plain_(described(d.kind == "conv" ? grouped(d.tensor_at("w"), d.at("groups")[0]) : d.tensor_at("w"))) {
    const memory::desc any(plain_.get_dims(), plain_.get_data_type(), memory::format_tag::any);
    const auto make = d.kind == "conv" ? convolution : product;
    const bool is_free = !d.value("packed").empty() || d.value("weights") == "free";
    formats_ = make(d, steps_, is_free || d.kind == "conv" ? any : plain_);
    stored_ = plain_;
    if (d.value("packed").empty()) return;
    const uint64_t packed = std::strtoull(d.value("packed").c_str(), nullptr, 16);
    stored_ = formats_.weight;
    if (signature(stored_) != packed) {
      const Threads then(std::atoi(d.value("threads").c_str()));
      stored_ = make(d, steps_, any).weight;
    }
    outcome_ = signature(stored_) == packed ? Done : OtherFormat;
  }

  int outcome() const { return outcome_; }
  const Steps& steps() const { return steps_; }
  const Formats& formats() const { return formats_; }
  const memory::desc& plain() const { return plain_; }
  const memory::desc& stored() const { return stored_; }
  int index() const { return index_; }

 private:
  static int next() {
    static std::atomic<int> count{0};
    return count++;
  }

  Steps steps_;
  memory::desc plain_;   // the weights as the model has them
  memory::desc stored_;  // as the call gets them
  Formats formats_;
  int outcome_ = Done;
  int index_ = next();
};

// An operator without weights.
class Mapping {
 public:
  explicit Mapping(const Description& d) : x_(described(d.tensor_at("x"))), y_(described(d.tensor_at("y"))) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    constexpr auto kInference = dnnl::prop_kind::forward_inference;
    if (d.kind == "pool") {
      Numbers dilation = d.at("dilation");
      for (int64_t& each : dilation) each -= 1;
      const std::string of = d.value("of");
      const algorithm kind = of == "max"    ? algorithm::pooling_max
                             : of == "mean" ? algorithm::pooling_avg_exclude_padding
                                            : algorithm::pooling_avg_include_padding;
      set<dnnl::pooling_forward>(dnnl::pooling_forward::primitive_desc(engine(), kInference, kind, x_, y_,
                                                                       d.at("stride"), d.at("kernel"), dilation,
                                                                       d.at("before"), d.at("after"), attributes));
    } else {
      set<dnnl::softmax_forward>(dnnl::softmax_forward::primitive_desc(engine(), kInference,
                                                                       algorithm::softmax_accurate, x_, y_,
                                                                       static_cast<int>(d.at("axis")[0]), attributes));
    }
  }

  const std::string& implementation() const { return implementation_; }

  void run(dnnl::stream& stream, Scratch& scratch, const float* x, float* y) const {
    const memory from(x_, engine(), const_cast<float*>(x)), to(y_, engine(), y);
    const memory space(scratch_, engine(), scratch.of(scratch_.get_size()));
    primitive_.execute(stream, {{DNNL_ARG_SRC, from}, {DNNL_ARG_DST, to}, {DNNL_ARG_SCRATCHPAD, space}});
  }

 private:
  template <typename Primitive, typename Made>
  void set(const Made& made) {
    implementation_ = made.impl_info_str();
    scratch_ = made.scratchpad_desc();
    primitive_ = Primitive(made);
  }

  memory::desc x_, y_, scratch_;
  std::string implementation_;
  dnnl::primitive primitive_;
};

// An operator's arguments on one thread. Only pointers change from call to call.
class Arguments {
 public:
  explicit Arguments(const Operator& op) : op_(op) {
    const Formats& formats = op.formats();
    add(DNNL_ARG_SRC, formats.source);
    add(DNNL_ARG_WEIGHTS, formats.weight);
    add(DNNL_ARG_DST, formats.result);
    add(DNNL_ARG_SCRATCHPAD, formats.scratch);
    for (const auto& [name, format] : op.steps().operands) add(name, format);
    if (op.stored() != formats.weight) {
      given_ = memory(op.stored(), engine(), DNNL_MEMORY_NONE);
      laid_out_ = memory(formats.weight, engine());
      reorder_ = dnnl::reorder(given_, laid_out_);
    }
  }

  void run(dnnl::stream& stream, Scratch& scratch, const float* x, const float* w, float* y,
           const float* const* operands) {
    set(0, x);
    if (reorder_) {
      given_.set_data_handle(const_cast<float*>(w));
      reorder_.execute(stream, given_, laid_out_);
      set(1, static_cast<const float*>(laid_out_.get_data_handle()));
    } else {
      set(1, w);
    }
    set(2, y);
    set(3, static_cast<const float*>(scratch.of(op_.formats().scratch.get_size())));
    for (std::size_t i = 0; i < op_.steps().operands.size(); ++i) set(4 + i, operands[i]);
    dnnl::error::wrap_c_api(dnnl_primitive_execute(op_.formats().primitive.get(), stream.get(),
                                                   static_cast<int>(arguments_.size()), arguments_.data()),
                            "the primitive failed");
  }

 private:
  void add(int name, const memory::desc& format) {
    memories_.push_back(memory(format, engine(), DNNL_MEMORY_NONE));
    arguments_.push_back({name, memories_.back().get()});
  }

  void set(std::size_t at, const float* data) { memories_[at].set_data_handle(const_cast<float*>(data)); }

  const Operator& op_;
  std::vector<memory> memories_;
  std::vector<dnnl_exec_arg_t> arguments_;
  memory given_, laid_out_;
  dnnl::reorder reorder_;
};

// What one thread keeps.
struct Mine {
  dnnl::stream stream{engine()};
  Scratch scratch;
  std::vector<std::unique_ptr<Arguments>> arguments;

  Arguments& of(const Operator& op) {
    const std::size_t at = static_cast<std::size_t>(op.index());
    if (arguments.size() <= at) arguments.resize(at + 1);
    if (!arguments[at]) arguments[at] = std::make_unique<Arguments>(op);
    return *arguments[at];
  }
};

Mine& mine() {
  thread_local Mine made;
  return made;
}

tvmake::Sites<Operator>& sites() {
  static auto* made = new tvmake::Sites<Operator>();
  return *made;
}

tvmake::Sites<Mapping>& mappings() {
  static auto* made = new tvmake::Sites<Mapping>();
  return *made;
}

std::string hexadecimal(uint64_t value) {
  std::ostringstream text;
  text << std::hex << value;
  return text.str();
}

}  // namespace

// What oneDNN would do: its implementation, the threads that it counted on, the size and signature of packed weights.
TVMAKE_EXPORT int tvmake_onednn_plan(const char* description, int threads, char* answer, std::size_t size) {
  return tvmake::guarded([=] {
    const Threads wanted(threads);
    const Description read(description);
    if (read.kind != "conv" && read.kind != "matmul") {
      return tvmake::answered("implementation=" + Mapping(read).implementation(), answer, size);
    }
    const Operator op(read);
    const memory::desc& weight = op.formats().weight;
    std::ostringstream text;
    text << "implementation=" << op.formats().implementation << " threads=" << omp_get_max_threads()
         << " bytes=" << weight.get_size() << " packed=" << hexadecimal(signature(weight));
    return tvmake::answered(text.str(), answer, size);
  });
}

TVMAKE_EXPORT int tvmake_onednn_pack(const char* description, const float* plain, float* packed) {
  return tvmake::guarded([=] {
    const Operator& op = sites().of(description);
    if (op.outcome() != Done) return op.outcome();
    memory from(op.plain(), engine(), const_cast<float*>(plain)), to(op.stored(), engine(), packed);
    dnnl::reorder(from, to).execute(mine().stream, from, to);
    return static_cast<int>(Done);
  });
}

TVMAKE_EXPORT int tvmake_onednn_run(const char* description, const float* x, const float* w, float* y, const float* a,
                                    const float* b, const float* c, const float* d) {
  return tvmake::guarded([=] {
    const Operator& op = sites().of(description);
    if (op.outcome() != Done) return op.outcome();
    const float* operands[kOperands] = {a, b, c, d};
    mine().of(op).run(mine().stream, mine().scratch, x, w, y, operands);
    return static_cast<int>(Done);
  });
}

TVMAKE_EXPORT int tvmake_onednn_map(const char* description, const float* x, float* y) {
  return tvmake::guarded([=] {
    mappings().of(description).run(mine().stream, mine().scratch, x, y);
    return static_cast<int>(Done);
  });
}

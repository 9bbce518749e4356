// What the shims share: descriptions of operators, and what was made of each.
//
// Generated code names an operator by a string constant, the same pointer at each call:
//
//     conv x=1x16x14x14:3136x1x224x16 w=... stride=2x2 then=add:1x32x1x1:32x1x1x1 then=relu
//
// a kind, then words of the form name=value. A tensor is its extents and its strides in elements. What a shim makes of
// a description is kept by the pointer, so that a call costs one look-up.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define TVMAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace tvmake {

// What the functions of a shim return. Generated code raises on all but Done.
enum Outcome : int { Done = 0, Refused = 1, OtherFormat = 2 };

using Numbers = std::vector<int64_t>;

inline std::vector<std::string> parts(const std::string& text, char mark) {
  std::vector<std::string> found;
  std::size_t begin = 0;
  for (std::size_t end; (end = text.find(mark, begin)) != std::string::npos; begin = end + 1) {
    found.push_back(text.substr(begin, end - begin));
  }
  found.push_back(text.substr(begin));
  return found;
}

// "3x3" → {3, 3}. Independent of the process's locale, as is `real`.
inline Numbers numbers(const std::string& text) {
  Numbers found;
  for (const std::string& each : parts(text, 'x')) found.push_back(std::strtoll(each.c_str(), nullptr, 10));
  return found;
}

inline float real(const std::string& text) {
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> value;
  return static_cast<float>(value);
}

struct Tensor {
  Numbers extents;
  Numbers strides;

  int64_t size() const {
    int64_t product = 1;
    for (int64_t extent : extents) product *= extent;
    return product;
  }
};

// Whether no two places of a tensor are the same element. A product may read one whose rows overlap, such as the windows
// of a convolution; libraries do not.
inline bool is_without_overlap(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, extent
  for (std::size_t i = 0; i < tensor.extents.size(); ++i) {
    if (tensor.extents[i] > 1) dimensions.emplace_back(tensor.strides[i], tensor.extents[i]);
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t end = 1;
  for (const auto& [stride, extent] : dimensions) {
    if (stride < end) return false;
    end = stride * extent;
  }
  return true;
}

inline Tensor tensor(const std::string& extents, const std::string& strides) {
  Tensor made{numbers(extents), numbers(strides)};
  if (made.extents.size() != made.strides.size()) throw std::invalid_argument("extents and strides");
  if (!is_without_overlap(made)) throw std::invalid_argument("overlap");
  return made;
}

// One thing done to the result: "add:1x32x1x1:32x1x1x1" has an operand, "clip:0:6" numbers.
struct Step {
  std::string name;
  std::vector<float> numbers;
  bool has_operand = false;
  Tensor operand;
};

inline Step step(const std::string& text) {
  const std::vector<std::string> words = parts(text, ':');
  Step made{words[0], {}, false, {}};
  made.has_operand = words[0] == "add" || words[0] == "sub" || words[0] == "mul" || words[0] == "div" ||
                     words[0] == "max" || words[0] == "min";
  if (made.has_operand) {
    made.operand = tensor(words.at(1), words.at(2));
  } else {
    for (std::size_t i = 1; i < words.size(); ++i) made.numbers.push_back(real(words[i]));
  }
  return made;
}

class Description {
 public:
  explicit Description(const char* text) {
    const std::vector<std::string> words = parts(text, ' ');
    kind = words[0];
    for (std::size_t i = 1; i < words.size(); ++i) {
      const std::size_t at = words[i].find('=');
      if (at == std::string::npos) throw std::invalid_argument("a word without a value: " + words[i]);
      const std::string name = words[i].substr(0, at), value = words[i].substr(at + 1);
      if (name == "then") {
        steps.push_back(step(value));
      } else {
        values_.emplace_back(name, value);
      }
    }
  }

  // The value of a word, "" where there is none.
  std::string value(const char* name) const {
    for (const auto& [known, text] : values_) {
      if (known == name) return text;
    }
    return "";
  }

  // Tensors of the same number of dimensions, which that of the steps' operands is as well.
  Tensor tensor_at(const char* name, std::size_t dimensions) const {
    const Tensor found = tensor_at(name);
    bool agree = found.extents.size() == dimensions;
    for (const Step& each : steps) agree = agree && (!each.has_operand || each.operand.extents.size() == dimensions);
    if (!agree) throw std::invalid_argument(std::string("dimensions of ") + name);
    return found;
  }

  Numbers at(const char* name) const { return numbers(required(name)); }

  Tensor tensor_at(const char* name) const {
    const std::vector<std::string> both = parts(required(name), ':');
    return tensor(both.at(0), both.at(1));
  }

  std::string kind;
  std::vector<Step> steps;

 private:
  std::string required(const char* name) const {
    std::string found = value(name);
    if (found.empty()) throw std::invalid_argument(std::string("no ") + name);
    return found;
  }

  std::vector<std::pair<std::string, std::string>> values_;
};

// What was made for each call site. Finding takes no lock; what is made is kept for the life of the process, since
// generated code may run on threads that outlive whoever would free it.
template <typename Made>
class Sites {
 public:
  // The one made from a description, or made now; Made must be constructible from a Description.
  const Made& of(const char* description) {
    std::atomic<Node*>& bucket = buckets_[slot(description)];
    if (const Made* known = found(bucket, description)) return *known;
    std::lock_guard<std::mutex> lock(making_);
    if (const Made* known = found(bucket, description)) return *known;
    Node* node = new Node{description, std::make_unique<Made>(Description(description)), bucket.load()};
    bucket.store(node, std::memory_order_release);
    return *node->made;
  }

 private:
  struct Node {
    const char* description;
    std::unique_ptr<Made> made;
    Node* next;
  };

  static constexpr std::size_t kBuckets = 1024;

  static std::size_t slot(const char* description) {
    return (reinterpret_cast<std::uintptr_t>(description) * 0x9E3779B97F4A7C15u >> 54) % kBuckets;
  }

  static const Made* found(const std::atomic<Node*>& bucket, const char* description) {
    for (const Node* node = bucket.load(std::memory_order_acquire); node; node = node->next) {
      if (node->description == description) return node->made.get();
    }
    return nullptr;
  }

  std::atomic<Node*> buckets_[kBuckets] = {};
  std::mutex making_;
};

// Runs what may throw. No exception may pass through generated code.
template <typename Action>
int guarded(Action action) noexcept {
  try {
    return action();
  } catch (...) {
    return Refused;
  }
}

// Memory of one thread, aligned and as large as was ever asked for.
class Scratch {
 public:
  void* of(std::size_t bytes) {
    if (bytes > bytes_) {
      constexpr std::size_t kAlign = 64;
      const std::size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
      memory_.reset(std::aligned_alloc(kAlign, rounded));
      if (!memory_) throw std::bad_alloc();
      bytes_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

// Writes an answer for the build to read.
inline int answered(const std::string& text, char* answer, std::size_t size) {
  if (text.size() + 1 > size) return Refused;
  std::memcpy(answer, text.c_str(), text.size() + 1);
  return Done;
}

}  // namespace tvmake

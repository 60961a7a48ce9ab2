// Refusals: one sentence with what was given and what is allowed. A ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastattn {

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

}  // namespace fastattn

// The parts of the sentence are evaluated only when the condition fails.
#define FASTATTN_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      ::fastattn::refuse(__VA_ARGS__); \
  } while (0)

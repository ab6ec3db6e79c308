// One pass over the next token of each of several sequences.
#pragma once

#include <vector>

#include "layers.h"

// States [n, d] of a pass over the newest tokens of at most n sequences, and what it is run with.
class NextTokens {
 public:
  NextTokens(int64_t n, int64_t d, int64_t dim)
      : states(n * d), d_(d), dim_(dim), cosines_(n * dim), sines_(n * dim), spans_(n) {}

  // Embeds the `token` of each `active` one of `rows`, at position `start` + `passes`, and takes them
  // through layers[0..count): -> `states`, in the order of `active`. cos and sin are those of all
  // positions.
  template <typename Row>
  void run(const Row* rows, const std::vector<int64_t>& active, const Layer* layers,
           const KeysValues* kv, int64_t count, const Matrix& embedding, const float* cos,
           const float* sin, int64_t threads) {
    const int64_t now = (int64_t)active.size();
    for (int64_t i = 0; i < now; i++) {
      const Row& one = rows[active[i]];
      const int64_t position = one.start + one.passes;
      widen_row(embedding, one.token, &states[i * d_]);
      std::memcpy(&cosines_[i * dim_], cos + position * dim_, dim_ * sizeof(float));
      std::memcpy(&sines_[i * dim_], sin + position * dim_, dim_ * sizeof(float));
      spans_[i] = Span{one.row, position, 1, i, nullptr, one.tables};
    }
    deliberate_run_layers(layers, kv, count, states.data(), now, d_, cosines_.data(),
                          sines_.data(), spans_.data(), now, false, threads);
  }

  std::vector<float> states;

 private:
  int64_t d_, dim_;
  std::vector<float> cosines_, sines_;
  std::vector<Span> spans_;
};

// A draft layer: see draft_layer.cpp.
#pragma once

#include "layers.h"

// What comes before the layer: the model's embedding [v, d] and the gain of its norm, the gain of the
// model's final norm, which states go through, and the matrix [d, 2 d] that joins both.
struct Joining {
  Matrix embedding, matrix;
  const float *embedding_gain, *state_gain;
  float embedding_eps, state_eps;
};

extern "C" {
void deliberate_extend_draft(const Joining* joining, const Layer* layer, const KeysValues* kv,
                             const float* states, const int64_t* tokens, int64_t n, int64_t d,
                             const float* cos, const float* sin, const Span* spans,
                             int64_t n_spans, float* outputs, int64_t threads);
}

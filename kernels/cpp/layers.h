// Runs of layers, and heads: see layers.cpp.
#pragma once

#include "attention.h"
#include "blocks.h"

// Final norm (none where `gain` is null), then x + F_n ... F_1 x for `factors`, then the matrix [v, d].
// Row i is of token `ids`[i]; of token i where `ids` is null.
struct Head {
  Matrix matrix;
  const float* gain;
  const Matrix* factors;
  int64_t n_factors;
  float eps;
  const int64_t* ids;
};

extern "C" {
void deliberate_run_layers(const Layer* layers, const KeysValues* kv, int64_t count, float* hidden,
                           int64_t tokens, int64_t d, const float* cos, const float* sin,
                           const Span* spans, int64_t n_spans, int64_t write_only, int64_t threads);
void deliberate_read_head(const Head* head, const float* states, int64_t rows, int64_t d,
                          float* logits, int64_t* best, float* stats, int64_t threads);
}

double thread_seconds();

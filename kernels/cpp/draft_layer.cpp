// A draft layer (deliberate/modeling/draft_layer.py): its entries in one call.
#include <vector>

#include "draft_layer.h"

extern "C" {

// Entries of states [n, d] and the tokens after them -> outputs [n, d]; the rest as
// `deliberate_run_layers`, of one layer.
void deliberate_extend_draft(const Joining* joining, const Layer* layer, const KeysValues* kv,
                             const float* states, const int64_t* tokens, int64_t n, int64_t d,
                             const float* cos, const float* sin, const Span* spans,
                             int64_t n_spans, float* outputs, int64_t threads) {
  static thread_local std::vector<float> joined;
  static thread_local std::vector<const float*> from;
  static thread_local std::vector<float*> to;
  if ((int64_t)joined.size() < 2 * n * d + d) joined.resize(2 * n * d + d);
  from.resize(n), to.resize(n);
  float* embedded = joined.data() + 2 * n * d;
  for (int64_t i = 0; i < n; i++) {
    float* row = joined.data() + 2 * i * d;
    widen_row(joining->embedding, tokens[i], embedded);
    rms_norm(embedded, joining->embedding_gain, d, joining->embedding_eps, row);
    rms_norm(states + i * d, joining->state_gain, d, joining->state_eps, row + d);
    from[i] = row, to[i] = outputs + i * d;
  }
  product(from.data(), n, joining->matrix, to.data(), (int)threads);
  deliberate_run_layers(layer, kv, 1, outputs, n, d, cos, sin, spans, n_spans, 0, threads);
}

int64_t deliberate_joining_size() { return sizeof(Joining); }
}

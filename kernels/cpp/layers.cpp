// A run of Llama-family layers, and heads, for tokens of one or more sequences, in float32.
//
// Every row is computed by the same instructions in the same order whatever else is in the call:
// results do not depend on the number of tokens, rows or sequences, nor on where a text is cut.
// Nothing here looks whether an address, a length or a shape is right: kernels/border.py does.
//
// The arithmetic of deliberate's fused layers in one call: RMS norm, joined QKV, norms of query and
// key, rotary embedding, cache write, attention over each sequence's own slots, SwiGLU, residuals.
// Nothing is allocated once a thread has seen its largest pass.
#include <cmath>
#include <ctime>
#include <limits>
#include <vector>

#include "next_tokens.h"

// One sequence of `deliberate_draft_rows`: that of cache row `row` or of `tables`, whose next token
// to be fed is `token` at position `start`. The head is read after its first `asked` passes of
// `steps`; a token stands where its score reaches the threshold and it is not one of `stops`.
// `states` [steps, d], `tokens` and `scores` [steps] get what was made; `passes` and `standing` say
// how many passes were run for it, and how many of their tokens stand.
struct DraftRow {
  int64_t row;
  const Table* tables;
  int64_t token, start, steps, asked;
  double threshold;
  const int64_t* stops;
  int64_t n_stops;
  float* states;
  int64_t* tokens;
  float* scores;
  int64_t passes, standing;
};

static void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec g = load(gate + i);
    store(out + i, g / (splat(1.0f) + exponential(-g)) * load(up + i));
  }
  if (i < n) {
    float g[LANES] = {}, u[LANES] = {}, result[LANES];
    std::memcpy(g, gate + i, (n - i) * sizeof(float));
    std::memcpy(u, up + i, (n - i) * sizeof(float));
    store(result, load(g) / (splat(1.0f) + exponential(-load(g))) * load(u));
    std::memcpy(out + i, result, (n - i) * sizeof(float));
  }
}

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

namespace {

void rows_of(float* base, int64_t stride, int64_t rows, std::vector<float*>& pointers) {
  pointers.resize(rows);
  for (int64_t r = 0; r < rows; r++) pointers[r] = base + r * stride;
}

// Threads of one product: each reads at least 32 KB, or telling it of the product costs more.
int threads_for(const Matrix& w, int threads) {
  const int64_t most = bytes_of(w) >> 15;
  return most < threads ? (most < 1 ? 1 : (int)most) : threads;
}

// The first of the largest of row[0..v), and in `stats`, unless null, what follows from the softmax.
int64_t summarise(const float* row, int64_t v, float* stats) {
  const float least = -std::numeric_limits<float>::infinity();
  float first = least, second = least;
  bool valid = true;
  const auto take = [&](float x) {
    second = x > first ? first : x > second ? x : second;
    first = x > first ? x : first;
  };
  // The two largest of each lane first.
  Vec largest = splat(least), next = largest;
  IVec numbers = IVec{} - 1;
  int64_t i = 0;
  for (; i + LANES <= v; i += LANES) {
    const Vec x = load(row + i), smaller = x < largest ? x : largest;
    next = smaller > next ? smaller : next;
    largest = x > largest ? x : largest;
    numbers &= x == x;
  }
  for (int lane = 0; lane < LANES; lane++) {
    take(largest[lane]), take(next[lane]);
    valid = valid && numbers[lane];
  }
  for (; i < v; i++) take(row[i]), valid = valid && row[i] == row[i];
  int64_t at = 0;
  while (at + 1 < v && row[at] != first) at++;
  if (row[at] != first) at = 0;
  if (!stats) return at;
  // Sums of exp(l - max) and of (l - max) exp(l - max): all three measures follow from them.
  Vec mass{}, moment{};
  for (i = 0; i + LANES <= v; i += LANES) {
    const Vec x = load(row + i) - splat(first);
    const Vec e = exponential(x);
    mass += e;
    moment = multiply_add(x, e, moment);
  }
  float parts[LANES];
  store(parts, sums<1>(&mass));
  float total = parts[0];
  store(parts, sums<1>(&moment));
  float weighted = parts[0];
  for (; i < v; i++) {
    const float x = row[i] - first, e = std::exp(x);
    total += e;
    weighted += x * e;
  }
  const float none = std::numeric_limits<float>::quiet_NaN();
  const float entropy = std::log(total) - weighted / total;
  stats[0] = valid ? 1.0f / total : none;
  stats[1] = valid ? (1.0f - std::exp(second - first)) / total : none;
  stats[2] = valid ? 1.0f - entropy / std::log((float)v) : none;
  return at;
}

// The rows of a joined QKV matrix that make keys and values; of blocks, queries are a part.
Matrix keys_and_values(const Layer& layer) {
  return without_rows(layer.qkv, layer.heads * layer.head_dim);
}

// A block of tokens small enough for the second-level cache; see `deliberate_run_layers`.
void run_block(const Layer* layers, const KeysValues* kv, int64_t count, float* hidden,
               int64_t tokens, int64_t d, const float* cos, const float* sin, const Span* spans,
               int64_t n_spans, bool write_only, int64_t threads) {
  static thread_local Scratch scratch;
  static thread_local std::vector<float*> states, from, to;
  int64_t widest = 0;
  for (int64_t l = 0; l < count; l++) {
    const Layer& layer = layers[l];
    const int64_t here = layer.qkv.n + layer.out.k + layer.gate_up.n + layer.down.k;
    widest = here > widest ? here : widest;
  }
  float* normed = scratch.room(tokens * (2 * d + widest));
  float* update = normed + tokens * d;
  float* work = update + tokens * d;
  rows_of(hidden, d, tokens, states);
  const auto multiply = [&](float* x, const Matrix& w, float* out) {
    rows_of(x, w.k, tokens, from);
    rows_of(out, w.n, tokens, to);
    product(from.data(), tokens, w, to.data(), threads_for(w, (int)threads));
  };
  const auto add = [&]() {
    for (int64_t i = 0; i < tokens * d; i++) hidden[i] += update[i];
  };
  for (int64_t l = 0; l < count; l++) {
    const Layer& layer = layers[l];
    const Matrix qkv = write_only ? keys_and_values(layer) : layer.qkv;
    float* joined = work;
    float* mixed = joined + tokens * qkv.n;
    for (int64_t t = 0; t < tokens; t++)
      rms_norm(states[t], layer.attention_norm, d, layer.eps, normed + t * d);
    multiply(normed, qkv, joined);
    for (int64_t s = 0; s < n_spans; s++) {
      write_keys(layer, kv[l], spans[s], !write_only, cos, sin, joined, qkv.n);
      if (!write_only) attend(layer, kv[l], spans[s], joined, qkv.n, mixed, (int)threads);
    }
    if (write_only) continue;
    multiply(mixed, layer.out, update);
    add();
    float* gate_up = work;
    float* act = gate_up + tokens * layer.gate_up.n;
    for (int64_t t = 0; t < tokens; t++)
      rms_norm(states[t], layer.mlp_norm, d, layer.eps, normed + t * d);
    multiply(normed, layer.gate_up, gate_up);
    parallel(tokens < 4 ? 1 : (int)threads, tokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const float* gate = gate_up + t * layer.gate_up.n;
        swiglu(gate, gate + layer.down.k, layer.down.k, act + t * layer.down.k);
      }
    });
    multiply(act, layer.down, update);
    add();
  }
}

}  // namespace

extern "C" {

// Sizes of the structures, as who calls must have them.
void deliberate_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(Matrix), sizeof(Layer), sizeof(KeysValues), sizeof(Span),
                         sizeof(Head),   sizeof(Run),   sizeof(Table),      sizeof(DraftRow)};
  std::memcpy(sizes, all, sizeof all);
}

// Takes hidden states [tokens, d], in place, through layers[0..count). cos and sin are
// [tokens, head_dim]; `spans` say which tokens are whose; tokens of no span are padding, computed
// with the others and written nowhere but in `hidden`. With `write_only` every layer gets keys and
// values of the same states, and nothing else is computed.
//
// Tokens go block by block, each through all layers: a token sees those before it in the cache.
void deliberate_run_layers(const Layer* layers, const KeysValues* kv, int64_t count, float* hidden,
                           int64_t tokens, int64_t d, const float* cos, const float* sin,
                           const Span* spans, int64_t n_spans, int64_t write_only,
                           int64_t threads) {
  if (count < 1) return;
  int64_t most = tokens, dim = layers[0].head_dim;
  for (int64_t l = 0; l < count; l++) {
    const int64_t here = rows_at_once(layers[l].down.k);
    most = here < most ? here : most;
  }
  if (most == tokens) {
    run_block(layers, kv, count, hidden, tokens, d, cos, sin, spans, n_spans, write_only, threads);
    return;
  }
  std::vector<Span> here;
  for (int64_t begin = 0; begin < tokens; begin += most) {
    const int64_t end = begin + most < tokens ? begin + most : tokens;
    here.clear();
    for (int64_t s = 0; s < n_spans; s++) {
      Span span = spans[s];
      const int64_t low = span.offset > begin ? span.offset : begin;
      const int64_t high = span.offset + span.count < end ? span.offset + span.count : end;
      if (low >= high) continue;
      span.start += low - span.offset;
      span.count = high - low;
      span.offset = low - begin;
      here.push_back(span);
    }
    run_block(layers, kv, count, hidden + begin * d, end - begin, d, cos + begin * dim,
              sin + begin * dim, here.data(), (int64_t)here.size(), write_only, threads);
  }
}

// What a head makes of states [rows, d]: see `Head`. Writes logits [rows, v]; with `best` also the
// token of the first of the largest logits; with `stats` for each row the largest probability, its
// lead over the second, and the normalised certainty 1 - entropy / log v.
void deliberate_read_head(const Head* head, const float* states, int64_t rows, int64_t d,
                          float* logits, int64_t* best, float* stats, int64_t threads) {
  static thread_local Scratch scratch;
  static thread_local std::vector<float*> normed, from, to;
  int64_t widest = d;
  for (int64_t f = 0; f < head->n_factors; f++)
    widest = head->factors[f].n > widest ? head->factors[f].n : widest;
  float* base = scratch.room(rows * (d + 2 * widest));
  rows_of(base, d, rows, normed);
  for (int64_t r = 0; r < rows; r++) {
    if (head->gain)
      rms_norm(states + r * d, head->gain, d, head->eps, normed[r]);
    else
      std::memcpy(normed[r], states + r * d, d * sizeof(float));
  }
  const auto multiply = [&](const Matrix& w, float* const* x, float* out) {
    rows_of(out, w.n, rows, to);
    product(x, rows, w, to.data(), threads_for(w, (int)threads));
  };
  if (head->n_factors) {
    float* spaces[2] = {base + rows * d, base + rows * (d + widest)};
    float* input = base;
    for (int64_t f = 0; f < head->n_factors; f++) {
      rows_of(input, head->factors[f].k, rows, from);
      multiply(head->factors[f], from.data(), spaces[f % 2]);
      input = spaces[f % 2];
    }
    for (int64_t i = 0; i < rows * d; i++) base[i] += input[i];
  }
  multiply(head->matrix, normed.data(), logits);
  if (!best) return;
  for (int64_t r = 0; r < rows; r++) {
    best[r] = summarise(logits + r * head->matrix.n, head->matrix.n, stats ? stats + 3 * r : nullptr);
    if (head->ids) best[r] = head->ids[best[r]];
  }
}

// Decodes one sequence, that of cache row `row` or of `tables`, greedily, a token at a time through layers[0..count), reading `head` after
// each. The token chosen stands, and is fed next, where its score reaches the threshold and it is
// not one of `stops`, or where `stops_stand`. Steps from `asked` on do not ask: there nothing stands.
// Ends after `steps` passes, at the first token that does not stand, and after a stop.
//
// `states` [steps, d] gets the states after the layers, `tokens` and `scores` [steps] what was
// chosen. Returns the passes run; `*standing` of their tokens stand: all, or all but the last.
int64_t deliberate_decode(const Layer* layers, const KeysValues* kv, int64_t count,
                          const Matrix* embedding, int64_t d, int64_t row,
                          const Table* tables, int64_t token, int64_t start, const float* cos,
                          const float* sin, int64_t steps, int64_t asked,
                          const Head* head, int64_t statistic, double threshold,
                          const int64_t* stops, int64_t n_stops, int64_t stops_stand,
                          float* states, int64_t* tokens, float* scores, int64_t* standing,
                          int64_t threads) {
  static thread_local std::vector<float> logits;
  logits.resize(head->matrix.n);
  const int64_t dim = layers[0].head_dim;
  *standing = 0;
  for (int64_t step = 0; step < steps; step++) {
    const int64_t position = start + step;
    float* state = states + step * d;
    widen_row(*embedding, token, state);
    const Span span{row, position, 1, 0, nullptr, tables};
    run_block(layers, kv, count, state, 1, d, cos + position * dim, sin + position * dim, &span, 1,
              false, threads);
    if (step >= asked) return step + 1;
    float stats[3];
    deliberate_read_head(head, state, 1, d, logits.data(), &token, stats, threads);
    tokens[step] = token;
    scores[step] = stats[statistic];
    bool stop = false;
    for (int64_t i = 0; i < n_stops; i++) stop = stop || stops[i] == token;
    if (!((double)scores[step] >= threshold) || (stop && !stops_stand)) return step + 1;
    *standing = step + 1;
    if (stop) return step + 1;
  }
  return steps;
}

// Drafts greedily for several sequences that share passes through layers[0..count), a token of each
// at a time, reading `head` after each pass; see `DraftRow`. A sequence takes part until its token
// does not stand, it was not asked, or its steps are over. Of those of the first two kinds, which
// need a deep pass, `enough` end the call; so do `patience` passes after the first of them, or from
// the beginning where others `wait` already.
//
// Returns the passes run; `seconds` gets this thread's processor time of each, without the head.
int64_t deliberate_draft_rows(const Layer* layers, const KeysValues* kv, int64_t count,
                              const Matrix* embedding, int64_t d, DraftRow* rows, int64_t n,
                              const float* cos, const float* sin, const Head* head,
                              int64_t statistic, int64_t enough, int64_t patience, int64_t wait,
                              double* seconds, int64_t threads) {
  const int64_t v = head->matrix.n;
  NextTokens tokens(n, d, layers[0].head_dim);
  std::vector<float>& states = tokens.states;
  std::vector<float> logits(n * v), stats(3 * n);
  std::vector<int64_t> best(n), active(n);
  for (int64_t r = 0; r < n; r++) {
    active[r] = r;
    rows[r].passes = rows[r].standing = 0;
  }
  int64_t blocked = 0, since = wait ? 0 : -1;
  for (int64_t pass = 0;; pass++) {
    const int64_t now = (int64_t)active.size();
    if (!now || blocked >= enough || (since >= 0 && pass - since >= patience)) return pass;
    const double began = thread_seconds();
    tokens.run(rows, active, layers, kv, count, *embedding, cos, sin, threads);
    // Those that are asked come first, so that the head reads them in one product.
    int64_t asked = 0;
    for (int64_t i = 0; i < now; i++) {
      DraftRow& one = rows[active[i]];
      std::memcpy(one.states + one.passes * d, &states[i * d], d * sizeof(float));
      if (one.passes++ >= one.asked) {
        blocked++;
        continue;
      }
      if (asked < i) std::memcpy(&states[asked * d], &states[i * d], d * sizeof(float));
      active[asked++] = active[i];
    }
    seconds[pass] = thread_seconds() - began;
    active.resize(asked);
    if (asked)
      deliberate_read_head(head, states.data(), asked, d, logits.data(), best.data(), stats.data(),
                           threads);
    int64_t left = 0;
    for (int64_t i = 0; i < asked; i++) {
      DraftRow& one = rows[active[i]];
      const float score = stats[3 * i + statistic];
      one.tokens[one.passes - 1] = one.token = best[i];
      one.scores[one.passes - 1] = score;
      bool stands = (double)score >= one.threshold;
      for (int64_t s = 0; s < one.n_stops; s++) stands = stands && one.stops[s] != best[i];
      if (!stands) {
        blocked++;
        continue;
      }
      one.standing = one.passes;
      if (one.passes < one.steps) active[left++] = active[i];
    }
    active.resize(left);
    if (blocked && since < 0) since = pass + 1;
  }
}
}

// Tokens of several sequences that share passes through layers and head, each chosen by noise and a
// mask of its own: sampling by the Gumbel-max trick, or greedily where there is no noise.
#include <cmath>
#include <limits>
#include <vector>

#include "next_tokens.h"

// One sequence of `deliberate_sample_rows`: that of cache row `row` or of `tables`, whose next token
// to be fed is `token` at position `start`. Its scores are the logits after a mask, over
// `temperature`, less `noise` [steps, stride] (null: greedy).
//
// The mask, in this order:
// - `runs`: of each its length and ids. Its last id may not come where its others are the newest
//   tokens, of which `recent` are the last before the call, the oldest first;
// - `moves`: of each its target, the number of its sources, and those. The target gets what all of
//   them have (the sum of probabilities where `summed`, else the highest score), the sources nothing.
//   Target -1 is the next token of `tag`, of which the newest tokens have begun `matched`.
//
// A token is accepted, and fed next, unless none is to be chosen (`left_out`), it is one of `until`,
// completes the tag, is the tag's next where a source of the first move had the higher score, or
// where no number decides. `tokens`, `scores` (log-probability by the logits) and `tops` (the highest
// probability) [steps] get what was accepted, `logits` [v] those after the newest pass; `passes` and
// `accepted` how many there were.
struct SampledRow {
  int64_t row;
  const Table* tables;
  int64_t token, start, steps, stride;
  const float* noise;
  float temperature;
  const int64_t *runs, *moves, *tag, *recent, *until;
  int64_t n_runs, n_moves, n_tag, n_recent, n_until, summed, matched, left_out;
  int64_t* tokens;
  float *scores, *tops, *logits;
  int64_t passes, accepted;
};

namespace {

const float NONE = -std::numeric_limits<float>::infinity();

// The newest token but `back` of a row.
int64_t newest(const SampledRow& one, int64_t back) {
  return back < one.accepted ? one.tokens[one.accepted - 1 - back]
                             : one.recent[one.n_recent - 1 - (back - one.accepted)];
}

void ban_runs(const SampledRow& one, float* scores) {
  const int64_t held = one.accepted + one.n_recent;
  const int64_t* run = one.runs;
  for (int64_t i = 0; i < one.n_runs; i++, run += *run + 1) {
    const int64_t size = *run;
    bool follows = size - 1 <= held;
    for (int64_t j = 0; follows && j < size - 1; j++)
      follows = run[size - 1 - j] == newest(one, j);
    if (follows) scores[run[size]] = NONE;
  }
}

// Whether a source of the first move has at least its target's score.
bool move_scores(const SampledRow& one, float* scores) {
  bool ended = false;
  const int64_t* move = one.moves;
  for (int64_t i = 0; i < one.n_moves; i++, move += move[1] + 2) {
    const int64_t target = move[0] < 0 ? one.tag[one.matched] : move[0];
    float most = NONE;
    for (int64_t j = 0; j < move[1]; j++) most = std::fmax(most, scores[move[2 + j]]);
    if (!i) ended = most >= scores[target];
    most = std::fmax(most, scores[target]);
    if (one.summed && most > NONE) {
      // In double precision, as `token_budget` does, so that both have the same sum.
      double sum = 0.0;
      for (int64_t j = 0; j < move[1]; j++) sum += std::exp((double)scores[move[2 + j]] - most);
      sum += std::exp((double)scores[target] - most);
      most = (float)(most + std::log(sum));
    }
    for (int64_t j = 0; j < move[1]; j++) scores[move[2 + j]] = NONE;
    scores[target] = most;
  }
  return ended;
}

// The first of the largest of scores[0..v) over a temperature, less noise; -1 where none is a number
// above minus infinity, or one is no number.
int64_t choose(float* scores, int64_t v, float temperature, const float* noise) {
  if (noise)
    for (int64_t i = 0; i < v; i++) scores[i] = scores[i] / temperature - noise[i];
  Vec largest = splat(NONE);
  IVec numbers = IVec{} - 1;
  int64_t i = 0;
  for (; i + LANES <= v; i += LANES) {
    const Vec x = load(scores + i);
    largest = x > largest ? x : largest;
    numbers &= x == x;
  }
  float best = NONE;
  bool valid = true;
  for (int lane = 0; lane < LANES; lane++) {
    best = largest[lane] > best ? largest[lane] : best;
    valid = valid && numbers[lane];
  }
  for (; i < v; i++) {
    best = scores[i] > best ? scores[i] : best;
    valid = valid && scores[i] == scores[i];
  }
  if (!valid || best == NONE) return -1;
  int64_t at = 0;
  while (scores[at] != best) at++;
  return at;
}

// Takes the next token of a row from its logits; whether it is accepted.
bool take(SampledRow& one, int64_t v, int64_t likely, float top, std::vector<float>& scores) {
  if (one.left_out) return false;
  std::memcpy(scores.data(), one.logits, v * sizeof(float));
  ban_runs(one, scores.data());
  const bool ended = move_scores(one, scores.data());
  const float* noise = one.noise ? one.noise + (one.passes - 1) * one.stride : nullptr;
  const int64_t token = choose(scores.data(), v, one.temperature, noise);
  if (token < 0) return false;
  for (int64_t i = 0; i < one.n_until; i++)
    if (one.until[i] == token) return false;
  if (one.n_tag) {
    if (token == one.tag[one.matched]) {
      if (ended || one.matched + 1 == one.n_tag) return false;
      one.matched++;
    } else {
      one.matched = token == one.tag[0];
      if (one.matched == one.n_tag) return false;
    }
  }
  one.tokens[one.accepted] = one.token = token;
  one.scores[one.accepted] = one.logits[token] - one.logits[likely] + std::log(top);
  one.tops[one.accepted++] = top;
  return true;
}

}  // namespace

extern "C" {

// Takes a token of each row at a time through layers[0..count) and `head`, which chooses among v
// tokens; see `SampledRow`. A row takes part until a token is not accepted or its steps are over.
void deliberate_sample_rows(const Layer* layers, const KeysValues* kv, int64_t count,
                            const Matrix* embedding, int64_t d, SampledRow* rows, int64_t n,
                            const float* cos, const float* sin, const Head* head,
                            int64_t threads) {
  const int64_t v = head->matrix.n;
  NextTokens tokens(n, d, layers[0].head_dim);
  std::vector<float> logits(n * v), stats(3 * n), scores(v);
  std::vector<int64_t> best(n), active(n);
  for (int64_t r = 0; r < n; r++) {
    active[r] = r;
    rows[r].passes = rows[r].accepted = 0;
  }
  while (!active.empty()) {
    const int64_t now = (int64_t)active.size();
    tokens.run(rows, active, layers, kv, count, *embedding, cos, sin, threads);
    deliberate_read_head(head, tokens.states.data(), now, d, logits.data(), best.data(),
                         stats.data(), threads);
    int64_t left = 0;
    for (int64_t i = 0; i < now; i++) {
      SampledRow& one = rows[active[i]];
      one.passes++;
      std::memcpy(one.logits, &logits[i * v], v * sizeof(float));
      if (take(one, v, best[i], stats[3 * i], scores) && one.passes < one.steps)
        active[left++] = active[i];
    }
    active.resize(left);
  }
}

int64_t deliberate_sampled_row_size() { return sizeof(SampledRow); }
}

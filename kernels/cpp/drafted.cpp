// Exact decoding of one sequence with drafts, several passes in one call.
//
// A pass drafts, by a draft layer or by looking up what followed the newest tokens before, and runs all
// layers over the newest token and the drafts. Of the tokens that full depth chooses, those that equal
// the drafts are accepted, and the one after them comes next.
#include <vector>

#include "draft_layer.h"

// How far a chain of drafts goes: `ChainRule` of kernels/native_drafted.py.
constexpr int CLASSES = 10;
struct ChainRule {
  double accepts[CLASSES];
  double token_value, token_cost, draft_value, draft_cost;
  int64_t limit;
};

// A draft layer with `entries` in row `row`; cos and sin are those of all positions. `states` [waiting,
// d] and the tokens after them have no entries yet. `entered` gets the tokens of the call that have.
struct DraftLayer {
  const Joining* joining;
  const Layer* layer;
  const KeysValues* kv;
  const Head* head;
  const float *cos, *sin;
  int64_t row, entries;
  const float* states;
  const int64_t* tokens;
  int64_t waiting, entered;
  ChainRule rule;
};

// Of n tokens that were found `best`[n] are verified, at most `most`. Where that is none one is, every
// so many times that it happens; `declined` counts them. Each takes `cost` of the `allowance`, an
// accepted one gives 1, and every token `earned`.
struct Lookup {
  const int64_t* best;
  int64_t most, shortest, longest, every, declined;
  double allowance, cost, earned, most_allowance;
};

// One pass: its drafts, how many of them were looked up and accepted, those whose confidences are
// known, and seconds of this thread's processor time.
struct DraftedPass {
  int64_t drafted, looked_up, accepted, chained, timed;
  double drafting, verifying;
};

namespace {

// Its tenth; a confidence that is no number counts as the least.
int class_of(float confidence) {
  const double at = (double)confidence * CLASSES;
  return at >= CLASSES - 1 ? CLASSES - 1 : at >= 0 ? (int)at : 0;
}

// Where the text goes on after the longest run of its newest tokens that it has before; of several the
// last. `length` if there is none.
int64_t look_up(const int64_t* text, int64_t length, const Lookup& lookup) {
  int64_t found = length, longest = lookup.shortest - 1;
  for (int64_t end = length - 1; end >= lookup.shortest && longest < lookup.longest; end--) {
    int64_t same = 0;
    while (same < lookup.longest && same < end && text[end - 1 - same] == text[length - 1 - same]) same++;
    if (same > longest) longest = same, found = end;
  }
  return found;
}

// Looked-up drafts after the text, at most so many -> how many, and where they begin.
int64_t found_drafts(const int64_t* text, int64_t length, int64_t most, Lookup& lookup,
                     int64_t* begin) {
  *begin = look_up(text, length, lookup);
  if (most > lookup.most) most = lookup.most;
  if (most > length - *begin) most = length - *begin;
  if (most <= 0) return 0;
  int64_t count = lookup.best[most];
  if (!count && ++lookup.declined % lookup.every == 0) count = 1;
  if (lookup.allowance >= lookup.cost * (double)count) return count;
  return lookup.allowance > 0 ? (int64_t)(lookup.allowance / lookup.cost) : 0;
}

// Entries of states [n, d] and the tokens after them, then drafts after the last of these, at most so
// many, an entry each: how many. `found`: the draft that was looked up, or -1; -1 where the first draft
// is the same, and nothing is drafted.
int64_t draft_chain(DraftLayer& from, int64_t entries, const float* states, const int64_t* tokens,
                    int64_t n, int64_t d, int64_t most, int64_t found, int64_t* drafts,
                    float* confidences, double* seconds, int64_t* timed, int64_t threads) {
  static thread_local std::vector<float> outputs, logits;
  if ((int64_t)outputs.size() < n * d) outputs.resize(n * d);
  if ((int64_t)logits.size() < from.head->matrix.n) logits.resize(from.head->matrix.n);
  const ChainRule& rule = from.rule;
  const int64_t dim = from.layer->head_dim;
  const auto extend = [&](const float* input, const int64_t* after, int64_t count, int64_t position) {
    const Span span{from.row, position, count, 0, nullptr, nullptr};
    deliberate_extend_draft(from.joining, from.layer, from.kv, input, after, count, d,
                            from.cos + position * dim, from.sin + position * dim, &span, 1,
                            outputs.data(), threads);
  };
  extend(states, tokens, n, entries);
  const float* output = outputs.data() + (n - 1) * d;
  double survives = 1.0, began = 0.0;
  for (int64_t made = 0;;) {
    int64_t token;
    float stats[3];
    deliberate_read_head(from.head, output, 1, d, logits.data(), &token, stats, threads);
    if (made) seconds[(*timed)++] = thread_seconds() - began;
    if (!made && token == found) return -1;
    survives *= rule.accepts[class_of(stats[0])];
    if (made && !(survives * rule.token_value > rule.token_cost)) return made;
    drafts[made] = token, confidences[made] = stats[0];
    if (++made == most || !(survives * rule.draft_value > rule.draft_cost)) return made;
    began = thread_seconds();
    extend(output, &token, 1, entries + n + made - 1);
    output = outputs.data();
  }
}

}  // namespace

extern "C" {

// Decodes one sequence, that of cache row `row` or of `tables`, greedily through layers[0..count), at
// most so many passes and `left` tokens. `text` has its `length` tokens so far, the newest of which no
// layer has run, and gets those that are decoded. `layer` and `lookup`: where drafts come from, or
// null. cos and sin are those of all positions. Ends after a token of `stops`, and where less than a
// whole pass of `room` positions is left.
//
// `states` [room, d] gets the states of the positions from the newest token's on, those of decoded
// tokens only; `passes` what each pass did, `confidences` [most, widest] of its drafts, and `seconds`
// likewise of drafts after the first. Returns the passes run.
int64_t deliberate_decode_drafted(const Layer* layers, const KeysValues* kv, int64_t count,
                                  const Matrix* embedding, const Head* head, int64_t d, int64_t row,
                                  const Table* tables, int64_t* text, int64_t length,
                                  const float* cos, const float* sin, int64_t most, int64_t room,
                                  int64_t left, const int64_t* stops, int64_t n_stops,
                                  DraftLayer* layer, Lookup* lookup, int64_t widest, float* states,
                                  DraftedPass* passes, float* confidences, double* seconds,
                                  int64_t threads) {
  static thread_local std::vector<float> logits;
  static thread_local std::vector<int64_t> best;
  const int64_t dim = layers[0].head_dim, v = head->matrix.n, start = length - 1;
  if ((int64_t)logits.size() < (1 + widest) * v) logits.resize((1 + widest) * v);
  best.resize(1 + widest);
  const auto stop = [&](int64_t token) {
    for (int64_t i = 0; i < n_stops; i++)
      if (stops[i] == token) return true;
    return false;
  };
  int64_t made = 0;  // tokens
  if (layer) layer->entered = 0;
  for (int64_t pass = 0;; pass++) {
    if (pass == most || made >= left || room - made < 1 + widest) return pass;
    DraftedPass& now = passes[pass];
    now = DraftedPass{};
    const double began = thread_seconds();
    int64_t* const drafts = text + length + made;
    // The last token of all is chosen at full depth.
    int64_t limit = left - made - 1 < widest ? left - made - 1 : widest, found = 0, begin = 0;
    if (lookup && limit > 0) found = found_drafts(text, length + made, limit, *lookup, &begin);
    if (layer && limit > 0) {
      const bool first = pass == 0;
      const int64_t entered = layer->entered, n = first ? layer->waiting : made - entered;
      const int64_t chain = limit < layer->rule.limit ? limit : layer->rule.limit;
      now.chained = draft_chain(*layer, layer->entries, first ? layer->states : states + entered * d,
                                first ? layer->tokens : text + length + entered, n, d, chain,
                                found ? text[begin] : -1, drafts, confidences + pass * widest,
                                seconds + pass * widest, &now.timed, threads);
      layer->entries += n, layer->entered = made;
    }
    if (now.chained > 0) {
      now.drafted = now.chained;
    } else if (!layer || now.chained < 0) {
      for (int64_t i = 0; i < found; i++) drafts[i] = text[begin + i];
      now.drafted = now.looked_up = found, now.chained = 0;
    }
    // A token that ends the output is chosen at full depth, and one of an image has no embedding.
    for (int64_t i = 0; i < now.drafted; i++)
      if (stop(drafts[i]) || drafts[i] < 0 || drafts[i] >= embedding->n) now.drafted = i;
    const double drafted = thread_seconds();
    now.drafting = drafted - began;
    const int64_t n = 1 + now.drafted, position = start + made;
    float* state = states + made * d;
    for (int64_t i = 0; i < n; i++) widen_row(*embedding, drafts[i - 1], state + i * d);
    const Span span{row, position, n, 0, nullptr, tables};
    deliberate_run_layers(layers, kv, count, state, n, d, cos + position * dim, sin + position * dim,
                          &span, 1, 0, threads);
    deliberate_read_head(head, state, n, d, logits.data(), best.data(), nullptr, threads);
    while (now.accepted < now.drafted && drafts[now.accepted] == best[now.accepted]) now.accepted++;
    if (lookup) {
      const double left = lookup->allowance + lookup->earned * (double)(now.accepted + 1) +
                          (double)now.accepted - lookup->cost * (double)now.drafted;
      lookup->allowance = left < lookup->most_allowance ? left : lookup->most_allowance;
    }
    const int64_t next = drafts[now.accepted] = best[now.accepted];
    made += now.accepted + 1;
    now.verifying = thread_seconds() - drafted;
    if (stop(next)) return pass + 1;
  }
}

// Sizes of the structures, as who calls must have them.
void deliberate_drafted_sizes(int64_t* sizes) {
  sizes[0] = sizeof(DraftLayer), sizes[1] = sizeof(Lookup), sizes[2] = sizeof(DraftedPass);
}
}

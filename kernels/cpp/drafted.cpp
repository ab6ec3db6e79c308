// Exact decoding of one sequence with drafts, several passes in one call.
//
// A pass drafts, by a draft layer, by the model itself run more cheaply, or by looking up what followed
// the newest tokens before, and runs all layers over the newest token and the drafts. Of the tokens that full depth chooses, those that equal
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

// Layers of the shape of those that verify, over the same keys and values: of `ranges` [n_ranges, 2]
// each says from which layer on, and before which, they run. What they write is written again, by full
// depth, in the pass that verifies.
struct DraftModel {
  const Layer* layers;
  const Head* head;
  const int64_t* ranges;
  int64_t n_ranges;
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

// A chain of drafts while it is made: `drafts` and their `confidences`, at most so many, and `seconds` of
// those after the first, of which there are `timed`. `found`: the draft that was looked up, or -1.
struct Chain {
  int64_t* drafts;
  float* confidences;
  double* seconds;
  int64_t timed;
  int64_t most, found;
};

// Makes a chain from the state `output` [d], and from what `extend` makes of each draft and the number
// of those before it: how many drafts; -1 where the first is the one that was found, and none is made.
template <typename Extend>
int64_t draft_chain(const Head& head, const ChainRule& rule, int64_t d, const float* output,
                    Chain& chain, const Extend& extend, int64_t threads) {
  static thread_local std::vector<float> logits;
  if ((int64_t)logits.size() < head.matrix.n) logits.resize(head.matrix.n);
  double survives = 1.0, began = 0.0;
  for (int64_t made = 0;;) {
    int64_t token;
    float stats[3];
    deliberate_read_head(&head, output, 1, d, logits.data(), &token, stats, threads);
    if (made) chain.seconds[chain.timed++] = thread_seconds() - began;
    if (!made && token == chain.found) return -1;
    survives *= rule.accepts[class_of(stats[0])];
    if (made && !(survives * rule.token_value > rule.token_cost)) return made;
    chain.drafts[made] = token, chain.confidences[made] = stats[0];
    if (++made == chain.most || !(survives * rule.draft_value > rule.draft_cost)) return made;
    began = thread_seconds();
    output = extend(token, made - 1);
  }
}

// Entries of states [n, d] and the tokens after them, then a chain after the last of these, an entry
// each.
int64_t layer_chain(DraftLayer& from, int64_t entries, const float* states, const int64_t* tokens,
                    int64_t n, int64_t d, Chain& chain, int64_t threads) {
  static thread_local std::vector<float> outputs;
  if ((int64_t)outputs.size() < n * d) outputs.resize(n * d);
  float* const made = outputs.data();
  const int64_t dim = from.layer->head_dim;
  const auto extend = [&](const float* input, const int64_t* after, int64_t count, int64_t position) {
    const Span span{from.row, position, count, 0, nullptr, nullptr};
    deliberate_extend_draft(from.joining, from.layer, from.kv, input, after, count, d,
                            from.cos + position * dim, from.sin + position * dim, &span, 1, made,
                            threads);
  };
  extend(states, tokens, n, entries);
  const float* output = made + (n - 1) * d;
  const auto next = [&](int64_t token, int64_t before) {
    extend(output, &token, 1, entries + n + before);
    return output = made;
  };
  return draft_chain(*from.head, from.rule, d, output, chain, next, threads);
}

// A chain after `token`, which comes at this position of the sequence of cache row `row` or of `tables`.
int64_t model_chain(const DraftModel& from, const KeysValues* kv, const Matrix& embedding, int64_t d,
                    int64_t row, const Table* tables, int64_t token, int64_t position,
                    const float* cos, const float* sin, Chain& chain, int64_t threads) {
  static thread_local std::vector<float> state;
  state.resize(d);
  float* const output = state.data();
  const int64_t dim = from.layers[0].head_dim;
  const auto run = [&](int64_t fed, int64_t at) {
    widen_row(embedding, fed, output);
    const Span span{row, at, 1, 0, nullptr, tables};
    for (int64_t i = 0; i < from.n_ranges; i++) {
      const int64_t first = from.ranges[2 * i], last = from.ranges[2 * i + 1];
      deliberate_run_layers(from.layers + first, kv + first, last - first, output, 1, d,
                            cos + at * dim, sin + at * dim, &span, 1, 0, threads);
    }
    return output;
  };
  run(token, position);
  const auto next = [&](int64_t draft, int64_t before) { return run(draft, position + 1 + before); };
  return draft_chain(*from.head, from.rule, d, output, chain, next, threads);
}

}  // namespace

extern "C" {

// Decodes one sequence, that of cache row `row` or of `tables`, greedily through layers[0..count), at
// most so many passes and `left` tokens. `text` has its `length` tokens so far, the newest of which no
// layer has run, and gets those that are decoded. `layer` or `model`, and `lookup`: where drafts come
// from, or null. cos and sin are those of all positions. Ends after a token of `stops`, and where less than a
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
                                  DraftLayer* layer, const DraftModel* model, Lookup* lookup,
                                  int64_t widest, float* states,
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
    Chain chain{drafts, confidences + pass * widest, seconds + pass * widest, 0, limit,
                found ? text[begin] : -1};
    if (layer && limit > 0) {
      const bool first = pass == 0;
      const int64_t entered = layer->entered, n = first ? layer->waiting : made - entered;
      if (layer->rule.limit < limit) chain.most = layer->rule.limit;
      now.chained = layer_chain(*layer, layer->entries, first ? layer->states : states + entered * d,
                                first ? layer->tokens : text + length + entered, n, d, chain, threads);
      layer->entries += n, layer->entered = made;
    } else if (model && limit > 0) {
      if (model->rule.limit < limit) chain.most = model->rule.limit;
      now.chained = model_chain(*model, kv, *embedding, d, row, tables, drafts[-1], start + made, cos,
                                sin, chain, threads);
    }
    now.timed = chain.timed;
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
  sizes[0] = sizeof(DraftLayer), sizes[1] = sizeof(DraftModel), sizes[2] = sizeof(Lookup);
  sizes[3] = sizeof(DraftedPass);
}
}

// One token's routing: scores of its experts, the best groups, the best experts and their weights.
#pragma once
#include <moe_xe/routing/rank.hpp>

namespace moe_xe {

using problem::Scoring, problem::GroupScore;
using Logit = Element<problem::input>;
using Bias = Element<problem::bias>;

// exp(logit - max) * scale. A NaN among the logits makes the scale, and so every score, NaN.
struct Softmax {
  float max = 0.f, scale = 1.f;
  Floats of(Floats logits) const { return exp_of(logits - max) * scale; }
};

struct Router {
  const Logit* logits;            // [tokens, num_experts]
  const Bias* correction_bias;    // [num_experts] or null
  float* topk_weights;            // [tokens, top_k]
  problem::ExpertId* topk_ids;    // [tokens, top_k]
  int64 logits_stride;            // elements between rows of logits
  float scaling_factor;

  void run(int64 token) const {
    const Logit* row = logits + token * logits_stride;
    Softmax softmax;
    if constexpr (problem::scoring == Scoring::softmax)
      softmax = softmax_of<slots_of(num_experts)>([row](int slot) { return logits_or_none(row, slot * lanes); });
    Ints groups = 0;
    if constexpr (grouped) groups = best_groups(row, softmax);

    Ranking<num_experts> ranking;
#pragma unroll unrolled
    for (int slot = 0; slot < ranking.slots; ++slot) {
      const int first = slot * lanes;
      ranking.keys[slot] = keys_of(row, first, num_experts - first, softmax);
      const Ints group = (first + lane_numbers()) / group_size;
      if constexpr (grouped) ranking.keys[slot] = (groups >> group & 1) != 0 ? ranking.keys[slot] : Ints(no_key);
    }
    Ints ids[chosen_slots] = {};
#pragma unroll 1
    for (int place = 0; place < top_k; ++place) put(ids, place, ranking.take_best());
    store(token, row, ids, softmax);
  }

 private:
  static constexpr int num_experts = problem::num_experts, top_k = problem::top_k, num_groups = problem::num_groups;
  static constexpr int group_size = num_experts / num_groups, chosen_slots = slots_of(top_k);
  static constexpr bool grouped = num_groups > 1;
  // Otherwise the logits choose: their order is the scores', without the ties of scores that saturate.
  static constexpr bool by_score = problem::has_bias || problem::rounded_scores || (grouped && problem::group_score == GroupScore::top2_sum);

  static Floats scores_of(Floats logits, Softmax softmax) {
    const Floats scores = exact_scores_of(logits, softmax);
    if constexpr (problem::rounded_scores) return rounded_floats<problem::input>(scores);
    else return scores;
  }

  static Floats exact_scores_of(Floats logits, Softmax softmax) {
    if constexpr (problem::scoring == Scoring::softmax) return softmax.of(logits);
    else if constexpr (problem::scoring == Scoring::sigmoid) return reciprocal_of(1.f + exp_of(-logits));
    else if constexpr (problem::scoring == Scoring::sqrtsoftplus) return sqrt_of(softplus(logits));
    else return logits;
  }

  // log(1 + exp(x)) = max(x, 0) + log(1 + y) with y = exp(-|x|) <= 1, and log(1 + y) = 2 atanh(y / (2 + y)), whose
  // series' terms fall ninefold: an error below 1e-8 of the value, however small it is.
  static Floats softplus(Floats x) {
    const Floats y = exp_of(x < 0.f ? x : -x), z = y * reciprocal_of(2.f + y), square = z * z;
    Floats series = 1.f / 15;
#pragma unroll
    for (int odd = 13; odd > 0; odd -= 2) series = series * square + 1.f / odd;
    return (x < 0.f ? Floats(0.f) : x) + 2.f * z * series;
  }

  // What the experts from `first` on, at most `count`, are chosen by.
  Ints keys_of(const Logit* row, int first, int count, Softmax softmax) const {
    Floats choice = load_floats<problem::input>(row + first, count);
    if constexpr (by_score) choice = scores_of(choice, softmax);
    if constexpr (problem::has_bias) choice += load_floats<problem::bias>(correction_bias + first, count);
    return lane_numbers() < count ? keys_from<Ints>(choice) : Ints(no_key);
  }

  static Floats logits_or_none(const Logit* row, int first) {
    const int count = num_experts - first;
    const Floats values = load_floats<problem::input>(row + first, count);
    return lane_numbers() < count ? values : Floats(minus_infinity);
  }

  // Everything is read twice, not kept: a row of many experts would fill a GPU's registers.
  template <int slots, class Read> static Softmax softmax_of(Read read) {
    Floats max = minus_infinity, sum = 0.f;
#pragma unroll 4
    for (int slot = 0; slot < slots; ++slot) {
      const Floats values = read(slot);
      max = values > max ? values : max;
    }
    const float row_max = value_of(max_of(keys_from<Ints>(max)));
#pragma unroll 4
    for (int slot = 0; slot < slots; ++slot) sum += exp_of(read(slot) - row_max);
    return {row_max, 1.f / sum_of(sum)};
  }

  // Bit g: experts of group g can be chosen.
  int best_groups(const Logit* row, Softmax softmax) const {
    Ranking<num_groups> ranking;
#pragma unroll
    for (int slot = 0; slot < ranking.slots; ++slot) ranking.keys[slot] = no_key;
#pragma unroll 1
    for (int group = 0; group < num_groups; ++group)
      put(ranking.keys, group, key_of_group(row, group * group_size, softmax));
    int groups = 0;
#pragma unroll 1
    for (int place = 0; place < problem::topk_groups; ++place) groups |= 1 << ranking.take_best();
    return groups;
  }

  int key_of_group(const Logit* row, int first, Softmax softmax) const {
    Ints best = no_key, second = no_key;
#pragma unroll 4
    for (int slot = 0; slot < slots_of(group_size); ++slot) {
      const Ints keys = keys_of(row, first + slot * lanes, group_size - slot * lanes, softmax);
      const Ints lesser = keys < best ? keys : best;
      best = keys > best ? keys : best;
      second = lesser > second ? lesser : second;
    }
    const int top = max_of(best);
    if constexpr (problem::group_score == GroupScore::max) return top;
    const int winner = min_of(best == top ? lane_numbers() : Ints(lanes));
    return keys_from<int>(value_of(top) + value_of(max_of(lane_numbers() == winner ? second : best)));
  }

  template <int slots> static void put(Ints (&values)[slots], int place, int value) {
#pragma unroll
    for (int slot = 0; slot < slots; ++slot)
      values[slot] = slot * lanes + lane_numbers() == place ? Ints(value) : values[slot];
  }

  // The weights of the chosen experts, a place in a lane.
  void store(int64 token, const Logit* row, const Ints (&ids)[chosen_slots], Softmax softmax) const {
    Floats weights[chosen_slots];
#pragma unroll
    for (int slot = 0; slot < chosen_slots; ++slot) weights[slot] = gather_floats<problem::input>(row, ids[slot]);
    if constexpr (problem::scoring == Scoring::topk_softmax) {
      fill_beyond(weights, minus_infinity);
      const Softmax over_chosen = softmax_of<chosen_slots>([&weights](int slot) { return weights[slot]; });
#pragma unroll
      for (int slot = 0; slot < chosen_slots; ++slot) weights[slot] = over_chosen.of(weights[slot]);
    } else {
#pragma unroll
      for (int slot = 0; slot < chosen_slots; ++slot) weights[slot] = scores_of(weights[slot], softmax);
    }
    float factor = scaling_factor;
    if constexpr (problem::renormalize) {
      fill_beyond(weights, 0.f);
      Floats sum = 0.f;
#pragma unroll
      for (int slot = 0; slot < chosen_slots; ++slot) sum += weights[slot];
      factor /= sum_of(sum) + 1e-20f;
    }
#pragma unroll
    for (int slot = 0; slot < chosen_slots; ++slot) {
      const int first = slot * lanes;
      store_lanes(topk_weights + token * top_k + first, weights[slot] * factor, top_k - first);
      store_lanes(topk_ids + token * top_k + first, ids[slot], top_k - first);
    }
  }

  // Lanes beyond the last place.
  static void fill_beyond(Floats (&weights)[chosen_slots], float value) {
    constexpr int last = chosen_slots - 1;
    weights[last] = last * lanes + lane_numbers() < top_k ? weights[last] : Floats(value);
  }
};

}  // namespace moe_xe

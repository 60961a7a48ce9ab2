// What forward and backward share.  No include guard: isa.h reads it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kKeys = 128;  // keys in a block
constexpr float kInf = std::numeric_limits<float>::infinity();

// exp of a difference of logits in Mul's unit.
template <class Mul, int Degree = Mul::kExpDegree>
FASTATTN_INLINE vf power(vf x) {
  return exp2<Degree>(x * (1.4426950408889634f / Mul::kUnit));
}

// One sequence: a batch of dense tensors, a part of packed ones, or a group of slots.
struct Sequence {
  int64_t b, row;          // its number, and its batch in the tensors
  int64_t q0, k0, Nq, Nk;  // where it begins, and its lengths
  int64_t part;            // of it, that a task is to do
  int64_t in_row;          // its number in its batch
};

// The sequences of a call, and parts of `span` rows of them.  Of the packed sequences of a batch, s owns the parts from
// q0 / span + s on, whatever the others' lengths; some of those are empty.
struct Sequences {
  int64_t B = 0, Nq = 0, Nk = 0;  // of the tensors; where there are groups, slots
  const int32_t *cu_q = nullptr, *cu_k = nullptr;
  int64_t num = 0;      // packed, in a batch
  bool is_even = true;  // they have one length

  bool is_packed() const { return cu_q; }
  int64_t count() const { return is_packed() ? B * num : B; }
  int64_t parts(int64_t N, int64_t span) const {  // of a batch of the tensors
    return is_packed() ? (num ? N / span + num : 0) : (N + span - 1) / span;
  }
  int64_t first_part(const Sequence& s, int64_t start, int64_t span) const {
    return is_packed() ? start / span + s.in_row : 0;
  }
  Sequence dense(int64_t b, int64_t part) const { return {b, b, 0, 0, Nq, Nk, part, 0}; }
  Sequence packed(int64_t b, int64_t s) const {
    return {b * num + s, b, cu_q[s], cu_k[s], cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s], 0, s};
  }
  Sequence whole(int64_t x) const { return is_packed() ? packed(x / num, x % num) : dense(x, 0); }
  // Part `part` of batch b, counted along `cu`.
  Sequence at(int64_t b, int64_t part, const int32_t* cu, int64_t span) const {
    if (!is_packed()) return dense(b, part);
    int64_t low = 0, high = num;  // the last sequence whose parts begin at `part` or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (cu[middle] / span + middle <= part ? low : high) = middle;
    }
    Sequence s = packed(b, low);
    s.part = part - (cu[low] / span + low);
    return s;
  }
  // Of keys that are gathered, the last slots may belong to no sequence.
  void check(const Maybe& q_ends, const Maybe& k_ends, bool is_gathered) {
    if (!q_ends && !k_ends) return;
    FASTATTN_CHECK(q_ends && k_ends, "packed sequences take both cu_q and cu_k");
    const View<const int32_t, 1> ends_q(*q_ends), ends_k(*k_ends);
    num = ends_q.shape[0] - 1, cu_q = ends_q.data, cu_k = ends_k.data;
    FASTATTN_CHECK(num >= 0 && ends_k.shape[0] == num + 1 && (ends_q.stride[0] == 1 || num == 0) &&
                       (ends_k.stride[0] == 1 || num == 0),
                   "cu_q is ", text(*q_ends), " and cu_k is ", text(*k_ends),
                   "; they take as many numbers, one after another");
    for (int64_t s = 0; s <= num; ++s) {
      FASTATTN_CHECK(s ? cu_q[s] >= cu_q[s - 1] && cu_k[s] >= cu_k[s - 1] : !cu_q[0] && !cu_k[0],
                     "cu_q[", s, "] is ", cu_q[s], " and cu_k[", s, "] is ", cu_k[s],
                     "; they must ascend from 0");
      if (s) is_even &= cu_q[s] - cu_q[s - 1] == cu_q[1] && cu_k[s] - cu_k[s - 1] == cu_k[1];
    }
    const int64_t end_q = num ? cu_q[num] : 0, end_k = num ? cu_k[num] : 0;
    FASTATTN_CHECK(end_q == Nq && (end_k == Nk || (is_gathered && end_k < Nk)), "cu_q ends at ",
                   end_q, " and cu_k at ", end_k, "; ", Nq, " and ", Nk, " rows are given");
  }
};

template <class T>
Strided<T> rows_of(const View<T, 4>& t, const Sequence& s, int64_t h, int64_t start) {
  return {t.at(s.row, h, start), t.stride[2]};
}

// Which token each slot holds: int32 [B|1, heads, 1 or with labels 2, slots].  A head of the index serves as many heads in
// a row of the tensors as there are more of them.
struct TokenSlots {
  const int32_t* token = nullptr;
  int64_t stride[3], shape[4], H, num_tokens;
  bool repeats = false, covers = true;  // tokens in several groups; every token is in one

  TokenSlots() = default;
  TokenSlots(const char* what, const Tensor& given, int64_t B, int64_t H, int64_t num_tokens)
      : H(H), num_tokens(num_tokens) {
    const View<const int32_t, 4> t(given);
    std::copy_n(t.shape, 4, shape);
    for (int axis = 0; axis < 3; ++axis) stride[axis] = shape[axis] == 1 ? 0 : t.stride[axis];
    FASTATTN_CHECK((shape[0] == 1 || shape[0] == B) &&
                       (H == 0 || (shape[1] > 0 && H % shape[1] == 0)) &&
                       (shape[2] == 1 || shape[2] == 2) && (t.stride[3] == 1 || shape[3] < 2),
                   what, " is ", text(given), "; B is ", B, " and H is ", H);
    token = t.data;
    char* const met = static_cast<char*>(scratch(num_tokens + 1));
    for (int64_t b = 0; b < shape[0]; ++b)
      for (int64_t h = 0; h < shape[1]; ++h) {
        std::memset(met, 0, num_tokens);
        const int32_t* const row = token + b * stride[0] + h * stride[1];
        int64_t count = 0;
        for (int64_t t = 0; t < shape[3]; ++t) {
          if (row[t] == -1) continue;
          FASTATTN_CHECK(row[t] >= 0 && row[t] < num_tokens, what, " names token ", row[t],
                         "; it takes 0 to ", num_tokens - 1, ", or -1 for an empty slot");
          met[row[t]] ? void(repeats = true) : void(++count);
          met[row[t]] = 1;
        }
        covers &= count == num_tokens;
      }
  }
  bool is_given() const { return token; }
  bool is_direct() const { return !repeats; }
  int64_t row_head(int64_t h) const { return h / (H / shape[1]); }
  const int32_t* at(const Sequence& s, int64_t h, int64_t start) const {
    return token ? token + s.row * stride[0] + row_head(h) * stride[1] + start : nullptr;
  }
  const int32_t* labels(const Sequence& s, int64_t h, int64_t start) const {
    return token && shape[2] == 2 ? at(s, h, start) + stride[2] : nullptr;
  }
  template <class T>
  Strided<T> rows(const View<T, 4>& t, const Sequence& s, int64_t h, int64_t start) const {
    if (!token) return rows_of(t, s, h, start);
    return {t.at(s.row, h, 0), t.stride[2], at(s, h, start), hole<T>()};
  }

 private:
  template <class T>
  static T* hole() {
    if constexpr (std::is_const_v<T>) {
      static const std::remove_const_t<T> zeros[256] = {};
      return zeros;
    } else {
      static thread_local T room[256];
      return room;
    }
  }
};

// Everything of a call that is not a row: api.py's arguments, read and checked.
struct Options {
  Sequences sequences;
  TokenSlots slots_q, slots_k;
  bool by_slot;  // o is [B, Hq, slots, Dv], not yet put together
  Term bias[2], weight;
  const float* sinks = nullptr;
  const int32_t* heads = nullptr;
  MaskTensors tensors;
  Ints mask;
  double scale, softcap, dropout;
  Clip clip;
  int64_t seed = 0, Hq, Hk, Nq, Nk;  // tokens
  int64_t topk;                      // logits that a query keeps, or 0: all

  Options(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionExtras& extras,
          Ints mask, Floats numbers)
      : mask(mask), Hq(q.shape[1]), Hk(k.shape[1]) {
    const auto& [bias_, bias_index, bias2, bias2_index, weight_, weight_index, sinks_, visible,
                 blocks, heads_, cu_q, cu_k, seed_, q_slots, k_slots] = extras;
    FASTATTN_CHECK(q.ndim == 4 && k.ndim == 4 && v.ndim == 4, "q, k, v are ", text(q), ", ",
                   text(k), ", ", text(v), "; they take 4 axes");
    FASTATTN_CHECK(q.shape[3] <= 256 && v.shape[3] <= 256, "D is ", q.shape[3], " and Dv is ",
                   v.shape[3], "; at most 256");
    FASTATTN_CHECK(heads_ || Hq == Hk || (Hk > 0 && Hq % Hk == 0), "Hq is ", Hq, " and Hk is ", Hk,
                   "; Hq must be a multiple of Hk");
    FASTATTN_CHECK(numbers.size() == 7, "numbers has ", numbers.size(), " numbers; it takes 7");
    scale = numbers[0], softcap = numbers[1], dropout = numbers[4], by_slot = numbers[5] != 0;
    topk = static_cast<int64_t>(numbers[6]);
    clip = {static_cast<float>(numbers[2]), static_cast<float>(numbers[3])};
    Nq = q.shape[2], Nk = k.shape[2];
    FASTATTN_CHECK((!q_slots || k_slots) && (!k_slots || cu_q),
                   "groups take slots of queries, slots of keys and cu_q; gathered keys take cu_q");
    sequences = {q.shape[0], Nq, Nk};
    if (k_slots) {
      slots_k = TokenSlots("key_groups", *k_slots, sequences.B, Hk, Nk);
      sequences.Nk = slots_k.shape[3];
    }
    if (q_slots) {
      slots_q = TokenSlots("groups", *q_slots, sequences.B, Hq, Nq);
      sequences.Nq = slots_q.shape[3];
      FASTATTN_CHECK(slots_q.shape[2] == slots_k.shape[2],
                     "both or neither of groups and key_groups have labels");
      FASTATTN_CHECK(
          by_slot || !slots_q.repeats,
          "groups: a token is in two groups, and combine=\"only\" promises that none is; "
          "say what is to be done: combine=\"mean\" or combine=\"sum\"");
    }
    FASTATTN_CHECK(!cu_q || q_slots || sequences.B == 1, "packed sequences take B = 1; B is ",
                   sequences.B);
    sequences.check(cu_q, cu_k, k_slots && !q_slots);
    const int64_t B = sequences.count();
    const int64_t in_row = q_slots ? sequences.num : B;
    bias[0] = Term("bias", bias_, bias_index, B, Hq, in_row);
    bias[1] = Term("bias2", bias2, bias2_index, B, Hq, in_row);
    weight = Term("weight", weight_, weight_index, B, Hq, in_row);
    if (sinks_) sinks = View<const float, 1>("sinks", *sinks_, {Hq}).data;
    if (heads_) {
      heads = View<const int32_t, 1>("heads", *heads_, {Hq}).data;
      for (int64_t h = 0; h < Hq; ++h)
        FASTATTN_CHECK(heads[h] >= 0 && heads[h] < Hk, "heads[", h, "] is ", heads[h], "; Hk is ",
                       Hk);
    }
    tensors = MaskTensors::of(visible, blocks);
    if (dropout != 0) {
      FASTATTN_CHECK(seed_ && dropout > 0 && dropout < 1, "dropout is ", dropout,
                     "; it takes a number in [0, 1), and a seed");
      seed = *View<const int64_t, 1>("seed", *seed_, {1}).data;
    }
  }

  // Nothing but a scale and a band: the fast case.
  bool is_plain() const {
    return is_band(mask) && bias[0].form == Form::none && bias[1].form == Form::none && !sinks &&
           weight.form == Form::none && softcap == 0 && !clip.is_on() && dropout == 0 &&
           !slots_k.is_given() && !topk;
  }
  // Rows of queries and of keys of a sequence; and of outputs.
  template <class T>
  Strided<T> queries(const View<T, 4>& t, const Sequence& s, int64_t h) const {
    return slots_q.rows(t, s, h, s.q0);
  }
  template <class T>
  Strided<T> keys(const View<T, 4>& t, const Sequence& s, int64_t h) const {
    return slots_k.rows(t, s, h, s.k0);
  }
  template <class T>
  Strided<T> outputs(const View<T, 4>& t, const Sequence& s, int64_t h) const {
    return by_slot ? rows_of(t, s, h, s.q0) : queries(t, s, h);
  }
  int64_t num_outputs() const { return by_slot ? sequences.Nq : Nq; }
  bool has_bias() const { return bias[0].form != Form::none; }
  bool has_factor() const { return weight.form != Form::none || dropout != 0; }
  int64_t key_head(int64_t h) const { return heads ? heads[h] : h / (Hq / Hk); }
  // How many of the query heads that read key heads before `hk`, or `hk` and come before h, come before h.
  int64_t rank(int64_t h) const {
    int64_t before = 0;
    if (!heads) return h;
    for (int64_t g = 0; g < Hq; ++g)
      before += heads[g] < heads[h] || (heads[g] == heads[h] && g < h);
    return before;
  }
};

// The mask of a batch and head.
template <class M>
M mask_of(const Options& options, const Sequence& s, int64_t h) {
  if constexpr (std::is_same_v<M, Band>) {
    return Band(options.mask.subspan(1), s.Nq, s.Nk);
  } else {
    if (!options.slots_q.is_given())
      return Formula(options.mask, s.Nq, s.Nk, options.tensors, s.b, h);
    const TokenSlots &q = options.slots_q, &k = options.slots_k;
    const int64_t hk = options.key_head(h);
    return Formula(options.mask, options.Nq, options.Nk, options.tensors, s.row, h,
                   {q.at(s, h, s.q0), k.at(s, hk, s.k0), q.labels(s, h, s.q0),
                    k.labels(s, hk, s.k0), static_cast<int>(s.Nq), static_cast<int>(s.Nk)});
  }
}

template <bool Plain, class Mul>
std::conditional_t<Plain, Scale, Bent> score_of(const Options& options) {
  const float scale = static_cast<float>(options.scale), cap = static_cast<float>(options.softcap);
  if constexpr (Plain)
    return {scale * Mul::kUnit};
  else
    return {scale, Mul::kUnit, cap, cap == 0 ? 0.0f : 1 / cap};
}

// What a kernel reads beside the products: tiles whose rows are keys and whose lanes are queries.  Absent ones are null.
struct Extras {
  float *added = nullptr, *factor = nullptr;  // to logits; by which weights are multiplied
  Lookup bias[2], weight;
  Keep keep;
  bool has_keep;

  void begin(const Options& options, const Sequence& s, int64_t h) {
    for (int i = 0; i < 2; ++i)
      bias[i] = options.bias[i].at(i ? "bias2" : "bias", s.b, h, s.Nq, s.Nk);
    weight = options.weight.at("weight", s.b, h, s.Nq, s.Nk);
    has_keep = options.dropout != 0;
    keep = {options.seed,
            static_cast<uint32_t>(
                std::min(std::nearbyint(options.dropout * 4294967296.0), 4294967295.0)),
            static_cast<uint32_t>(s.b), static_cast<uint32_t>(h),
            static_cast<float>(1 / (1 - options.dropout))};
  }
  // For the pairs [i0, i1) x [j0, j1).  Rows are `ld` lanes; the row past j1 is the partner of an odd last key.
  template <class M>
  void read(const M& mask, const Runs& runs, int64_t ld, int64_t i0, int64_t i1, int64_t j0,
            int64_t j1) const {
    const int64_t lanes = up(i1 - i0, W);
    for (int i = 0; i < 2; ++i)
      if (bias[i].is_given()) fill(bias[i], added, ld, i0, i1, j0, j1, i == 0);
    if (!bias[0].is_given())
      for (int64_t j = j0; j < j1; ++j) std::fill_n(added + (j - j0) * ld, lanes, 0.0f);
    for (const Run& run : runs)
      if (run.partial)
        for (int64_t j = run.j0; j < run.j1; ++j)
          for (int v = run.v0; v < run.v1; ++v) {
            float* const at = added + j * ld + v * W;
            store(at, select(visible(mask, static_cast<int>(i0) + v * W, static_cast<int>(j0 + j)),
                             load(at), splat(-kInf)));
          }
    if (!factor) return;
    if (weight.is_given()) fill(weight, factor, ld, i0, i1, j0, j1, true);
    if (has_keep) keep.fill(factor, ld, i0, i1, j0, j1, !weight.is_given());
    std::fill_n(factor + (j1 - j0) * ld, lanes, 0.0f);
  }
};

// A logit s of key j, or -inf where the query keeps greater ones; NaN stays.
FASTATTN_INLINE vf kept(vf s, const float* floor, const float* last, int64_t j) {
  const vf least = load(floor);
  const vi beyond = static_cast<int>(j) > load_as<vi>(last);
  return select((s < least) | ((s == least) & beyond), splat(-kInf), s);
}

template <class T>
void clear(const View<T, 4>& t) {
  for (int64_t b = 0; b < t.shape[0]; ++b)
    for (int64_t h = 0; h < t.shape[1]; ++h)
      for (int64_t i = 0; i < t.shape[2]; ++i) std::fill_n(t.at(b, h, i), t.shape[3], T(0.0f));
}

// Run-time values become types here, once: `run` is called with the element type and whether the call is plain.
template <class Run>
struct WithKind {
  const Run& run;
  bool is_plain;
  template <class T>
  void operator()(Type<T> type) const {
    is_plain ? run(type, Value<true>{}) : run(type, Value<false>{});
  }
};
template <class Run>
void dispatch_kind(const Tensor& q, const Options& options, const Run& run) {
  dispatch(types<float, bf16, f16>, "q.dtype", q.dtype, WithKind<Run>{run, options.is_plain()});
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA

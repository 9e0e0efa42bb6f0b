//! Counts of the calls that were served, by shape and tier.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::Write as _;

use crate::plan::Reason;
use crate::{Dtype, Problem, Tier};

/// What calls are told apart by. Field order is the order of equally frequent entries in a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Element type of q, k and v.
    pub dtype: Dtype,
    /// Head dimension of q and k.
    pub head_dim: usize,
    /// Head dimension of v and the output.
    pub value_dim: usize,
    /// Queries of a sequence; of the longest one in a packed call.
    pub query_len: usize,
    /// Keys of a sequence; of the longest one in a packed call.
    pub key_len: usize,
    /// Whether keys after the diagonal are hidden.
    pub causal: bool,
    /// The tier that served.
    pub tier: Tier,
    /// Whether it served gradients.
    pub backward: bool,
}

impl Key {
    /// The key of a call.
    #[must_use]
    pub fn of(problem: &Problem, tier: Tier) -> Self {
        Self {
            dtype: problem.dtype,
            head_dim: problem.head_dim,
            value_dim: problem.value_dim,
            query_len: problem.lengths.max_query_len(),
            key_len: problem.lengths.max_key_len(),
            causal: problem.mask.right == Some(0),
            tier,
            backward: false,
        }
    }

    /// The key of the gradients of a call.
    #[must_use]
    pub fn of_backward(problem: &Problem, tier: Tier) -> Self {
        Self { backward: true, ..Self::of(problem, tier) }
    }

    fn rank(&self) -> impl Ord + use<> {
        let Self { dtype, head_dim, value_dim, query_len, key_len, causal, tier, backward } = *self;
        (dtype.name(), head_dim, value_dim, query_len, key_len, causal, tier.name(), backward)
    }
}

/// Calls that share a [`Key`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How many there were.
    pub calls: u64,
    /// What they have in common.
    pub key: Key,
}

/// Most keys that are told apart: a process that meets ever new lengths must not grow without end.
pub const MAX_KEYS: usize = 4096;

/// Counts calls by [`Key`], in bounded memory.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    calls: HashMap<Key, Calls>,
    other_calls: u64,
}

#[derive(Clone, Debug, Default)]
struct Calls {
    count: u64,
    /// The tiers before the one that served, with the reasons of the first call.
    passed_over: Vec<(Tier, String)>,
}

impl Trace {
    /// Counts one call. Calls with a new key are counted together once there are [`MAX_KEYS`] keys. `passed_over` gives
    /// the reasons of the other tiers; it is called for the first call of a key only.
    pub fn record(&mut self, key: Key, passed_over: impl FnOnce() -> Vec<(Tier, Reason)>) {
        let tier = key.tier;
        if let Some(calls) = self.calls.get_mut(&key) {
            calls.count += 1;
        } else if self.calls.len() < MAX_KEYS {
            let before = Tier::ALL.into_iter().take_while(|&other| other != tier);
            let mut reasons = passed_over();
            reasons.retain(|(other, _)| before.clone().any(|tier| tier == *other));
            let passed_over = reasons.into_iter().map(|(tier, reason)| (tier, reason.to_string())).collect();
            self.calls.insert(key, Calls { count: 1, passed_over });
        } else {
            self.other_calls += 1;
        }
    }

    /// The counts, most frequent first.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> =
            self.calls.iter().map(|(&key, calls)| Entry { calls: calls.count, key }).collect();
        entries.sort_by_cached_key(|entry| (Reverse(entry.calls), entry.key.rank()));
        entries
    }

    /// The reasons for which tiers were passed over, in the order of the tiers, each with the number of its calls.
    fn reasons(&self) -> Vec<(Tier, &str, u64)> {
        let mut counts: HashMap<(Tier, &str), u64> = HashMap::new();
        for Calls { count, passed_over } in self.calls.values() {
            for (tier, reason) in passed_over {
                *counts.entry((*tier, reason)).or_default() += count;
            }
        }
        let mut reasons: Vec<_> = counts.into_iter().map(|((tier, reason), calls)| (tier, reason, calls)).collect();
        let place = |tier| Tier::ALL.into_iter().position(|other| other == tier);
        reasons.sort_by_key(|&(tier, reason, calls)| (place(tier), Reverse(calls), reason));
        reasons
    }

    /// Calls whose key is in no entry, because it came after [`MAX_KEYS`] others.
    #[must_use]
    pub const fn other_calls(&self) -> u64 {
        self.other_calls
    }

    /// Every call.
    #[must_use]
    pub fn total_calls(&self) -> u64 {
        self.calls.values().map(|calls| calls.count).sum::<u64>() + self.other_calls
    }

    /// The report that `MTLFLASHATTN_TRACE` prints: a headline and a line per entry, without a final line break; empty
    /// when nothing was recorded. Lq and Lk are the lengths, D is the head dimension (of q and v where they differ). Below
    /// them stand the reasons for which better tiers did not serve.
    #[must_use]
    pub fn summary(&self) -> String {
        let entries = self.entries();
        if entries.is_empty() {
            return String::new();
        }
        let mut text = format!(
            "[MTLFLASHATTN_TRACE] {} attention call(s), {} distinct shape/kernel combos:",
            self.total_calls(),
            entries.len()
        );
        for Entry { calls, key } in entries {
            let dim = match key {
                Key { head_dim, value_dim, .. } if head_dim == value_dim => head_dim.to_string(),
                Key { head_dim, value_dim, .. } => format!("{head_dim}/{value_dim}"),
            };
            let Key { dtype, query_len, key_len, tier, .. } = key;
            let (dtype, causal) = (dtype.name(), if key.causal { 'T' } else { 'F' });
            let pass = if key.backward { " (backward)" } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n  calls={calls:<6} {dtype:<9} D={dim:<4} Lq={query_len:<6} Lk={key_len:<6} causal={causal}  -> {tier}{pass}"
            );
        }
        if self.other_calls > 0 {
            let _ = write!(text, "\n  calls={:<6} other shapes, beyond the first {MAX_KEYS} combos", self.other_calls);
        }
        let reasons = self.reasons();
        if !reasons.is_empty() {
            text.push_str("\n  passed over:");
        }
        for (tier, reason, calls) in reasons {
            let _ = write!(text, "\n    {tier}: {reason} ({calls} call(s))");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, TensorMeta};

    fn alone() -> Vec<(Tier, Reason)> {
        Vec::new()
    }

    fn problem(dtype: Dtype, [query_len, key_len]: [i64; 2], [head_dim, value_dim]: [i64; 2], causal: bool) -> Problem {
        let meta = |shape| TensorMeta { dtype, shape, strides: &[0, 0, 0, 1] };
        let options = Options { causal, window: (-1, -1), ..Options::default() };
        let (q, k, v) = ([1, query_len, 2, head_dim], [1, key_len, 2, head_dim], [1, key_len, 2, value_dim]);
        Problem::dense(meta(&q), meta(&k), meta(&v), &options).unwrap()
    }

    #[test]
    fn summary_has_a_headline_and_the_most_frequent_first() {
        let mut trace = Trace::default();
        let (long, short, causal) = (
            problem(Dtype::Bf16, [26136, 26136], [128, 128], false),
            problem(Dtype::Bf16, [26136, 5], [128, 128], false),
            problem(Dtype::F32, [77, 77], [192, 128], true),
        );
        for _ in 0..990 {
            trace.record(Key::of(&long, Tier::Cpu), alone);
        }
        trace.record(Key::of(&causal, Tier::Cpu), alone);
        trace.record(Key::of(&short, Tier::Torch), alone);
        trace.record(Key::of(&short, Tier::Torch), alone);
        assert_eq!(
            trace.summary(),
            "[MTLFLASHATTN_TRACE] 993 attention call(s), 3 distinct shape/kernel combos:\n  \
             calls=990    bfloat16  D=128  Lq=26136  Lk=26136  causal=F  -> cpu\n  \
             calls=2      bfloat16  D=128  Lq=26136  Lk=5      causal=F  -> torch\n  \
             calls=1      float32   D=192/128 Lq=77     Lk=77     causal=T  -> cpu"
        );
    }

    #[test]
    fn nothing_recorded_is_no_report() {
        assert_eq!(Trace::default().summary(), "");
    }

    #[test]
    fn the_reasons_of_better_tiers_are_counted_and_asked_for_once() {
        let mut trace = Trace::default();
        let asked = std::cell::Cell::new(0);
        let why = || {
            asked.set(asked.get() + 1);
            vec![
                (Tier::Tensorops, Reason::NeedsMetal),
                (Tier::Simdgroup, Reason::Demoted("no compiler".into())),
                (Tier::Scalar, Reason::After(Tier::Torch)),
            ]
        };
        for query_len in [5, 5, 6] {
            trace.record(Key::of(&problem(Dtype::F32, [query_len, 9], [8, 8], false), Tier::Torch), why);
        }
        trace.record(Key::of(&problem(Dtype::F32, [5, 9], [8, 8], false), Tier::Cpu), || {
            vec![(Tier::Tensorops, Reason::NeedsMetal), (Tier::Torch, Reason::After(Tier::Cpu))]
        });
        assert_eq!(asked.get(), 2);
        let summary = trace.summary();
        let (_, reasons) = summary.split_once("\n  passed over:\n").unwrap();
        assert_eq!(
            reasons,
            "    tensorops: needs tensors on an MPS device (4 call(s))\n    \
             simdgroup: failed here: no compiler (3 call(s))"
        );
    }

    #[test]
    fn every_field_of_the_key_tells_calls_apart() {
        let mut trace = Trace::default();
        let same = problem(Dtype::F32, [7, 9], [8, 8], false);
        trace.record(Key::of(&same, Tier::Cpu), alone);
        trace.record(Key::of(&same, Tier::Cpu), alone);
        trace.record(Key::of(&same, Tier::Torch), alone);
        for other in [
            problem(Dtype::F16, [7, 9], [8, 8], false),
            problem(Dtype::F32, [8, 9], [8, 8], false),
            problem(Dtype::F32, [7, 8], [8, 8], false),
            problem(Dtype::F32, [7, 9], [16, 8], false),
            problem(Dtype::F32, [7, 9], [8, 16], false),
            problem(Dtype::F32, [7, 9], [8, 8], true),
        ] {
            trace.record(Key::of(&other, Tier::Cpu), alone);
        }
        trace.record(Key::of_backward(&same, Tier::Cpu), alone);
        assert!(trace.summary().lines().any(|line| line.ends_with("-> cpu (backward)")));
        let entries = trace.entries();
        assert_eq!(entries.len(), 9);
        assert_eq!(entries[0], Entry { calls: 2, key: Key::of(&same, Tier::Cpu) });
        assert_eq!(trace.total_calls(), 10);
    }

    #[test]
    fn memory_is_bounded_and_no_call_is_lost() {
        let mut trace = Trace::default();
        let at = |query_len: usize| problem(Dtype::F32, [query_len as i64, 3], [8, 8], false);
        for query_len in 1..=MAX_KEYS + 10 {
            trace.record(Key::of(&at(query_len), Tier::Cpu), alone);
        }
        trace.record(Key::of(&at(1), Tier::Cpu), alone);
        assert_eq!(trace.entries().len(), MAX_KEYS);
        assert_eq!(trace.entries()[0], Entry { calls: 2, key: Key::of(&at(1), Tier::Cpu) });
        assert_eq!((trace.other_calls(), trace.total_calls()), (10, MAX_KEYS as u64 + 11));
        let summary = trace.summary();
        assert_eq!(summary.lines().count(), MAX_KEYS + 2);
        assert_eq!(summary.lines().last(), Some("  calls=10     other shapes, beyond the first 4096 combos"));
    }
}

//! Plans for Metal devices, kept: choosing a tile takes longer than launching its kernel.

use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use mtlflashattn_core::plan::{Gpu, TunedTiles, Wanted, has_plain_rows};
use mtlflashattn_core::{
    self as core, BackwardPlan, BiasKind, CacheLayout, Device, Dtype, Lengths, Mask, Plan, Planner, Problem, Settings,
};

/// Most plans that are kept; lengths that never come again must not fill the memory.
const CAPACITY: usize = 1024;

/// Everything that a planner may look at: all of a problem but factors, and of strides only what `has_plain_rows` says.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "features are on or off")]
struct Key {
    gpu: Gpu,
    dtype: Dtype,
    lengths: Lengths,
    heads: [usize; 2],
    dims: [usize; 2],
    plain_rows: bool,
    /// Whether keys lie in a cache, and whether that has pages.
    paged: Option<bool>,
    mask: Mask,
    bias: Option<BiasKind>,
    softcap: bool,
    alibi: bool,
    sinks: bool,
    dropout: bool,
    splits: Option<NonZeroUsize>,
}

impl Key {
    fn new(problem: &Problem, gpu: Gpu) -> Self {
        let Problem { dtype, lengths, query_heads, key_heads, head_dim, value_dim, softcap, mask, .. } = *problem;
        Self {
            gpu,
            dtype,
            lengths,
            heads: [query_heads, key_heads],
            dims: [head_dim, value_dim],
            plain_rows: has_plain_rows(problem),
            paged: problem.cache.map(|cache| matches!(cache.layout, CacheLayout::Pages { .. })),
            mask,
            bias: problem.bias.map(|bias| bias.kind),
            softcap: softcap > 0.0,
            alibi: problem.alibi.is_some(),
            sinks: problem.sinks.is_some(),
            dropout: problem.dropout.is_some(),
            splits: problem.splits,
        }
    }
}

/// The plans that were made with some settings.
#[derive(Default)]
pub struct Plans {
    forward: Kept<Key, Plan>,
    backward: Kept<(Key, Wanted), BackwardPlan>,
}

impl Plans {
    /// The plan for `problem` on `gpu` when no kernel of it has failed.
    pub fn get(&self, problem: &Problem, gpu: Gpu, settings: &Settings, tuned: &TunedTiles) -> core::Result<Plan> {
        let planner = Planner { tuned, ..Planner::new(Device::Metal(gpu), settings) };
        self.forward.get(Key::new(problem, gpu), || planner.plan(problem))
    }

    /// The same for its gradients.
    pub fn backward(&self, problem: &Problem, gpu: Gpu, settings: &Settings, wanted: Wanted) -> BackwardPlan {
        let planner = Planner::new(Device::Metal(gpu), settings);
        let make = || Ok::<_, Infallible>(planner.plan_backward(problem, wanted));
        let Ok(plan) = self.backward.get((Key::new(problem, gpu), wanted), make);
        plan
    }
}

struct Kept<K, P>(Mutex<HashMap<K, P>>);

impl<K, P> Default for Kept<K, P> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, P: Clone> Kept<K, P> {
    fn get<E>(&self, key: K, make: impl FnOnce() -> Result<P, E>) -> Result<P, E> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let plan = make()?;
        if plans.len() == CAPACITY {
            plans.clear();
        }
        plans.insert(key, plan.clone());
        Ok(plan)
    }
}

//! Variants of the decode kernel, and its launches on the simulator.

use mtlflashattn_core::plan::QueryHome;
use mtlflashattn_core::reference::Forward;
use mtlflashattn_core::{BiasKind, Dtype, MetalTile};
use mtlflashattn_metal::{CacheTensors, DecodeLaunch, DecodeTensors, Kernel, MergeKernel, Tensors};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch, Report};
use proptest::prelude::*;

use super::bench::{Bench, borrowed, buffers};
use super::cached::CacheForm;
use super::variants::Variant;
use super::{Case, Run, hole};

/// A variant of the decode kernel with the number of splits of its launches.
#[derive(Clone, Debug)]
pub struct DecodeVariant {
    pub name: &'static str,
    pub case: Case,
    pub tile: MetalTile,
    pub aligned: bool,
    pub splits: usize,
    /// Where keys lie, if in a cache.
    pub cache: Option<CacheForm>,
}

/// What the kernels of a call did.
pub struct Reports {
    pub decode: Report,
    pub merge: Report,
}

impl DecodeVariant {
    /// For its cases alone.
    pub fn without_tile(name: &'static str, case: &Case) -> Self {
        let tile = direct(1, 1, 8, 8);
        Self { name, case: case.clone(), tile, aligned: false, splits: 1, cache: None }
    }

    pub fn run(&self, case: &Case) -> Run {
        self.cache.map_or_else(|| Run::new(case), |form| Run::cached(case, form))
    }

    pub fn kernel(&self, run: &Run) -> Kernel {
        let kernel = Kernel::decode(&run.problem, self.tile, self.case.lse);
        let kernel = if self.aligned { kernel.aligned(&run.problem, [0; 3]) } else { kernel };
        assert!(kernel.fits() && kernel.features.aligned == self.aligned, "{}", self.name);
        kernel
    }

    /// Problems that this variant serves, with up to `most` keys, and more rows than a threadgroup has.
    pub fn cases(&self, most: usize) -> impl Strategy<Value = Case> + use<> {
        let variant = Variant { name: self.name, case: self.case.clone(), tile: None, aligned: false, matmul: None };
        (variant.cases(most * 2 / 3), 1..=5usize, 1..=7usize).prop_map(|(case, group, queries)| {
            let few = |query_len: usize| if case.packed { query_len % (queries + 1) } else { queries };
            let lengths = case.lengths.iter().map(|&(query_len, key_len)| (few(query_len), key_len)).collect();
            Case { lengths, group, ..case }
        })
    }
}

/// Texts of both kernels.
#[derive(Clone)]
pub struct Texts {
    pub decode: String,
    pub merge: String,
}

impl Texts {
    pub fn of(kernel: &Kernel) -> Self {
        Self { decode: kernel.source(), merge: MergeKernel::of(kernel).source() }
    }

    /// Both texts with `from` replaced by `to`.
    pub fn changed(&self, from: &str, to: &str) -> Self {
        assert!(self.decode.contains(from) || self.merge.contains(from), "{from:?} is in no text");
        Self { decode: self.decode.replace(from, to), merge: self.merge.replace(from, to) }
    }
}

/// Runs the texts of `kernel` and of its merge kernel, and returns what they computed and did.
///
/// # Errors
/// Whatever the compiler or the simulator found wrong.
pub fn launch(
    bench: &Bench,
    kernel: &Kernel,
    texts: &Texts,
    run: &Run,
    splits: usize,
) -> Result<(Forward, Reports), String> {
    let launch = DecodeLaunch::new(&run.problem, kernel, &run.outputs, splits).expect("a small problem");
    let forward = buffers(&run.tensors()).map_err(|error| error.to_string())?;
    let cache = run.cache_tensors().map(|bytes| Buffer::from_slice(bytes).expect("memory"));
    let reports = dispatch(bench, kernel, texts, &launch, borrowed(&forward), cache.map(|buffer| buffer))?;
    let lse = forward.lse.as_ref().map(Buffer::read::<u8>);
    Ok((run.read(&forward.out.read::<u8>(), lse.as_deref())?, reports))
}

/// Runs both kernels with partial results that are full of NaN.
///
/// # Errors
/// Whatever the compiler or the simulator found wrong.
pub fn dispatch(
    bench: &Bench,
    kernel: &Kernel,
    texts: &Texts,
    launch: &DecodeLaunch,
    forward: Tensors<&Buffer>,
    cache: CacheTensors<&Buffer>,
) -> Result<Reports, String> {
    let partials = Buffer::from_slice(&hole(Dtype::F32).repeat(launch.partial_floats)).expect("memory");
    let tensors = DecodeTensors { forward, partials: (launch.partial_floats > 0).then_some(&partials), cache };
    let arguments = launch.arguments(&tensors);
    let run = |source: &str, entry: &str, grid| -> Result<Report, String> {
        let pipeline = bench.pipeline(source, entry).map_err(|error| error.to_string())?;
        bench.simulator().run(&pipeline, &arguments, &Dispatch::from(grid)).map_err(|error| error.to_string())
    };
    let mut reports = Reports { decode: Report::default(), merge: Report::default() };
    if !launch.is_empty() {
        reports.decode = run(&texts.decode, kernel.entry(), launch.grid)?;
        if let Some(grid) = launch.merge {
            reports.merge = run(&texts.merge, MergeKernel::of(kernel).entry(), grid)?;
        }
    }
    Ok(reports)
}

/// Runs both kernels and checks their results.
///
/// # Errors
/// Whatever is wrong.
pub fn check(bench: &Bench, kernel: &Kernel, texts: &Texts, run: &Run, splits: usize) -> Result<Reports, String> {
    let (got, reports) = launch(bench, kernel, texts, run, splits)?;
    run.check(kernel, &got)?;
    Ok(reports)
}

/// A window bound of the template that becomes a random one.
const RANDOM: i64 = i64::MAX;

const fn direct(simdgroups: usize, row_fragments: usize, keys: usize, value_chunk: usize) -> MetalTile {
    MetalTile { simdgroups, row_fragments, keys, staged: false, value_chunk, query: QueryHome::Registers }
}

const fn staged(tile: MetalTile) -> MetalTile {
    MetalTile { staged: true, ..tile }
}

const fn query_in(query: QueryHome, tile: MetalTile) -> MetalTile {
    MetalTile { query, ..tile }
}

/// Variants that together have every feature, dtype, class of head dimension and form of tile.
pub fn variants() -> Vec<DecodeVariant> {
    use Dtype::{Bf16, F16, F32};
    let additive = |dtype| Some(BiasKind::Additive(dtype));
    let dims = |dtype, head_dim, value_dim| Case { dtype, head_dim, value_dim, ..Case::default() };
    let list = [
        ("decode f16 64", dims(F16, 64, 64), direct(4, 1, 16, 64), true, 1),
        ("decode f16 128 causal", Case { window: (-1, 0), ..dims(F16, 128, 128) }, direct(4, 1, 16, 128), true, 3),
        (
            "decode bf16 64 packed window sinks",
            Case { packed: true, window: (RANDOM, RANDOM), sinks: true, ..dims(Bf16, 64, 64) },
            direct(2, 2, 8, 64),
            true,
            4,
        ),
        (
            "decode f32 32/48 softcap alibi sinks",
            Case { softcap: 3.0, alibi: 2, window: (-1, RANDOM), sinks: true, ..dims(F32, 32, 48) },
            staged(direct(3, 1, 16, 48)),
            false,
            5,
        ),
        (
            "decode f16 61/33 everything in chunks",
            Case { packed: true, window: (RANDOM, RANDOM), softcap: 2.0, alibi: 1, sinks: true, ..dims(F16, 61, 33) },
            query_in(QueryHome::Threadgroup, direct(4, 1, 16, 24)),
            false,
            2,
        ),
        (
            "decode bf16 72 boolean mask",
            Case { bias: Some(BiasKind::Boolean), window: (RANDOM, 0), ..dims(Bf16, 72, 72) },
            query_in(QueryHome::Device, direct(2, 1, 32, 72)),
            false,
            3,
        ),
        (
            "decode f16 80 bias staged causal",
            Case { bias: additive(F32), window: (-1, 0), sinks: true, ..dims(F16, 80, 80) },
            staged(direct(2, 2, 16, 80)),
            true,
            2,
        ),
        (
            "decode f32 40/24 staged parked packed",
            Case { packed: true, window: (-1, 0), lse: false, ..dims(F32, 40, 24) },
            staged(query_in(QueryHome::Threadgroup, direct(2, 1, 8, 24))),
            false,
            1,
        ),
    ];
    let cached = [
        (
            "decode f16 64 slots causal",
            Case { window: (-1, 0), ..dims(F16, 64, 64) },
            direct(4, 1, 16, 64),
            true,
            3,
            CacheForm::Slots,
        ),
        (
            "decode bf16 40/24 padded slots window alibi",
            Case { window: (RANDOM, RANDOM), alibi: 1, sinks: true, ..dims(Bf16, 40, 24) },
            staged(direct(2, 1, 32, 24)),
            false,
            2,
            CacheForm::PaddedSlots,
        ),
        (
            "decode f32 32 small pages causal",
            Case { window: (-1, 0), softcap: 3.0, ..dims(F32, 32, 32) },
            direct(2, 1, 16, 32),
            true,
            2,
            CacheForm::Pages(16),
        ),
        (
            "decode f16 72 pages packed window",
            Case { packed: true, window: (RANDOM, 0), ..dims(F16, 72, 72) },
            staged(direct(2, 2, 8, 72)),
            false,
            3,
            CacheForm::Pages(48),
        ),
    ];
    let dense = list.map(|(name, case, tile, aligned, splits)| (name, case, tile, aligned, splits, None));
    let cached =
        cached.map(|(name, case, tile, aligned, splits, form)| (name, case, tile, aligned, splits, Some(form)));
    let variant = |(name, case, tile, aligned, splits, cache): (_, Case, _, _, _, _)| DecodeVariant {
        name,
        case: Case { beside: if aligned { 4 } else { 5 }, ..case },
        tile,
        aligned,
        splits,
        cache,
    };
    dense.into_iter().chain(cached).map(variant).collect()
}

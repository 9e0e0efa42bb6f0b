//! `plan()`: which tier would serve a call, and why not the others.

use mtlflashattn_core::plan::{BackwardPass, BackwardTile, Reason, TileChoice, TileSource, TunedTiles, Wanted};
use mtlflashattn_core::{self as core, Demotions, Planner, Tier};
use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{Numbers, Slot, Tensors, describe};
use crate::error::{Error, guard};
use crate::execute::planned_device;
use crate::form::Form;
use crate::tensor::{Place, View};
use crate::torch::Torch;
use crate::{metal, settings};

/// Which tier serves a call.
#[pyclass(frozen, module = "metal_flash_attn", get_all, eq)]
#[derive(PartialEq)]
pub struct Plan {
    /// Name of the tier.
    tier: &'static str,
    /// Instruction set of the cpu tier; `None` for the others.
    isa: Option<&'static str>,
    /// The tile of a Metal kernel, in words, or those of the kernels of gradients; `None` for tiers without tiles.
    tile: Option<String>,
    /// Where the tile comes from: "default", "tuned" or "forced".
    tile_source: Option<&'static str>,
    /// Every other tier, with the reason why it does not serve.
    reasons: Vec<(&'static str, String)>,
}

impl Plan {
    fn new(tier: Tier, isa: Option<&'static str>, passed_over: &[(Tier, Reason)]) -> Self {
        let reasons = passed_over.iter().map(|(tier, reason)| (tier.name(), reason.to_string())).collect();
        Self { tier: tier.name(), isa, tile: None, tile_source: None, reasons }
    }

    /// The tiles of kernels that run one after the other; what sums dO * O has none.
    fn with_backward_tiles(self, kernels: &[(BackwardPass, BackwardTile)]) -> Self {
        let sums = kernels.iter().filter(|(pass, _)| *pass != BackwardPass::Delta);
        let tiles: Vec<String> = sums.map(|(pass, tile)| format!("{}: {tile}", pass.name())).collect();
        if tiles.is_empty() {
            return self;
        }
        Self { tile: Some(tiles.join("; ")), tile_source: Some(TileSource::Default.name()), ..self }
    }

    fn with_tile(self, choice: Option<TileChoice>) -> Self {
        let tile_source = choice.as_ref().map(|choice| choice.source.name());
        Self { tile: choice.map(|choice| choice.candidate.to_string()), tile_source, ..self }
    }
}

#[pymethods]
impl Plan {
    fn __repr__(&self) -> String {
        let Self { tier, isa, tile, tile_source, reasons } = self;
        let isa = isa.map_or_else(|| "None".into(), |isa| format!("'{isa}'"));
        let reasons: Vec<String> = reasons.iter().map(|(tier, reason)| format!("('{tier}', '{reason}')")).collect();
        let tile = match (tile, tile_source) {
            (Some(tile), Some(source)) => format!(", tile='{tile}', tile_source='{source}'"),
            _ => String::new(),
        };
        format!("Plan(tier='{tier}', isa={isa}{tile}, reasons=[{}])", reasons.join(", "))
    }
}

/// Plans a call of `attention` without computing it; tensors of any device, also meta, will do.
#[pyfunction]
#[pyo3(signature = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
    softcap, alibi_slopes, bias, mask, sinks, top_left, backward, /))]
#[allow(clippy::too_many_arguments, reason = "the parts of one call")]
pub fn plan<'py>(
    py: Python<'py>,
    q: Bound<'py, PyAny>,
    k: Bound<'py, PyAny>,
    v: Bound<'py, PyAny>,
    cu_seqlens_q: Option<Bound<'py, PyAny>>,
    cu_seqlens_k: Option<Bound<'py, PyAny>>,
    max_seqlen_q: &Bound<'py, PyAny>,
    max_seqlen_k: &Bound<'py, PyAny>,
    softmax_scale: &Bound<'py, PyAny>,
    causal: &Bound<'py, PyAny>,
    window_size: &Bound<'py, PyAny>,
    softcap: &Bound<'py, PyAny>,
    alibi_slopes: Option<Bound<'py, PyAny>>,
    bias: Option<Bound<'py, PyAny>>,
    mask: Option<Bound<'py, PyAny>>,
    sinks: Option<Bound<'py, PyAny>>,
    top_left: bool,
    backward: bool,
) -> PyResult<Plan> {
    guard(|| {
        let torch = Torch::get(py)?;
        let form = Form::new(1, cu_seqlens_q.is_some(), mask.is_some());
        let lengths = [max_seqlen_q, max_seqlen_k];
        let numbers = Numbers::read(form, lengths, softmax_scale, causal, window_size, softcap, top_left)?;
        let bias = mask.or(bias);
        let objects = [Some(q), Some(k), Some(v), cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks];
        let tensors = Tensors::new(objects);
        tensors.check_types(torch, form)?;
        let mut views = Tensors::none();
        for (slot, tensor) in tensors.present() {
            let view = View::describe(tensor)?.ok_or_else(symbolic)?;
            views.set(slot, if slot.has_rows() { view.with_contiguous_rows() } else { view });
        }
        let problem = describe(form, &numbers, &tensors, &views)?.problem;
        let place = Place::of(tensors.q())?;
        let settings = settings::current(py)?;
        let isa = settings.isa()?;
        let metal = settings.metal_device(place);
        let device = planned_device(py, torch, &settings, place)?;
        if backward {
            let bias_gradient = match tensors.get(Slot::Bias) {
                Some(bias) => bias.getattr(intern!(py, "requires_grad"))?.is_truthy()?,
                None => false,
            };
            let wanted = Wanted { bias: bias_gradient, ..Wanted::INPUTS };
            let mut demotions = Demotions::default();
            let plan = loop {
                let planner = Planner { demotions: &demotions, ..Planner::new(device, &settings.values) };
                let plan = planner.plan_backward(&problem, wanted);
                let refusal = metal.map(|metal| metal.backward_refusal(py, &problem, &plan.metal, &settings.values));
                let Some(refusal) = refusal.transpose()?.flatten() else { break plan };
                demotions.demote(plan.tier, refusal.to_string());
            };
            let isa = plan.cpu.map(|_| isa.name());
            return Ok(Plan::new(plan.tier, isa, &plan.passed_over).with_backward_tiles(&plan.metal));
        }
        let mut demotions = Demotions::default();
        let tuned_here = metal.map(|metal| settings.tuned(py, metal)).transpose()?;
        let mut tuned = tuned_here.unwrap_or(TunedTiles::NONE);
        let (passed_over, tile, plan) = loop {
            let planner = Planner { demotions: &demotions, tuned, ..Planner::new(device, &settings.values) };
            let plan = planner.plan(&problem)?;
            let refusal = match metal {
                Some(metal) => metal::refusal(py, metal, &plan, &problem, &settings.values)?,
                None => None,
            };
            let Some(refusal) = refusal else {
                break (planner.passed_over(&problem, &plan), planner.tile_choice(&problem, plan.tier), plan);
            };
            if tuned.is_empty() {
                demotions.demote(plan.tier, refusal.to_string());
            }
            // A tuned tile that fails says nothing about the planner's own.
            tuned = TunedTiles::NONE;
        };
        let isa = plan.cpu.is_some().then(|| isa.name());
        Ok(Plan::new(plan.tier, isa, &passed_over).with_tile(tile))
    })
}

fn symbolic() -> Error {
    Error::Problem(core::Error::Unsupported {
        argument: "q, k, v",
        got: "a plan for symbolic sizes".into(),
        instead: "pass tensors whose sizes are known".into(),
    })
}

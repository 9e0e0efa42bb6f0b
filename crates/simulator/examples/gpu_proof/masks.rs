//! The mask of dropout, bit by bit: what every kernel drops of a long problem beside `core::dropout`.
//!
//! With Q = 0 or K = 0 all weights of a row are equal, and nothing but dropout makes a weight 0. Where V is 1 in column c
//! for key b + c alone, column c of the output is the weight of that key. In the same way gradients show what each pass of
//! the backward kernels drops:
//!
//! ```text
//! O[i, c]  = P z(i, b + c)               V one-hot
//! dQ[i, c] = scale P z(i, b + c)         K one-hot, dO . V = 1, O = 0, so that delta = 0
//! dK[j, c] = scale P z(b + c, j)         Q and dO one-hot, V = 1
//! dV[j, c] = P z(b + c, j)               the same
//! ```
//!
//! As many launches as there are blocks of columns show the whole mask.

use mtlflashattn_core::plan::BackwardPass;
use mtlflashattn_core::{Dtype, Problem};
use mtlflashattn_metal::{
    BackwardKernel, BackwardLaunch, BackwardTensors, DeviceError, Kernel, Launch, LseStrides, Outputs, Tensors,
};
use mtlflashattn_simulator::nvidia::{Gpu, Memory, Program};

use crate::gradients::{CHIPS, outputs, planned, program};
use crate::numerics::{Case, Data, case};
use crate::parallel::in_parallel;
use crate::programs::{self, Programs};
use crate::random::encode;
use crate::{Wanted, tiles};

fn cases() -> Vec<Case> {
    let ragged = [(700, 700), (33, 1025), (2049, 1200)];
    vec![
        Case { dropout: 0.1, key_heads: 2, ..case(Dtype::F16, &[(8192, 8192)], 128) },
        Case { dropout: 0.5, ..case(Dtype::Bf16, &[(8191, 8190)], 128) },
        Case { dropout: 0.1, ..case(Dtype::F32, &[(2048, 4097)], 64) },
        Case { dropout: 0.25, key_heads: 2, ..case(Dtype::F16, &ragged, 64) },
    ]
}

/// A kernel whose mask is looked at.
#[derive(Clone, Copy)]
enum Masked {
    Forward(Kernel),
    Backward(&'static str, BackwardKernel),
}

impl Masked {
    fn name(&self) -> String {
        match self {
            Self::Forward(kernel) => tiles::name(kernel),
            Self::Backward(chip, kernel) => format!("{}: {}, of an {chip}", kernel.pass.name(), kernel.tile),
        }
    }

    fn program(&self) -> programs::Kernel {
        match self {
            Self::Forward(kernel) => programs::Kernel { source: kernel.source(), entry: kernel.entry() },
            Self::Backward(_, kernel) => program(kernel),
        }
    }

    /// Whether what it computes belongs to keys.
    fn owns_keys(&self) -> bool {
        matches!(self, Self::Backward(_, kernel) if kernel.pass.owns_keys())
    }

    fn writes(&self, gradient: BackwardPass) -> bool {
        let Self::Backward(_, kernel) = self else { return false };
        kernel.pass == gradient
            || kernel.pass == BackwardPass::KeysAndValues
                && matches!(gradient, BackwardPass::Keys | BackwardPass::Values)
    }
}

fn kernels(case: &Case, problem: &Problem, wanted: &Wanted) -> Vec<Masked> {
    let forward = tiles::proved(problem, case.packed()).into_iter().chain([Kernel::scalar(problem, true)]);
    let mut all: Vec<Masked> = forward.map(Masked::Forward).collect();
    for chip in CHIPS {
        let kernel = |(pass, tile)| BackwardKernel::new(pass, problem, tile, false);
        all.extend(planned(problem, chip).into_iter().map(|tile| Masked::Backward(chip, kernel(tile))));
    }
    all.retain(|kernel| wanted.includes(&format!("{case} {}", kernel.name())));
    all
}

/// Runs the kernels of all cases and prints a line for each. Whether all masks are right.
pub fn run(programs: &Programs, wanted: &Wanted) -> Result<bool, String> {
    let mut all_right = true;
    for case in &cases() {
        let problem = &case.problem();
        let kernels = kernels(case, problem, wanted);
        let texts: Vec<programs::Kernel> = kernels.iter().map(Masked::program).collect();
        let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { continue };
        let mut look = Look::new(gpu, case, problem);
        let wrong = look.at(&kernels, &loaded).map_err(|error| error.to_string())?;
        let bits = look.mask.len();
        for (kernel, wrong) in kernels.iter().zip(wrong) {
            let Some(wrong) = wrong else { continue };
            let verdict = if wrong == 0 { "ok  " } else { "FAIL" };
            println!("{verdict} mask {case} {}: {wrong} of {bits} bits differ", kernel.name());
            all_right &= wrong == 0;
        }
    }
    Ok(all_right)
}

/// A case with its mask, and tensors that are rewritten for each block of columns.
struct Look<'a> {
    gpu: &'a Gpu,
    case: &'a Case,
    problem: &'a Problem,
    data: Data,
    /// For each sequence, head, query and key, in this order: whether the weight is kept.
    mask: Vec<bool>,
}

/// Rows of a tensor: those of queries or of keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

impl<'a> Look<'a> {
    fn new(gpu: &'a Gpu, case: &'a Case, problem: &'a Problem) -> Self {
        let dropout = problem.dropout.expect("a case with dropout");
        let heads = case.query_heads();
        let mut mask = Vec::new();
        for (sequence, &(queries, keys)) in case.lengths.iter().enumerate() {
            let mut rows = in_parallel(heads * queries, |row| {
                let (head, query) = (row / queries, row % queries);
                (row, (0..keys).map(|key| dropout.keeps(sequence * heads + head, query, key)).collect::<Vec<bool>>())
            });
            rows.sort_by_key(|&(row, _)| row);
            mask.extend(rows.into_iter().flat_map(|(_, row)| row));
        }
        Self { gpu, case, problem, data: Data::new(case), mask }
    }

    fn rows(&self, side: Side) -> usize {
        if side == Side::Queries { self.case.total().0 } else { self.case.total().1 }
    }

    /// A tensor of `value(position in the sequence, column)`.
    fn upload(&self, side: Side, value: impl Fn(usize, usize) -> bool) -> Result<Memory, DeviceError> {
        let Case { dtype, head_dim, .. } = *self.case;
        let [one, zero] = [1.0, 0.0].map(|number| encode(dtype, number).0);
        let mut bytes = Vec::with_capacity(self.rows(side) * self.case.query_heads() * head_dim * dtype.size());
        for &(queries, keys) in &self.case.lengths {
            for position in 0..if side == Side::Queries { queries } else { keys } {
                for _ in 0..self.case.query_heads() {
                    for column in 0..head_dim {
                        bytes.extend_from_slice(if value(position, column) { &one } else { &zero });
                    }
                }
            }
        }
        self.gpu.upload(&bytes)
    }

    fn offsets(&self) -> Result<Option<(Memory, Memory)>, DeviceError> {
        let [queries, keys] = &self.data.offsets;
        if self.case.packed() { Ok(Some((self.gpu.upload(queries)?, self.gpu.upload(keys)?))) } else { Ok(None) }
    }

    /// How many bits of each kernel differ from the mask; `None` for those that have none.
    fn at(&mut self, kernels: &[Masked], programs: &[Program]) -> Result<Vec<Option<usize>>, DeviceError> {
        let dim = self.case.head_dim;
        let mut wrong: Vec<Option<usize>> = kernels.iter().map(|_| None).collect();
        let zeros = [self.upload(Side::Queries, |_, _| false)?, self.upload(Side::Keys, |_, _| false)?];
        let ones = self.upload(Side::Keys, |_, _| true)?;
        let first_column = self.upload(Side::Queries, |_, column| column == 0)?;
        let longest = self.case.lengths.iter().map(|&(queries, keys)| queries.max(keys)).max().unwrap_or(0);
        // P is what an LSE of log(keys) makes of scores of 0.
        let lse: Vec<f32> = vec![(longest as f32).ln(); self.rows(Side::Queries) * self.case.query_heads()];
        let lse = self.gpu.upload(&lse)?;
        for base in (0..longest).step_by(dim) {
            let one_hot = |position: usize, column: usize| position == base + column;
            let hot = [self.upload(Side::Queries, one_hot)?, self.upload(Side::Keys, one_hot)?];
            let query_pass = [&zeros[0], &hot[1], &ones, &first_column];
            let keys_pass = [&hot[0], &zeros[1], &ones, &hot[0]];
            for (at, (kernel, program)) in kernels.iter().zip(programs).enumerate() {
                let results: Vec<Memory> = match kernel {
                    Masked::Forward(kernel) => vec![self.forward(program, kernel, [&zeros[0], &zeros[1], &hot[1]])?],
                    Masked::Backward(_, delta) if delta.pass == BackwardPass::Delta => continue,
                    Masked::Backward(chip, _) => {
                        let of_chip = kernels.iter().position(|other| {
                            matches!(other, Masked::Backward(other, kernel) if other == chip && kernel.pass == BackwardPass::Delta)
                        });
                        let delta = of_chip.expect("the planner's passes have delta");
                        let tensors = if kernel.owns_keys() { keys_pass } else { query_pass };
                        self.backward(
                            [(&programs[delta], &kernels[delta]), (program, kernel)],
                            tensors,
                            (&zeros[0], &lse),
                        )?
                    }
                };
                for result in results {
                    *wrong[at].get_or_insert(0) += self.differing(&result.download()?, base, kernel.owns_keys());
                }
            }
        }
        Ok(wrong)
    }

    fn forward(&self, program: &Program, kernel: &Kernel, [q, k, v]: [&Memory; 3]) -> Result<Memory, DeviceError> {
        let out = self.blank(Side::Queries)?;
        let lse = self.gpu.poisoned(self.rows(Side::Queries) * self.case.query_heads() * 4)?;
        let strides = LseStrides::contiguous(self.problem);
        let launch = Launch::new(self.problem, kernel, &Outputs { out: self.problem.q, lse: Some(strides) });
        let launch = launch.expect("within the limits");
        let offsets = self.offsets()?;
        let offsets = offsets.as_ref().map(|(queries, keys)| (queries, keys));
        let (out_tensor, lse) = (&out, Some(&lse));
        let tensors = Tensors { q, k, v, out: out_tensor, lse, offsets, alibi_slopes: None, bias: None, sinks: None };
        self.gpu.prepare(program, &launch.arguments(&tensors), launch.grid)?.enqueue()?;
        Ok(out)
    }

    /// Runs delta and a pass, and returns what the pass writes.
    fn backward(
        &self,
        kernels: [(&Program, &Masked); 2],
        [q, k, v, d_out]: [&Memory; 4],
        (out, lse): (&Memory, &Memory),
    ) -> Result<Vec<Memory>, DeviceError> {
        let pass = kernels[1].1;
        let blank = |side, gradient| pass.writes(gradient).then(|| self.blank(side)).transpose();
        let tensors = BackwardTensors {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            out: out.clone(),
            lse: lse.clone(),
            offsets: self.offsets()?,
            alibi_slopes: None,
            bias: None,
            d_out: d_out.clone(),
            d_lse: None,
            states: self.gpu.poisoned(8 * self.rows(Side::Queries) * self.case.query_heads())?,
            d_query: blank(Side::Queries, BackwardPass::Query)?,
            d_key: blank(Side::Keys, BackwardPass::Keys)?,
            d_value: blank(Side::Keys, BackwardPass::Values)?,
        };
        for (program, masked) in kernels {
            let Masked::Backward(_, kernel) = masked else { continue };
            let launch = BackwardLaunch::new(self.problem, kernel, &outputs(self.problem)).expect("within the limits");
            let arguments = launch.arguments(&tensors.map(|memory| memory));
            self.gpu.prepare(program, &arguments, launch.grid)?.enqueue()?;
        }
        Ok([tensors.d_query, tensors.d_key, tensors.d_value].into_iter().flatten().collect())
    }

    fn blank(&self, side: Side) -> Result<Memory, DeviceError> {
        self.gpu.poisoned(self.rows(side) * self.case.query_heads() * self.case.head_dim * self.case.dtype.size())
    }

    /// How many weights that a result shows are not as the mask has them. A result belongs to queries, and its columns to
    /// keys from `base` on, or the other way round.
    fn differing(&self, result: &[u8], base: usize, of_keys: bool) -> usize {
        let Case { dtype, head_dim, .. } = *self.case;
        let heads = self.case.query_heads();
        let row_bytes = heads * head_dim * dtype.size();
        let (mut first_bit, mut first_row, mut wrong) = (0, 0, 0);
        for &(queries, keys) in &self.case.lengths {
            let (rows, others) = if of_keys { (keys, queries) } else { (queries, keys) };
            let of_row = |row: usize| -> usize {
                let bytes = &result[(first_row + row) * row_bytes..][..row_bytes];
                let shown = bytes.chunks_exact(dtype.size()).enumerate();
                let differs = |(at, bytes): (usize, &[u8])| {
                    let (head, other) = (at / head_dim, base + at % head_dim);
                    let (query, key) = if of_keys { (other, row) } else { (row, other) };
                    let kept = other < others && self.mask[first_bit + (head * queries + query) * keys + key];
                    usize::from(kept != is_positive(bytes))
                };
                shown.map(differs).sum()
            };
            wrong += in_parallel(rows, of_row).into_iter().sum::<usize>();
            first_bit += heads * queries * keys;
            first_row += rows;
        }
        wrong
    }
}

/// Whether the bytes of a number, the least first, are of one above 0. NaN counts as one, so that what was never written
/// differs from what is dropped; weights that are kept are checked elsewhere.
fn is_positive(bytes: &[u8]) -> bool {
    let (last, rest) = bytes.split_last().expect("bytes of a number");
    last & 0x7f != 0 || rest.iter().any(|&byte| byte != 0)
}

//! Merging the results of key splits: `O = sum_s w_s O_s / sum_s w_s l_s` with `w_s = 2^(m_s - m)`.

use crate::call::{Call, Task, normalizer};
use crate::element::Element;

/// Merges all rows of `task`. Each split holds, per row, an unnormalised output, a maximum and a sum.
///
/// # Safety
/// `call` must hold valid buffers and every split the partial results of all rows of the task.
pub(crate) unsafe fn run<T: Element>(call: &Call<'_>, task: &Task, splits: &[*const f32]) {
    let value_dim = call.problem.value_dim;
    let mut merged = vec![0.0f32; value_dim];
    for row in task.rows.clone() {
        let results = || splits.iter().map(|split| split.add(row * (value_dim + 2)));
        let max = results().map(|r| r.add(value_dim).read()).fold(f32::MIN, f32::max);
        let mut sum = 0.0;
        merged.fill(0.0);
        for result in results() {
            let weight = (result.add(value_dim).read() - max).exp2();
            sum += weight * result.add(value_dim + 1).read();
            for (column, merged) in merged.iter_mut().enumerate() {
                *merged += weight * result.add(column).read();
            }
        }
        let factor = normalizer(sum);
        let out = call.out_row::<T>(task, row);
        for (column, &merged) in merged.iter().enumerate() {
            out.add(column).write(T::from_f32(merged * factor));
        }
        call.write_lse(task, row, max, sum);
    }
}

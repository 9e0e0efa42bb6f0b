//! Shapes of the timing tables.

use std::fmt;

use mtlflashattn_core::{Dropout, Dtype, Options, Problem, TensorMeta};

/// A dense problem with as many key heads as query heads, tensors `[batch, heads, rows, dim]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub len: usize,
    pub head_dim: usize,
    pub dtype: Dtype,
    pub causal: bool,
    /// Probability that a weight is dropped.
    pub dropout: f64,
}

impl Shape {
    /// The shapes of the tables.
    pub fn all() -> Vec<Self> {
        let shape =
            |dtype, head_dim, causal| Self { batch: 4, heads: 16, len: 2048, head_dim, dtype, causal, dropout: 0.0 };
        let mut all: Vec<Self> = [(64, false), (64, true), (128, false), (128, true)]
            .map(|(dim, causal)| shape(Dtype::F16, dim, causal))
            .into();
        all.extend([shape(Dtype::Bf16, 64, false), shape(Dtype::Bf16, 128, false), shape(Dtype::F32, 64, false)]);
        all
    }

    pub fn problem(&self) -> Problem {
        let [batch, heads, len, dim] = [self.batch, self.heads, self.len, self.head_dim].map(|size| size as i64);
        let (sizes, strides) = ([batch, len, heads, dim], [heads * len * dim, dim, len * dim, 1]);
        let meta = || TensorMeta { dtype: self.dtype, shape: &sizes, strides: &strides };
        let dropout = Dropout::new(self.dropout, 1, 2).expect("a probability");
        let options = Options { causal: self.causal, window: (-1, -1), dropout, ..Options::default() };
        Problem::dense(meta(), meta(), meta(), &options).expect("the shape is valid")
    }

    /// Elements of each tensor.
    pub fn elements(&self) -> usize {
        self.batch * self.heads * self.len * self.head_dim
    }

    /// Operations of both products; causal problems count half of the square.
    pub fn flops(&self) -> f64 {
        4.0 * (self.elements() * self.len) as f64 * if self.causal { 0.5 } else { 1.0 }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, heads, len, head_dim, dtype, causal, dropout } = self;
        write!(f, "B{batch} H{heads} L{len} D{head_dim} {dtype}{}", if *causal { " causal" } else { "" })?;
        if *dropout > 0.0 { write!(f, " dropout {dropout}") } else { Ok(()) }
    }
}

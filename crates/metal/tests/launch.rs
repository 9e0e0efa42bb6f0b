//! Texts and launches follow the rules that every home of a kernel relies on.

use mtlflashattn_core::plan::{BackwardPass, BackwardTile, QueryHome};
use mtlflashattn_core::{BiasKind, Dtype, MetalTile, Options, Problem, Strides, TensorMeta};
use mtlflashattn_metal::{
    Argument, BackwardKernel, Features, Kernel, Launch, LaunchError, LseStrides, MAX_LEN, Outputs, Tensors,
};

const TILE: MetalTile = MetalTile {
    simdgroups: 4,
    row_fragments: 2,
    keys: 32,
    staged: false,
    value_chunk: 48,
    query: QueryHome::Registers,
};

fn problem(dtype: Dtype, [batch, query_len, key_len, query_heads]: [i64; 4], options: &Options<'_>) -> Problem {
    let (head_dim, value_dim, key_heads) = (64, 80, 2);
    let shapes = [
        [batch, query_len, query_heads, head_dim],
        [batch, key_len, key_heads, head_dim],
        [batch, key_len, key_heads, value_dim],
    ];
    let strides = shapes.map(|[_, rows, heads, dim]| [rows * heads * dim, heads * dim, dim, 1]);
    let meta = |i: usize| TensorMeta { dtype, shape: &shapes[i], strides: &strides[i] };
    Problem::dense(meta(0), meta(1), meta(2), options).expect("a valid problem")
}

fn open() -> Options<'static> {
    Options { window: (-1, -1), ..Options::default() }
}

fn outputs(problem: &Problem) -> Outputs {
    Outputs { out: Strides { batch: 7, row: 5, head: 3 }, lse: Some(LseStrides::contiguous(problem)) }
}

/// Kernels that differ in every switch.
fn kernels() -> Vec<Kernel> {
    let mut all = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let biases = [Dtype::F32, Dtype::F16, Dtype::Bf16].map(|dtype| Some(BiasKind::Additive(dtype)));
        for bias in biases.into_iter().chain([None, Some(BiasKind::Boolean)]) {
            for staged in [false, true] {
                for query in [QueryHome::Registers, QueryHome::Threadgroup, QueryHome::Device] {
                    let problem = problem(dtype, [2, 100, 90, 4], &open());
                    let mut kernel = Kernel::simdgroup(&problem, MetalTile { staged, query, ..TILE }, true);
                    let features = Features { bias, softcap: staged, alibi: !staged, ..kernel.features };
                    kernel.features = Features { packed: staged, window_left: true, sinks: true, ..features };
                    let mut scalar = Kernel::scalar(&problem, staged);
                    scalar.features = Features { lse: staged, ..kernel.features };
                    all.extend([kernel, kernel.aligned(&problem, [0; 3]), scalar]);
                }
            }
        }
    }
    all
}

#[test]
fn texts_are_ascii_and_complete() {
    for kernel in kernels() {
        let text = kernel.source();
        // torch hands the text to an ASCII decoder.
        assert!(text.is_ascii());
        assert!(text.contains(&format!("kernel void {}(", kernel.entry())));
        // Neither function constants nor threadgroup memory of run-time size can be had through torch.
        assert!(!text.contains("function_constant") && !text.contains("[[threadgroup("));
        let includes: Vec<&str> = text.lines().filter(|line| line.starts_with("#include")).collect();
        assert_eq!(includes, ["#include <metal_stdlib>"]);
        assert!(text.starts_with("#include"), "nothing is defined before the library's headers");
    }
}

#[test]
fn every_switch_of_the_text_is_defined() {
    for kernel in kernels() {
        let text = kernel.source();
        let defined: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("#define ")?.split(' ').next()).collect();
        for line in text.lines() {
            let Some(condition) = line.strip_prefix("#if ").or(line.strip_prefix("#elif ")) else { continue };
            assert!(defined.contains(&condition), "{condition} is not defined");
        }
    }
}

#[test]
fn texts_differ_where_kernels_do() {
    let all = kernels();
    for (i, a) in all.iter().enumerate() {
        for b in &all[..i] {
            assert_eq!(a == b, a.source() == b.source(), "{a:?} and {b:?}");
        }
    }
}

#[test]
fn sizes_do_not_change_the_kernel() {
    let kernel = |sizes| Kernel::simdgroup(&problem(Dtype::F16, sizes, &open()), TILE, true);
    assert_eq!(kernel([2, 100, 90, 4]), kernel([1, 7, 4096, 2]));
}

#[test]
fn rows_are_read_by_fours_where_all_of_them_start_and_end_at_fours() {
    let base = problem(Dtype::F16, [2, 100, 90, 4], &open());
    let is_aligned =
        |problem: &Problem, starts| Kernel::simdgroup(problem, TILE, true).aligned(problem, starts).features.aligned;
    assert!(is_aligned(&base, [0, 8, 16]) && !is_aligned(&base, [0, 4, 16]) && !is_aligned(&base, [0, 8, 2]));
    let float = problem(Dtype::F32, [2, 100, 90, 4], &open());
    assert!(is_aligned(&float, [0, 32, 16]) && !is_aligned(&float, [8, 0, 0]));
    let changes: [fn(&mut Problem); 6] = [
        |problem| problem.q.row += 2,
        |problem| problem.k.head += 1,
        |problem| problem.v.batch += 3,
        |problem| problem.v.row += 6,
        |problem| problem.head_dim = 62,
        |problem| problem.value_dim = 79,
    ];
    for change in changes {
        let mut changed = base;
        change(&mut changed);
        assert!(!is_aligned(&changed, [0; 3]), "{changed:?}");
    }
    let scalar = Kernel::scalar(&base, true);
    assert_eq!(scalar.aligned(&base, [0; 3]), scalar);
}

#[test]
fn the_grid_covers_every_row_head_and_column_once() {
    let problem = problem(Dtype::F16, [3, 257, 90, 4], &open());
    let simdgroup = Kernel::simdgroup(&problem, TILE, true);
    let grid = Launch::new(&problem, &simdgroup, &outputs(&problem)).unwrap().grid;
    // 64 rows a threadgroup, 80 columns in chunks of 48.
    assert_eq!((grid.threadgroups, grid.group), ([5, 8, 3], [32, 4, 1]));
    assert_eq!(grid.threads(), [160, 32, 3]);
    let scalar = Kernel::scalar(&problem, true);
    let grid = Launch::new(&problem, &scalar, &outputs(&problem)).unwrap().grid;
    assert_eq!((grid.threadgroups, grid.group), ([3, 8, 3], [32, 4, 1]));
}

#[test]
fn arguments_come_in_the_order_of_their_indices() {
    let problem = problem(Dtype::F16, [2, 100, 90, 4], &Options { softmax_scale: Some(-0.5), ..open() });
    let launch = Launch::new(&problem, &Kernel::scalar(&problem, true), &outputs(&problem)).unwrap();
    let (q, k, v, out, lse) = ("q", "k", "v", "out", "lse");
    let tensors = Tensors {
        q: &q,
        k: &k,
        v: &v,
        out: &out,
        lse: Some(&lse),
        offsets: None,
        alibi_slopes: None,
        bias: None,
        sinks: None,
    };
    let arguments = launch.arguments(&tensors);
    let names: Vec<&str> = arguments
        .iter()
        .map(|argument| match argument {
            Argument::Buffer(name) => **name,
            Argument::Ints(_) => "ints",
            Argument::Floats(_) => "floats",
        })
        .collect();
    // q stands in for what the problem does not have.
    assert_eq!(names, ["q", "k", "v", "out", "lse", "q", "q", "q", "q", "q", "ints", "floats"]);
    assert_eq!(launch.sizes[..11], [100, 90, 200, 180, 64, 80, 2, 2, 0, 0, 0]);
    let q_strides = [100 * 4 * 64, 4 * 64, 64];
    let v_strides = [90 * 2 * 80, 2 * 80, 80];
    assert_eq!(launch.sizes[11..14], q_strides);
    assert_eq!(launch.sizes[17..20], v_strides);
    assert_eq!(launch.sizes[20..25], [7, 5, 3, 400, 100]);
    assert_eq!(launch.sizes[25..], [0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
    let factors = [-1.0, 0.5 * std::f32::consts::LOG2_E, 0.0, 1.0];
    assert_eq!(launch.factors.map(f32::to_bits), factors.map(f32::to_bits));
}

#[test]
fn empty_problems_launch_nothing() {
    for (sizes, empty) in [([0, 5, 5, 2], true), ([1, 0, 5, 2], true), ([1, 5, 0, 2], false), ([1, 1, 1, 2], false)] {
        let problem = problem(Dtype::F32, sizes, &open());
        let launch = Launch::new(&problem, &Kernel::scalar(&problem, true), &outputs(&problem)).unwrap();
        assert_eq!(launch.is_empty(), empty, "{sizes:?}");
    }
}

#[test]
fn lengths_that_kernels_cannot_count_are_refused() {
    let launch = |query_len, key_len| {
        let problem = problem(Dtype::F32, [1, query_len, key_len, 2], &open());
        Launch::new(&problem, &Kernel::scalar(&problem, true), &outputs(&problem)).map(|launch| launch.grid)
    };
    let most = MAX_LEN as i64;
    assert!(launch(most, most).is_ok());
    assert_eq!(launch(most + 1, 1), Err(LaunchError::Length { len: MAX_LEN + 1 }));
    assert_eq!(launch(1, most + 1), Err(LaunchError::Length { len: MAX_LEN + 1 }));
}

#[test]
fn windows_beyond_every_length_are_clamped() {
    let options = Options { window: (i64::MAX, 3), ..Options::default() };
    let problem = problem(Dtype::F32, [1, 10, 10, 2], &options);
    let launch = Launch::new(&problem, &Kernel::scalar(&problem, true), &outputs(&problem)).unwrap();
    assert_eq!(launch.sizes[8..10], [MAX_LEN as i64, 3]);
}

#[test]
fn backward_texts_are_ascii_and_do_not_depend_on_sizes() {
    let passes = [
        BackwardPass::Delta,
        BackwardPass::Query,
        BackwardPass::KeysAndValues,
        BackwardPass::Keys,
        BackwardPass::Values,
    ];
    let own = QueryHome::Threadgroup;
    let tile = BackwardTile { simdgroups: 4, row_fragments: 1, block: 16, staged: true, chunk: 80, own };
    for pass in passes {
        let kernel = |sizes| BackwardKernel::new(pass, &problem(Dtype::F16, sizes, &open()), tile, true);
        let text = kernel([2, 100, 90, 4]).source();
        assert!(text.is_ascii() && text.contains(&format!("kernel void {}(", kernel([1, 1, 1, 2]).entry())));
        assert_eq!(text, kernel([5, 7, 300, 8]).source(), "{}", pass.name());
    }
}

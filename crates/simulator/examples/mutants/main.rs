//! Plants bugs in the kernels and reports which layer of the simulator notices each.
//!
//! `make mutants`, or with words that a mutant's description must contain as arguments. Fails when a bug survives, and
//! when a change that is proved to be none is noticed.
#![allow(clippy::print_stdout, reason = "prints a report")]

mod backward;
#[path = "../../tests/common/mod.rs"]
mod common;
mod decode;
mod dropout;
mod list;
mod tensorops;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::append::{AppendForm, AppendRun};
use common::backward::{BackwardRun, BackwardVariant};
use common::bench::Bench;
use common::decode::{DecodeVariant, Texts};
use common::far::{Far, Form};
use common::far_backward::FarBackward;
use common::variants::{self, Variant};
use common::{Case, Run};
use list::{FAR_DIRECT, FAR_SCALAR, FAR_STAGED, Mutant};
use mtlflashattn_metal::{BackwardKernel, Kernel, MergeKernel};
use mtlflashattn_simulator::{LaneLayout, Layer, Options, TensorOps};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use tensorops::{FAR_LOADED, FAR_TENSOR, FAR_TENSOR_STAGED};

/// Problems that a mutant must survive in the fast and in the check layer, and their longest lengths.
const FAST: (usize, usize) = (24, 100);
const CHECK: (usize, usize) = (6, 50);

/// Longest time that a mutant may take; one that never ends is noticed by that.
const LIMIT: Duration = Duration::from_secs(180);

/// Who noticed a mutant, and by what.
#[derive(Clone)]
struct Catch {
    layer: String,
    how: String,
}

/// Tries the layers in order and prints each as it begins, so that a crash can be told from where it happened.
fn examine(mutant: &Mutant) -> Option<String> {
    let form = [
        (FAR_DIRECT, Form::Direct),
        (FAR_STAGED, Form::Staged),
        (FAR_SCALAR, Form::Scalar),
        (FAR_TENSOR, Form::Tensor),
        (FAR_LOADED, Form::TensorLoaded),
        (FAR_TENSOR_STAGED, Form::TensorStaged),
    ];
    if let Some((_, form)) = form.into_iter().find(|(name, _)| *name == mutant.variant) {
        let far = Far::new();
        let kernel = far.kernel(form);
        let source = changed(mutant, &kernel);
        return types(&kernel, &source).or_else(|| {
            println!("fast");
            far.judge(&Bench::new(Options::new(Layer::Fast)), &kernel, &source).err()
        });
    }
    if [backward::FAR, backward::FAR_STAGED].contains(&mutant.variant) {
        return examine_far_backward(mutant);
    }
    if let Some(variant) = common::backward::variants().into_iter().find(|variant| variant.name == mutant.variant) {
        return examine_backward(mutant, &variant);
    }
    if let Some(variant) = common::decode::variants().into_iter().find(|variant| variant.name == mutant.variant) {
        return examine_decode(mutant, &variant);
    }
    if let Some((form, case)) = common::append::forms().into_iter().find(|(form, _)| form.name == mutant.variant) {
        return examine_append(mutant, form, &case);
    }
    let variants = variants::all();
    let variant = variants.iter().find(|variant| variant.name == mutant.variant).expect("a variant");
    let (fast, small) = (problems(variant, FAST), problems(variant, CHECK));
    let kernel = variant.kernel(&fast[0]);
    let source = changed(mutant, &kernel);
    let first = |options: Options, problems: &[Run]| {
        let bench = Bench::new(options);
        problems.iter().find_map(|problem| judge(&bench, &kernel, &source, problem).err())
    };
    types(&kernel, &source)
        .or_else(|| {
            println!("fast");
            first(Options::new(Layer::Fast), &fast)
        })
        .or_else(|| first(Options::new(Layer::Fast).with_seed(5), &fast))
        .or_else(|| variant.matmul.and_then(|_| first(scattered(), &fast)))
        .or_else(|| {
            println!("check");
            first(Options::new(Layer::Check), &small)
        })
}

/// The same for the kernels of the backward pass whose rows lie far apart.
fn examine_far_backward(mutant: &Mutant) -> Option<String> {
    let far = FarBackward::new();
    let kernels = far.kernels(mutant.variant == backward::FAR_STAGED);
    let is_in = kernels.iter().any(|kernel| kernel.source().contains(mutant.from));
    assert!(is_in, "{:?} is not in the texts of {}", mutant.from, mutant.variant);
    println!("fast");
    let edit = |kernel: &BackwardKernel| kernel.source().replace(mutant.from, mutant.to);
    far.judge(&Bench::new(Options::new(Layer::Fast)), &kernels, &edit).err()
}

/// The same for the kernels of the backward pass, which run one after the other.
fn examine_backward(mutant: &Mutant, variant: &BackwardVariant) -> Option<String> {
    let runs = |(count, most): (usize, usize)| -> Vec<BackwardRun> {
        let mut runner = TestRunner::deterministic();
        let strategy = variant.cases(most);
        let mut case = || strategy.new_tree(&mut runner).expect("a case").current();
        (0..count).map(|_| BackwardRun::new(&case(), variant.lse_gradient)).collect()
    };
    let (fast, small) = (runs((FAST.0 / 2, FAST.1 / 2)), runs((CHECK.0 / 2, CHECK.1)));
    let kernels = variant.kernels(&fast[0]);
    let is_in = kernels.iter().any(|kernel| kernel.source().contains(mutant.from));
    assert!(is_in, "{:?} is not in the texts of {}", mutant.from, mutant.variant);
    let edit = |kernel: &BackwardKernel| kernel.source().replace(mutant.from, mutant.to);
    let first = |options: Options, runs: &[BackwardRun]| {
        let bench = Bench::new(options);
        runs.iter().find_map(|run| run.launch(&bench, &kernels, &edit).and_then(|(got, _)| run.check(&got)).err())
    };
    println!("type");
    let types = Bench::new(Options::new(Layer::Type));
    kernels
        .iter()
        .find_map(|kernel| types.pipeline(&edit(kernel), kernel.entry()).err().map(|error| error.to_string()))
        .or_else(|| {
            println!("fast");
            first(Options::new(Layer::Fast), &fast)
        })
        .or_else(|| first(Options::new(Layer::Fast).with_seed(5), &fast))
        .or_else(|| {
            println!("check");
            first(Options::new(Layer::Check), &small)
        })
}

/// The same for the decode kernel and the kernel that merges its splits.
fn examine_decode(mutant: &Mutant, variant: &DecodeVariant) -> Option<String> {
    let runs = |(count, most): (usize, usize)| -> Vec<Run> {
        let mut runner = TestRunner::deterministic();
        let strategy = variant.cases(most);
        (0..count).map(|_| variant.run(&strategy.new_tree(&mut runner).expect("a case").current())).collect()
    };
    let (fast, small) = (runs((FAST.0, 4 * FAST.1)), runs((CHECK.0, 2 * CHECK.1)));
    let kernel = variant.kernel(&fast[0]);
    let texts = Texts::of(&kernel).changed(mutant.from, mutant.to);
    let first = |options: Options, runs: &[Run]| {
        let bench = Bench::new(options);
        runs.iter().find_map(|run| common::decode::check(&bench, &kernel, &texts, run, variant.splits).err())
    };
    println!("type");
    let types = Bench::new(Options::new(Layer::Type));
    let merge = MergeKernel::of(&kernel);
    [(&texts.decode, kernel.entry()), (&texts.merge, merge.entry())]
        .into_iter()
        .find_map(|(text, entry)| types.pipeline(text, entry).err().map(|error| error.to_string()))
        .or_else(|| {
            println!("fast");
            first(Options::new(Layer::Fast), &fast)
        })
        .or_else(|| first(Options::new(Layer::Fast).with_seed(5), &fast))
        .or_else(|| {
            println!("check");
            first(Options::new(Layer::Check), &small)
        })
}

/// The same for the kernel that appends to caches.
fn examine_append(mutant: &Mutant, form: AppendForm, case: &Case) -> Option<String> {
    let mut runner = TestRunner::deterministic();
    let strategy = DecodeVariant::without_tile(form.name, case).cases(FAST.1);
    let mut run = || AppendRun::new(&strategy.new_tree(&mut runner).expect("a case").current(), form);
    let runs: Vec<AppendRun> = (0..FAST.0).map(|_| run()).collect();
    let kernel = runs[0].kernel();
    let original = kernel.source();
    assert!(original.contains(mutant.from), "{:?} is not in the text of {}", mutant.from, mutant.variant);
    let source = original.replace(mutant.from, mutant.to);
    let first = |layer: Layer| {
        let bench = Bench::new(Options::new(layer));
        runs.iter().find_map(|run| run.launch(&bench, &source).and_then(|(got, _)| run.check(&got)).err())
    };
    println!("type");
    let types = Bench::new(Options::new(Layer::Type)).pipeline(&source, kernel.entry());
    types
        .err()
        .map(|error| error.to_string())
        .or_else(|| {
            println!("fast");
            first(Layer::Fast)
        })
        .or_else(|| {
            println!("check");
            first(Layer::Check)
        })
}

/// A GPU on which any lane may have any element.
fn scattered() -> Options {
    let tensor_ops = TensorOps { layout: LaneLayout::Scattered(9), ..TensorOps::default() };
    Options::new(Layer::Fast).with_tensor_ops(tensor_ops)
}

/// Every mutant.
fn mutants() -> Vec<&'static Mutant> {
    let lists = [list::MUTANTS, tensorops::MUTANTS, backward::MUTANTS, dropout::MUTANTS, decode::MUTANTS];
    lists.into_iter().flatten().collect()
}

fn changed(mutant: &Mutant, kernel: &Kernel) -> String {
    let original = kernel.source();
    assert!(original.contains(mutant.from), "{:?} is not in the text of {}", mutant.from, mutant.variant);
    original.replace(mutant.from, mutant.to)
}

fn types(kernel: &Kernel, source: &str) -> Option<String> {
    println!("type");
    Bench::new(Options::new(Layer::Type)).pipeline(source, kernel.entry()).err().map(|error| error.to_string())
}

fn judge(bench: &Bench, kernel: &Kernel, source: &str, run: &Run) -> Result<(), String> {
    let got = bench.run(kernel, source, run)?;
    run.check(kernel, &got)
}

/// The same problems for every mutant of a variant.
fn problems(variant: &Variant, (count, most): (usize, usize)) -> Vec<Run> {
    let mut runner = TestRunner::deterministic();
    let strategy = variant.cases(most);
    let case = |runner: &mut TestRunner| -> Case { strategy.new_tree(runner).expect("a case").current() };
    (0..count).map(|_| Run::new(&case(&mut runner))).collect()
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, index] = words.as_slice()
        && flag == "--one"
    {
        let caught = examine(mutants()[index.parse::<usize>().expect("an index")]);
        println!("{}", caught.as_deref().unwrap_or(ALIVE).replace('\n', " "));
        return ExitCode::SUCCESS;
    }
    let wanted: Vec<usize> = (0..mutants().len())
        .filter(|&index| words.iter().all(|word| mutants()[index].what.contains(word.as_str())))
        .collect();
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    let work = || {
        while let Some(&index) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            let caught = in_a_process(index);
            tally.lock().expect("no panic").add(mutants()[index], caught);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    tally.into_inner().expect("no panic").finish()
}

/// What a process says of a mutant that nothing noticed.
const ALIVE: &str = "alive";

/// Examines a mutant in a process of its own: it may crash, or never end.
fn in_a_process(index: usize) -> Option<Catch> {
    let program = std::env::current_exe().expect("a path");
    let mut child = Command::new(program)
        .args(["--one", &index.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a process");
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break Some(status);
        }
        if Instant::now() > end {
            child.kill().expect("a child");
            child.wait().expect("a child");
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let mut output = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut output).expect("text");
    let mut lines = output.lines().rev();
    let how = match status {
        Some(status) if status.success() => lines.next().unwrap_or_default().to_owned(),
        Some(status) => format!("the process ended with {status}"),
        None => format!("the kernel did not end within {} s", LIMIT.as_secs()),
    };
    let layer = lines.next().unwrap_or("none").to_owned();
    assert!(layer != "none", "mutant {index} ({}) was never examined: {how}", mutants()[index].what);
    (how != ALIVE).then_some(Catch { layer, how })
}

/// The report, as far as it has come.
#[derive(Default)]
struct Tally {
    layers: BTreeMap<String, usize>,
    equivalent: usize,
    wrong: usize,
}

impl Tally {
    fn add(&mut self, mutant: &Mutant, caught: Option<Catch>) {
        let name = format!("{} [{}]", mutant.what, mutant.variant);
        match (caught, mutant.equivalent) {
            (Some(Catch { layer, how }), None) => {
                println!("{layer:<6} {name}: {how:.120}");
                *self.layers.entry(layer).or_default() += 1;
            }
            (None, Some(proof)) => {
                println!("none   {name}: {proof}");
                self.equivalent += 1;
            }
            (None, None) => {
                println!("ALIVE  {name}");
                self.wrong += 1;
            }
            (Some(Catch { layer, how }), Some(_)) => {
                println!("WRONG  {name}: no change, but the layer {layer} noticed: {how:.200}");
                self.wrong += 1;
            }
        }
    }

    fn finish(&self) -> ExitCode {
        let Self { layers, equivalent, wrong } = self;
        let caught: usize = layers.values().sum();
        println!("{caught} bugs caught, by layer: {layers:?}; {equivalent} changes that are none; {wrong} wrong");
        if *wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

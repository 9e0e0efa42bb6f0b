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
use common::variants;
use common::{Case, Run};
use list::{FAR_DIRECT, FAR_SCALAR, FAR_STAGED, Mutant};
use mtlflashattn_metal::{BackwardKernel, MergeKernel};
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

/// The layer that notices a mutant, and by what; see [`through_layers`].
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
        let source = changed(mutant, &[kernel.source()]).remove(0);
        return through_layers(&[(&source, kernel.entry())], &FAST_LAYER[..1], (&[()], &[]), |bench, ()| {
            far.judge(bench, &kernel, &source)
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
    let [fast, small] = [FAST, CHECK]
        .map(|(count, most)| cases(&variant.cases(most), count).iter().map(Run::new).collect::<Vec<Run>>());
    let kernel = variant.kernel(&fast[0]);
    let source = changed(mutant, &[kernel.source()]).remove(0);
    let mut schedules = FAST_LAYER.to_vec();
    schedules.extend(variant.matmul.map(|_| scattered as fn() -> Options));
    through_layers(&[(&source, kernel.entry())], &schedules, (&fast, &small), |bench, run| {
        run.check(&kernel, &bench.run(&kernel, &source, run)?)
    })
}

/// The same for the kernels of the backward pass whose rows lie far apart.
fn examine_far_backward(mutant: &Mutant) -> Option<String> {
    let far = FarBackward::new();
    let kernels = far.kernels(mutant.variant == backward::FAR_STAGED);
    changed(mutant, &kernels.iter().map(BackwardKernel::source).collect::<Vec<_>>());
    let edit = |kernel: &BackwardKernel| kernel.source().replace(mutant.from, mutant.to);
    through_layers(&[], &FAST_LAYER[..1], (&[()], &[]), |bench, ()| far.judge(bench, &kernels, &edit))
}

/// The same for the kernels of the backward pass, which run one after the other.
fn examine_backward(mutant: &Mutant, variant: &BackwardVariant) -> Option<String> {
    let runs = |count, most| -> Vec<BackwardRun> {
        cases(&variant.cases(most), count).iter().map(|case| BackwardRun::new(case, variant.lse_gradient)).collect()
    };
    let (fast, small) = (runs(FAST.0 / 2, FAST.1 / 2), runs(CHECK.0 / 2, CHECK.1));
    let kernels = variant.kernels(&fast[0]);
    let texts = changed(mutant, &kernels.iter().map(BackwardKernel::source).collect::<Vec<_>>());
    let texts: Vec<(&str, &str)> =
        texts.iter().zip(&kernels).map(|(text, kernel)| (text.as_str(), kernel.entry())).collect();
    let edit = |kernel: &BackwardKernel| kernel.source().replace(mutant.from, mutant.to);
    through_layers(&texts, &FAST_LAYER, (&fast, &small), |bench, run| {
        run.launch(bench, &kernels, &edit).and_then(|(got, _)| run.check(&got))
    })
}

/// The same for the decode kernel and the kernel that merges its splits.
fn examine_decode(mutant: &Mutant, variant: &DecodeVariant) -> Option<String> {
    let runs =
        |count, most| -> Vec<Run> { cases(&variant.cases(most), count).iter().map(|case| variant.run(case)).collect() };
    let (fast, small) = (runs(FAST.0, 4 * FAST.1), runs(CHECK.0, 2 * CHECK.1));
    let kernel = variant.kernel(&fast[0]);
    let texts = Texts::of(&kernel).changed(mutant.from, mutant.to);
    let entries = [(texts.decode.as_str(), kernel.entry()), (&texts.merge, MergeKernel::of(&kernel).entry())];
    through_layers(&entries, &FAST_LAYER, (&fast, &small), |bench, run| {
        common::decode::check(bench, &kernel, &texts, run, variant.splits).map(|_| ())
    })
}

/// The same for the kernel that appends to caches.
fn examine_append(mutant: &Mutant, form: AppendForm, case: &Case) -> Option<String> {
    let strategy = DecodeVariant::without_tile(form.name, case).cases(FAST.1);
    let runs: Vec<AppendRun> = cases(&strategy, FAST.0).iter().map(|case| AppendRun::new(case, form)).collect();
    let kernel = runs[0].kernel();
    let source = changed(mutant, &[kernel.source()]).remove(0);
    through_layers(&[(&source, kernel.entry())], &FAST_LAYER[..1], (&runs, &runs), |bench, run| {
        run.launch(bench, &source).and_then(|(got, _)| run.check(&got))
    })
}

/// The orders in which the fast layer runs lanes.
const FAST_LAYER: [fn() -> Options; 2] = [|| Options::new(Layer::Fast), || Options::new(Layer::Fast).with_seed(5)];

/// What is wrong with changed kernels, texts and their entry points: first whether the type layer takes them, then whether
/// `judge` accepts them on the problems of the fast layer, in every schedule, and on those of the check layer. Prints each
/// layer as it begins, so that a crash can be told from where it happened.
fn through_layers<P>(
    texts: &[(&str, &str)],
    schedules: &[fn() -> Options],
    (fast, small): (&[P], &[P]),
    judge: impl Fn(&Bench, &P) -> Result<(), String>,
) -> Option<String> {
    let first = |options: Options, problems: &[P]| {
        let bench = Bench::new(options);
        problems.iter().find_map(|problem| judge(&bench, problem).err())
    };
    println!("type");
    let types = Bench::new(Options::new(Layer::Type));
    let refused = texts.iter().find_map(|(text, entry)| types.pipeline(text, entry).err());
    refused
        .map(|error| error.to_string())
        .or_else(|| {
            println!("fast");
            schedules.iter().find_map(|schedule| first(schedule(), fast))
        })
        .or_else(|| {
            println!("check");
            first(Options::new(Layer::Check), small)
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

/// The texts with the bug in them, which must be in one at least.
fn changed(mutant: &Mutant, texts: &[String]) -> Vec<String> {
    let is_in = texts.iter().any(|text| text.contains(mutant.from));
    assert!(is_in, "{:?} is not in the text of {}", mutant.from, mutant.variant);
    texts.iter().map(|text| text.replace(mutant.from, mutant.to)).collect()
}

/// The same problems for every mutant of a variant.
fn cases(strategy: &impl Strategy<Value = Case>, count: usize) -> Vec<Case> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| strategy.new_tree(&mut runner).expect("a case").current()).collect()
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

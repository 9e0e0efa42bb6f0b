//! Translated kernels: made once, kept in a folder, loaded by several threads at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use mtlflashattn_simulator::nvidia::{Gpu, Program};
use mtlflashattn_simulator::ptx::{FloatProducts, translate};

/// How products of float32 matrices are translated: to check numbers, with 22 bits at least.
pub const FLOAT_PRODUCTS: FloatProducts = FloatProducts::Split;

/// A text and an entry point of it.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub source: String,
    pub entry: &'static str,
}

/// The folder, and the GPU if there is one.
pub struct Programs<'a> {
    pub gpu: Option<&'a Gpu>,
    folder: PathBuf,
}

impl<'a> Programs<'a> {
    pub fn new(gpu: Option<&'a Gpu>, folder: PathBuf) -> Result<Self, String> {
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(Self { gpu, folder })
    }

    /// Where the translation of a kernel is kept.
    pub fn path(&self, kernel: &Kernel) -> PathBuf {
        // FNV-1a: names only have to differ where texts do.
        let hash = kernel
            .source
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        self.folder.join(format!("{hash:016x}.ptx"))
    }

    fn ptx(&self, kernel: &Kernel) -> Result<String, String> {
        let path = self.path(kernel);
        if let Ok(text) = fs::read_to_string(&path) {
            return Ok(text);
        }
        let text = translate(&kernel.source, FLOAT_PRODUCTS).map_err(|error| error.to_string())?;
        write(&path, &text)?;
        Ok(text)
    }

    /// Translates all kernels, and loads them if there is a GPU. In the order of the list.
    pub fn load(&self, kernels: &[Kernel]) -> Result<Option<Vec<Program>>, String> {
        let next = AtomicUsize::new(0);
        let (sender, receiver) = mpsc::channel();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let sender = sender.clone();
                let next = &next;
                scope.spawn(move || {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(kernel) = kernels.get(at) else { break };
                        sender.send((at, self.load_one(kernel))).expect("the receiver waits below");
                    }
                });
            }
        });
        drop(sender);
        let mut loaded: Vec<_> = receiver.into_iter().collect();
        loaded.sort_by_key(|(at, _)| *at);
        loaded.into_iter().map(|(_, program)| program).collect()
    }

    fn load_one(&self, kernel: &Kernel) -> Result<Option<Program>, String> {
        let ptx = self.ptx(kernel)?;
        self.gpu.map(|gpu| gpu.load(&ptx, kernel.entry)).transpose().map_err(|error| error.to_string())
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

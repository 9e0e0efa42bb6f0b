//! The `MTLFLASHATTN_*` variables: their names, their meaning and their values read into one [`Settings`].
//!
//! Whoever owns the process environment hands in a lookup; nothing here reads it. Values are trimmed, their case does
//! not matter (but for package names), and an empty value counts as not set.

use std::fmt;
use std::path::PathBuf;

use crate::plan::TilePattern;
use crate::{Dtype, Tier};

/// An environment variable: what help and documentation say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Name in the environment.
    pub name: &'static str,
    /// Text that means the same as leaving the variable unset.
    pub default: &'static str,
    /// What may stand there, in words.
    pub allowed: &'static str,
    /// What it does, in one line.
    pub description: &'static str,
}

const KERNEL: Variable = Variable {
    name: "MTLFLASHATTN_KERNEL",
    default: "auto",
    allowed: "auto, cpu, torch (or pytorch), decode, tensorops (or v2r), tensorops-staged, simdgroup (or v1), scalar (or v0), \
              v2, v2_fp32, v2_bf16, v2_dtype (or v2_typed)",
    description: "Forces one tier; a call that it cannot serve is an error.",
};
const SHIM: Variable = Variable {
    name: "MTLFLASHATTN_SHIM",
    default: "auto",
    allowed: "auto, on, off",
    description: "Whether `import flash_attn` finds this package; auto means on Apple Silicon only.",
};
const SHIM_DENY: Variable = Variable {
    name: "MTLFLASHATTN_SHIM_DENY",
    default: "",
    allowed: "package names separated by commas",
    description: "Packages for whose imports the `flash_attn` of this package stays hidden.",
};
const TRACE: Variable = Variable {
    name: "MTLFLASHATTN_TRACE",
    default: "off",
    allowed: "on, off",
    description: "Counts calls by shape and tier and prints the counts to standard error at exit.",
};
const V2_PREUSE: Variable = Variable {
    name: "MTLFLASHATTN_V2_PREUSE",
    default: "auto",
    allowed: "auto, on, off",
    description: "Whether the v2 kernels keep P in registers (tensorops) or stage it (off: tensorops-staged).",
};
const V2_FP32_MIN_SEQ: Variable = Variable {
    name: "MTLFLASHATTN_V2_FP32_MIN_SEQ",
    default: "2048",
    allowed: "a whole number of at least 0",
    description: "Longest of query and key length from which float32 calls use the tensorops tiers under auto.",
};
const TF32: Variable = Variable {
    name: "MTLFLASHATTN_TF32",
    default: "off",
    allowed: "on, off",
    description: "Whether the tensorops tiers may round float32 inputs to 11 significant bits, for speed.",
};
const TORCH_CHUNK: Variable = Variable {
    name: "MTLFLASHATTN_TORCH_CHUNK",
    default: "2048",
    allowed: "a whole number of at least 1",
    description: "Query rows that the torch tier computes at a time.",
};
const SDPA: Variable = Variable {
    name: "MTLFLASHATTN_SDPA",
    default: "auto",
    allowed: "auto, on, off",
    description: "off keeps the patch of scaled_dot_product_attention from being installed; on makes it serve every call it can.",
};
const SDPA_MIN_GB: Variable = Variable {
    name: "MTLFLASHATTN_SDPA_MIN_GB",
    default: "12",
    allowed: "a number of at least 0",
    description: "Size of the score matrix in GiB from which the patch serves a call to save memory.",
};
const SDPA_MIN_SEQ: Variable = Variable {
    name: "MTLFLASHATTN_SDPA_MIN_SEQ",
    default: "4096",
    allowed: "a whole number of at least 0",
    description: "Longest of query and key length from which the patch serves calls whose scores torch would hold.",
};
const SDPA_FAST_MIN_SEQ: Variable = Variable {
    name: "MTLFLASHATTN_SDPA_FAST_MIN_SEQ",
    default: "1024",
    allowed: "a whole number of at least 0",
    description: "Longest of query and key length from which the patch serves calls that have a tensorops tier.",
};
const DEVICE: Variable = Variable {
    name: "MTLFLASHATTN_DEVICE",
    default: "auto",
    allowed: "auto, simulator",
    description: "simulator computes CPU tensors by the Metal kernels, executed by the simulator: slow, for tests.",
};
const PROBE: Variable = Variable {
    name: "MTLFLASHATTN_PROBE",
    default: "on",
    allowed: "on, off, force",
    description: "Whether a Metal kernel must get small problems right before it serves; force checks those again that \
                  this machine has already checked.",
};
const CACHE: Variable = Variable {
    name: "MTLFLASHATTN_CACHE",
    default: "",
    allowed: "an absolute path",
    description: "Folder for what was found out about this machine: verdicts on kernels, tuned tiles.",
};
const CPU_ISA: Variable = Variable {
    name: "MTLFLASHATTN_CPU_ISA",
    default: "auto",
    allowed: "auto, portable, avx2, avx512, neon",
    description: "Instruction set of the cpu tier; one that this machine lacks is an error.",
};
const TILE: Variable = Variable {
    name: "MTLFLASHATTN_TILE",
    default: "",
    allowed: "fields of a tile separated by commas: simdgroups, row_fragments, keys, value_chunk = a number; \
              staged, in_step = on, off; query = registers, threadgroup, device",
    description: "Takes the best tile that has these fields; a call that has no such tile is an error.",
};

/// Every variable, in the order in which help lists them.
pub const VARIABLES: &[Variable] = &[
    KERNEL,
    DEVICE,
    PROBE,
    CACHE,
    CPU_ISA,
    TORCH_CHUNK,
    V2_PREUSE,
    V2_FP32_MIN_SEQ,
    TILE,
    TF32,
    TRACE,
    SHIM,
    SHIM_DENY,
    SDPA,
    SDPA_MIN_GB,
    SDPA_MIN_SEQ,
    SDPA_FAST_MIN_SEQ,
];

/// A value that is not allowed; the default is used instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The variable.
    pub variable: Variable,
    /// The value that was set.
    pub value: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Variable { name, default, allowed, .. } = self.variable;
        let default = if default.is_empty() { "none" } else { default };
        write!(f, "{name} is {:?}; allowed: {allowed}; using {default}", self.value)
    }
}

/// What `MTLFLASHATTN_KERNEL` and, for the `v2` names, `MTLFLASHATTN_V2_PREUSE` ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    name: &'static str,
    tier: Option<Tier>,
}

/// Names whose tier `MTLFLASHATTN_V2_PREUSE` decides.
const V2_NAMES: [&str; 5] = ["v2", "v2_fp32", "v2_bf16", "v2_dtype", "v2_typed"];

/// Names that also ask for an element type.
const V2_DTYPES: [(&str, Dtype); 3] = [("v2", Dtype::F16), ("v2_fp32", Dtype::F32), ("v2_bf16", Dtype::Bf16)];

const KERNEL_NAMES: [(&str, Tier); 11] = [
    ("cpu", Tier::Cpu),
    ("torch", Tier::Torch),
    ("pytorch", Tier::Torch),
    ("decode", Tier::Decode),
    ("tensorops", Tier::Tensorops),
    ("v2r", Tier::Tensorops),
    ("tensorops-staged", Tier::TensoropsStaged),
    ("simdgroup", Tier::Simdgroup),
    ("v1", Tier::Simdgroup),
    ("scalar", Tier::Scalar),
    ("v0", Tier::Scalar),
];

impl Kernel {
    /// The planner chooses.
    pub const AUTO: Self = Self { name: "auto", tier: None };

    /// The name as set, in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// The element type that the name asks for; `None` when any will do.
    #[must_use]
    pub fn dtype(self) -> Option<Dtype> {
        V2_DTYPES.into_iter().find_map(|(name, dtype)| (name == self.name).then_some(dtype))
    }

    /// The forced tier; `None` when the planner chooses.
    #[must_use]
    pub const fn tier(self) -> Option<Tier> {
        self.tier
    }

    fn parse(text: &str, preuse: Switch) -> Option<Self> {
        if text == Self::AUTO.name {
            return Some(Self::AUTO);
        }
        let v2 = V2_NAMES.into_iter().find(|&name| name == text).map(|name| {
            let tier = if preuse == Switch::Off { Tier::TensoropsStaged } else { Tier::Tensorops };
            (name, tier)
        });
        let (name, tier) = v2.or_else(|| KERNEL_NAMES.into_iter().find(|&(name, _)| name == text))?;
        Some(Self { name, tier: Some(tier) })
    }
}

/// A choice that can be left to the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// The package decides.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Switch {
    /// The name in `MTLFLASHATTN_*` variables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            _ => parse_bool(text).map(|on| if on { Self::On } else { Self::Off }),
        }
    }
}

/// What `MTLFLASHATTN_DEVICE` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// Each tensor is computed where it lies.
    #[default]
    Auto,
    /// CPU tensors are computed by the Metal kernels, which the simulator executes.
    Simulator,
}

impl Device {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "simulator" => Some(Self::Simulator),
            _ => None,
        }
    }
}

/// What `MTLFLASHATTN_PROBE` asks for, the least demanding first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Probe {
    /// A kernel serves unchecked.
    Off,
    /// A kernel serves after it got small problems right on this machine, now or earlier.
    #[default]
    On,
    /// A kernel serves after it got small problems right in this process.
    Force,
}

impl Probe {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "force" => Some(Self::Force),
            _ => parse_bool(text).map(|on| if on { Self::On } else { Self::Off }),
        }
    }
}

/// Instruction set that `MTLFLASHATTN_CPU_ISA` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuIsa {
    /// The best one of this machine.
    #[default]
    Auto,
    /// No instructions beyond the compilation target's.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512.
    Avx512,
    /// Arm NEON.
    Neon,
}

impl CpuIsa {
    /// Every choice.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Portable, Self::Avx2, Self::Avx512, Self::Neon];

    /// The name in the variable.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == text)
    }
}

/// The value of every variable in [`VARIABLES`].
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The forced tier, if any.
    pub kernel: Kernel,
    /// Whether CPU tensors go to the simulator.
    pub device: Device,
    /// What a Metal kernel must show before it serves.
    pub probe: Probe,
    /// Folder of the cache, absolute; `None` where caches of the user belong.
    pub cache: Option<PathBuf>,
    /// Instruction set of the cpu tier.
    pub cpu_isa: CpuIsa,
    /// Query rows that the torch tier computes at a time; at least 1.
    pub torch_chunk: usize,
    /// Whether the v2 kernels keep P in registers.
    pub v2_preuse: Switch,
    /// Sequence length from which float32 uses the tensorops tiers under auto.
    pub v2_fp32_min_seq: usize,
    /// Fields that the tile of a Metal kernel must have.
    pub tile: Option<TilePattern>,
    /// Whether the tensorops tiers may round float32 inputs.
    pub tf32: bool,
    /// Whether calls are counted and reported at exit.
    pub trace: bool,
    /// Whether `import flash_attn` finds this package.
    pub shim: Switch,
    /// Packages from which the shim hides.
    pub shim_deny: Vec<String>,
    /// Whether the `scaled_dot_product_attention` patch may be installed.
    pub sdpa: Switch,
    /// Size of the score matrix in GiB from which the patch serves a call.
    pub sdpa_min_gb: f64,
    /// Sequence length from which the patch serves every call.
    pub sdpa_min_seq: usize,
    /// Sequence length from which the patch serves calls that have a tensorops tier.
    pub sdpa_fast_min_seq: usize,
}

impl Settings {
    /// Nothing set.
    pub const DEFAULT: Self = Self {
        kernel: Kernel::AUTO,
        device: Device::Auto,
        probe: Probe::On,
        cache: None,
        cpu_isa: CpuIsa::Auto,
        torch_chunk: 2048,
        v2_preuse: Switch::Auto,
        v2_fp32_min_seq: 2048,
        tile: None,
        tf32: false,
        trace: false,
        shim: Switch::Auto,
        shim_deny: Vec::new(),
        sdpa: Switch::Auto,
        sdpa_min_gb: 12.0,
        sdpa_min_seq: 4096,
        sdpa_fast_min_seq: 1024,
    };

    /// Reads every variable through `lookup`, which returns the text of a variable by its full name.
    ///
    /// A value that is not allowed counts as not set and adds one [`Warning`].
    pub fn parse(lookup: impl Fn(&str) -> Option<String>) -> (Self, Vec<Warning>) {
        let mut reader = Reader { lookup, warnings: Vec::new() };
        let default = Self::DEFAULT;
        let v2_preuse = reader.read(V2_PREUSE, Switch::parse).unwrap_or(default.v2_preuse);
        let at_least = |least: usize| move |text: &str| text.parse().ok().filter(|&number| number >= least);
        let settings = Self {
            kernel: reader.read(KERNEL, |text| Kernel::parse(text, v2_preuse)).unwrap_or(default.kernel),
            device: reader.read(DEVICE, Device::parse).unwrap_or(default.device),
            probe: reader.read(PROBE, Probe::parse).unwrap_or(default.probe),
            cache: reader.read_as_written(CACHE, parse_folder),
            cpu_isa: reader.read(CPU_ISA, CpuIsa::parse).unwrap_or(default.cpu_isa),
            torch_chunk: reader.read(TORCH_CHUNK, at_least(1)).unwrap_or(default.torch_chunk),
            v2_preuse,
            v2_fp32_min_seq: reader.read(V2_FP32_MIN_SEQ, at_least(0)).unwrap_or(default.v2_fp32_min_seq),
            tile: reader.read(TILE, TilePattern::parse),
            tf32: reader.read(TF32, parse_bool).unwrap_or(default.tf32),
            trace: reader.read(TRACE, parse_bool).unwrap_or(default.trace),
            shim: reader.read(SHIM, Switch::parse).unwrap_or(default.shim),
            shim_deny: reader.read_as_written(SHIM_DENY, parse_packages).unwrap_or(default.shim_deny),
            sdpa: reader.read(SDPA, Switch::parse).unwrap_or(default.sdpa),
            sdpa_min_gb: reader.read(SDPA_MIN_GB, parse_size).unwrap_or(default.sdpa_min_gb),
            sdpa_min_seq: reader.read(SDPA_MIN_SEQ, at_least(0)).unwrap_or(default.sdpa_min_seq),
            sdpa_fast_min_seq: reader.read(SDPA_FAST_MIN_SEQ, at_least(0)).unwrap_or(default.sdpa_fast_min_seq),
        };
        (settings, reader.warnings)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

struct Reader<L> {
    lookup: L,
    warnings: Vec<Warning>,
}

impl<L: Fn(&str) -> Option<String>> Reader<L> {
    fn read<T>(&mut self, variable: Variable, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.read_as_written(variable, |text| parse(&text.to_ascii_lowercase()))
    }

    fn read_as_written<T>(&mut self, variable: Variable, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let text = (self.lookup)(variable.name)?;
        let text = text.trim();
        if text.is_empty() {
            return None;
        }
        let value = parse(text);
        if value.is_none() {
            self.warnings.push(Warning { variable, value: text.to_owned() });
        }
        value
    }
}

pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "on" | "true" | "yes" => Some(true),
        "0" | "off" | "false" | "no" => Some(false),
        _ => None,
    }
}

fn parse_size(text: &str) -> Option<f64> {
    text.parse().ok().filter(|size: &f64| size.is_finite() && *size >= 0.0)
}

fn parse_folder(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|path| path.is_absolute())
}

/// Names of Python packages, dotted or not; empty items are skipped, so that a trailing comma does no harm.
fn parse_packages(text: &str) -> Option<Vec<String>> {
    let is_identifier = |part: &str| {
        let starts_well = part.chars().next().is_some_and(|first| first.is_alphabetic() || first == '_');
        starts_well && part.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.map(|name| name.split('.').all(is_identifier).then(|| name.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(pairs: &[(&str, &str)]) -> (Settings, Vec<Warning>) {
        let find = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Settings::parse(find)
    }

    /// Parses pairs that must all be allowed.
    fn accepted(pairs: &[(&str, &str)]) -> Settings {
        let (settings, warnings) = parse(pairs);
        assert_eq!(warnings, [], "{pairs:?}");
        settings
    }

    fn rejected(name: &str, value: &str) -> String {
        let (settings, warnings) = parse(&[(name, value)]);
        assert_eq!(settings, Settings::DEFAULT, "{name}={value}");
        assert_eq!(warnings.len(), 1, "{name}={value}");
        warnings[0].to_string()
    }

    #[test]
    fn nothing_set_is_the_default() {
        assert_eq!(accepted(&[]), Settings::default());
        for variable in VARIABLES {
            assert_eq!(accepted(&[(variable.name, "  ")]), Settings::DEFAULT);
        }
    }

    #[test]
    fn documented_defaults_are_the_defaults() {
        for variable in VARIABLES {
            assert_eq!(accepted(&[(variable.name, variable.default)]), Settings::DEFAULT, "{}", variable.name);
        }
    }

    #[test]
    fn every_variable_is_listed_once_and_read() {
        let asked = std::cell::RefCell::new(Vec::new());
        Settings::parse(|name| {
            asked.borrow_mut().push(name.to_owned());
            None
        });
        let mut asked = asked.into_inner();
        let mut listed: Vec<String> = VARIABLES.iter().map(|variable| variable.name.to_owned()).collect();
        asked.sort();
        listed.sort();
        assert_eq!(asked, listed);
        listed.dedup();
        assert_eq!(listed.len(), VARIABLES.len());
    }

    #[test]
    fn kernel_names_mean_the_tiers_of_the_design() {
        let table = [
            ("cpu", None, Tier::Cpu),
            ("torch", None, Tier::Torch),
            ("pytorch", None, Tier::Torch),
            ("v0", None, Tier::Scalar),
            ("scalar", None, Tier::Scalar),
            ("v1", None, Tier::Simdgroup),
            ("simdgroup", None, Tier::Simdgroup),
            ("decode", None, Tier::Decode),
            ("v2", None, Tier::Tensorops),
            ("v2", Some("auto"), Tier::Tensorops),
            ("v2", Some("1"), Tier::Tensorops),
            ("v2", Some("0"), Tier::TensoropsStaged),
            ("v2_fp32", Some("off"), Tier::TensoropsStaged),
            ("v2_bf16", Some("false"), Tier::TensoropsStaged),
            ("v2_dtype", Some("no"), Tier::TensoropsStaged),
            ("v2_typed", None, Tier::Tensorops),
            ("v2r", Some("off"), Tier::Tensorops),
            ("tensorops", Some("off"), Tier::Tensorops),
            ("tensorops-staged", Some("on"), Tier::TensoropsStaged),
        ];
        for (name, preuse, tier) in table {
            let settings = accepted(&[(KERNEL.name, name), (V2_PREUSE.name, preuse.unwrap_or(""))]);
            assert_eq!((settings.kernel.name(), settings.kernel.tier()), (name, Some(tier)), "{name} {preuse:?}");
        }
        assert_eq!(accepted(&[(KERNEL.name, "auto")]).kernel.tier(), None);
    }

    #[test]
    fn every_name_of_a_tier_or_an_instruction_set_is_accepted_and_named_in_the_help() {
        for tier in Tier::ALL {
            assert_eq!(accepted(&[(KERNEL.name, tier.name())]).kernel.tier(), Some(tier));
        }
        for name in V2_NAMES.into_iter().chain(KERNEL_NAMES.map(|(name, _)| name)) {
            let mut words = KERNEL.allowed.split(|c: char| ",() ".contains(c));
            assert!(words.any(|word| word == name), "{name}");
        }
        for isa in CpuIsa::ALL {
            assert_eq!(accepted(&[(CPU_ISA.name, isa.name())]).cpu_isa, isa);
            assert!(CPU_ISA.allowed.split(", ").any(|word| word == isa.name()));
        }
    }

    #[test]
    fn probes_are_demanded_more_and_more() {
        let [off, on, force] = ["0", "TRUE", "Force"].map(|text| accepted(&[(PROBE.name, text)]).probe);
        assert_eq!([off, on, force], [Probe::Off, Probe::On, Probe::Force]);
        assert!(off < on && on < force);
    }

    #[test]
    fn every_variable_reaches_its_field() {
        let settings = accepted(&[
            (KERNEL.name, "V0"),
            (DEVICE.name, "Simulator"),
            (PROBE.name, "No"),
            (CACHE.name, " /Volumes/Big Disk/cache "),
            (CPU_ISA.name, "AVX512"),
            (TORCH_CHUNK.name, "1"),
            (V2_PREUSE.name, "True"),
            (V2_FP32_MIN_SEQ.name, "0"),
            (TILE.name, "Keys=032, staged = yes,query=Device"),
            (TF32.name, "on"),
            (TRACE.name, "Yes"),
            (SHIM.name, "ON"),
            (SHIM_DENY.name, " xformers, Diffusers.models ,,"),
            (SDPA.name, "0"),
            (SDPA_MIN_GB.name, " 1.5 "),
            (SDPA_MIN_SEQ.name, "17"),
            (SDPA_FAST_MIN_SEQ.name, "18"),
        ]);
        let expected = Settings {
            kernel: Kernel { name: "v0", tier: Some(Tier::Scalar) },
            device: Device::Simulator,
            probe: Probe::Off,
            cache: Some("/Volumes/Big Disk/cache".into()),
            cpu_isa: CpuIsa::Avx512,
            torch_chunk: 1,
            v2_preuse: Switch::On,
            v2_fp32_min_seq: 0,
            tile: TilePattern::parse("keys=32,staged=on,query=device"),
            tf32: true,
            trace: true,
            shim: Switch::On,
            shim_deny: vec!["xformers".into(), "Diffusers.models".into()],
            sdpa: Switch::Off,
            sdpa_min_gb: 1.5,
            sdpa_min_seq: 17,
            sdpa_fast_min_seq: 18,
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn a_bad_value_warns_once_and_the_default_is_used() {
        assert_eq!(
            rejected("MTLFLASHATTN_TORCH_CHUNK", " abc"),
            "MTLFLASHATTN_TORCH_CHUNK is \"abc\"; allowed: a whole number of at least 1; using 2048"
        );
        assert_eq!(
            rejected("MTLFLASHATTN_SHIM_DENY", "a b"),
            "MTLFLASHATTN_SHIM_DENY is \"a b\"; allowed: package names separated by commas; using none"
        );
        for (variable, values) in [
            (KERNEL, &["v3", "tensorops_staged", "metal"][..]),
            (DEVICE, &["cpu", "mps", "1"]),
            (PROBE, &["auto", "2", "forced"]),
            (CACHE, &["cache", "~/cache", "./cache"]),
            (CPU_ISA, &["sse2", "avx-512"]),
            (TORCH_CHUNK, &["0", "-1", "2.5", "1e3", "99999999999999999999"]),
            (V2_PREUSE, &["2", "maybe"]),
            (V2_FP32_MIN_SEQ, &["-1", "long"]),
            (TILE, &["32", "keys", "keys=", "keys=0", "keys=8,keys=8", "staged=3", "query=l2", "cores=1", "keys=8,"]),
            (TF32, &["auto", "tf32"]),
            (TRACE, &["auto", "verbose"]),
            (SHIM, &["force"]),
            (SHIM_DENY, &["1st", "a..b", "a-b", "a,b;c"]),
            (SDPA, &["always"]),
            (SDPA_MIN_GB, &["nan", "inf", "-0.5", "12GB"]),
            (SDPA_MIN_SEQ, &["4k"]),
            (SDPA_FAST_MIN_SEQ, &["1_024"]),
        ] {
            for value in values {
                let text = rejected(variable.name, value);
                assert!(text.contains(variable.name) && text.contains(value) && text.contains(variable.allowed));
            }
        }
    }

    #[test]
    fn one_bad_value_leaves_the_others() {
        let (settings, warnings) = parse(&[(V2_PREUSE.name, "?"), (KERNEL.name, "v2"), (TRACE.name, "1")]);
        assert_eq!(warnings, [Warning { variable: V2_PREUSE, value: "?".into() }]);
        assert_eq!(settings.kernel.tier(), Some(Tier::Tensorops));
        assert!(settings.trace);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_warned_about(index in 0..VARIABLES.len(), text in ".{0,12}") {
            let (settings, warnings) = parse(&[(VARIABLES[index].name, &text)]);
            prop_assert!(warnings.is_empty() || settings == Settings::DEFAULT);
            prop_assert!(warnings.len() <= 1);
            prop_assert!(settings.torch_chunk >= 1);
        }
    }
}

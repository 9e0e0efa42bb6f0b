//! What the planner knows about an Apple GPU and the software that compiles for it.

use std::fmt;

use crate::{Dtype, Error, Result};

/// A version by its first two numbers, the ones that capabilities depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u16,
    /// Second number; 0 where the text has none.
    pub minor: u16,
}

impl Version {
    /// The version `major.minor`.
    #[must_use]
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// Reads the first two numbers of texts such as `26.2`, `15`, `2.15.0` and `2.12.0a0+git1234`.
    ///
    /// # Errors
    /// [`Error::Value`] with the name `argument`.
    pub fn parse(argument: &'static str, text: &str) -> Result<Self> {
        let number = |part: &str| {
            let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            part[..digits].parse().ok()
        };
        let mut parts = text.trim().splitn(3, '.');
        let major = parts.next().and_then(number);
        let minor = parts.next().map_or(Some(0), number);
        let (Some(major), Some(minor)) = (major, minor) else {
            let allowed = "a version such as 26.2 or 2.15.0".into();
            return Err(Error::Value { argument, got: format!("{text:?}"), allowed });
        };
        Ok(Self { major, minor })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// How many dies and cores a chip of one generation has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Size {
    /// The chip without a suffix.
    Base,
    /// Pro.
    Pro,
    /// Max.
    Max,
    /// Ultra.
    Ultra,
}

impl Size {
    const ALL: [Self; 4] = [Self::Base, Self::Pro, Self::Max, Self::Ultra];

    const fn suffix(self) -> &'static str {
        match self {
            Self::Base => "",
            Self::Pro => " Pro",
            Self::Max => " Max",
            Self::Ultra => " Ultra",
        }
    }
}

/// The chip that a GPU is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Chip {
    /// A chip of the M series.
    M {
        /// 1 for the M1, and so on.
        generation: u8,
        /// Pro, Max, Ultra or none of them.
        size: Size,
    },
    /// Any other Apple GPU, for example that of a virtual machine: treated as the M1, the least of the series.
    Unknown,
}

impl Chip {
    /// Reads the name that Metal gives a device (`Apple M3 Max`) or a short form of it (`m3-max`). A name of any other
    /// kind is [`Chip::Unknown`].
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        let name = name.trim().to_ascii_lowercase();
        let name = name.strip_prefix("apple").unwrap_or(&name);
        let mut words = name.split([' ', '-', '_']).filter(|word| !word.is_empty());
        let digits = words.next().and_then(|word| word.strip_prefix('m'));
        let size = match (words.next(), words.next()) {
            (suffix, None) => {
                Size::ALL.into_iter().find(|size| size.suffix().trim().eq_ignore_ascii_case(suffix.unwrap_or("")))
            }
            _ => None,
        };
        match (digits.and_then(|digits| digits.parse().ok()), size) {
            (Some(generation @ 1..), Some(size)) => Self::M { generation, size },
            _ => Self::Unknown,
        }
    }

    /// Cores of the largest configuration of this chip, for a device that does not tell. A generation that is not known
    /// yet counts as the M5, and an unknown chip as the smallest of all.
    #[must_use]
    pub const fn most_cores(self) -> usize {
        let Self::M { generation, size } = self else { return 8 };
        match (generation, size) {
            (1, Size::Base) => 8,
            (1, Size::Pro) => 16,
            (1, Size::Max) => 32,
            (1, Size::Ultra) => 64,
            (_, Size::Base) => 10,
            (2, Size::Pro) => 19,
            (2, Size::Max) => 38,
            (2, Size::Ultra) => 76,
            (3, Size::Pro) => 18,
            (_, Size::Pro) => 20,
            (_, Size::Max) => 40,
            (_, Size::Ultra) => 80,
        }
    }

    /// The generation that decides about kernels: 1 for an unknown chip.
    #[must_use]
    pub const fn generation(self) -> u8 {
        match self {
            Self::M { generation, .. } => generation,
            Self::Unknown => 1,
        }
    }
}

impl fmt::Display for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::M { generation, size } => write!(f, "Apple M{generation}{}", size.suffix()),
            Self::Unknown => f.write_str("an Apple GPU of unknown family"),
        }
    }
}

/// An Apple GPU, with the versions that decide which kernels compile for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gpu {
    /// The chip.
    pub chip: Chip,
    /// GPU cores.
    pub cores: usize,
    /// Version of macOS.
    pub macos: Version,
    /// Version of torch, whose `torch.mps.compile_shader` compiles; `None` where nobody stands between this package and
    /// Metal.
    pub torch: Option<Version>,
}

/// Something that a tier needs and a machine lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What the tier needs.
    pub needs: &'static str,
    /// What the machine is or has.
    pub found: String,
    /// What the user can do about it; `None` where only another machine helps.
    pub remedy: Option<&'static str>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {}; this is {}", self.needs, self.found)
    }
}

/// What brings a newer macOS.
const UPDATE_MACOS: &str = "update macOS";
/// What brings a newer torch.
const UPGRADE_TORCH: &str = "pip install --upgrade torch";
/// First torch with a public `torch.mps.compile_shader`.
const COMPILE_SHADER_TORCH: Version = Version::new(2, 7);
/// First macOS with Metal 3.1, which has the type `bfloat`.
const BFLOAT_MACOS: Version = Version::new(14, 0);
/// First generation with matrix units that `matmul2d` uses; before it `matmul2d` is no faster than `simdgroup_matrix`.
const TENSOROPS_GENERATION: u8 = 5;
/// `matmul2d`'s cooperative tensors changed their layout in this version of macOS.
const TENSOROPS_MACOS: Version = Version::new(26, 2);
/// First torch that compiles as Metal 4.0, the language of `matmul2d`.
const TENSOROPS_TORCH: Version = Version::new(2, 11);

impl Gpu {
    /// The GPU that the simulator stands for: the least of the series, with nothing that only later ones have.
    pub const SIMULATED: Self =
        Self { chip: Chip::M { generation: 1, size: Size::Base }, cores: 8, macos: Version::new(15, 0), torch: None };

    /// Why no kernel in `dtype` compiles, or `None`.
    #[must_use]
    pub fn lacks_for_kernels(&self, dtype: Dtype) -> Option<Missing> {
        self.lacks_torch(COMPILE_SHADER_TORCH, "torch >= 2.7, the first with torch.mps.compile_shader").or_else(|| {
            (dtype == Dtype::Bf16 && self.macos < BFLOAT_MACOS).then(|| Missing {
                needs: "macOS >= 14.0 for bfloat16, a type of Metal 3.1",
                found: format!("macOS {}", self.macos),
                remedy: Some(UPDATE_MACOS),
            })
        })
    }

    /// The first thing that `matmul2d` lacks here, or `None`.
    #[must_use]
    pub fn lacks_for_tensorops(&self) -> Option<Missing> {
        if self.chip.generation() < TENSOROPS_GENERATION {
            return Some(Missing { needs: "an M5 or later", found: self.chip.to_string(), remedy: None });
        }
        if self.macos < TENSOROPS_MACOS {
            let found = format!("macOS {}", self.macos);
            return Some(Missing { needs: "macOS >= 26.2", found, remedy: Some(UPDATE_MACOS) });
        }
        self.lacks_torch(TENSOROPS_TORCH, "torch >= 2.11, the first that compiles Metal 4.0")
    }

    fn lacks_torch(&self, least: Version, needs: &'static str) -> Option<Missing> {
        let torch = self.torch.filter(|&torch| torch < least)?;
        Some(Missing { needs, found: format!("torch {torch}"), remedy: Some(UPGRADE_TORCH) })
    }

    /// Whether arithmetic in bfloat16 needs no widening: from the M3 on.
    #[must_use]
    pub const fn has_bfloat(&self) -> bool {
        self.chip.generation() >= 3
    }

    /// Whether registers, threadgroup memory and the first-level cache share one pool that is divided at run time: from
    /// the M3 on. The occupancy model does not describe such GPUs.
    #[must_use]
    pub const fn has_dynamic_caching(&self) -> bool {
        self.chip.generation() >= 3
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} cores, macOS {}", self.chip, self.cores, self.macos)?;
        self.torch.map_or(Ok(()), |torch| write!(f, ", torch {torch}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M5: Gpu = Gpu {
        chip: Chip::M { generation: 5, size: Size::Max },
        cores: 40,
        macos: Version::new(26, 2),
        torch: Some(Version::new(2, 11)),
    };

    #[test]
    fn names_of_chips_are_read() {
        let m = |generation, size| Chip::M { generation, size };
        for (name, chip) in [
            ("m3-max", m(3, Size::Max)),
            ("Apple M3 Max", m(3, Size::Max)),
            ("Apple M1", m(1, Size::Base)),
            ("M2_Ultra", m(2, Size::Ultra)),
            (" apple m4 pro ", m(4, Size::Pro)),
            ("m12", m(12, Size::Base)),
            ("Apple Paravirtual device", Chip::Unknown),
            ("Apple A17 Pro", Chip::Unknown),
            ("m0", Chip::Unknown),
            ("m3 max plus", Chip::Unknown),
            ("m3-mux", Chip::Unknown),
            ("", Chip::Unknown),
        ] {
            assert_eq!(Chip::from_name(name), chip, "{name}");
            if chip != Chip::Unknown {
                assert_eq!(Chip::from_name(&chip.to_string()), chip);
            }
        }
    }

    #[test]
    fn versions_are_read() {
        for (text, version) in
            [("26.2", (26, 2)), ("15", (15, 0)), ("2.15.0", (2, 15)), ("2.12.0a0+git12", (2, 12)), ("2.9a1", (2, 9))]
        {
            assert_eq!(Version::parse("macos", text), Ok(Version::new(version.0, version.1)), "{text}");
        }
        for text in ["", "x", "2.", "2.x", ".5", "99999.1", "-1.0"] {
            let error = Version::parse("torch", text).unwrap_err().to_string();
            assert_eq!(error, format!("torch is {text:?}; allowed: a version such as 26.2 or 2.15.0"));
        }
    }

    #[test]
    fn the_first_missing_requirement_is_named() {
        let lacks = |gpu: Gpu| gpu.lacks_for_tensorops().map(|missing| missing.to_string());
        assert_eq!(lacks(M5), None);
        assert_eq!(lacks(Gpu { torch: None, ..M5 }), None);
        let old = Gpu { chip: Chip::from_name("m4-pro"), macos: Version::new(15, 5), ..M5 };
        assert_eq!(lacks(old).unwrap(), "needs an M5 or later; this is Apple M4 Pro");
        let macos = Gpu { macos: Version::new(26, 1), torch: Some(Version::new(2, 10)), ..M5 };
        assert_eq!(lacks(macos).unwrap(), "needs macOS >= 26.2; this is macOS 26.1");
        let torch = Gpu { torch: Some(Version::new(2, 10)), ..M5 };
        assert_eq!(lacks(torch).unwrap(), "needs torch >= 2.11, the first that compiles Metal 4.0; this is torch 2.10");
    }

    #[test]
    fn bfloat_needs_metal_3_1_and_kernels_need_compile_shader() {
        let old = Gpu { macos: Version::new(13, 7), torch: Some(Version::new(2, 7)), ..M5 };
        assert_eq!(old.lacks_for_kernels(Dtype::F16), None);
        assert_eq!(
            old.lacks_for_kernels(Dtype::Bf16).unwrap().to_string(),
            "needs macOS >= 14.0 for bfloat16, a type of Metal 3.1; this is macOS 13.7"
        );
        let private = Gpu { torch: Some(Version::new(2, 6)), ..M5 };
        assert_eq!(
            private.lacks_for_kernels(Dtype::F32).unwrap().to_string(),
            "needs torch >= 2.7, the first with torch.mps.compile_shader; this is torch 2.6"
        );
        assert_eq!(Gpu::SIMULATED.lacks_for_kernels(Dtype::Bf16), None);
    }
}

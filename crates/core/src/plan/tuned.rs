//! Tiles that were measured on a machine, or asked for by the user, in the place of the planner's own choice.
//!
//! A tile is named by its fields, and only ever chosen from the candidates of the planner: a record that another version
//! wrote, or that somebody edited, can be ignored but cannot become a tile that does not fit.

use std::collections::BTreeMap;
use std::fmt;

use super::matmul::Matmul;
use super::occupancy::{Features, KernelShape};
use super::tile::{FRAGMENT, MetalTile, QueryHome};
use crate::{Dtype, Problem, Tier};

/// Values of some fields of a tile, such as `keys=32,staged=false`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TilePattern(Vec<(&'static str, String)>);

impl TilePattern {
    /// All fields of `candidate` by which tiles for one call differ.
    #[must_use]
    pub fn of(candidate: &Candidate) -> Self {
        let Candidate { tile: MetalTile { simdgroups, row_fragments, keys, staged, value_chunk, query }, matmul } =
            *candidate;
        let number = |name, value: usize| (name, value.to_string());
        let mut fields = vec![
            number("simdgroups", simdgroups),
            number("row_fragments", row_fragments),
            number("keys", keys),
            ("staged", switch(staged).to_owned()),
            number("value_chunk", value_chunk),
            ("query", query.name().to_owned()),
        ];
        fields.extend(matmul.map(|matmul| ("in_step", switch(matmul.keep_step).to_owned())));
        Self(fields)
    }

    /// Reads `name=value` pairs separated by commas; `None` for a name or a value that no tile has, and for a name that
    /// comes twice.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut fields: Vec<(&'static str, String)> = Vec::new();
        for pair in text.split(',') {
            let (name, value) = pair.split_once('=')?;
            let field = parse_field(name.trim(), value.trim())?;
            if fields.iter().any(|(name, _)| *name == field.0) {
                return None;
            }
            fields.push(field);
        }
        Some(Self(fields))
    }

    /// Names and values.
    pub fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// Whether `candidate` has these values.
    #[must_use]
    pub fn matches(&self, candidate: &Candidate) -> bool {
        let all = Self::of(candidate);
        self.0.iter().all(|field| all.0.contains(field))
    }
}

impl fmt::Display for TilePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<String> = self.fields().map(|(name, value)| format!("{name}={value}")).collect();
        f.write_str(&pairs.join(","))
    }
}

fn parse_field(name: &str, value: &str) -> Option<(&'static str, String)> {
    let name = ["simdgroups", "row_fragments", "keys", "staged", "value_chunk", "query", "in_step"]
        .into_iter()
        .find(|known| *known == name)?;
    let value = match name {
        "staged" | "in_step" => switch(crate::settings::parse_bool(value)?).to_owned(),
        "query" => QueryHome::ALL.into_iter().find(|home| home.name() == value)?.name().to_owned(),
        _ => value.parse().ok().filter(|&number: &usize| number > 0)?.to_string(),
    };
    Some((name, value))
}

const fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// The values that `tiles` have, field by field, in words.
fn offered(tiles: &[Candidate]) -> String {
    let mut fields: Vec<(&'static str, Vec<String>)> = Vec::new();
    for (name, value) in tiles.iter().flat_map(|tile| TilePattern::of(tile).0) {
        match fields.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) if values.contains(&value) => {}
            Some((_, values)) => values.push(value),
            None => fields.push((name, vec![value])),
        }
    }
    let mut texts: Vec<String> = Vec::new();
    for (name, mut values) in fields {
        values.sort_by_key(|value| (value.parse::<usize>().unwrap_or(0), value.clone()));
        texts.push(format!("{name} {}", values.join(", ")));
    }
    texts.join("; ")
}

/// The calls that share a tuned tile. How long sequences are does not belong to it: see [`TunedTiles`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TuningKey {
    /// Whose tile it is.
    pub tier: Tier,
    /// Element type.
    pub dtype: Dtype,
    /// Columns of Q and K, in whole fragments.
    pub head_dim: usize,
    /// Columns of V and O, in whole fragments.
    pub value_dim: usize,
    /// What else takes registers.
    pub features: Features,
}

impl TuningKey {
    /// The key of `problem`.
    #[must_use]
    pub fn of(tier: Tier, problem: &Problem) -> Self {
        let KernelShape { dtype, head_dim, value_dim, features, .. } = KernelShape::of(problem, false);
        let [head_dim, value_dim] = [head_dim, value_dim].map(|dim| dim.next_multiple_of(FRAGMENT));
        Self { tier, dtype, head_dim, value_dim, features }
    }
}

/// The name under which a record keeps the tile.
impl fmt::Display for TuningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tier, dtype, head_dim, value_dim, features } = self;
        write!(f, "{tier} {dtype} {head_dim}/{value_dim}")?;
        let Features { masked, softcap, alibi, bias, dropout } = *features;
        let names = [("masked", masked), ("softcap", softcap), ("alibi", alibi), ("bias", bias), ("dropout", dropout)];
        for (name, on) in names {
            if on {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}

/// The tiles that were measured to be the best ones on a machine, by the name of their [`TuningKey`].
///
/// They were measured on sequences long enough to fill the GPU. A call that they would leave with idle cores, idle
/// simdgroups or rows that are filled up gets the planner's own tile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunedTiles(BTreeMap<String, Record>);

/// A tile, or the text of a record that is none.
pub(super) type Record = Result<TilePattern, String>;

impl TunedTiles {
    /// Nothing was measured.
    pub const NONE: &Self = &Self(BTreeMap::new());

    /// Records by name, each with the text that a [`TilePattern`] prints.
    pub fn new(records: impl IntoIterator<Item = (String, String)>) -> Self {
        let read = |text: String| TilePattern::parse(&text).ok_or(text);
        Self(records.into_iter().map(|(name, text)| (name, read(text))).collect())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn get(&self, key: &TuningKey) -> Option<&Record> {
        // Most machines have none, and a name takes longer than that.
        if self.is_empty() { None } else { self.0.get(&key.to_string()) }
    }
}

/// Where a tile comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileSource {
    /// The planner's criteria.
    Default,
    /// A measurement on this machine.
    Tuned,
    /// `MTLFLASHATTN_TILE`.
    Forced,
}

impl TileSource {
    /// Name for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Tuned => "tuned",
            Self::Forced => "forced",
        }
    }
}

/// A tile that could serve, with all that its kernel depends on beside the problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The tile.
    pub tile: MetalTile,
    /// How its products are made, for the tensorops tiers.
    pub matmul: Option<Matmul>,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tile, matmul } = self;
        tile.fmt(f)?;
        matmul.map_or(Ok(()), |matmul| write!(f, "; {matmul}"))
    }
}

/// A tile and how it came to be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileChoice {
    /// The tile.
    pub candidate: Candidate,
    /// Where it comes from.
    pub source: TileSource,
    /// Why a tuned tile was ignored, if there is one.
    pub ignored: Option<String>,
}

impl TileChoice {
    /// Chooses among `tiles`, of which there is at least one; the first is the planner's own choice. The `wanted` fields
    /// come before the `tuned` tile, and that one comes before the planner's unless `objection` says what the planner's
    /// has at the sizes of the problem and the tuned one lacks.
    ///
    /// # Errors
    /// The values that tiles have, in words, when none is what is `wanted`.
    pub(super) fn new(
        tiles: &[Candidate],
        wanted: Option<&TilePattern>,
        tuned: Option<&Record>,
        objection: impl FnOnce(&Candidate) -> Option<&'static str>,
    ) -> Result<Self, String> {
        let find = |pattern: &TilePattern| tiles.iter().find(|tile| pattern.matches(tile));
        if let Some(wanted) = wanted {
            let &candidate = find(wanted).ok_or_else(|| offered(tiles))?;
            return Ok(Self { candidate, source: TileSource::Forced, ignored: None });
        }
        let ignored = match tuned {
            None => None,
            Some(Err(text)) => Some(format!("its record {text:?} is none of this version")),
            Some(Ok(pattern)) => match find(pattern) {
                None => Some(format!("{pattern} is no candidate of this version")),
                Some(candidate) => match objection(candidate) {
                    None => return Ok(Self { candidate: *candidate, source: TileSource::Tuned, ignored: None }),
                    Some(words) => Some(format!("{candidate}; at these sizes the default has {words}")),
                },
            },
        };
        let ignored = ignored.map(|reason| format!("the tuned tile is ignored: {reason}"));
        Ok(Self { candidate: tiles[0], source: TileSource::Default, ignored })
    }
}

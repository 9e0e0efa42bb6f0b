//! Tiles that a record of measurements or the user chooses.

use super::*;

fn tiles_on_m1(problem: &Problem) -> Vec<Candidate> {
    planner(Device::Metal(M1), &Settings::default()).candidates(problem, Tier::Simdgroup).unwrap()
}

/// A long problem on an M1 whose record of tuned tiles says `text`.
fn choice_with_record(problem: &Problem, text: &str) -> TileChoice {
    let settings = Settings::DEFAULT;
    let name = TuningKey::of(Tier::Simdgroup, problem).to_string();
    let tuned = TunedTiles::new([(name, text.to_owned()), ("simdgroup float16 8/8".into(), "keys=8".into())]);
    let planner = Planner { tuned: &tuned, ..Planner::new(Device::Metal(M1), &settings) };
    let choice = planner.tile_choice(problem, Tier::Simdgroup).unwrap();
    assert_eq!(planner.serve(problem, Tier::Simdgroup).unwrap().metal, Some(choice.candidate.tile));
    choice
}

#[test]
fn a_tuned_tile_takes_the_place_of_the_default() {
    let problem = prefill();
    let tiles = tiles_on_m1(&problem);
    for tile in &tiles[1..] {
        let choice = choice_with_record(&problem, &TilePattern::of(tile).to_string());
        let expected = TileChoice { candidate: *tile, source: TileSource::Tuned, ignored: None };
        if choice.source == TileSource::Tuned {
            assert_eq!(choice, expected);
        } else {
            assert_eq!(choice.candidate, tiles[0]);
            assert!(choice.ignored.unwrap().contains("at these sizes the default has "));
        }
    }
    let second = choice_with_record(&problem, &TilePattern::of(&tiles[1]).to_string());
    assert_eq!((second.candidate, second.source), (tiles[1], TileSource::Tuned));
}

#[test]
fn a_record_that_is_no_tile_of_this_problem_is_ignored_with_a_reason() {
    let problem = prefill();
    let default = tiles_on_m1(&problem)[0];
    for (text, reason) in [
        ("keys=64", "the tuned tile is ignored: keys=64 is no candidate of this version"),
        ("cores=8", "the tuned tile is ignored: its record \"cores=8\" is none of this version"),
        ("", "the tuned tile is ignored: its record \"\" is none of this version"),
        ("value_chunk=8", "the tuned tile is ignored: value_chunk=8 is no candidate of this version"),
    ] {
        let choice = choice_with_record(&problem, text);
        let ignored = Some(reason.to_owned());
        assert_eq!(choice, TileChoice { candidate: default, source: TileSource::Default, ignored });
    }
}

#[test]
fn a_tile_tuned_for_long_sequences_is_not_forced_on_short_ones() {
    let long = problem([1, 8192, 8, 64], [8192, 8], false);
    let tile = tiles_on_m1(&long)[0];
    let text = TilePattern::of(&tile).to_string();
    assert_eq!(choice_with_record(&long, &text).source, TileSource::Tuned);
    let decode = problem([1, 1, 8, 64], [8192, 8], false);
    let choice = choice_with_record(&decode, &text);
    assert_eq!((choice.candidate.tile.simdgroups, choice.source), (1, TileSource::Default));
    let reason = choice.ignored.unwrap();
    assert!(reason.contains("at these sizes the default has "), "{reason}");
    // The record of another dtype, head dimension or feature is nobody else's.
    let masked = problem([1, 8192, 8, 64], [8192, 8], true);
    let half = Problem { dtype: Dtype::F16, ..long };
    let names = [long, masked, half].map(|problem| TuningKey::of(Tier::Simdgroup, &problem).to_string());
    assert_eq!(names, ["simdgroup float32 64/64", "simdgroup float32 64/64 masked", "simdgroup float16 64/64"]);
    let narrow = Problem { head_dim: 57, ..long };
    assert_eq!(TuningKey::of(Tier::Simdgroup, &narrow).to_string(), names[0]);
}

#[test]
fn a_forced_tile_serves_or_the_error_names_those_that_would() {
    let with_tile = |text: &str| {
        let tile = TilePattern::parse(text);
        assert!(tile.is_some(), "{text}");
        Settings { tile, ..Settings::DEFAULT }
    };
    let problem = prefill();
    let settings = with_tile("keys=8,simdgroups=2");
    let planner_of_gpu = planner(Device::Metal(M1), &settings);
    let choice = planner_of_gpu.tile_choice(&problem, Tier::Simdgroup).unwrap();
    assert_eq!(
        (choice.candidate.tile.keys, choice.candidate.tile.simdgroups, choice.source),
        (8, 2, TileSource::Forced)
    );
    assert_eq!(planner_of_gpu.plan(&problem).unwrap().metal, Some(choice.candidate.tile));
    let settings = with_tile("keys=64");
    let error = planner(Device::Metal(M1), &settings).plan(&problem).unwrap_err().to_string();
    assert_eq!(
        error,
        "MTLFLASHATTN_TILE: keys=64 for this call is not supported; unset the variable, or ask for what tiles for this \
         call have: simdgroups 1, 2, 4, 8; row_fragments 1, 2; keys 8, 16, 32; staged off, on; value_chunk 64; query \
         device, registers, threadgroup"
    );
    // A device without tiles takes no notice, and a tier that is forced says what it lacks.
    assert_eq!(planner(CPU, &settings).plan(&problem).unwrap().tier, Tier::Cpu);
    let forced_tier = Settings { kernel: forced("v1").kernel, ..settings };
    let error = planner(Device::Metal(M1), &forced_tier).plan(&problem).unwrap_err().to_string();
    assert!(error.contains("v1 for this call (simdgroup: MTLFLASHATTN_TILE is keys=64; tiles "), "{error}");
}

proptest! {
    #[test]
    fn patterns_are_read_back(index in 0..42usize, drop in 0..6usize) {
        let tiles = tiles_on_m1(&prefill());
        let tile = tiles[index % tiles.len()];
        let all = TilePattern::of(&tile);
        prop_assert_eq!(TilePattern::parse(&all.to_string()), Some(all.clone()));
        prop_assert_eq!(tiles.iter().filter(|other| all.matches(other)).count(), 1);
        let some: Vec<String> =
            all.fields().enumerate().filter(|&(i, _)| i != drop).map(|(_, (name, value))| format!("{name}={value}")).collect();
        prop_assert!(TilePattern::parse(&some.join(" , ")).unwrap().matches(&tile));
    }

    #[test]
    fn no_record_ever_makes_a_tile_that_is_no_candidate(text in "[a-z_=,0-9]{0,40}", len in 1..3000i64) {
        let problem = problem([1, len, 2, 64], [len, 2], false);
        let choice = choice_with_record(&problem, &text);
        prop_assert!(tiles_on_m1(&problem).contains(&choice.candidate));
    }
}

#[test]
fn tiles_of_the_tensorops_tiers_can_be_tuned_and_forced() {
    let chip = Chip::from_name("m5-max");
    let gpu = Gpu { chip, cores: 40, macos: Version::new(26, 2), torch: None };
    let problem = Problem { dtype: Dtype::F16, ..contiguous(64, [4096, 4096]) };
    let settings = Settings::DEFAULT;
    let plain = planner(Device::Metal(gpu), &settings);
    for tier in [Tier::Tensorops, Tier::TensoropsStaged] {
        let tiles = plain.candidates(&problem, tier).unwrap();
        let default = plain.serve(&problem, tier).unwrap();
        assert_eq!((default.metal, default.matmul), (Some(tiles[0].tile), tiles[0].matmul));
        for tile in &tiles {
            let all = TilePattern::of(tile);
            assert_eq!(tiles.iter().filter(|other| all.matches(other)).count(), 1, "{tile}");
            let tuned = TunedTiles::new([(TuningKey::of(tier, &problem).to_string(), all.to_string())]);
            let choice = Planner { tuned: &tuned, ..plain }.tile_choice(&problem, tier).unwrap();
            assert_eq!((choice.candidate, choice.source), (*tile, TileSource::Tuned));
        }
        assert!(tiles.len() >= 4, "{tier}: {}", tiles.len());
    }
    let settings = Settings { tile: TilePattern::parse("in_step=off,keys=16"), ..Settings::DEFAULT };
    let plan = planner(Device::Metal(gpu), &settings).plan(&problem).unwrap();
    assert_eq!((plan.tier, plan.metal.unwrap().keys, plan.matmul.unwrap().keep_step), (Tier::Tensorops, 16, false));
    // Only the simdgroup tier has tiles of 8 keys.
    let settings = Settings { tile: TilePattern::parse("keys=8"), ..Settings::DEFAULT };
    assert_eq!(planner(Device::Metal(gpu), &settings).plan(&problem).unwrap().tier, Tier::Simdgroup);
}

//! What is written comes back; what cannot be used is replaced; writers at once lose nothing.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use mtlflashattn_cache::{
    Cache, Error, Fields, Fingerprint, MAX_VERDICTS, Machine, Outcome, Record, TunedTile, VERSION, Variant, Verdict,
};

fn machine(os: &str) -> Machine {
    Machine { gpu: "Apple M1, 8 cores".into(), os: os.into(), torch: "2.15.0".into(), package: "1.0.0".into() }
}

fn verdict(checked_at: u64) -> Verdict {
    Verdict {
        variant: Variant {
            tier: "simdgroup".into(),
            dtype: "float16".into(),
            head_dim: Some(64),
            value_dim: None,
            tile: "4 simdgroups".into(),
            features: vec!["window_right".into(), "lse".into()],
        },
        fingerprint: Fingerprint::of(["text"]),
        outcome: Outcome::Failed("off by \"2\" times\n\u{1F4A5}".into()),
        max_threads_per_threadgroup: Some(576),
        launches: 3,
        compile_micros: u64::MAX,
        probe_micros: 1500,
        checked_at,
    }
}

fn tuned() -> TunedTile {
    let fields = [("keys".to_owned(), 32.into()), ("staged".to_owned(), true.into())];
    let tile = fields.into_iter().collect::<Fields>();
    TunedTile { tile, cost: 10, default_cost: 12, unit: "nanoseconds".into(), tuned_at: 7 }
}

/// Everything that a record can hold.
fn full() -> Record {
    let proved = Verdict { outcome: Outcome::Proved, max_threads_per_threadgroup: None, ..verdict(2) };
    Record {
        verdicts: [("one".to_owned(), verdict(1)), ("two".to_owned(), proved)].into(),
        tiles: [("kind".to_owned(), tuned())].into(),
    }
}

fn stored(folder: &Path) -> Cache {
    let cache = Cache::new(folder, machine("macOS 26.2"));
    cache.update(|record| *record = full()).unwrap();
    cache
}

#[test]
fn what_is_written_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let cache = stored(&folder.path().join("made").join("on demand"));
    assert_eq!(cache.load().unwrap(), full());
    let after = cache.update(|record| drop(record.verdicts.remove("one"))).unwrap();
    assert_eq!(after, Record { verdicts: [("two".to_owned(), full().verdicts["two"].clone())].into(), ..full() });
    assert_eq!(cache.load().unwrap(), after);
    // Nothing is left of the temporary files.
    let files = fs::read_dir(cache.path().parent().unwrap()).unwrap().count();
    assert_eq!(files, 2, "the record and the lock");
}

#[test]
fn machines_do_not_share() {
    let folder = tempfile::tempdir().unwrap();
    let cache = stored(folder.path());
    let other = Cache::new(folder.path(), machine("macOS 26.3"));
    assert_eq!(other.load().unwrap(), Record::default());
    other.update(|_| ()).unwrap();
    assert_eq!(cache.load().unwrap(), full());
}

#[test]
fn first_uses_cost_what_their_parts_cost() {
    let mut record = full();
    // One of them is longer than a count of microseconds holds; the sum is no overflow.
    assert!(record.first_use_cost() >= Duration::from_micros(u64::MAX));
    for verdict in record.verdicts.values_mut() {
        verdict.compile_micros = 500;
    }
    assert_eq!(record.first_use_cost(), Duration::from_millis(4));
}

#[test]
fn an_edited_kernel_has_no_verdict_until_its_own_takes_the_place_of_the_old_one() {
    let mut record = Record::default();
    let old = verdict(1);
    record.insert(old.clone());
    assert_eq!(record.verdict(&old.variant, &old.fingerprint), Some(&old));
    let edited = Verdict { fingerprint: Fingerprint::of(["edited"]), ..verdict(2) };
    assert_eq!(record.verdict(&edited.variant, &edited.fingerprint), None);
    record.insert(edited.clone());
    assert_eq!(record.verdicts.len(), 1);
    assert_eq!(record.verdict(&edited.variant, &edited.fingerprint), Some(&edited));
    let words: Vec<&str> = record.verdicts.keys().map(String::as_str).collect();
    assert_eq!(words, ["simdgroup float16 64/any [window_right, lse] 4 simdgroups"]);
}

#[test]
fn fingerprints_keep_parts_apart() {
    assert_eq!(Fingerprint::of(["ab", "c"]), Fingerprint::of(["ab", "c"]));
    assert_ne!(Fingerprint::of(["ab", "c"]), Fingerprint::of(["a", "bc"]));
    assert_ne!(Fingerprint::of(["ab"]), Fingerprint::of(["ab", ""]));
}

/// Puts `bytes` in the place of the file, whose error must match, and which the next update must replace.
fn check_unusable(bytes: &[u8], is_expected: impl Fn(&Error) -> bool) {
    let folder = tempfile::tempdir().unwrap();
    let cache = stored(folder.path());
    fs::write(cache.path(), bytes).unwrap();
    let error = cache.load().unwrap_err();
    assert!(is_expected(&error), "{error}");
    assert!(error.to_string().contains(&cache.path().display().to_string()), "{error}");
    let record = cache.update(|record| drop(record.tiles.insert("new".into(), tuned()))).unwrap();
    assert_eq!(record.tiles.keys().collect::<Vec<_>>(), ["new"]);
    assert_eq!(cache.load().unwrap(), record);
}

#[test]
fn damaged_files_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(stored(folder.path()).path()).unwrap();
    let is_damaged = |error: &Error| matches!(error, Error::Damaged { .. });
    // Cut off anywhere but before the line break at the end.
    for len in (0..text.trim_end().len()).step_by(97) {
        check_unusable(&text.as_bytes()[..len], is_damaged);
    }
    for foreign in ["null", "[]", "{}", "\u{0}\u{0}\u{0}", "not JSON", r#"{"program": "other", "format": 1}"#] {
        check_unusable(foreign.as_bytes(), is_damaged);
    }
    check_unusable(&[0xFF; 64], is_damaged);
    check_unusable(text.replace("1500", "-1").as_bytes(), is_damaged);
    check_unusable(text.replace("\"failed\"", "\"maybe\"").as_bytes(), is_damaged);
}

#[test]
fn files_of_other_formats_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(stored(folder.path()).path()).unwrap();
    let format = format!("\"format\": {VERSION}");
    assert!(text.contains(&format));
    let future = text.replace(&format, "\"format\": 999, \"new\": []").replace("\"verdicts\"", "\"renamed\"");
    check_unusable(future.as_bytes(), |error| matches!(error, Error::Format { found: 999, .. }));
    let copied = text.replace("macOS 26.2", "macOS 15.0");
    check_unusable(copied.as_bytes(), |error| matches!(error, Error::OtherMachine { .. }));
}

#[test]
fn what_cannot_be_read_or_written_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let below_a_file = Cache::new(&file.join("folder"), machine("macOS"));
    let a_folder = stored(&folder.path().join("other"));
    fs::remove_file(a_folder.path()).unwrap();
    fs::create_dir_all(a_folder.path().join("not empty")).unwrap();
    let mut refused = vec![below_a_file, a_folder];
    if cfg!(target_os = "linux") {
        // Nobody, not even root, makes files there.
        refused.push(Cache::new(Path::new("/proc/self"), machine("macOS")));
    }
    for cache in refused {
        let error = cache.update(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Io { action: "written", .. }), "{error}");
        assert!(error.to_string().contains("cannot be written"), "{error}");
    }
    assert_eq!(fs::read_to_string(file).unwrap(), "in the way");
}

#[test]
fn a_read_only_folder_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let cache = stored(folder.path());
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let updated = cache.update(|record| record.tiles.clear());
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Root may write in spite of the mode.
    let expected = if updated.is_err() { full() } else { Record { verdicts: full().verdicts, ..Record::default() } };
    assert_eq!(cache.load().unwrap(), expected);
}

#[test]
fn a_pipe_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path(), machine("macOS"));
    assert!(Command::new("mkfifo").arg(cache.path()).status().unwrap().success());
    assert!(matches!(cache.load(), Err(Error::Io { action: "read", .. })));
    cache.update(|_| ()).unwrap();
    assert_eq!(cache.load().unwrap(), Record::default());
}

#[test]
fn the_newest_verdicts_stay() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path(), machine("macOS"));
    let fill = |record: &mut Record| {
        record.verdicts = (0..MAX_VERDICTS as u64 + 3).map(|at| (format!("{at:05}"), verdict(at))).collect();
    };
    cache.update(fill).unwrap();
    let record = cache.load().unwrap();
    assert_eq!(record.verdicts.len(), MAX_VERDICTS);
    assert_eq!(record.verdicts.keys().next().unwrap(), "00003");
}

#[test]
fn a_lock_that_nobody_gives_back_delays_but_does_not_stop() {
    let folder = tempfile::tempdir().unwrap();
    let cache = stored(folder.path());
    let held = fs::File::open(folder.path().join("lock")).unwrap();
    held.lock().unwrap();
    let since = Instant::now();
    cache.update(|record| record.tiles.clear()).unwrap();
    assert!(since.elapsed() >= Duration::from_secs(1));
    assert!(cache.load().unwrap().tiles.is_empty());
}

const WRITER: &str = "MTLFLASHATTN_CACHE_TEST_WRITER";
const UPDATES: u64 = 12;

/// A process of its own where [`WRITER`] names it, and nothing in the test run itself.
#[test]
fn writer() {
    let Ok(job) = env::var(WRITER) else { return };
    let (name, folder) = job.split_once(' ').unwrap();
    let cache = Cache::new(Path::new(folder), machine("macOS"));
    for at in 0..UPDATES {
        cache.update(|record| drop(record.verdicts.insert(format!("{name} {at}"), verdict(at)))).unwrap();
    }
}

#[test]
fn writers_at_once_lose_nothing_and_readers_see_whole_files() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path(), machine("macOS"));
    let names = ["a", "b", "c"];
    let start = |name: &&str| {
        let job = format!("{name} {}", folder.path().display());
        Command::new(env::current_exe().unwrap()).args(["--exact", "writer"]).env(WRITER, job).spawn().unwrap()
    };
    let mut processes: Vec<_> = names.iter().map(start).collect();
    let mut seen = 0;
    while processes.iter_mut().any(|process| process.try_wait().unwrap().is_none()) {
        let len = cache.load().expect("a whole file").verdicts.len();
        assert!(len >= seen, "updates are never undone");
        seen = len;
        thread::sleep(Duration::from_millis(1));
    }
    for mut process in processes {
        assert!(process.wait().unwrap().success());
    }
    let record = cache.load().unwrap();
    let expected = names.len() as u64 * UPDATES;
    assert_eq!(record.verdicts.len() as u64, expected);
}

//! Every input that fuzzing found worth keeping, again: the functions of the fuzz targets without libFuzzer.

use std::{fs, path::Path};

#[path = "fuzz/src/lib.rs"]
mod fuzz;

fn replay(target: &str, run: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs: Vec<_> =
        fs::read_dir(&folder).expect("a corpus").map(|entry| entry.expect("an entry").path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    for input in inputs {
        // Only seen when the run fails.
        println!("{}", input.display());
        run(&fs::read(&input).expect("an input"));
    }
}

#[test]
fn accept() {
    // In real time: a failed login takes its half second.
    replay("accept", |data| fuzz::accept(data, |_| ()));
}

#[test]
fn startup() {
    replay("startup", fuzz::startup);
}

#[test]
fn frontend() {
    replay("frontend", fuzz::frontend);
}

#[test]
fn backend() {
    replay("backend", fuzz::backend);
}

#[test]
fn sasl() {
    replay("sasl", fuzz::sasl);
}

#[test]
fn signs() {
    replay("signs", fuzz::signs);
}

/// A target without a test here would never be replayed.
#[test]
fn every_target_is_replayed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let names = |folder: &str| {
        let mut names: Vec<_> = fs::read_dir(root.join(folder))
            .expect("a folder")
            .map(|entry| entry.expect("an entry").path().file_stem().expect("a name").to_owned())
            .collect();
        names.sort();
        names
    };
    let known = ["accept", "backend", "frontend", "sasl", "signs", "startup"];
    assert_eq!(names("fuzz_targets"), known);
    assert_eq!(names("corpus"), known);
}

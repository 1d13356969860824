//! The tests, benchmarks and the demo, run in L1 as root.

use std::process::ExitCode;

use theseus_tests::{bench, cases, demo, harness::lab, native, soak};

const USAGE: &str = "usage: l1-tests test [FILTER]... [--hardware BDF [--peer INTERFACE]] [--list]
       l1-tests bench native [vcpus | fences] | vectors
       l1-tests golden
       l1-tests soak [updates] [thousand] [matrix] [faults] [SEED]
       l1-tests bench | demo | soak   [--hardware BDF --peer INTERFACE]

--hardware BDF      use this device (bound to vfio-pci) instead of the lab's; what needs more devices, or a wire
                    where no peer is named, is skipped
--peer INTERFACE    the interface of this machine that is wired to it";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let Some(command) = words.next() else { return usage("which command?") };
    let (mut filters, mut rest) = (Vec::new(), Vec::new());
    let (mut hardware, mut peer) = (None, None);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--hardware" | "--peer" => {
                let Some(value) = words.next() else { return usage(&format!("{word} needs a value")) };
                if word == "--peer" { peer = Some(value) } else { hardware = Some(value) }
            }
            "-h" | "--help" => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            // Options of the test harness.
            option if option.starts_with('-') => rest.push(word),
            _ => filters.push(word),
        }
    }
    if let Some(bdf) = hardware
        && let Err(error) = lab::use_hardware(&bdf, peer.as_deref())
    {
        return usage(&error.to_string());
    }
    let outcome = match command.as_str() {
        "test" => match cases::run(&filters, &rest) {
            Ok(code) => return code,
            Err(e) => Err(e),
        },
        "bench" if filters == ["native"] => native::run(),
        "bench" if filters == ["native", "vcpus"] => native::run_vcpus(),
        "bench" if filters == ["native", "fences"] => native::run_fences(),
        "bench" if filters == ["vectors"] => bench::vectors(),
        "bench" => bench::run(),
        "demo" => demo::run(),
        "golden" => cases::rollback::golden(),
        "soak" => soak::run(&filters),
        "-h" | "--help" | "help" => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => return usage(&format!("unknown command '{other}'")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            eprintln!("{}", theseus_tests::harness::logs::tails());
            ExitCode::FAILURE
        }
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("error: {why}\n{USAGE}");
    ExitCode::from(2)
}

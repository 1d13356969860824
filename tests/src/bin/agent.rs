//! The guest agent. Started by the guest's init; see `theseus_tests::proto` for what it speaks.

fn main() -> std::process::ExitCode {
    // A test hands this file to the VMM as an update target: it must not act as an agent there.
    if std::env::args().len() > 1 {
        eprintln!("agent: takes no arguments");
        return std::process::ExitCode::from(2);
    }
    match theseus_tests::agent::run("/dev/ttyS0") {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("agent: /dev/ttyS0: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}

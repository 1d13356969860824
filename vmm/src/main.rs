//! `theseus`: see the README.

fn main() -> std::process::ExitCode {
    theseus_vmm::main()
}

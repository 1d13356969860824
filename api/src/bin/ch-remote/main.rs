//! `ch-remote`: talks to a running VMM. Success prints the answer; failure prints the numbered chain of causes.

mod report;

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use theseus_api::client::Client;
use theseus_api::types::{UpdateOutcome, UpdateReport, UpdateRequest};

/// Control a running theseus.
#[derive(Parser)]
#[command(name = "ch-remote", version)]
struct Cli {
    /// The API socket of the VMM
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Version, build and process id of the VMM
    Ping,
    /// Configuration and state of the VM
    Info,
    /// Counters of the devices
    Counters,
    /// Create a VM from a JSON configuration
    Create {
        /// The file, or - for standard input
        #[arg(default_value = "-", value_name = "FILE")]
        config: PathBuf,
    },
    /// Boot the VM that was created
    Boot,
    /// Pause the VM
    Pause,
    /// Resume the paused VM
    Resume,
    /// Reset the VM
    Reboot,
    /// Press the ACPI power button
    PowerButton,
    /// Send a non-maskable interrupt to the guest
    Nmi,
    /// Stop the VM; it can be booted again
    Shutdown,
    /// Delete the VM
    Delete,
    /// End the VMM
    ShutdownVmm,
    /// Replace the VMM under the running guest
    Update(UpdateArgs),
}

#[derive(Args)]
struct UpdateArgs {
    /// The new build, as the VMM sees it [default: the file the VMM was started from]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// SHA-256 that the new build must have
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// Only find out whether the update would go ahead
    #[arg(long)]
    dry_run: bool,
    /// Give up after this time and leave the guest as it is
    #[arg(long, value_name = "N")]
    deadline_ms: Option<u64>,
    /// Accept a lower version than the running one
    #[arg(long)]
    allow_downgrade: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            print_causes(e.chain().map(ToString::to_string));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let mut client = Client::new(&cli.api_socket)?;
    let response = match &cli.command {
        Command::Ping => client.get("vmm.ping"),
        Command::Info => client.get("vm.info"),
        Command::Counters => client.get("vm.counters"),
        Command::Create { config } => client.put("vm.create", Some(&read_config(config)?)),
        Command::Boot => client.put("vm.boot", None),
        Command::Pause => client.put("vm.pause", None),
        Command::Resume => client.put("vm.resume", None),
        Command::Reboot => client.put("vm.reboot", None),
        Command::PowerButton => client.put("vm.power-button", None),
        Command::Nmi => client.put("vm.nmi", None),
        Command::Shutdown => client.put("vm.shutdown", None),
        Command::Delete => client.put("vm.delete", None),
        Command::ShutdownVmm => client.put("vmm.shutdown", None),
        Command::Update(args) => client.put("vm.update", Some(&update_body(args)?)),
    }?;
    if !response.is_success() {
        if matches!(&cli.command, Command::Update(args) if args.json) {
            print_json(&response.body);
        }
        print_causes(response.causes());
        return Ok(ExitCode::FAILURE);
    }
    if let Command::Update(args) = &cli.command {
        let report: UpdateReport =
            response.json().with_context(|| format!("the report cannot be read: {}", response.body))?;
        return Ok(finish_update(&report, &response.body, args));
    }
    print_json(&response.body);
    Ok(ExitCode::SUCCESS)
}

fn read_config(path: &PathBuf) -> Result<String> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("the configuration on standard input cannot be read")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| format!("{}: the configuration cannot be read", path.display()))
}

fn update_body(args: &UpdateArgs) -> Result<String> {
    let UpdateArgs { binary, sha256, dry_run, deadline_ms, allow_downgrade, json: _ } = args;
    // The VMM has a working directory of its own.
    let binary = binary.as_ref().map(std::path::absolute).transpose().context("--binary: not a path")?;
    let request = UpdateRequest {
        binary,
        sha256: sha256.clone(),
        dry_run: *dry_run,
        deadline_ms: *deadline_ms,
        allow_downgrade: *allow_downgrade,
        ..Default::default()
    };
    Ok(serde_json::to_string(&request)?)
}

fn finish_update(report: &UpdateReport, body: &str, args: &UpdateArgs) -> ExitCode {
    if args.json {
        print_json(body);
    } else {
        print!("{}", report::table(report));
    }
    match report.outcome {
        UpdateOutcome::Updated | UpdateOutcome::Ready => ExitCode::SUCCESS,
        UpdateOutcome::RolledBack | UpdateOutcome::Refused => {
            print_causes(report.reasons.iter().cloned());
            ExitCode::FAILURE
        }
    }
}

fn print_json(body: &str) {
    match serde_json::from_str::<serde_json::Value>(body) {
        Ok(value) => println!("{value:#}"),
        Err(_) if body.is_empty() => {}
        Err(_) => println!("{body}"),
    }
}

fn print_causes(causes: impl IntoIterator<Item = String>) {
    eprintln!("Error:");
    for (i, cause) in causes.into_iter().enumerate() {
        eprintln!("  {i}: {cause}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn update_options_become_the_request() {
        let words = "ch-remote --api-socket /s update --binary /b --dry-run --deadline-ms 500 --allow-downgrade";
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        let Command::Update(args) = cli.command else { panic!("not an update") };
        let request: UpdateRequest = serde_json::from_str(&update_body(&args).unwrap()).unwrap();
        let expected = UpdateRequest {
            binary: Some("/b".into()),
            dry_run: true,
            deadline_ms: Some(500),
            allow_downgrade: true,
            ..Default::default()
        };
        assert_eq!(request, expected);
    }
}

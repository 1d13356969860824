//! `ch-remote`: talks to a running VMM. Success prints the answer; failure prints the numbered chain of causes.

mod patience;
mod report;

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use patience::Patience;
use theseus_api::ApiError;
use theseus_api::client::Client;
use theseus_api::types::foreign;
use theseus_api::types::{UpdateOutcome, UpdateReport, UpdateRequest};

/// Control a running theseus.
#[derive(Parser)]
#[command(name = "ch-remote", version)]
struct Cli {
    /// The API socket of the VMM; may stand behind the subcommand too
    #[arg(long, value_name = "PATH", global = true)]
    api_socket: Option<PathBuf>,
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

/// With the subcommands of Cloud Hypervisor's that are not there yet: whatever stands behind one of them, it is refused
/// by name.
fn command() -> clap::Command {
    let not_yet = foreign::ENDPOINTS.iter().map(|(name, _)| {
        let words = Arg::new("words").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        clap::Command::new(*name).hide(true).disable_help_flag(true).arg(words)
    });
    Cli::command().subcommands(not_yet)
}

fn main() -> ExitCode {
    let matches = command().get_matches();
    if let Some(why) = matches.subcommand_name().and_then(foreign::no_endpoint) {
        print_causes([why]);
        return ExitCode::FAILURE;
    }
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run(cli) {
        Ok(code) => code,
        Err(e) => {
            print_causes(ApiError::chain(500, e.as_ref()).causes);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let socket = cli.api_socket.context("--api-socket is missing: give the path that the VMM was started with")?;
    let mut client = Client::new(&socket)?;
    let (method, endpoint, body) = match &cli.command {
        Command::Ping => ("GET", "vmm.ping", None),
        Command::Info => ("GET", "vm.info", None),
        Command::Counters => ("GET", "vm.counters", None),
        Command::Create { config } => ("PUT", "vm.create", Some(read_config(config)?)),
        Command::Boot => ("PUT", "vm.boot", None),
        Command::Pause => ("PUT", "vm.pause", None),
        Command::Resume => ("PUT", "vm.resume", None),
        Command::Reboot => ("PUT", "vm.reboot", None),
        Command::PowerButton => ("PUT", "vm.power-button", None),
        Command::Nmi => ("PUT", "vm.nmi", None),
        Command::Shutdown => ("PUT", "vm.shutdown", None),
        Command::Delete => ("PUT", "vm.delete", None),
        Command::ShutdownVmm => ("PUT", "vmm.shutdown", None),
        Command::Update(args) => ("PUT", "vm.update", Some(update_body(args)?)),
    };
    let waiting = Patience::start();
    let response = client.request(method, endpoint, body.as_deref())?;
    drop(waiting);
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
        command().debug_assert();
    }

    #[test]
    fn the_socket_may_stand_on_either_side() {
        for words in
            ["ch-remote --api-socket /s ping", "ch-remote ping --api-socket /s", "ch-remote ping --api-socket=/s"]
        {
            let matches = command().try_get_matches_from(words.split(' ')).unwrap();
            assert_eq!(Cli::from_arg_matches(&matches).unwrap().api_socket, Some("/s".into()), "{words}");
        }
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

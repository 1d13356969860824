//! `ch-remote`: talks to a running VMM. Success prints the answer; failure prints the numbered chain of causes.

mod patience;
mod report;

use std::io::{Read, Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Arg, ArgMatches, Args, CommandFactory, FromArgMatches, Parser};
use patience::Patience;
use theseus_api::ApiError;
use theseus_api::client::Client;
use theseus_api::endpoint::{ENDPOINTS, Endpoint, NOT_YET, not_yet};
use theseus_api::types::{UpdateOutcome, UpdateReport, UpdateRequest};

/// Control a running theseus.
#[derive(Parser)]
#[command(name = "ch-remote", version, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// The API socket of the VMM; may stand behind the subcommand too
    #[arg(long, value_name = "PATH", global = true)]
    api_socket: Option<PathBuf>,
}

#[derive(Args)]
struct CreateArgs {
    /// The file, or - for standard input
    #[arg(default_value = "-", value_name = "FILE")]
    config: PathBuf,
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

/// The subcommands that send a body: endpoint, arguments, and how they become the body.
type Sender = (&'static str, fn(clap::Command) -> clap::Command, fn(&ArgMatches) -> Result<String>);

const SENDERS: [Sender; 2] = [
    ("vm.create", CreateArgs::augment_args, |matches| read_config(&CreateArgs::from_arg_matches(matches)?.config)),
    (UPDATE, UpdateArgs::augment_args, |matches| update_body(&UpdateArgs::from_arg_matches(matches)?)),
];

/// Its answer is a report.
const UPDATE: &str = "vm.update";

fn sender(endpoint: &Endpoint) -> Option<&'static Sender> {
    SENDERS.iter().find(|(name, ..)| *name == endpoint.name)
}

/// With the subcommands of Cloud Hypervisor's that are not there yet: whatever stands behind one of them, it is refused
/// by name.
fn command() -> clap::Command {
    let here = ENDPOINTS.iter().filter_map(|endpoint| {
        let command = clap::Command::new(endpoint.command?).about(endpoint.about());
        Some(match sender(endpoint) {
            Some((_, arguments, _)) => arguments(command),
            None => command,
        })
    });
    let not_yet = NOT_YET.iter().map(|(name, _)| {
        let words = Arg::new("words").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        clap::Command::new(*name).hide(true).disable_help_flag(true).arg(words)
    });
    Cli::command().subcommands(here).subcommands(not_yet)
}

fn main() -> ExitCode {
    let matches = command().get_matches();
    if let Some(why) = matches.subcommand_name().and_then(not_yet) {
        print_causes([why]);
        return ExitCode::FAILURE;
    }
    match run(&matches) {
        Ok(code) => code,
        Err(e) => {
            print_causes(ApiError::chain(500, e.as_ref()).causes);
            ExitCode::FAILURE
        }
    }
}

/// The endpoint of the subcommand, and what stands behind it.
fn chosen(matches: &ArgMatches) -> Option<(&'static Endpoint, &ArgMatches)> {
    let (command, arguments) = matches.subcommand()?;
    let endpoint = ENDPOINTS.iter().find(|endpoint| endpoint.command == Some(command))?;
    Some((endpoint, arguments))
}

fn run(matches: &ArgMatches) -> Result<ExitCode> {
    let socket = Cli::from_arg_matches(matches)?.api_socket;
    let socket = socket.context("--api-socket is missing: give the path that the VMM was started with")?;
    let (endpoint, arguments) = chosen(matches).context("no subcommand was given: see --help")?;
    let mut client = Client::new(&socket)?;
    let body = sender(endpoint).map(|(.., body)| body(arguments)).transpose()?;
    let update = if endpoint.name == UPDATE { Some(UpdateArgs::from_arg_matches(arguments)?) } else { None };
    let waiting = Patience::start();
    let response = client.request(endpoint.method.name(), endpoint.name, body.as_deref())?;
    drop(waiting);
    if !response.is_success() {
        if update.is_some_and(|args| args.json) {
            print_json(&response.body);
        }
        print_causes(response.causes());
        return Ok(ExitCode::FAILURE);
    }
    if let Some(args) = update {
        let report: UpdateReport =
            response.json().with_context(|| format!("the report cannot be read: {}", response.body))?;
        return Ok(finish_update(&report, &response.body, &args));
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
        tell(stdout(), &report::table(report));
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
        Ok(value) => tell(stdout(), &format!("{value:#}\n")),
        Err(_) if body.is_empty() => {}
        Err(_) => tell(stdout(), &format!("{body}\n")),
    }
}

fn print_causes(causes: impl IntoIterator<Item = String>) {
    let causes: String = causes.into_iter().enumerate().map(|(i, cause)| format!("  {i}: {cause}\n")).collect();
    tell(stderr(), &format!("Error:\n{causes}"));
}

/// The exit status says how it went, to whoever reads nothing, too: `println!` would panic where nobody listens.
fn tell(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

#[cfg(test)]
mod tests {
    use super::*;
    use theseus_api::endpoint::BodyRule;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn what_takes_a_body_can_be_sent_one() {
        for endpoint in ENDPOINTS.iter().filter(|endpoint| endpoint.command.is_some()) {
            assert_eq!(sender(endpoint).is_some(), endpoint.body != BodyRule::None, "{}", endpoint.name);
        }
        assert!(SENDERS.iter().all(|(name, ..)| ENDPOINTS.iter().any(|endpoint| endpoint.name == *name)));
    }

    #[test]
    fn the_socket_may_stand_on_either_side() {
        for words in
            ["ch-remote --api-socket /s ping", "ch-remote ping --api-socket /s", "ch-remote ping --api-socket=/s"]
        {
            let matches = command().try_get_matches_from(words.split(' ')).unwrap();
            assert_eq!(Cli::from_arg_matches(&matches).unwrap().api_socket, Some("/s".into()), "{words}");
            assert_eq!(chosen(&matches).unwrap().0.name, "vmm.ping", "{words}");
        }
    }

    #[test]
    fn update_options_become_the_request() {
        let words = "ch-remote --api-socket /s update --binary /b --dry-run --deadline-ms 500 --allow-downgrade";
        let matches = command().try_get_matches_from(words.split(' ')).unwrap();
        let (endpoint, arguments) = chosen(&matches).unwrap();
        assert_eq!(endpoint.name, UPDATE);
        let (.., body) = sender(endpoint).unwrap();
        let request: UpdateRequest = serde_json::from_str(&body(arguments).unwrap()).unwrap();
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

//! The binary against a server.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use serde_json::json;
use theseus_api::server::{Backend, ReplyTo, Server, bind};
use theseus_api::{ApiError, Body, Request};

struct Fake;

impl Backend for Fake {
    fn submit(&self, request: Request, reply: ReplyTo) {
        reply.send(match request {
            Request::Ping => Ok(Body::Json(json!({"version": "1"}))),
            Request::Create(config) => Ok(Body::Json(json!(config.cpus.boot_vcpus))),
            Request::Pause => Err(ApiError::conflict("the VM cannot be paused").because(["it does not run".into()])),
            Request::Update(update) => {
                let outcome = if update.dry_run { "ready" } else { "rolled_back" };
                let build = json!({"version": "0.1.0", "build_id": "aa"});
                let phases = json!([{"name": "prepare", "us": 1500}]);
                Ok(Body::Json(json!({"outcome": outcome, "from": build, "to": build, "pid": 7, "phases": phases,
                    "reasons": ["the new build did not come up"]})))
            }
            _ => Ok(Body::Empty),
        });
    }
}

fn run(socket: &std::path::Path, words: &str, input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ch-remote"))
        .arg("--api-socket")
        .arg(socket)
        .args(words.split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn commands() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let _server = Server::start(bind(&socket).unwrap(), vec![], Arc::new(Fake)).unwrap();
    let config = r#"{"cpus":{"boot_vcpus":3},"payload":{"kernel":"/k"}}"#;
    let file = dir.path().join("config.json");
    std::fs::write(&file, config).unwrap();

    let table = [
        ("ping", "", 0, "{\n  \"version\": \"1\"\n}\n", ""),
        ("boot", "", 0, "", ""),
        ("create -", config, 0, "3\n", ""),
        ("create", config, 0, "3\n", ""),
        (&format!("create {}", file.display()), "", 0, "3\n", ""),
        ("create -", "{}", 1, "", "  1: payload.kernel is missing"),
        (
            "create -",
            "{\"payload\":{\"kernel\":\"/k\"},}",
            1,
            "",
            "trailing comma at line 1 column 28: nothing follows the comma",
        ),
        (
            "add-disk path=/x,readonly=on",
            "",
            1,
            "",
            "Error:\n  0: add-disk is not supported by this build: pass a storage",
        ),
        ("resize --cpus 2 --memory 1G", "", 1, "", "  0: resize is not supported by this build: "),
        ("remove-device nic", "", 1, "", "  0: remove-device is not supported by this build: "),
        ("snapshot file:///x", "", 1, "", "  0: snapshot is not supported by this build: "),
        ("send-migration --help", "", 1, "", "  0: send-migration is not supported by this build: "),
        ("create /nowhere", "", 1, "", "  0: /nowhere: the configuration cannot be read\n  1: No such file"),
        ("pause", "", 1, "", "Error:\n  0: the VM cannot be paused\n  1: it does not run\n"),
        ("update --dry-run", "", 0, "ready: the update would go ahead", ""),
        ("update", "", 1, "  prepare  1 500 µs", "  0: the new build did not come up"),
        ("update --json", "", 1, "\"outcome\": \"rolled_back\"", "  0: the new build did not come up"),
        ("update --sha256 12", "", 1, "", "  1: sha256 is not 64 hex digits"),
    ];
    for (words, input, code, out, err) in table {
        let output = run(&socket, words, input);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words}: {stdout}{stderr}");
        assert!(stdout.contains(out) && (stdout.is_empty() == out.is_empty()), "{words}: {stdout}");
        assert!(stderr.contains(err) && (stderr.is_empty() == err.is_empty()), "{words}: {stderr}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_ch-remote")).arg("ping").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("--api-socket is missing"), "{output:?}");
    let long = dir.path().join("x".repeat(108));
    let output = run(&long, "ping", "");
    assert!(String::from_utf8_lossy(&output.stderr).contains("longer than that of a unix socket"), "{output:?}");
    let output = run(&dir.path().join("none"), "ping", "");
    assert!(String::from_utf8_lossy(&output.stderr).contains("is theseus running"), "{output:?}");
}

/// As in `ch-remote ping | head -1`: how it went is the exit status all the same.
#[test]
fn nobody_reads_its_answer() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let _server = Server::start(bind(&socket).unwrap(), vec![], Arc::new(Fake)).unwrap();
    for (words, code) in [("ping", 0), ("update --dry-run", 0), ("update", 1), ("pause", 1)] {
        let closed = || Stdio::from(std::io::pipe().unwrap().1);
        let mut command = Command::new(env!("CARGO_BIN_EXE_ch-remote"));
        let command = command.arg("--api-socket").arg(&socket).args(words.split(' '));
        let status = command.stdin(Stdio::null()).stdout(closed()).stderr(closed()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{words}");
    }
}

//! Bad input to the API: the documented status, a message, and the VM untouched.

use anyhow::{Context, Result, ensure};

use crate::harness::vm::Vm;

/// Method, endpoint, body, status, and a word that the message must hold.
type Row = (&'static str, &'static str, &'static str, u16, &'static str);

const WITH_GUEST: &[Row] = &[
    ("PUT", "vm.update", "not json", 400, ""),
    ("PUT", "vm.update", "{", 400, ""),
    ("PUT", "vm.update", "[]", 400, ""),
    ("PUT", "vm.update", "\"text\"", 400, ""),
    ("PUT", "vm.update", r#"{"binary":5}"#, 400, "binary"),
    ("PUT", "vm.update", r#"{"dry_run":"yes"}"#, 400, "dry_run"),
    ("PUT", "vm.update", r#"{"deadline_ms":-1}"#, 400, "deadline_ms"),
    ("PUT", "vm.update", r#"{"binary":"/x","colour":"red"}"#, 400, "colour"),
    ("PUT", "vm.update", r#"{"mode":"teleport"}"#, 400, "mode"),
    ("PUT", "vm.update", r#"{"sha256":"xyz"}"#, 400, "sha256"),
    ("PUT", "vm.update", r#"{"binary":"relative/path"}"#, 400, "absolute"),
    ("PUT", "vm.teleport", "{}", 404, "vm.teleport"),
    ("PUT", "", "", 404, ""),
    ("GET", "vm.update", "", 400, ""),
    ("DELETE", "vm.info", "", 400, ""),
    ("PUT", "vm.create", "{", 400, ""),
    ("PUT", "vm.create", r#"{"cpus":{"boot_vcpus":"two"},"payload":{"kernel":"/k"}}"#, 400, "boot_vcpus"),
    ("PUT", "vm.create", r#"{"cpus":{"boot_vcpus":0},"payload":{"kernel":"/k"}}"#, 400, "boot_vcpus"),
    ("PUT", "vm.create", r#"{"payload":{"kernel":"/k"},"colour":"red"}"#, 400, "colour"),
    // A guest runs: these states forbid the call.
    ("PUT", "vm.create", r#"{"payload":{"kernel":"/k"}}"#, 409, ""),
    ("PUT", "vm.boot", "", 409, ""),
    ("PUT", "vm.resume", "", 409, ""),
];

const WITHOUT_GUEST: &[Row] = &[
    ("GET", "vm.info", "", 404, ""),
    ("PUT", "vm.boot", "", 404, ""),
    ("PUT", "vm.pause", "", 404, ""),
    ("PUT", "vm.delete", "", 404, ""),
    ("PUT", "vm.power-button", "", 404, ""),
    ("PUT", "vm.create", "", 400, ""),
    ("PUT", "vm.create", r#"{"payload":{}}"#, 400, "kernel"),
    ("PUT", "vm.create", r#"{"payload":{"kernel":"/k"},"memory":{"size":1}}"#, 400, "memory"),
];

/// What `openapi.json` answers.
const DOCUMENT: &str = include_str!("../../../api/openapi.json");

fn run_table(vm: &Vm, rows: &[Row]) -> Result<()> {
    for (method, endpoint, body, status, word) in rows {
        let row = format!("{method} {endpoint} {body}");
        let answer = vm.api.connect()?.call(method, endpoint, body).with_context(|| row.clone())?;
        ensure!(answer.status == *status, "{row}: expected {status}: {answer:?}");
        let causes = answer.causes().with_context(|| row.clone())?.join(": ");
        ensure!(causes.contains(word), "{row}: no '{word}' in {causes:?}");
        ensure!(causes.len() > 8, "{row}: {causes:?} explains nothing");
    }
    Ok(())
}

/// Requests that are not even HTTP, or not whole, or too big.
fn broken_requests(vm: &Vm) -> Result<()> {
    let big = "x".repeat(5 << 20);
    let mut connection = vm.api.connect()?;
    // The VMM may close while we write: its answer is what counts.
    let _ = connection.send("PUT", "vm.create", &big);
    let answer = connection.receive().context("5 MiB body")?;
    ensure!(answer.status == 400 && answer.causes()?.join(" ").contains("4 MiB"), "{answer:?}");

    let mut connection = vm.api.connect()?;
    connection.send_raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not http\r\n\r\n")?;
    let answer = connection.receive().context("not HTTP")?;
    ensure!(answer.status == 400, "{answer:?}");

    // Half a request, left standing: others are served meanwhile; then it is dropped.
    let mut half = vm.api.connect()?;
    half.send_raw(b"PUT /api/v1/vm.shutdown HTTP/1.1\r\nHost: x\r\nContent-Le")?;
    let mut half_body = vm.api.connect()?;
    half_body.send_raw(b"PUT /api/v1/vm.update HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{\"binary\":")?;
    ensure!(vm.api.get("vmm.ping")?.ok(), "ping beside half a request");
    drop((half, half_body));

    // A client that asks and does not wait for the answer.
    for _ in 0..20 {
        vm.api.connect()?.send("GET", "vmm.ping", "")?;
    }
    ensure!(vm.api.get("vmm.ping")?.ok(), "ping after clients that hung up");
    Ok(())
}

pub(super) fn bad_input() -> Result<()> {
    let vm = Vm::builder().boot()?;
    let (info, ping) = (vm.info()?, vm.ping()?);
    run_table(&vm, WITH_GUEST)?;
    broken_requests(&vm)?;
    // Untouched: the same configuration and state, the same build, and a guest that answers.
    ensure!(vm.info()? == info, "vm.info changed: {info} -> {}", vm.info()?);
    ensure!(vm.ping()?.build_id == ping.build_id, "the build changed");
    vm.agent()?.ping()?;

    vm.api.order("vm.pause")?;
    ensure!(vm.state()? == "Paused", "{}", vm.info()?);
    let again = vm.api.put("vm.pause", "")?;
    ensure!(again.status == 409, "pause of a paused VM: {again:?}");
    vm.api.order("vm.resume")?;
    vm.agent()?.ping()
}

pub(super) fn bad_input_without_guest() -> Result<()> {
    let mut vm = Vm::api_only()?;
    run_table(&vm, WITHOUT_GUEST)?;
    let document = vm.api.get("openapi.json")?;
    ensure!(document.status == 200 && document.body == DOCUMENT, "{document:?}");
    broken_requests(&vm)?;
    vm.api.order("vmm.shutdown")?;
    let status = vm.wait_exit()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

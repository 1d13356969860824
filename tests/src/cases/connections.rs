//! API connections over an update.

use std::{thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::harness::{
    http::Connection,
    report::{Report, update_body},
    rig::{self, Rig},
    wait_for,
};

/// The caller is answered on its own connection by the new image; a connection that was idle lives; a half-sent request
/// does not stand in the way.
pub(super) fn kept() -> Result<()> {
    rig::shared(|rig| {
        let mut idle = rig.vm.api.connect()?;
        ensure!(idle.call("GET", "vmm.ping", "")?.ok(), "ping");
        let mut fresh = rig.vm.api.connect()?;
        let mut half = rig.vm.api.connect()?;
        half.send_raw(b"PUT /api/v1/vm.pause HTT")?;
        let before = rig.vm.ping()?;
        let mut caller = rig.vm.api.connect()?;
        let answer = caller.call("PUT", "vm.update", &update_body(&rig.vm.other_build()?))?;
        ensure!(answer.status == 200, "{answer:?}");
        rig.vm.check_updated(&before, &answer.json::<Report>()?)?;
        rig.vm.note_update();
        let build_of = |connection: &mut Connection| -> Result<String> {
            let ping: serde_json::Value = connection.call("GET", "vmm.ping", "")?.json()?;
            Ok(ping["build_id"].as_str().unwrap_or_default().to_string())
        };
        let now = rig.vm.ping()?.build_id;
        for (name, connection) in [("caller's", &mut caller), ("idle", &mut idle), ("fresh", &mut fresh)] {
            let build = build_of(connection)
                .map_err(|e| e.context(format!("the {name} connection did not live through the update")))?;
            ensure!(build == now, "the {name} connection is answered by {build}, not {now}");
        }
        ensure!(half.is_closed()?, "the half-sent request's connection was neither closed nor answered");
        ensure!(rig.vm.state()? == "Running", "{}", rig.vm.info()?);
        rig.agent()?.ping()
    })
}

/// Clients that hang up at several moments of the update they asked for: it takes place all the same.
pub(super) fn client_hangs_up() -> Result<()> {
    rig::shared(|rig| {
        let traffic = rig.traffic()?;
        for after_ms in [0, 5, 20, 60, 150, 400] {
            let mut caller = rig.vm.api.connect()?;
            caller.send("PUT", "vm.update", &update_body(&rig.vm.other_build()?))?;
            sleep(Duration::from_millis(after_ms));
            drop(caller);
            settle(rig).with_context(|| format!("after {after_ms} ms"))?;
        }
        // The next one, asked for properly, works.
        rig.vm.update()?;
        traffic.moves_on(rig.agent()?, 50)?;
        traffic.finish_clean(rig.agent()?)?;
        Ok(())
    })
}

/// Waits until the update has happened.
fn settle(rig: &mut Rig) -> Result<()> {
    let wanted = rig.vm.other_build()?;
    let wanted = build_id_of(&wanted)?;
    wait_for("an update whose caller hung up", || {
        Ok(rig.vm.ping().ok().filter(|ping| ping.build_id == wanted).map(|_| ()))
    })?;
    rig.vm.note_update();
    ensure!(rig.vm.is_running(), "the VMM ended");
    ensure!(rig.vm.state()? == "Running", "{}", rig.vm.info()?);
    rig.agent()?.ping()
}

/// What `theseus -V` prints holds the build id.
fn build_id_of(binary: &std::path::Path) -> Result<String> {
    let output = std::process::Command::new(binary).arg("-V").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let id = text.split(|c: char| !c.is_ascii_hexdigit()).rfind(|word| word.len() == 40).map(str::to_string);
    id.ok_or_else(|| anyhow::anyhow!("{} -V prints no build id: {text:?}", binary.display()))
}

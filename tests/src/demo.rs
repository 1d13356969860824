//! `l1-tests demo`: the main job, shown.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::harness::{
    clock,
    lab::{self, Nic},
    logs, proc,
    report::Report,
    rig::Rig,
    table::{Table, ms},
    traffic::RATE,
    vm::Vm,
};

const UPDATES: usize = 5;

fn short(build_id: &str) -> &str {
    build_id.get(..8).unwrap_or(build_id)
}

pub fn run() -> Result<()> {
    logs::begin("demo");
    let started = Instant::now();
    println!("Theseus boots a stock Debian kernel ({}) with a passed-through igb NIC ...", lab::kernel_version());
    let mut rig = Rig::boot(Vm::builder().cpus(2).memory("size=512M"), &[(Nic::IgbA, None)])?;
    let machine = rig.agent()?.machine()?;
    let ping = rig.vm.ping()?;
    println!(
        "  guest: Linux {}, {} CPUs, {} MiB, up after {:.1} s",
        machine.kernel,
        machine.cpus_online,
        machine.memory_kib / 1024,
        started.elapsed().as_secs_f64()
    );
    println!("  VMM:   theseus {} build {}, PID {}", ping.version, short(&ping.build_id), ping.pid);
    println!(
        "  NIC:   {} = {} of the host, {} in the guest\n",
        Nic::IgbA.bdf()?,
        rig.wires[0].peer,
        rig.wires[0].guest
    );
    println!(
        "Numbered packets go to the guest and others come back: {RATE} a second each way, or as many as this machine \
         carries."
    );

    let traffic = rig.traffic()?;
    traffic.moves_on(rig.agent()?, 500)?;
    println!("500 of each have come. Now {UPDATES} updates of the VMM under it:\n");
    let locked = rig.vm.settled_facts()?.locked_kib;
    let clock_before = clock::read(&rig.vm)?;
    let mut reports: Vec<Report> = Vec::new();
    let mut rows = Vec::new();
    for number in 1..=UPDATES {
        println!("  update {number} of {UPDATES} ...");
        let report = rig.vm.update()?;
        traffic.moves_on(rig.agent()?, 250)?;
        let error = clock::error_us(&clock_before, &clock::read(&rig.vm)?)?;
        let account = traffic.so_far(rig.agent()?)?.remove(0);
        rows.push(vec![
            number.to_string(),
            format!("{} -> {}", short(&report.from.build_id), short(&report.to.build_id)),
            report.pid.to_string(),
            ms(report.pause_us),
            account.to_guest.got.unique.to_string(),
            account.from_guest.got.unique.to_string(),
            format!("{error:+.1}"),
        ]);
        println!(
            "  update {number} of {UPDATES}: {} -> {}, the guest paused {} ms; {} packets to it and {} from it so far",
            short(&report.from.build_id),
            short(&report.to.build_id),
            ms(report.pause_us),
            account.to_guest.got.unique,
            account.from_guest.got.unique
        );
        reports.push(report);
    }
    let seconds = traffic.started().elapsed().as_secs_f64();
    let accounts = traffic.finish(rig.agent()?)?;
    let facts = rig.vm.settled_facts()?;

    let mut table = Table::new(["update", "build", "PID", "pause, ms", "packets in", "packets out", "clock error, us"]);
    for row in rows {
        table.row(row);
    }
    println!("\n{table}");

    println!("Where the time went, ms (prepare runs while the guest does):\n");
    println!("{}", per_update(&reports));

    let mut table =
        Table::new(["packets", "sent", "received", "lost", "twice", "reordered", "a second", "longest gap, ms"]);
    let mut clean = true;
    for account in &accounts {
        for (name, one) in [("to the guest", &account.to_guest), ("from the guest", &account.from_guest)] {
            clean &= one.is_clean();
            let got = &one.got;
            table.row([
                name.to_string(),
                one.sent.packets.to_string(),
                got.unique.to_string(),
                got.lost_of(one.sent.packets).to_string(),
                got.duplicated.to_string(),
                got.reordered.to_string(),
                format!("{:.0}", got.unique as f64 / seconds),
                ms(got.max_gap_us),
            ]);
        }
    }
    println!("{table}");
    let waits = accounts.iter().flat_map(|account| [account.to_guest.sent, account.from_guest.sent]);
    let longest_wait = waits.map(|sent| sent.longest_wait_us).max().unwrap_or(0);
    if longest_wait > 0 {
        println!(
            "A sender keeps {} packets ahead of its receiver at most; on this machine one has waited {} ms for that, \
             which is part of a gap.\n",
            rig.wires[0].window,
            ms(longest_wait)
        );
    }
    println!(
        "Process {}: {} descriptors, {} threads, {} children, {} MiB pinned for DMA.",
        rig.vm.pid(),
        facts.fd_count(),
        facts.thread_count(),
        proc::children(rig.vm.pid())?.len(),
        facts.locked_kib / 1024
    );
    println!("The lab is software emulation: times on hardware are about a tenth of these.");
    ensure!(clean, "packets were lost, doubled or reordered: {accounts:?}");
    ensure!(facts.locked_kib == locked, "pinned memory changed: {locked} -> {} KiB", facts.locked_kib);
    Ok(())
}

/// A row per phase, a column per update.
fn per_update(reports: &[Report]) -> Table {
    let mut head = vec!["phase".to_string()];
    head.extend((1..=reports.len()).map(|n| format!("update {n}")));
    let mut table = Table::new(head);
    let names: Vec<String> =
        reports.first().map(|r| r.phases.iter().map(|p| p.name.clone()).collect()).unwrap_or_default();
    for name in names {
        let times = reports.iter().map(|r| r.phases.iter().find(|p| p.name == name).map_or("-".into(), |p| ms(p.us)));
        table.row([name.clone()].into_iter().chain(times));
    }
    table
}

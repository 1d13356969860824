#!/usr/bin/env bash
# l2-initramfs.sh OUT AGENT_BINARY KERNEL_DIR: L2's initramfs: busybox, NIC and disk drivers, and the agent.
# The part without the agent is cached next to the kernel; OUT is rewritten only when something in it changed.
source "$(dirname "$0")/common.sh"
source "$LAB/kernel.sh"

[[ $# == 3 ]] || die "usage: l2-initramfs.sh OUT AGENT_BINARY KERNEL_DIR"
out=$1 agent=$2 kernel=$3
[[ -s $agent ]] || die "no agent binary at $agent: './dev test' builds it"
MODULES=(igb e1000e igbvf nvme button evdev virtio_pci virtio_net virtio_blk virtio_console)

hash=$(cat "$kernel/release" "$LAB/l2-init" "$LAB/kernel.sh" "$0" | sha256sum | cut -c1-16)
base=$kernel/l2-$hash.cpio
whole=$(sha256sum "$base" "$agent" 2>/dev/null | sha256sum || true)
if [[ -e $base && -e $out && $(cat "$out.sum" 2>/dev/null) == "$whole" ]]; then exit 0; fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if [[ ! -e $base ]]; then
    mkdir -p "$dir"/base/{bin,proc,sys,dev,run,tmp}
    cp "$(command -v busybox)" "$dir/base/bin/busybox"
    install -m 755 "$LAB/l2-init" "$dir/base/init"
    modules_into "$dir/base/modules" "$kernel" "${MODULES[@]}"
    pack_initramfs "$dir/base" "$base"
fi
# The kernel unpacks archives one after the other, so the agent is simply appended.
mkdir -p "$dir/agent"
install -m 755 "$agent" "$dir/agent/agent"
pack_initramfs "$dir/agent" "$dir/agent.cpio"
cat "$base" "$dir/agent.cpio" >"$out.$$"
mv "$out.$$" "$out"
sha256sum "$base" "$agent" | sha256sum >"$out.sum"

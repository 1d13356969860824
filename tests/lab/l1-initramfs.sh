#!/usr/bin/env bash
# l1-initramfs.sh KERNEL_DIR: builds L1's initramfs if the cached one is not current, and prints its path.
source "$(dirname "$0")/common.sh"
source "$LAB/kernel.sh"

kernel=$1
BASE=(kvm-amd vfio_iommu_type1 vfio-pci virtio_pci 9pnet_virtio 9p virtio_console tun)
# Loaded last, by l1-enter.sh, once the devices to pass through are marked.
NICS=(igb e1000e)

hash=$(cat "$kernel/release" "$LAB/l1-init" "$LAB/kernel.sh" "$0" | sha256sum | cut -c1-16)
image=$kernel/l1-$hash.cpio
if [[ ! -e $image ]]; then
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
    mkdir -p "$dir"/{bin,proc,sys,dev,host,lower}
    cp "$(command -v busybox)" "$dir/bin/busybox"
    install -m 755 "$LAB/l1-init" "$dir/init"
    modules_into "$dir/modules" "$kernel" "${BASE[@]}"
    mv "$dir/modules/order" "$dir/modules/base"
    modules_into "$dir/modules" "$kernel" "${NICS[@]}"
    mv "$dir/modules/order" "$dir/modules/nics"
    pack_initramfs "$dir" "$image"
fi
printf '%s\n' "$image"

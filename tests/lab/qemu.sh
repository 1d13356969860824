# The QEMU of the lab: Debian's source with qemu.patch, and no more than the lab needs of it. Sourced.
# shellcheck shell=bash

# In the cache, by what it is built from; about three minutes on two cores.
qemu_dir() { printf '%s/qemu-%s-%s\n' "$CACHE" "$(codename)" "$(cat "$LAB/qemu.patch" "$LAB/qemu.sh" | sha256sum | cut -c1-16)"; }
qemu_suite() { if [[ $(codename) == bookworm ]]; then echo bookworm-backports; else codename; fi; }

QEMU_DEVICES=(Q35 VTD PCIE_PORT IGB_PCI_EXPRESS E1000E_PCI_EXPRESS NVME_PCI SPDM_SOCKET VIRTIO_PCI VIRTIO_SERIAL VIRTIO_9P)

build_qemu() {
    local dir suite work
    dir=$(qemu_dir)
    [[ -x $dir/qemu-system-x86_64 ]] && return
    suite=$(qemu_suite)
    need_root_debian "the lab's QEMU is not in $CACHE"
    mkdir -p "$CACHE"
    exec {lock}>"$CACHE/lock"
    flock "$lock"
    if [[ ! -x $dir/qemu-system-x86_64 ]]; then
        note "building QEMU for the lab (about three minutes, once)"
        add_suite "$suite"
        apt_quiet update
        apt_quiet install --no-install-recommends "meson/$suite" ninja-build libglib2.0-dev pkg-config python3-venv patch
        work=$(mktemp -d)
        fetch_source qemu "$suite" "$work"
        tar xf "$work"/qemu_*.tar.* -C "$work" --strip-components=1
        if ! (cd "$work" && compile_qemu) >"$work/log" 2>&1 </dev/null; then
            tail -20 "$work/log" >&2
            die "QEMU does not build (its last lines are above; the rest: $work/log)"
        fi
        mkdir -p "$dir"
        strip -o "$dir/qemu.new" "$work/build/qemu-system-x86_64"
        mv "$dir/qemu.new" "$dir/qemu-system-x86_64"
        rm -rf "$work"
    fi
    exec {lock}>&-
}

# In the source's folder.
compile_qemu() {
    patch -p1 <"$LAB/qemu.patch" &&
        # Debian's source has no firmware in it, and no wheels: meson is its own package's, the test runner is not needed.
        echo 'roms = []' >pc-bios/meson.build &&
        sed -i '/^pycotap/d' pythondeps.toml &&
        printf 'CONFIG_%s=y\n' "${QEMU_DEVICES[@]}" >configs/devices/x86_64-softmmu/lab.mak &&
        mkdir build && cd build &&
        ../configure --python=/usr/bin/python3 --target-list=x86_64-softmmu --without-default-features \
            --without-default-devices --with-devices-x86_64=lab --enable-system --enable-tcg --enable-virtfs --enable-attr \
            --enable-trace-backends=nop --disable-qom-cast-debug --disable-download --disable-install-blobs --disable-docs --disable-tools --disable-guest-agent &&
        ninja qemu-system-x86_64
}

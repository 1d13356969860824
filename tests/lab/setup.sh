#!/usr/bin/env bash
# setup.sh [VERSION...|all]: installs what the lab lacks, builds its QEMU and fetches kernels (6.12 when none is named).
# setup.sh rust: only looks for the Rust toolchain.
# Does nothing, in well under a second, when all is there.
source "$(dirname "$0")/common.sh"
source "$LAB/apt.sh"
source "$LAB/kernel.sh"
source "$LAB/qemu.sh"

# The workspace says which Rust it needs; a distribution's own may be older.
check_rust() {
    local need have hint
    need=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml")
    hint="install Rust >= $need with clippy and rustfmt: 'apt-get install rustup && rustup default stable' on Debian 13, or rustup as its own site says"
    command -v cargo >/dev/null || [[ ! -x ${HOME:-/root}/.cargo/bin/cargo ]] || PATH=$PATH:${HOME:-/root}/.cargo/bin
    command -v cargo >/dev/null || die "cargo is missing: $hint"
    have=$(rustc --version | awk '{ print $2 }')
    cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 || die "cargo has no clippy or no fmt: $hint"
    [[ $(printf '%s\n' "$need" "${have%%-*}" | sort -V | head -1) == "$need" ]] || die "rustc $have is too old: $hint"
}

if [[ ${1:-} == rust ]]; then
    check_rust
    exit
fi
[[ $(uname -m) == x86_64 ]] || die "the lab runs on x86-64 hosts only (this is $(uname -m))"
kernels=("$@")
[[ $# -gt 0 ]] || kernels=("$DEFAULT_KERNEL")
[[ ${kernels[0]} != all ]] || kernels=("${ALL_KERNELS[@]}")

install_packages
[[ ${SKIP_QEMU:-} ]] || build_qemu
for version in "${kernels[@]}"; do fetch_kernel "$version"; done
[[ ${SKIP_RUST:-} ]] || check_rust

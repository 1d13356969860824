# Shared by every script of the lab: where things are, how errors are told. Sourced, never run.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
LAB=$ROOT/tests/lab
# Kernels and initramfs images are the same for every checkout on a machine, so the cache lies outside of the checkout.
CACHE=${THESEUS_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/theseus}
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
# The static triple of .cargo/config.toml: cargo puts binaries below it.
TRIPLE=x86_64-unknown-linux-gnu
OUT=$TARGET/lab
DEFAULT_KERNEL=6.12
ALL_KERNELS=(6.1 6.12 7)
# cron and minimal images leave the sbin folders out of PATH.
PATH=$PATH:/usr/sbin:/sbin

note() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# A folder of the cache per kernel: vmlinuz, lib/modules/<release>, release.
kernel_dir() { printf '%s/kernel-%s\n' "$CACHE" "$1"; }

# Makes the folder for the logs of a run, and prints it.
new_results() {
    local dir
    dir=$OUT/results/$(date +%Y%m%d-%H%M%S)-$$
    mkdir -p "$dir"
    ln -sfn "$(basename "$dir")" "$OUT/results/latest"
    # Logs of the last runs are of use, those of last month are not.
    find "$OUT/results" -mindepth 1 -maxdepth 1 -type d -printf '%T@ %p\n' | sort -rn | tail -n +21 | cut -d' ' -f2- | xargs -r rm -rf
    printf '%s\n' "$dir"
}

# The fuzz targets of fuzz/. Sourced.
# shellcheck shell=bash

FUZZ_TARGETS=(registers passthrough requests http arguments saved_state)

# Coverage of what is fuzzed is what only a nightly compiler compiles in.
prepare_fuzz() {
    cargo +nightly --version >/dev/null 2>&1 || {
        note "installing a nightly compiler"
        rustup toolchain install nightly --profile minimal || die "no nightly compiler: 'rustup toolchain install nightly'"
    }
    cargo fuzz --version >/dev/null 2>&1 || {
        note "compiling cargo-fuzz"
        cargo install --locked cargo-fuzz || die "no cargo-fuzz: 'cargo install cargo-fuzz'"
    }
}

# Without a sanitizer: what fails are Rust's own checks, and those of the targets. From what is kept in fuzz/corpus and what earlier runs have left in target/lab/fuzz, where this one's goes too. What
# takes too long or too much memory is a failure, as a panic is.
fuzz_one() { # TARGET SECONDS
    local target=$1 seconds=$2 found=$OUT/fuzz/$1
    local -a seeds=("$ROOT/fuzz/corpus/$target") options=(-max_len=4096 -dict="$ROOT/fuzz/words.dict")
    if [[ $target == saved_state ]]; then
        seeds+=("$ROOT/vmm/tests/golden")
        options=(-max_len=131072)
    fi
    mkdir -p "$found"
    # A console's sockets and the like: what a killed run has left goes with the folder.
    rm -rf "$OUT/fuzz/tmp" && mkdir -p "$OUT/fuzz/tmp"
    TMPDIR=$OUT/fuzz/tmp cargo +nightly fuzz run --fuzz-dir "$ROOT/fuzz" --sanitizer none --features libfuzzer "$target" "$found" "${seeds[@]}" -- \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -malloc_limit_mb=256 -print_final_stats=1 "${options[@]}"
}

#!/usr/bin/env bash
# stages.sh test|lint|unit|build|bench|demo|fuzz|soak [ARGS]: what './dev' runs. Every failure is counted and ends in a non-zero exit.
source "$(dirname "$0")/common.sh"
source "$LAB/build.sh"
source "$LAB/fuzz.sh"
[[ ! -d ${HOME:-/root}/.cargo/bin ]] || PATH=$PATH:${HOME:-/root}/.cargo/bin
cd "$ROOT"
export CARGO_TARGET_DIR=$TARGET CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

passed=0 failed=0
reasons=()
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Runs one check that either passes or fails as a whole.
check() { # NAME CMD...
    local name=$1 start=$SECONDS
    shift
    note "== $name"
    if "$@" </dev/null; then
        passed=$((passed + 1))
        note "== $name: ok ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "== $name: FAILED"
        return 1
    fi
}

# Runs CMD, whose tests report by 'test result: ... N passed; N failed' lines, and adds up what they say.
count() { # NAME CMD...
    local name=$1 start=$SECONDS code=0 good=0 bad=0 line
    shift
    note "== $name"
    "$@" </dev/null 2>&1 | tee "$log" || code=${PIPESTATUS[0]}
    while read -r line; do
        [[ $line =~ ^test\ result:.*\ ([0-9]+)\ passed\;\ ([0-9]+)\ failed ]] || continue
        good=$((good + BASH_REMATCH[1])) bad=$((bad + BASH_REMATCH[2]))
    done <"$log"
    # Once more at the end, where they are found: what the logs say besides fills pages.
    while read -r line; do reasons+=("${line:0:1000}"); done < <(grep -aoE 'FAILED [a-z0-9_]+: .*' "$log")
    # What fails without a failed test (does not build, dies, is ended) is a failure too, and so is a run without tests.
    if [[ $bad == 0 && ($code != 0 || $good == 0) ]]; then bad=1; fi
    passed=$((passed + good)) failed=$((failed + bad))
    note "== $name: $good passed, $bad failed, exit code $code ($((SECONDS - start)) s)"
    [[ $bad == 0 && $code == 0 ]]
}

verdict() {
    echo
    [[ ${#reasons[@]} == 0 ]] || printf '%s\n' "${reasons[@]}"
    echo "$passed passed, $failed failed"
    [[ $failed == 0 ]] || exit 1
    exit 0
}

lint() {
    check fmt cargo fmt --all --check || true
    check clippy cargo clippy --workspace --all-targets --features theseus-fuzz/targets -- -D warnings || true
}
unit() { count 'unit tests' cargo test --workspace --no-fail-fast || true; }

# LIMIT_S is for a lab that hangs: what waits in it for something gives up by itself, after ten minutes (tests/src/lib.rs). It is many times
# what a fast machine needs.
in_lab() { # LIMIT_S ARGS...: l1-tests with ARGS in L1
    local limit=$1
    shift
    one_lab --timeout "$limit" -- l1-tests "$@"
}

one_lab() { # OPTIONS of run.sh
    local code=0
    "$LAB/run.sh" --kernel "$kernel" "$@" || code=$?
    # 125: L1's own kernel died under emulation (ADR 4), which says nothing about what ran in it. A failed test is never run again.
    if [[ $code == 125 ]]; then
        note "L1 itself died, see target/lab/results/latest: starting it once more"
        code=0
        "$LAB/run.sh" --kernel "$kernel" "$@" || code=$?
    fi
    return "$code"
}

# All tests, in two labs that take one after the other from the list; the second one's output follows the first one's.
in_two_labs() { # LIMIT_S
    local limit=$1 results n first=0 second=0 pid
    results=$(new_results)
    mkdir -p "$results"/{1,2,claims}
    note "in two labs; what the second says comes at the end, and is in target/lab/results/latest/2/output.log meanwhile"
    labs_part() { LAB_NUMBER=$1 one_lab --timeout "$limit" --results "$results/$1" --claims "$results/claims" -- l1-tests test; }
    labs_part 2 >"$results/second.log" 2>&1 &
    pid=$!
    labs_part 1 || first=$?
    wait "$pid" || second=$?
    note "what the second lab has said"
    cat "$results/second.log"
    for n in "$results"/claims/*; do
        [[ -e $n/ended ]] && continue
        echo "error: ${n##*/} was begun and has not ended"
        first=1
    done
    return $((first ? first : second))
}

# Each has 10 GiB of memory (run.sh), and a CPU.
room_for_two() { [[ $(nproc) -ge 2 && $(awk '/^MemAvailable/ { print $2 }' /proc/meminfo) -ge $((21 << 20)) ]]; }

# The same tests on this machine's own KVM, IOMMU and device.
on_hardware() { # BDF ARGS...
    local dir
    dir=$(kernel_dir "$kernel")
    export LAB_BIN=$OUT LAB_KERNEL=$dir/vmlinuz LAB_KERNEL_VERSION=$kernel LAB_MODULES=$dir
    export LAB_INITRAMFS=$OUT/l2-initramfs-$kernel.cpio LAB_RESULTS=$OUT/results/hardware
    mkdir -p "$LAB_RESULTS"
    "$LAB/l2-initramfs.sh" "$LAB_INITRAMFS" "$OUT/agent" "$dir" || return
    ulimit -l unlimited 2>/dev/null || note "'ulimit -l unlimited' failed: pinning guest memory then needs CAP_IPC_LOCK"
    "$OUT/l1-tests" test --hardware "$@"
}

command=$1
shift
kernel=$DEFAULT_KERNEL hardware='' one_kernel=''
args=()
while [[ $# -gt 0 ]]; do
    case $1 in
    --kernel | --hardware)
        [[ $# -ge 2 ]] || die "$1 needs a value"
        [[ $1 != --kernel ]] || one_kernel=$2
        declare "${1#--}=$2" && shift 2
        ;;
    *) args+=("$1") && shift ;;
    esac
done

case $command in
lint | unit | build | fuzz) "$LAB/setup.sh" rust ;;
soak) "$LAB/setup.sh" "${one_kernel:-all}" ;;
*)
    # What runs on this machine itself needs a guest kernel, but no lab.
    if [[ $hardware || ${args[0]:-} == native ]]; then export SKIP_QEMU=1; fi
    [[ $command != demo ]] || note "demo, step 1 of 3: what the lab needs (packages, QEMU and kernel $kernel; all there after the first time)"
    "$LAB/setup.sh" "$kernel"
    ;;
esac

case $command in
lint) lint && verdict ;;
unit) unit && verdict ;;
build) build_release ;;
test)
    # Naming tests is for working on them: straight to the lab.
    if [[ ${#args[@]} == 0 && ! $hardware ]]; then
        lint
        unit
    fi
    if check build build_all; then
        if [[ $hardware ]]; then
            count "tests with device $hardware" on_hardware "$hardware" ${args[@]+"${args[@]}"} || true
        else
            how=(in_lab 14400 test ${args[@]+"${args[@]}"})
            if [[ ${#args[@]} == 0 ]] && room_for_two; then how=(in_two_labs 14400); fi
            count "lab tests, kernel $kernel" "${how[@]}" || true
        fi
    fi
    verdict
    ;;
bench)
    build_all || die "the build failed"
    # Native numbers need only /dev/kvm, and no lab.
    if [[ ${args[0]:-} == native ]]; then
        mkdir -p "$OUT/results/native"
        LAB_BIN=$OUT LAB_RESULTS=$OUT/results/native exec "$OUT/l1-tests" bench "${args[@]}"
    fi
    if [[ ${args[0]:-} == vectors ]]; then
        # One CPU has not vectors enough for the last of them.
        for n in 8 64 256; do
            "$LAB/run.sh" --alone --kernel "$kernel" --cpus 2 --vectors "$n" --timeout 7200 -- l1-tests bench vectors || exit
        done
        exit
    fi
    one_lab --alone --timeout 14400 -- l1-tests bench ${args[@]+"${args[@]}"}
    ;;
demo)
    note "demo, step 2 of 3: compiling Theseus in two builds, and what drives the demo"
    build_all || die "the build failed"
    note "demo, step 3 of 3: the lab"
    one_lab --alone --timeout 7200 -- l1-tests demo ${args[@]+"${args[@]}"}
    ;;
fuzz)
    prepare_fuzz
    seconds=60
    targets=()
    for arg in ${args[@]+"${args[@]}"}; do
        if [[ $arg =~ ^[0-9]+$ ]]; then seconds=$arg; else targets+=("$arg"); fi
    done
    [[ ${#targets[@]} -gt 0 ]] || targets=("${FUZZ_TARGETS[@]}")
    for target in "${targets[@]}"; do check "fuzz $target, $seconds s" fuzz_one "$target" "$seconds" || true; done
    verdict
    ;;
soak)
    check build build_all || verdict
    kernels=("$kernel")
    [[ $one_kernel ]] || kernels=("${ALL_KERNELS[@]}")
    for kernel in "${kernels[@]}"; do
        count "soak, kernel $kernel" in_lab 43200 soak ${args[@]+"${args[@]}"} || true
    done
    verdict
    ;;
*) die "unknown command $command" ;;
esac

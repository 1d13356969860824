#!/usr/bin/env bash
# run.sh [OPTIONS] -- CMD ARGS...   runs CMD in L1, exits with its code
# run.sh --shell [OPTIONS]          an interactive shell in L1
# Options: --kernel V  --mem M  --cpus N  --timeout S  --results DIR  and
# --vectors N   how many MSI-X vectors the NVMe controller has
# --claims DIR  where several L1s that share tests mark which of them each has taken: $LAB_CLAIMS in L1
# --alone       with no other lab beside it, for what is timed
# Exit codes of the lab itself: 124 timeout, 125 L1 did not start or died.
source "$(dirname "$0")/common.sh"
source "$LAB/apt.sh"
source "$LAB/qemu.sh"

kernel=$DEFAULT_KERNEL mem=10G cpus=1 timeout=14400 results='' vectors=65 mode=run claims='' alone=''
while [[ $# -gt 0 ]]; do
    case $1 in
    --shell) mode=shell && shift ;;
    --alone) alone=yes && shift ;;
    --kernel | --mem | --cpus | --timeout | --results | --vectors | --claims)
        [[ $# -ge 2 ]] || die "$1 needs a value"
        declare "${1#--}=$2" && shift 2
        ;;
    --) shift && break ;;
    -*) die "unknown option $1 (usage: ./dev lab run [--kernel V] [--mem M] [--cpus N] [--timeout S] [--results DIR] -- CMD ARGS...)" ;;
    *) break ;;
    esac
done
[[ $mode == shell || $# -gt 0 ]] || die "which command shall run in L1? (./dev lab run -- CMD ARGS...)"
[[ $timeout =~ ^[0-9]+$ ]] || die "--timeout $timeout: seconds are wanted"

SKIP_RUST=1 "$LAB/setup.sh" "$kernel"
kdir=$(kernel_dir "$kernel")
initramfs=$("$LAB/l1-initramfs.sh" "$kdir")
if [[ -x $OUT/agent ]]; then "$LAB/l2-initramfs.sh" "$OUT/l2-initramfs-$kernel.cpio" "$OUT/agent" "$kdir"; fi

if [[ ! $results ]]; then
    results=$(new_results)
fi
mkdir -p "$results/.lab"
results=$(cd "$results" && pwd -P)
rm -f "$results/.lab/exit"
work=$(mktemp -d)
qemu_pid='' watchdog_pid='' tee_pid=''
cleanup() {
    [[ ! $watchdog_pid ]] || kill "$watchdog_pid" 2>/dev/null || true
    [[ ! $qemu_pid ]] || kill -KILL "$qemu_pid" 2>/dev/null || true
    [[ ! $tee_pid ]] || kill "$tee_pid" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# Not below TMPDIR: labs that do not see each other's locks may take the same ports, and QEMU shares them without a word.
locked=/tmp/theseus-lab-$(id -u)
mkdir -p "$locked"

# Two labs at a time, as each keeps one CPU busy; more would only wait for each other.
locks=()
take_place() { # flock's options
    local n
    for n in 1 2; do
        exec {lock}>"$locked/place.$n"
        if flock "$@" "$lock"; then
            locks+=("$lock")
            [[ $alone ]] || return 0
        else
            exec {lock}>&-
        fi
    done
    # Both, if it is to be alone.
    [[ $alone && ${#locks[@]} == 2 ]] && return
    for lock in "${locks[@]}"; do exec {lock}>&-; done
    locks=()
    return 1
}
if ! take_place -n; then
    note "another lab is running: waiting for it"
    # In turns, as either of two may end first.
    until take_place -w 1; do :; done
    note "the other lab has ended"
fi

# UDP ports for three wires: a block per run, held by a lock, and free of other programs.
udp_free() { # FIRST LAST
    local address p
    while read -r _ address _; do
        [[ $address == *:* ]] || continue
        p=$((16#${address##*:}))
        ((p < $1 || p > $2)) || return 1
    done </proc/net/udp
}
ports=''
for base in $(seq 21000 8 22600); do
    exec {lock}>"$locked/ports.$base"
    if flock -n "$lock" && udp_free "$base" $((base + 5)); then
        ports=$base
        break
    fi
    exec {lock}>&-
done
[[ $ports ]] || die "no free block of UDP ports in 21000-22600: too many labs at once"

args=()
passed='' peers='' slot=16 wire=0
port() { # adds a root port in slot $slot; the names of L1's PCI addresses follow from it
    slot_name=$(printf '%02x' "$slot")
    args+=(-device "pcie-root-port,id=rp$slot,chassis=$slot,addr=0x$slot_name")
}
nic() { # MODEL MAC LOCAL_PORT REMOTE_PORT
    port
    args+=(-netdev "socket,id=n$slot,udp=127.0.0.1:$4,localaddr=127.0.0.1:$3"
        -device "$1,netdev=n$slot,mac=${2//-/:},bus=rp$slot,romfile=")
    slot=$((slot + 1))
}
pair() { # NAME MODEL: one NIC to pass through, one for L1, and the wire between them
    local a=$((ports + 2 * wire)) mac peer
    local b=$((a + 1))
    printf -v mac '52-54-00-aa-00-%02x' $((2 * wire + 1))
    printf -v peer '52-54-00-aa-00-%02x' $((2 * wire + 2))
    nic "$2" "$mac" $a $b
    passed+=" $1:$slot_name:$mac"
    nic "$2" "$peer" $b $a
    peers+=" $1:$slot_name:$peer"
    wire=$((wire + 1))
}
pair IGB_A igb
pair IGB_B igb
# Two functions of one slot without ACS are one IOMMU group.
shared=$slot
pair E1000E e1000e,multifunction=on
truncate -s 64M "$work/nvme.img"
args+=(-drive "file=$work/nvme.img,if=none,id=nvme,format=raw"
    -device "nvme,serial=lab,drive=nvme,bus=rp$shared,addr=0.1,msix_qsize=$vectors")
printf -v passed '%s NVME:%02x.1:' "$passed" "$shared"

copy=''
for f in theseus-a theseus-b ch-remote agent l1-tests; do [[ ! -e $OUT/$f ]] || copy+=" $OUT/$f"; done
if [[ -e $OUT/l2-initramfs-$kernel.cpio ]]; then
    ln "$OUT/l2-initramfs-$kernel.cpio" "$work/l2-initramfs.cpio" 2>/dev/null || cp "$OUT/l2-initramfs-$kernel.cpio" "$work/l2-initramfs.cpio"
    copy+=" $work/l2-initramfs.cpio"
fi
rows=24 cols=80
[[ $mode != shell ]] || read -r rows cols < <(stty size 2>/dev/null || echo 24 80)
{
    printf 'LAB_MODE=%q\nLAB_DIR=%q\nLAB_CWD=%q\nLAB_ROWS=%q\nLAB_COLS=%q\n' "$mode" "$LAB" "$PWD" "$rows" "$cols"
    printf 'LAB_PASSED=%q\nLAB_PEERS=%q\nLAB_COPY=%q\n' "${passed# }" "${peers# }" "${copy# }"
    printf 'LAB_KERNEL=%q\nLAB_KERNEL_VERSION=%q\nLAB_MODULES=%q\n' "$kdir/vmlinuz" "$kernel" "$kdir"
    printf 'LAB_CLAIMING=%q\n' "$claims"
    printf 'LAB_KEEP=%q\n' "$ROOT $CACHE $TARGET $work $PWD"
} >"$results/.lab/boot.env"
(set +o pipefail && export -p | grep -E '^declare -x (THESEUS_|LAB_|RUST_|CI=|TERM=)' || true) >"$results/.lab/pass.env"
if [[ $# -gt 0 ]]; then { printf 'exec' && printf ' %q' "$@" && echo; } >"$results/.lab/cmd"; fi

# no_timer_check: where this machine is busy, no tick may come in the 40 ms in which L1's kernel looks for ten, and it would panic.
qemu=("$(qemu_dir)/qemu-system-x86_64" -L /usr/share/seabios -L /usr/share/qemu -nodefaults -no-user-config -display none -no-reboot
    -accel tcg,thread=multi,tb-size=1024 -machine q35,kernel-irqchip=split -cpu max,la57=off -smp "$cpus" -m "$mem"
    -device intel-iommu,intremap=on,caching-mode=on
    -kernel "$kdir/vmlinuz" -initrd "$initramfs"
    -append "console=ttyS0 intel_iommu=on iommu=pt tsc=reliable no_timer_check panic=-1 oops=panic quiet"
    -serial "file:$results/l1-console.log" -monitor "unix:$work/monitor,server=on,wait=off"
    -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap
    -virtfs "local,path=$results,mount_tag=results,security_model=none"
    -device virtio-serial "${args[@]}")
if [[ $claims ]]; then qemu+=(-virtfs "local,path=$(cd "$claims" && pwd -P),mount_tag=claims,security_model=none"); fi

if [[ $mode == shell ]]; then
    # Ctrl-C belongs to the shell in L1. Leave with 'exit'.
    "${qemu[@]}" -chardev stdio,id=out,signal=off -device virtconsole,chardev=out
    exit "$(cat "$results/.lab/exit" 2>/dev/null || echo 125)"
fi

# Under emulation L1's CPU now and then loses a timer interrupt (in the middle of a VMEXIT, it seems), and with nothing else
# to interrupt it stands still for good. A frame that nobody wants, to the peer of the e1000e, twenty times a second,
# makes QEMU's APIC look again.
nudge() { # QEMU_PID
    local frame='\x52\x54\x00\xaa\x00\x06\x02\x00\x00\x00\x00\x01\x88\xb5'
    frame+=$(printf '\\x00%.0s' {1..46})
    while kill -0 "$1" 2>/dev/null; do
        # shellcheck disable=SC2059
        printf "$frame" >"/dev/udp/127.0.0.1/$((ports + 5))" || true
        sleep 0.05
    done
}

# Starts L1 and waits for its end, or until FILE has not come after SECONDS.
boot() {
    mkfifo "$work/out"
    tee "$results/output.log" <"$work/out" &
    tee_pid=$!
    # The kernel ends QEMU when this script dies by whatever means.
    setpriv --pdeathsig KILL "${qemu[@]}" -chardev "file,id=out,path=$work/out" \
        -device virtserialport,chardev=out,name=lab.out </dev/null >"$results/qemu.log" 2>&1 &
    qemu_pid=$!
    note "starting L1, the outer guest, with kernel $kernel"
    watch "$qemu_pid" </dev/null >/dev/null &
    watchdog_pid=$!
    nudge "$qemu_pid" </dev/null >/dev/null 2>&1 &
    # 'wait', unlike a program in the foreground, lets this script act on a signal at once.
    wait "$qemu_pid" 2>/dev/null || true
    qemu_pid=''
    # A QEMU that did not start has not opened it, and tee would wait for that for ever, and with it all who wait for the lab.
    : <>"$work/out"
    wait "$tee_pid" || true
    kill "$watchdog_pid" 2>/dev/null || true
    wait "$watchdog_pid" 2>/dev/null || true
    rm -f "$work/out"
}
# The kernel of L1 now and then loses its boot CPU's timer while it boots under emulation, and stands still: that is
# told apart from a hung command, because l1-enter.sh writes .lab/started first of all. It takes some 5 s where nothing else runs.
START_TIMEOUT=${LAB_START_TIMEOUT:-400}
watch() { # QEMU_PID
    local start=$SECONDS
    trap 'kill $! 2>/dev/null; exit' TERM
    while [[ ! -e $results/.lab/started ]] && ((SECONDS - start < START_TIMEOUT)); do
        sleep 0.2 & wait $!
    done
    if [[ ! -e $results/.lab/started ]]; then touch "$work/not-started"
    else
        note "L1 is up ($((SECONDS - start)) s)"
        sleep "$timeout" & wait $!
        touch "$work/timed-out"
    fi
    kill -KILL "$1"
}
for try in 1 2 3; do
    rm -f "$work/not-started" "$results/.lab/started"
    boot
    [[ -e $work/not-started ]] || break
    cp "$results/l1-console.log" "$results/l1-console-try$try.log"
    note "L1's kernel did not come up within $START_TIMEOUT s (try $try of 3)"
done

if [[ -e $work/timed-out ]]; then
    echo "error: L1 was ended: '$*' took longer than $timeout s (logs: $results; end of L1's console follows)" >&2
    tail -n 15 "$results/l1-console.log" >&2 || true
    exit 124
fi
if [[ ! -s $results/.lab/exit ]]; then
    echo "error: L1 died before it could tell how '$*' ended (logs: $results; end of QEMU's log and L1's console follow)" >&2
    tail -n 5 "$results/qemu.log" >&2 2>/dev/null || true
    tail -n 30 "$results/l1-console.log" >&2 || true
    exit 125
fi
exit "$(<"$results/.lab/exit")"

#!/usr/bin/env bash
# PID 1 of L1 on the host's files: devices, environment, the command, its exit code, power-off.
# run.sh fixes the PCI topology: a root port per device, so a device is known by its port before any driver has it.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RESULTS=/run/lab/results
. "$RESULTS/.lab/boot.env"
: >"$RESULTS/.lab/started"

finish() {
    dmesg >"$RESULTS/l1-dmesg.log" 2>/dev/null
    printf '%s\n' "$1" >"$RESULTS/.lab/exit"
    sync
    busybox poweroff -f
}
trap 'finish 125' EXIT
fail() {
    echo "lab: $*" >"$out"
    finish 125
}

mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t hugetlbfs hugetlbfs /dev/hugepages
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sf "/proc/self/fd/${n%%:*}" "/dev/${n#*:}"; done
ip link set lo up
hostname l1 2>/dev/null || echo l1 >/proc/sys/kernel/hostname
ulimit -l unlimited
ulimit -n 65536

# Where the command's output goes: a virtio port, which unlike a terminal leaves bytes alone.
out=/dev/console
for p in /sys/class/virtio-ports/*; do
    [ "$(cat "$p/name" 2>/dev/null)" = lab.out ] && out=/dev/${p##*/}
done

behind() { # PORT[.FUNCTION]: the PCI address of the device behind the root port in slot PORT of bus 0
    local d function=0
    case $1 in *.*) function=${1#*.} ;; esac
    for d in /sys/bus/pci/devices/0000:00:"${1%.*}".0/0000:*."$function"; do
        [ -e "$d/vendor" ] && basename "$d" && return
    done
    fail "no device behind root port $1"
}
env=/run/lab.env
say() { printf 'export %s=%q\n' "$1" "$2" >>"$env"; }

for entry in $LAB_PASSED; do # NAME:PORT:MAC (nvme has no MAC)
    IFS=: read -r name port mac <<<"$entry"
    bdf=$(behind "$port")
    echo vfio-pci >"/sys/bus/pci/devices/$bdf/driver_override"
    echo "$bdf" >/sys/bus/pci/drivers_probe
    [ -e "/sys/bus/pci/drivers/vfio-pci/$bdf" ] || fail "vfio-pci did not take $name ($bdf)"
    say "LAB_${name}_BDF" "$bdf"
    [ -z "$mac" ] || say "LAB_${name}_MAC" "${mac//-/:}"
done

# fq_codel, the default, drops what waited for more than 100 ms: a stall would look like a loss.
echo pfifo_fast >/proc/sys/net/core/default_qdisc
while read -r m; do busybox insmod "/run/lab/modules/$m" || fail "insmod $m"; done </run/lab/modules/nics
for entry in $LAB_PEERS; do
    IFS=: read -r name port mac <<<"$entry"
    bdf=$(behind "$port")
    # A hang detector: ten minutes.
    for _ in $(seq 6000); do
        ifname=$(ls "/sys/bus/pci/devices/$bdf/net" 2>/dev/null) && [ -n "$ifname" ] && break
        sleep 0.1
    done
    [ -n "$ifname" ] || fail "no network interface on $bdf, the peer of $name"
    ip link set "$ifname" up
    say "LAB_${name}_PEER" "$ifname"
    say "LAB_${name}_PEER_MAC" "${mac//-/:}"
done

# What is timed runs from tmpfs: 9p makes exec look slow.
mkdir -p /run/lab/bin
for f in $LAB_COPY; do [ -e "$f" ] && cp "$f" /run/lab/bin/; done
say LAB_BIN /run/lab/bin
[ ! -e /run/lab/bin/l2-initramfs.cpio ] || say LAB_INITRAMFS /run/lab/bin/l2-initramfs.cpio
say LAB_RESULTS "$RESULTS"
[ -z "$LAB_CLAIMING" ] || say LAB_CLAIMS /run/lab/claims
say LAB_KERNEL "$LAB_KERNEL"
say LAB_KERNEL_VERSION "$LAB_KERNEL_VERSION"
say LAB_MODULES "$LAB_MODULES"
say LAB_DIR "$LAB_DIR"
say HOME /tmp
say PATH "/run/lab/bin:$PATH"
cat "$RESULTS/.lab/pass.env" >>"$env"
. "$env"
cd "$LAB_CWD" 2>/dev/null || cd /

code=0
if [ "$LAB_MODE" = shell ]; then
    stty -F /dev/hvc0 sane rows "${LAB_ROWS:-24}" cols "${LAB_COLS:-80}"
    PS1='l1:\w\$ ' setsid -c bash --norc -i </dev/hvc0 >/dev/hvc0 2>&1 || code=$?
else
    mkfifo /run/lab/out
    cat /run/lab/out >"$out" &
    printer=$!
    # The fifo is opened by the command alone, so its end is the printer's end.
    (exec bash "$RESULTS/.lab/cmd") </dev/null >/run/lab/out 2>&1 || code=$?
    # A daemon that the command left behind may hold the fifo: do not wait for it.
    for _ in $(seq 300); do kill -0 $printer 2>/dev/null || break; sleep 0.1; done
fi
finish "$code"

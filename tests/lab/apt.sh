# Debian packages: what the lab needs, and from which suite. Sourced.
# shellcheck shell=bash

# Everything but QEMU, whose version matters and which is checked by itself.
PACKAGES=(busybox-static cpio kmod xz-utils zstd iproute2 util-linux gcc libc6-dev binutils)

codename() { (. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-}"); }

missing_packages() {
    local name status
    declare -A installed=()
    while read -r name status; do
        [[ $status == installed ]] && installed[${name%%:*}]=1
    done < <(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "${PACKAGES[@]}" 2>/dev/null || true)
    for name in "${PACKAGES[@]}"; do
        [[ ${installed[$name]:-} ]] || printf '%s\n' "$name"
    done
}

# igb came to QEMU with 8.0; the lab was measured with 10, so that is what is asked for.
qemu_is_good() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p')
    [[ ${version:-0} -ge 10 ]]
}

need_root_debian() {
    [[ $(id -u) == 0 ]] || die "$1: installing it needs root; run './dev setup' as root"
    (. /etc/os-release && [[ ${ID:-} == debian ]]) ||
        die "$1: this script installs packages on Debian 12 and 13 only; here install by hand: QEMU >= 10 (x86), ${PACKAGES[*]}"
}

apt_quiet() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 \
        -o APT::Sandbox::User=root "$@" >"$log" 2>&1 </dev/null; then
        tail -20 "$log" >&2
        rm -f "$log"
        die "apt-get $1 failed (its last lines are above)"
    fi
    rm -f "$log"
}

apt_targets() { apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages'; }

# Adds SUITE of the mirror this machine already uses. Everything in it is pinned to -1 (never picked), except the source
# packages named in the further arguments.
add_suite() {
    local suite=$1 uri keyring signed=() sources pins
    shift
    if apt_targets | awk -v s="$suite" '$2 == s && $3 == "main" { found = 1 } END { exit !found }'; then
        return
    fi
    uri=$(apt_targets | awk -v s="$(codename)" '$2 == s && $3 == "main" { print $1; exit }')
    [[ $uri ]] || die "no apt source for '$(codename) main' on this machine to derive '$suite' from: add one and run './dev setup' again"
    for keyring in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        [[ -e $keyring ]] && signed=("Signed-By: $keyring") && break
    done
    note "adding an apt source for $suite, pinned"
    sources=/etc/apt/sources.list.d/theseus-$suite.sources
    pins=/etc/apt/preferences.d/theseus-$suite
    {
        printf 'Package: *\nPin: release n=%s\nPin-Priority: -1\n' "$suite"
        [[ $# == 0 ]] || printf '\nPackage: %s\nPin: release n=%s\nPin-Priority: 500\n' "$*" "$suite"
    } >"$pins"
    printf '%s\n' 'Types: deb' "URIs: $uri" "Suites: $suite" 'Components: main' ${signed[@]+"${signed[@]}"} >"$sources"
    apt_quiet update
}

install_packages() {
    local missing=() log_name
    mapfile -t missing < <(missing_packages)
    qemu_is_good || missing+=(qemu-system-x86)
    [[ ${#missing[@]} -gt 0 ]] || return 0
    log_name=${missing[*]}
    need_root_debian "missing: $log_name"
    note "installing $log_name"
    apt_quiet update
    if [[ $log_name == *qemu* && $(codename) == bookworm ]]; then
        # The firmware and boot ROMs that this QEMU was built against come along.
        add_suite bookworm-backports src:qemu src:seabios src:ipxe
    fi
    apt_quiet install --no-install-recommends "${missing[@]}"
    qemu_is_good || die "QEMU >= 10 is needed, and $(qemu-system-x86_64 --version | head -1) is what apt installed; look at 'apt-cache policy qemu-system-x86'"
}

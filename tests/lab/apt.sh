# Debian packages: what the lab needs, and from which suite. Sourced.
# shellcheck shell=bash

# QEMU itself is built (qemu.sh); its firmware is Debian's.
PACKAGES=(busybox-static cpio kmod xz-utils zstd iproute2 util-linux gcc libc6-dev binutils seabios qemu-system-data systemd)

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

need_root_debian() {
    [[ $(id -u) == 0 ]] || die "$1: installing it needs root; run './dev setup' as root"
    (. /etc/os-release && [[ ${ID:-} == debian ]]) ||
        die "$1: this script installs packages on Debian 12 and 13 only; here install by hand: ${PACKAGES[*]}"
}

apt_quiet() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 \
        -o APT::Sandbox::User=root "$@" >"$log" 2>&1 </dev/null; then
        tail -20 "$log" >&2
        rm -f "$log"
        die "apt-get $* failed (its last lines are above)"
    fi
    rm -f "$log"
}

apt_targets() { apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages'; }

debian_keyring() {
    local keyring
    for keyring in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        if [[ -e $keyring ]]; then echo "$keyring" && break; fi
    done
}

# Adds SUITE of the mirror this machine already uses, pinned to -1: nothing is picked from it that is not asked for by PACKAGE/SUITE.
add_suite() {
    local suite=$1 uri keyring
    if apt_targets | awk -v s="$suite" '$2 == s && $3 == "main" { found = 1 } END { exit !found }'; then
        return
    fi
    uri=$(apt_targets | awk -v s="$(codename)" '$2 == s && $3 == "main" { print $1; exit }')
    [[ $uri ]] || die "no apt source for '$(codename) main' on this machine to derive '$suite' from: add one and run './dev setup' again"
    note "adding an apt source for $suite, pinned"
    printf 'Package: *\nPin: release n=%s\nPin-Priority: -1\n' "$suite" >"/etc/apt/preferences.d/theseus-$suite"
    keyring=$(debian_keyring)
    printf '%s\n' 'Types: deb' "URIs: $uri" "Suites: $suite" 'Components: main' ${keyring:+"Signed-By: $keyring"} \
        >"/etc/apt/sources.list.d/theseus-$suite.sources"
    apt_quiet update
}

# The original source of PACKAGE as SUITE has it, into DIR. With apt sources of its own: a second entry for one that this machine has could
# contradict it, and then apt reads none.
fetch_source() { # PACKAGE SUITE DIR
    local uri keyring
    uri=$(apt_targets | awk -v s="$2" '$2 == s && $3 == "main" { print $1; exit }')
    [[ $uri ]] || die "no apt source for '$2 main' on this machine: add one and run './dev setup' again"
    keyring=$(debian_keyring)
    mkdir -p "$3/apt/lists/partial"
    printf 'deb-src %s%s %s main\n' "${keyring:+[signed-by=$keyring] }" "$uri" "$2" >"$3/apt/list"
    local options=(-o Dir::Etc::SourceList="$3/apt/list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$3/apt/lists"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    apt_quiet "${options[@]}" update
    (cd "$3" && apt_quiet "${options[@]}" source --tar-only "$1/$2")
}

install_packages() {
    local missing=()
    mapfile -t missing < <(missing_packages)
    [[ ${#missing[@]} -gt 0 ]] || return 0
    need_root_debian "missing: ${missing[*]}"
    note "installing ${missing[*]}"
    apt_quiet update
    apt_quiet install --no-install-recommends "${missing[@]}"
}

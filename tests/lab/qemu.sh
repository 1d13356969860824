# The QEMU of the lab: Debian's own packages of trixie-backports, with all libraries down to libc, unpacked into the cache and started by
# their own loader. So it is the same on every release, and takes nothing from the machine's. Sourced.
# shellcheck shell=bash

QEMU_SUITE=trixie-backports

# In the cache, by what it is made by; a download of 40 MB.
qemu_dir() { printf '%s/qemu-%s\n' "$CACHE" "$(sha256sum <"$LAB/qemu.sh" | cut -c1-16)"; }

# The start of QEMU's command line.
qemu_command() {
    local dir
    dir=$(qemu_dir)
    printf '%s\n' "$dir/lib/ld-linux-x86-64.so.2" --library-path "$dir/lib" "$dir/qemu-system-x86_64" -L "$dir/seabios" -L "$dir/qemu"
}

fetch_qemu() {
    local dir work deb
    dir=$(qemu_dir)
    [[ -e $dir/version ]] && return
    need_root_debian "the lab's QEMU is not in $CACHE"
    mkdir -p "$CACHE"
    exec {lock}>"$CACHE/lock"
    flock "$lock"
    if [[ ! -e $dir/version ]]; then
        note "downloading QEMU for the lab (once)"
        work=$dir.new
        rm -rf "$work"
        download_with_libraries qemu-system-x86 "$work/apt"
        for deb in "$work"/apt/cache/archives/*.deb; do dpkg -x "$deb" "$work/root"; done
        mv "$work/root/usr/lib/x86_64-linux-gnu" "$work/lib"
        mv "$work/root/usr/share/qemu" "$work/root/usr/share/seabios" "$work/root/usr/bin/qemu-system-x86_64" "$work/"
        rm -rf "$work/root" "$work/apt"
        mend_qemu "$work/qemu-system-x86_64" || note "this QEMU is used as it is: the code of docs/adr/0008 is not in it as known"
        "$work/lib/ld-linux-x86-64.so.2" --library-path "$work/lib" "$work/qemu-system-x86_64" --version >"$work/version" ||
            die "the QEMU of $QEMU_SUITE does not run here"
        mv "$work" "$dir"
    fi
    exec {lock}>&-
}

# helper_vmrun leaves the vector of an interrupt that it has injected in cs->exception_index, from where it may be delivered once more
# (docs/adr/0008). Found by the three stores around it, exception_index's becomes a nop: the field stays at -1.
mend_qemu() { # FILE
    # movzbl %r12b,%esi; mov %r13d,error_code(%rbx); mov %esi,exception_index(%rbx); movl $0,exception_is_int(%rbx)
    perl -0777 -i -pe '
        my $stores = qr/(\x41\x0f\xb6\xf4\x44\x89\xab....)\x89\xb3....(?=\xc7\x83....\x00\x00\x00\x00)/s;
        $once = 1 == (() = /$stores/g);
        s/$stores/$1\x66\x0f\x1f\x44\x00\x00/ if $once;
        END { exit !$once }' "$1"
}

# PACKAGE of QEMU_SUITE and all that it depends on, for a system on which nothing is installed: an apt of its own, with the mirror and the
# keys of this machine's.
download_with_libraries() { # PACKAGE DIR
    local package=$1 dir=$2 uri keyring suite
    uri=$(mirror)
    keyring=$(debian_keyring)
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"
    for suite in trixie "$QEMU_SUITE"; do
        printf 'deb [arch=amd64%s] %s %s main\n' "${keyring:+ signed-by=$keyring}" "$uri" "$suite"
    done >"$dir/list"
    local options=(-o Dir::Etc::SourceList="$dir/list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o Dir::State="$dir/state" -o Dir::State::status="$dir/status" -o Dir::Cache="$dir/cache"
        -o APT::Default-Release="$QEMU_SUITE")
    apt_quiet "${options[@]}" update
    apt_quiet "${options[@]}" --download-only --no-install-recommends install "$package"
}

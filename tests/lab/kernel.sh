# Stock Debian kernels: downloaded and unpacked into the cache, never installed. Sourced.
# shellcheck shell=bash

kernel_suite() {
    case $1 in
    6.1) echo bookworm ;;
    6.12) if [[ $(codename) == bookworm ]]; then echo bookworm-backports; else echo trixie; fi ;;
    7) echo trixie-backports ;;
    *) die "kernel '$1' is not one of: ${ALL_KERNELS[*]}" ;;
    esac
}

# The packages that hold the files of PACKAGE/SUITE: a meta package names the image; from 7.x on the image is split.
kernel_packages() {
    local suite=$1 package=$2 dep
    echo "$package/$suite"
    apt-cache show --no-all-versions "$package/$suite" | sed -n 's/^Depends: //p' | tr ',|' '\n\n' |
        sed -nE 's/^ *(linux-(image|binary|modules|base)-[0-9][^ ]*).*/\1/p' | sort -u |
        while read -r dep; do kernel_packages "$suite" "$dep"; done
}

fetch_kernel() {
    local version=$1 suite dir work deb release
    local packages=()
    suite=$(kernel_suite "$version")
    dir=$(kernel_dir "$version")
    [[ -e $dir/vmlinux ]] && return
    need_root_debian "kernel $version is not in $CACHE"
    mkdir -p "$CACHE"
    exec {lock}>"$CACHE/lock"
    flock "$lock"
    if [[ ! -e $dir/vmlinux ]]; then
        add_suite "$suite"
        [[ $(apt-cache show "linux-image-amd64/$suite" 2>/dev/null) ]] || apt_quiet update
        mapfile -t packages < <(kernel_packages "$suite" linux-image-amd64 | sort -u)
        [[ ${#packages[@]} -gt 1 ]] || die "no kernel behind linux-image-amd64 in $suite: look at 'apt-cache policy linux-image-amd64'"
        note "downloading kernel $version (${packages[*]})"
        work=$dir.new
        rm -rf "$work" "$dir"
        mkdir -p "$work/deb"
        (cd "$work/deb" && apt_quiet download "${packages[@]}")
        note "unpacking kernel $version"
        for deb in "$work"/deb/*.deb; do dpkg -x "$deb" "$work/root"; done
        # Merged and unmerged /usr layouts both occur; modprobe -d wants lib/modules.
        mkdir -p "$work/lib"
        if [[ -d $work/root/usr/lib/modules ]]; then mv "$work/root/usr/lib/modules" "$work/lib/"; else mv "$work/root/lib/modules" "$work/lib/"; fi
        release=$(ls "$work/lib/modules")
        find "$work/root" -name "vmlinuz*" -type f -exec cp {} "$work/vmlinuz" \;
        find "$work/lib/modules" -maxdepth 2 -name 'vmlinuz*' -type f -exec cp {} "$work/vmlinuz" \;
        [[ -s $work/vmlinuz ]] || die "no vmlinuz in ${packages[*]}"
        unpack_vmlinux "$work/vmlinuz" "$work/vmlinux"
        depmod -b "$work" "$release"
        rm -rf "$work/root" "$work/deb"
        printf '%s\n' "$release" >"$work/release"
        mv "$work" "$dir"
    fi
    exec {lock}>&-
}

# The ELF image inside a bzImage, by its payload_offset and payload_length (Documentation/arch/x86/boot.rst).
unpack_vmlinux() { # VMLINUZ OUT
    local sectors offset length unpack
    number() { od -An -t "u$3" -j $(($2)) -N "$3" "$1" | tr -d ' '; }
    sectors=$(number "$1" 0x1f1 1) offset=$(number "$1" 0x248 4) length=$(number "$1" 0x24c 4)
    offset=$(((sectors + 1) * 512 + offset))
    case $(od -An -t x1 -j "$offset" -N 4 "$1" | tr -d ' ') in
    fd377a58) unpack='xz -dc --single-stream' ;;
    28b52ffd) unpack='zstd -qdc' ;;
    1f8b*) unpack='gzip -dc' ;;
    *) die "$1: its payload is compressed in a way that is not known here" ;;
    esac
    # The uncompressed size behind the payload ends the stream with an error, or a warning.
    tail -c "+$((offset + 1))" "$1" | head -c "$length" | $unpack 2>/dev/null >"$2" || true
    [[ $(stat -c %s "$2") == "$(number "$1" $((offset + length - 4)) 4)" ]] || die "$1: its ELF image cannot be unpacked"
}

# Puts modules and all that they depend on, decompressed, into DIR, and their load order into DIR/order.
modules_into() {
    local dir=$1 kernel=$2 release name kind file base
    shift 2
    release=$(<"$kernel/release")
    mkdir -p "$dir"
    : >"$dir/order"
    for name in "$@"; do
        modprobe -C /dev/null -d "$kernel" -S "$release" --show-depends "$name" >"$dir/deps" ||
            die "kernel $release has no module $name"
        while read -r kind file _; do
            [[ $kind == insmod ]] || continue
            base=$(basename "$file")
            base=${base%%.ko*}.ko
            [[ -e $dir/$base ]] && continue
            case $file in
            *.xz) xz -dc "$file" ;;
            *.zst) zstd -qdc "$file" ;;
            *.gz) gzip -dc "$file" ;;
            *) cat "$file" ;;
            esac >"$dir/$base"
            echo "$base" >>"$dir/order"
        done <"$dir/deps"
    done
    rm -f "$dir/deps"
}

# Packs folder DIR into the cpio archive FILE. Not compressed: unpacking costs the booting kernel more than reading.
pack_initramfs() {
    local dir=$1 file=$2
    (cd "$dir" && find . -print0 | sort -z | cpio --quiet --null -o -H newc -R 0:0 --reproducible) >"$file.$$"
    mv "$file.$$" "$file"
}

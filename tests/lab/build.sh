# What is built, and where it lies afterwards. Sourced.
# shellcheck shell=bash

BIN=$TARGET/$TRIPLE

# Everything a build depends on, so that nothing is built (and nothing relinked) when nothing changed.
sources_hash() {
    {
        rustc --version
        find "$ROOT" \( -path "$ROOT/target" -o -path "$ROOT/.git" -o -path "$TARGET" \) -prune -o \
            -type f \( -name '*.rs' -o -name '*.toml' -o -name 'Cargo.lock' -o -path '*/.cargo/*' -o -path '*/golden/*' \) -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

cargo_build() { (cd "$ROOT" && cargo build --target-dir "$TARGET" --target "$TRIPLE" "$@"); }

# By rename: a file that is being executed cannot be written to.
place() { # FROM TO
    cp "$1" "$2.new" && mv "$2.new" "$2"
}

# The binaries under test: two builds of one source whose tag, and so whose build id, differs; and what drives them.
build_all() {
    local hash tag version name
    local -a versions=()
    mkdir -p "$OUT"
    hash=$(sources_hash)
    if [[ $(cat "$OUT/built" 2>/dev/null) == "$hash" ]]; then return 0; fi
    rm -f "$OUT/built"
    # All packages in one call: cargo unites the features of dependencies over what is built together, so a call for each
    # would compile most of them again. The tag is seen by the crate theseus-vmm alone.
    for tag in b a; do
        note "compiling all binaries with build tag $tag of b, a (the second time only what the tag is in)"
        THESEUS_BUILD_TAG=$tag cargo_build --release --workspace --exclude theseus-fuzz --bins --features theseus-vmm/test-hooks || return
        place "$BIN/release/theseus" "$OUT/theseus-$tag" || return
        version=$("$OUT/theseus-$tag" -V) || return
        versions+=("$version")
    done
    for name in agent l1-tests ch-remote; do place "$BIN/release/$name" "$OUT/$name" || return; done
    [[ ${versions[0]} != "${versions[1]}" ]] || {
        echo "error: theseus-a and theseus-b are the same build: $version" >&2
        return 1
    }
    for name in theseus-a theseus-b ch-remote agent l1-tests; do is_static "$OUT/$name" || return; done
    printf '%s\n' "$hash" >"$OUT/built"
}

# What an operator gets: no test hooks, no tag.
build_release() {
    local dist=$TARGET/dist name
    mkdir -p "$dist"
    cargo_build --release -p theseus-vmm -p theseus-api --bins || return
    for name in theseus ch-remote; do
        place "$BIN/release/$name" "$dist/$name" && is_static "$dist/$name" && printf '%s\n' "$dist/$name" || return
    done
}

is_static() {
    ! readelf -lW "$1" | grep -q 'INTERP' || {
        echo "error: $1 is not statically linked: exec in an update must not load libraries (see .cargo/config.toml)" >&2
        return 1
    }
}

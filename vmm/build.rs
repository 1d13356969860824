//! Tells the source that it is the later of the two builds under test, see `src/build_info.rs`.

fn main() {
    println!("cargo::rerun-if-env-changed=THESEUS_BUILD_TAG");
    println!("cargo::rustc-check-cfg=cfg(later_build)");
    if std::env::var("THESEUS_BUILD_TAG").is_ok_and(|tag| tag == "b") {
        println!("cargo::rustc-cfg=later_build");
    }
}

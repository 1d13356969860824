//! What a caught panic said.

use std::any::Any;

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("of an unknown kind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told() {
        let caught = std::panic::catch_unwind(|| std::panic::panic_any(format!("no {}", 7))).unwrap_err();
        assert_eq!(panic_text(&*caught), "panic: no 7");
    }
}

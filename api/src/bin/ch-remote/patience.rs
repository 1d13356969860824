//! A sign of life while the VMM takes its time: lines on standard error, which no script reads.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// The first line comes sooner where somebody watches.
const FIRST_ON_TERMINAL: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_secs(10);

/// Says that it still waits, until dropped.
pub(crate) struct Patience(#[expect(dead_code, reason = "its end is what counts")] Sender<()>);

impl Patience {
    pub(crate) fn start() -> Self {
        let first = if std::io::stderr().is_terminal() { FIRST_ON_TERMINAL } else { EVERY };
        Self::with(first, EVERY, |line| {
            // Nobody to be told is no reason to end: `eprintln!` would.
            let _ = writeln!(std::io::stderr(), "{line}");
        })
    }

    fn with(first: Duration, every: Duration, mut say: impl FnMut(String) + Send + 'static) -> Self {
        let (ended, end) = channel::<()>();
        let started = Instant::now();
        // Without a thread nothing is said, and that is all.
        let _ = std::thread::Builder::new().spawn(move || {
            let mut next = first;
            while end.recv_timeout(next) == Err(RecvTimeoutError::Timeout) {
                say(format!("waiting for the VMM's answer, for {} s so far", started.elapsed().as_secs()));
                next = every;
            }
        });
        Self(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_until_the_answer_does() {
        let (sender, lines) = channel();
        let patience = Patience::with(Duration::ZERO, Duration::ZERO, move |line| {
            let _ = sender.send(line);
        });
        for _ in 0..2 {
            assert!(lines.recv().unwrap().starts_with("waiting for the VMM's answer"));
        }
        drop(patience);
        // Ends, as the thread does.
        assert!(lines.iter().all(|line| line.starts_with("waiting")));
    }

    #[test]
    fn a_quick_answer_has_none() {
        let (sender, lines) = channel::<String>();
        let hour = Duration::from_secs(3600);
        drop(Patience::with(hour, hour, move |line| {
            let _ = sender.send(line);
        }));
        assert_eq!(lines.iter().count(), 0);
    }
}

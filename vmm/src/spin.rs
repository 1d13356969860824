//! Waits for who is about to answer, without going to sleep: to be woken takes tens of microseconds, most of them a
//! CPU's way out of its idle state, and in the pause of an update one wait follows another.

use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// What one step of a pause takes, and then some.
const LONGEST: Duration = Duration::from_micros(300);

/// How long to stay awake.
#[derive(Clone, Copy)]
pub struct Spin(Duration);

impl Spin {
    pub const NOT: Self = Self(Duration::ZERO);

    /// For so many threads and the one that commands them. Not at all where there is no CPU for each: they would keep
    /// those whom they wait for from running.
    pub fn of_threads(count: usize) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        if cpus > count { Self(LONGEST) } else { Self::NOT }
    }

    pub fn receive<T>(self, from: &Receiver<T>) -> Result<T, RecvError> {
        self.awake(|| message(from)).unwrap_or_else(|| from.recv())
    }

    pub fn receive_until<T>(self, from: &Receiver<T>, deadline: Instant) -> Result<T, RecvTimeoutError> {
        match self.awake(|| message(from)) {
            Some(message) => message.map_err(|_| RecvTimeoutError::Disconnected),
            None => from.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        }
    }

    /// What `look` finds, if it does so in time.
    pub fn awake<T>(self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let began = Instant::now();
        loop {
            let found = look();
            if found.is_some() || began.elapsed() >= self.0 {
                return found;
            }
            // Not a mere pause: whom this waits for may have been put on the same CPU.
            std::thread::yield_now();
        }
    }
}

/// None: there is none yet.
fn message<T>(from: &Receiver<T>) -> Option<Result<T, RecvError>> {
    match from.try_recv() {
        Err(TryRecvError::Empty) => None,
        Err(TryRecvError::Disconnected) => Some(Err(RecvError)),
        Ok(message) => Some(Ok(message)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_comes_early_or_late_arrives_and_who_is_gone_is_noticed() {
        for spin in [Spin(Duration::ZERO), Spin(Duration::from_millis(5))] {
            let (sender, receiver) = channel();
            let soon = || Instant::now() + Duration::from_millis(20);
            sender.send(1).unwrap();
            assert_eq!(spin.receive(&receiver), Ok(1));
            assert_eq!(spin.receive_until(&receiver, soon()), Err(RecvTimeoutError::Timeout));
            let late = std::thread::spawn({
                let sender = sender.clone();
                move || {
                    std::thread::sleep(Duration::from_millis(20));
                    sender.send(2)
                }
            });
            assert_eq!(spin.receive(&receiver), Ok(2));
            late.join().unwrap().unwrap();
            drop(sender);
            assert_eq!(spin.receive(&receiver), Err(RecvError));
            assert_eq!(spin.receive_until(&receiver, soon()), Err(RecvTimeoutError::Disconnected));
        }
    }
}

//! What the owner of the vCPU threads says to them, and what they answer.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::VcpuError;
use super::saved::{EncodedVcpu, SavedVcpu};
use crate::spin::Spin;

pub(super) enum Command {
    /// The next one is about to come.
    Awake,
    RestoreEarly(EncodedVcpu),
    RestoreLate,
    Run,
    Pause,
    /// Numbered: the answer to one that was given up may come later.
    Save(u64),
    End,
}

pub(super) enum Event {
    /// Created, restored early, or restored late; the error may be the last word of a thread that has panicked.
    Ready(Result<(), VcpuError>),
    Paused,
    Saved(u64, u32, Result<SavedVcpu, VcpuError>),
}

/// What all threads answer.
pub(super) struct Answers {
    pub events: Receiver<Event>,
    pub spin: Spin,
}

impl Answers {
    /// Of one thread. `all`: how many there are.
    pub(super) fn ready(&self, all: usize, within: Duration) -> Result<(), VcpuError> {
        match self.spin.receive_until(&self.events, Instant::now() + within) {
            Ok(Event::Ready(result)) => result,
            Ok(Event::Paused | Event::Saved(..)) | Err(RecvTimeoutError::Disconnected) => Err(VcpuError::Gone),
            Err(RecvTimeoutError::Timeout) => Err(VcpuError::Silent { missing: 1, all, within }),
        }
    }

    /// Waits for so many vCPUs to stop; the error is how many have not.
    pub(super) fn paused(&self, expected: usize, deadline: Instant) -> Result<(), usize> {
        let mut done = 0;
        while done < expected {
            match self.spin.receive_until(&self.events, deadline) {
                Ok(Event::Paused) => done += 1,
                // The answer to what was given up before.
                Ok(Event::Ready(_) | Event::Saved(..)) => {}
                Err(_) => return Err(expected - done),
            }
        }
        Ok(())
    }

    /// The states that `all` vCPUs have saved when they were asked for the `turn`th time, in order of their index.
    /// `soon` is called when no more than one is missing.
    pub(super) fn saved(
        &self,
        turn: u64,
        all: usize,
        within: Duration,
        soon: impl FnOnce(),
    ) -> Result<Vec<SavedVcpu>, VcpuError> {
        let deadline = Instant::now() + within;
        let (mut states, mut failed) = (Vec::with_capacity(all), None);
        let (mut answers, mut soon) = (0, Some(soon));
        while answers < all {
            if answers + 1 >= all
                && let Some(soon) = soon.take()
            {
                soon();
            }
            match self.spin.receive_until(&self.events, deadline) {
                Ok(Event::Saved(of, index, saved)) if of == turn => {
                    answers += 1;
                    match saved {
                        Ok(saved) => states.push((index, saved)),
                        Err(error) => failed = Some(error),
                    }
                }
                Ok(Event::Ready(Err(error))) => return Err(error),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(VcpuError::Silent { missing: all - answers, all, within });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuError::Gone),
            }
        }
        states.sort_by_key(|(index, _)| *index);
        failed.map_or(Ok(states.into_iter().map(|(_, saved)| saved).collect()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn answers() -> (Sender<Event>, Answers) {
        let (sender, events) = channel();
        (sender, Answers { events, spin: Spin::of_threads(2) })
    }

    #[test]
    fn answers_to_what_was_given_up_count_for_nothing() {
        let (sender, answers) = answers();
        let say = |event| sender.send(event).unwrap();
        let saved = |turn, index| Event::Saved(turn, index, Err(VcpuError::Panicked { index, panic: String::new() }));
        say(saved(1, 0));
        let silent = answers.saved(1, 2, SOON, || ());
        assert!(matches!(silent, Err(VcpuError::Silent { missing: 1, all: 2, .. })));
        // The second one answers when nobody listens any more; then both stop and save anew.
        [saved(1, 1), Event::Paused, Event::Paused].into_iter().for_each(say);
        assert_eq!(answers.paused(2, Instant::now() + SOON), Ok(()));
        [saved(1, 1), saved(2, 7), saved(2, 8)].into_iter().for_each(say);
        assert!(matches!(answers.saved(2, 2, SOON, || ()), Err(VcpuError::Panicked { index: 8, .. })));
        say(Event::Paused);
        assert_eq!(answers.paused(3, Instant::now() + SOON), Err(2));
    }

    #[test]
    fn the_last_word_of_a_thread_is_the_reason() {
        let (sender, answers) = answers();
        sender.send(Event::Ready(Err(VcpuError::Panicked { index: 3, panic: "panic: x".into() }))).unwrap();
        assert_eq!(answers.saved(1, 2, SOON, || ()).err().unwrap().to_string(), "vCPU 3: panic: x");
    }
}

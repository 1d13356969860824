//! What the owner of the vCPU threads says to them, and what they answer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::VcpuError;
use super::round::{Done, Round};
use super::saved::SavedVcpu;
use crate::spin::Spin;

pub(super) enum Command {
    /// The next one is about to come.
    Awake,
    /// To be taken part in.
    Round(Arc<Round>),
    Run,
    Pause,
    End,
}

pub(super) enum Event {
    /// Created; the error may be the last word of a thread that has panicked.
    Ready(Result<(), VcpuError>),
    Paused,
    /// What a thread has done of the round with this number.
    Done(u64, Vec<Done>),
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
            Ok(Event::Paused | Event::Done(..)) | Err(RecvTimeoutError::Disconnected) => Err(VcpuError::Gone),
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
                Ok(Event::Ready(_) | Event::Done(..)) => {}
                Err(_) => return Err(expected - done),
            }
        }
        Ok(())
    }

    /// Waits until a round is over, of which the calling thread has done `done`. The states, where it has saved, in
    /// order of their index. `soon` is called when no more than one vCPU is missing.
    pub(super) fn of_round(
        &self,
        number: u64,
        all: usize,
        mut done: Vec<Done>,
        within: Duration,
        soon: impl FnOnce(),
    ) -> Result<Vec<SavedVcpu>, VcpuError> {
        let deadline = Instant::now() + within;
        let mut soon = Some(soon);
        while done.len() < all {
            if done.len() + 1 >= all
                && let Some(soon) = soon.take()
            {
                soon();
            }
            match self.spin.receive_until(&self.events, deadline) {
                Ok(Event::Done(of, theirs)) if of == number => done.extend(theirs),
                Ok(Event::Ready(Err(error))) => return Err(error),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(VcpuError::Silent { missing: all - done.len(), all, within });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuError::Gone),
            }
        }
        done.sort_by_key(|done| done.index);
        done.into_iter().filter_map(|done| done.result.transpose()).collect()
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
        let done = |index: u32| Done {
            index: index as usize,
            result: Err(VcpuError::Panicked { index, panic: String::new() }),
        };
        let saved = |number, index| Event::Done(number, vec![done(index)]);
        say(saved(1, 0));
        let silent = answers.of_round(1, 2, Vec::new(), SOON, || ());
        assert!(matches!(silent, Err(VcpuError::Silent { missing: 1, all: 2, .. })));
        // The second one answers when nobody listens any more; then both stop and save anew.
        [saved(1, 1), Event::Paused, Event::Paused].into_iter().for_each(say);
        assert_eq!(answers.paused(2, Instant::now() + SOON), Ok(()));
        [saved(1, 1), saved(2, 7), saved(2, 8)].into_iter().for_each(say);
        let failed = answers.of_round(2, 3, vec![done(6)], SOON, || ());
        assert!(matches!(failed, Err(VcpuError::Panicked { index: 6, .. })));
        say(Event::Paused);
        assert_eq!(answers.paused(3, Instant::now() + SOON), Err(2));
    }

    #[test]
    fn the_last_word_of_a_thread_is_the_reason() {
        let (sender, answers) = answers();
        sender.send(Event::Ready(Err(VcpuError::Panicked { index: 3, panic: "panic: x".into() }))).unwrap();
        let failed = answers.of_round(1, 2, Vec::new(), SOON, || ());
        assert_eq!(failed.err().unwrap().to_string(), "vCPU 3: panic: x");
    }
}

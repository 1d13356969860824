//! The main thread: starts the others, then only waits to run a child, or to end the process.
//!
//! It has no seccomp filter and sees no guest data: a child inherits what this thread is.

mod child;

use std::ffi::OsString;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

pub(crate) use child::{Ended, run_child};

enum Order {
    Spawn(Box<Command>, Duration, Sender<std::io::Result<Option<Ended>>>),
    Quit(i32),
}

/// The other threads' way to the main thread.
#[derive(Clone)]
pub(crate) struct MainThread(Sender<Order>);

impl MainThread {
    /// Runs a child to its end; `None` if it was killed because it took too long.
    pub(crate) fn spawn(&self, command: Command, patience: Duration) -> std::io::Result<Option<Ended>> {
        let (sender, receiver) = channel();
        let gone = |_| std::io::Error::other("the main thread has ended");
        self.0.send(Order::Spawn(Box::new(command), patience, sender)).map_err(|_| gone(()))?;
        receiver.recv().map_err(|_| gone(()))?
    }

    /// Ends the process with this exit code.
    pub(crate) fn quit(&self, code: i32) {
        // A main thread that has ended has ended the process.
        let _ = self.0.send(Order::Quit(code));
    }
}

pub(crate) struct Orders {
    orders: Receiver<Order>,
    environment: Option<(OsString, OsString)>,
}

/// `environment`: what each child has in its own, whatever else it has or has not.
pub(crate) fn orders(environment: Option<(OsString, OsString)>) -> (MainThread, Orders) {
    let (sender, orders) = channel();
    (MainThread(sender), Orders { orders, environment })
}

impl Orders {
    /// The main thread's life. Returns the exit code.
    pub(crate) fn serve(self) -> i32 {
        for order in &self.orders {
            match order {
                Order::Spawn(mut command, patience, answer) => {
                    command.envs(self.environment.clone());
                    let _ = answer.send(run_child(*command, patience));
                }
                Order::Quit(code) => return code,
            }
        }
        // All senders are gone: the control thread has panicked.
        crate::EXIT_FAILURE
    }
}

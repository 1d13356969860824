//! Where the log goes, and how much of it.
//!
//! A write to a log can wait without end: a terminal that was stopped, a pipe that nobody empties, a file whose server
//! is gone; so can the opening of its file. No guest may stand still for that: while one does, what is logged waits in
//! memory.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use theseus_resources::threads::{self, Role};

/// Of files that this process makes: what is in them is nobody else's business. The umask may take from it.
pub(crate) const MODE: u32 = 0o640;

/// Linux's, bytes (pipe(7)): what is longer may wait though the pipe is ready.
const PIPE_BUF: usize = 4096;

/// How much may wait, bytes; the rest is dropped.
const WAITING_MAX: usize = 64 << 10;

/// How long a log may take to write what has waited for an update, before the next one is told that it stands still.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogConfig {
    /// Standard error if there is none.
    pub file: Option<PathBuf>,
    /// 0 warnings, 1 info, 2 debug, more: trace.
    pub verbose: u8,
}

/// [`LogConfig`] in the saved state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LogHandles {
    file: Option<PathBuf>,
    verbose: u8,
}

static IN_USE: OnceLock<LogConfig> = OnceLock::new();
static SINK: Mutex<Sink> = Mutex::new(Sink { holds: 0, flushing: false, waiting: Vec::new(), file: None });
/// The log's fd: for [`last_words`].
static LOG_FD: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);
/// Bytes that were not written, since this image was started.
static DROPPED: AtomicU64 = AtomicU64::new(0);
static FLUSHED: Condvar = Condvar::new();

impl LogConfig {
    pub(crate) fn save(&self) -> LogHandles {
        let Self { file, verbose } = self.clone();
        LogHandles { file, verbose }
    }

    pub(crate) fn restore(handles: LogHandles) -> Self {
        let LogHandles { file, verbose } = handles;
        Self { file, verbose }
    }

    /// Once per image.
    pub(crate) fn start(self) -> anyhow::Result<()> {
        let file = self.file.as_deref().map(|path| open(path, Wait::No)).transpose()?;
        sink().go_to(file);
        self.init()
    }

    /// The same for an image whose guest stands still: everything waits for [`release`], the opening of the file too.
    pub(crate) fn start_held(self) -> anyhow::Result<()> {
        sink().holds += 1;
        self.init()
    }

    fn init(self) -> anyhow::Result<()> {
        let level = match self.verbose {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            2 => log::LevelFilter::Debug,
            _ => log::LevelFilter::Trace,
        };
        let _ = IN_USE.set(self);
        builder(level, Box::new(Lines)).try_init()?;
        // Rust's own hook writes to standard error by itself.
        std::panic::set_hook(Box::new(|info| log::error!("{info}")));
        Ok(())
    }

    /// For the next image.
    pub(crate) fn in_use() -> Self {
        IN_USE.get().cloned().unwrap_or_default()
    }
}

/// Each record is formed when it is said, with the time of that, however long it may then wait.
fn builder(level: log::LevelFilter, target: Box<dyn Write + Send>) -> env_logger::Builder {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).format_timestamp_millis().target(env_logger::Target::Pipe(target));
    builder
}

/// Why an update has to wait for the log: what has waited for the one before is still not written. The thread that
/// tries to could hold an exec up for as long.
pub(crate) fn stands_still() -> Option<String> {
    let mut sink = sink();
    FLUSHED.wait_while_for(&mut sink, |sink| sink.flushing, PATIENCE);
    let log = IN_USE.get().and_then(|config| config.file.as_deref()).unwrap_or(Path::new("standard error"));
    sink.flushing.then(|| format!("the log takes nothing: is whoever reads or stores {} gone?", log.display()))
}

/// Lets the log wait until this is dropped. If an exec comes first, what waits is lost.
#[must_use]
pub(crate) struct Held(());

impl Held {
    pub(crate) fn new() -> Self {
        sink().holds += 1;
        Self(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        release();
    }
}

/// Who opens a log file.
#[derive(Clone, Copy, PartialEq)]
enum Wait {
    /// A thread that has nothing else to do, and may wait for the reader of a FIFO.
    Yes,
    No,
}

/// Ends a hold. What has waited is written by a thread of its own: the caller has a guest to serve, however long the
/// log takes.
pub(crate) fn release() {
    let mut sink = sink();
    sink.holds = sink.holds.saturating_sub(1);
    let nothing = sink.waiting.is_empty() && sink.unopened().is_none();
    if nothing || sink.holds > 0 || std::mem::replace(&mut sink.flushing, true) {
        return;
    }
    drop(sink);
    if threads::spawn(Role::Log, flush).is_err() {
        flush();
    }
}

/// The same before the end of the process, which waits for the log, but not for ever.
pub(crate) fn finish() {
    release();
    settle();
}

/// Before the end of the process.
pub(crate) fn settle() {
    FLUSHED.wait_while_for(&mut sink(), |sink| sink.flushing, PATIENCE);
}

/// Writes what has waited.
fn flush() {
    let unopened = sink().unopened();
    if let Some(path) = unopened {
        match open(path, Wait::Yes) {
            Ok(file) => sink().go_to(Some(file)),
            Err(error) => log::error!("{error:#}: the log goes to standard error"),
        }
    }
    loop {
        let mut sink = sink();
        if sink.holds > 0 || sink.waiting.is_empty() {
            sink.flushing = false;
            FLUSHED.notify_all();
            return;
        }
        let (lines, file) = (std::mem::take(&mut sink.waiting), sink.file.clone());
        drop(sink);
        write(file, &lines);
    }
}

/// Appended to, so that the image after an update goes on in the same file.
fn open(path: &Path, wait: Wait) -> anyhow::Result<Arc<File>> {
    let flags = libc::O_NOCTTY | if wait == Wait::Yes { 0 } else { libc::O_NONBLOCK };
    let file = File::options().create(true).append(true).mode(MODE).custom_flags(flags).open(path);
    let file = file.and_then(|file| {
        // What is written to it later may wait, in the thread for that.
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        Ok(Arc::new(file))
    });
    file.with_context(|| {
        format!("cannot open the log file {} (if it is a FIFO: does anybody read it?)", path.display())
    })
}

/// What cannot be written (the disk is full, RLIMIT_FSIZE is reached, nobody reads any more) is counted.
fn write(file: Option<Arc<File>>, lines: &[u8]) {
    let written = match file {
        Some(file) => (&*file).write_all(lines),
        None => std::io::stderr().write_all(lines),
    };
    if written.is_err() {
        drop_bytes(lines.len());
    }
}

fn drop_bytes(count: usize) {
    DROPPED.fetch_add(count as u64, Ordering::Relaxed);
}

/// For a signal handler, before the end: at once, unless the log would block. No allocation, no lock.
pub(crate) fn last_words(text: &[u8]) {
    let fd = LOG_FD.load(Ordering::Relaxed);
    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd, and bytes that live during the call; the log's file stays open.
    unsafe {
        if libc::poll(&mut poll, 1, 0) == 1 {
            libc::write(fd, text.as_ptr().cast(), text.len());
        }
    }
}

/// In a child of a test, whatever another test's log was just then.
#[cfg(test)]
pub(crate) fn last_words_to_standard_error() {
    LOG_FD.store(libc::STDERR_FILENO, Ordering::Relaxed);
}

/// Bytes of the log that were dropped, since this image was started.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

struct Sink {
    holds: u32,
    /// Whether a thread writes what has waited.
    flushing: bool,
    waiting: Vec<u8>,
    /// Standard error if there is none.
    file: Option<Arc<File>>,
}

impl Sink {
    /// From now on, and last words before it closes what it went to: nothing else may get those by its number.
    fn go_to(&mut self, file: Option<Arc<File>>) {
        let fd = file.as_ref().map_or(libc::STDERR_FILENO, |file| file.as_raw_fd());
        LOG_FD.store(fd, Ordering::Relaxed);
        self.file = file;
    }

    fn takes_a_line(&self) -> bool {
        self.waiting.is_empty()
            && match &self.file {
                Some(file) => crate::ready(file),
                None => crate::ready(&std::io::stderr()),
            }
    }

    /// The file that the log is to go to, if that is still to be opened.
    fn unopened(&self) -> Option<&'static Path> {
        IN_USE.get().and_then(|config| config.file.as_deref()).filter(|_| self.file.is_none())
    }
}

/// Never held for longer than memory takes.
fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock()
}

/// What the logger writes to, a record at a time.
struct Lines;

impl Write for Lines {
    fn write(&mut self, record: &[u8]) -> std::io::Result<usize> {
        let mut sink = sink();
        let held = sink.holds > 0 || sink.flushing;
        if !held && record.len() <= PIPE_BUF && sink.takes_a_line() {
            let file = sink.file.clone();
            drop(sink);
            write(file, record);
            return Ok(record.len());
        }
        if sink.waiting.len() + record.len() <= WAITING_MAX {
            sink.waiting.extend_from_slice(record);
        } else {
            drop_bytes(record.len());
        }
        if !held {
            // Whoever logs has something else to do than to wait for the log.
            sink.flushing = true;
            drop(sink);
            if threads::spawn(Role::Log, flush).is_err() {
                // The next line tries again.
                self::sink().flushing = false;
            }
        }
        Ok(record.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::read_to_string;

    use rustix::event::{PollFd, PollFlags};

    use super::*;

    #[test]
    fn a_line_has_the_time_at_which_it_was_said() {
        use log::Log;
        let (mut reader, writer) = std::io::pipe().unwrap();
        let logger = builder(log::LevelFilter::Warn, Box::new(writer)).build();
        let record = log::Record::builder().level(log::Level::Warn).target("vmm").args(format_args!("text")).build();
        logger.log(&record);
        drop(logger);
        let mut line = String::new();
        std::io::Read::read_to_string(&mut reader, &mut line).unwrap();
        // [2026-01-02T03:04:05.678Z WARN  vmm] text
        let shape: String = line.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "[0000-00-00T00:00:00.000Z WARN  vmm] text\n");
    }

    /// One test: there is one log.
    #[test]
    fn what_is_logged_waits_for_the_end_of_the_hold_and_a_log_that_takes_nothing_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        sink().go_to(Some(open(&path, Wait::No).unwrap()));
        let line = |text: &str| Lines.write_all(text.as_bytes()).unwrap();
        line("1 ");
        let (outer, inner) = (Held::new(), Held::new());
        line("2 ");
        line("3 ");
        drop(inner);
        assert_eq!(read_to_string(&path).unwrap(), "1 ");
        drop(outer);
        assert_eq!(stands_still(), None);
        line("4 ");
        assert_eq!(read_to_string(&path).unwrap(), "1 2 3 4 ");

        let (reader, writer) = std::io::pipe().unwrap();
        let full = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
        (&writer).write_all(&vec![b'.'; full]).unwrap();
        sink().go_to(Some(Arc::new(File::from(std::os::fd::OwnedFd::from(writer)))));
        drop({
            let held = Held::new();
            line("5 ");
            held
        });
        assert!(stands_still().unwrap().contains("the log takes nothing"));
        line("6 ");
        line(&"7".repeat(WAITING_MAX));
        line("8 ");
        let mut text = vec![0; full + 6];
        std::io::Read::read_exact(&mut &reader, &mut text).unwrap();
        assert_eq!(&text[full..], b"5 6 8 ");
        assert_eq!(stands_still(), None);
        assert_eq!(dropped(), WAITING_MAX as u64);

        // Nobody holds it, but it takes nothing: who logs goes on.
        (&*sink().file.clone().unwrap()).write_all(&vec![b'.'; full]).unwrap();
        line("9 ");
        line("10 ");
        assert!(stands_still().unwrap().contains("the log takes nothing"));
        let mut text = vec![0; full + 5];
        std::io::Read::read_exact(&mut &reader, &mut text).unwrap();
        assert_eq!(&text[full..], b"9 10 ");
        assert_eq!(stands_still(), None);
        drop(reader);
        // A child that another test starts has it until its exec.
        let file = sink().file.clone().unwrap();
        rustix::event::poll(&mut [PollFd::new(&*file, PollFlags::empty())], None).unwrap();
        line("9 ");
        assert_eq!(dropped(), WAITING_MAX as u64 + 2);
        sink().go_to(None);
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        assert!(format!("{:#}", open(&fifo, Wait::No).unwrap_err()).contains("does anybody read it"));
    }
}

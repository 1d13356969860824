//! Where the log goes, and how much of it.

use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::Context;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogConfig {
    /// Standard error if there is none.
    pub file: Option<PathBuf>,
    /// 0 warnings, 1 info, 2 debug, more: trace.
    pub verbose: u8,
}

static IN_USE: OnceLock<LogConfig> = OnceLock::new();

impl LogConfig {
    /// Once per image.
    pub fn start(self) -> anyhow::Result<()> {
        let level = match self.verbose {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            2 => log::LevelFilter::Debug,
            _ => log::LevelFilter::Trace,
        };
        let mut builder = env_logger::Builder::new();
        builder.filter_level(level);
        if let Some(path) = &self.file {
            // Appended to, so that the image after an update goes on in the same file.
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.with_context(|| format!("cannot open the log file {}", path.display()))?;
            builder.target(env_logger::Target::Pipe(Box::new(file)));
        }
        builder.try_init()?;
        let _ = IN_USE.set(self);
        Ok(())
    }

    /// For the next image.
    pub fn in_use() -> Self {
        IN_USE.get().cloned().unwrap_or_default()
    }
}

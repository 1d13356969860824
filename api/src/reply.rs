//! The shape of an answer: what a call returns, and how it fails.

use std::error::Error;

use serde_json::Value;

/// What a successful call returns.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// 204
    Empty,
    /// 200 without a text, which is what clients expect of vmm.shutdown.
    EmptyOk,
    /// 200
    Json(Value),
    /// 200, with what is JSON already.
    Text(&'static str),
}

/// The answer to a request.
pub type Reply = Result<Body, ApiError>;

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", causes.join(": "))]
pub struct ApiError {
    /// HTTP status: 400, 403, 404, 409, 429 or 500.
    pub status: u16,
    /// Outermost cause first; the body of the answer.
    pub causes: Vec<String>,
}

impl ApiError {
    /// With one cause. There is a shorthand for each status.
    pub fn new(status: u16, cause: impl Into<String>) -> Self {
        Self { status, causes: vec![cause.into()] }
    }

    /// 400: the request makes no sense, whatever the state.
    pub fn bad_request(cause: impl Into<String>) -> Self {
        Self::new(400, cause)
    }

    /// 403: this user may not use the API.
    pub fn forbidden(cause: impl Into<String>) -> Self {
        Self::new(403, cause)
    }

    /// 404: no such route, VM or device.
    pub fn not_found(cause: impl Into<String>) -> Self {
        Self::new(404, cause)
    }

    /// 409: the present state forbids the call, or an update is refused.
    pub fn conflict(cause: impl Into<String>) -> Self {
        Self::new(409, cause)
    }

    /// 429: something else is under way; the call may be repeated.
    pub fn busy(cause: impl Into<String>) -> Self {
        Self::new(429, cause)
    }

    /// 500: the VMM or the host failed.
    pub fn internal(cause: impl Into<String>) -> Self {
        Self::new(500, cause)
    }

    /// Appends causes that lie deeper. Of many only the first: what is wrong with a body can take more than the body.
    pub fn because(mut self, causes: impl IntoIterator<Item = String>) -> Self {
        let mut causes = causes.into_iter();
        self.causes.extend(causes.by_ref().take(CAUSES_MAX));
        let left = causes.count();
        if left > 0 {
            self.causes.push(format!("and {left} more"));
        }
        self
    }

    /// An error and all its sources, but for those whose words an outer one has already. Where it is the limit of open
    /// files, which hits just anywhere, what to do is added.
    pub fn chain(status: u16, error: &dyn Error) -> Self {
        let mut causes: Vec<String> = Vec::new();
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            if !causes.iter().any(|outer| outer.contains(&text)) {
                causes.push(text);
            }
            next = error.source();
        }
        let mention = |what: &str| causes.iter().any(|cause| cause.contains(what));
        let limit = [("(os error 24)", "RLIMIT_NOFILE", NO_FILES), ("(os error 23)", "fs.file-max", NO_FILES_ON_HOST)];
        let remedy =
            limit.iter().find(|(errno, remedy, _)| mention(errno) && !mention(remedy)).map(|(_, _, text)| *text);
        causes.extend(remedy.map(str::to_owned));
        Self { status, causes }
    }
}

/// What one call to [`ApiError::because`] appends at most.
const CAUSES_MAX: usize = 100;

/// EMFILE
const NO_FILES: &str =
    "this process has as many files open as it may: raise RLIMIT_NOFILE (ulimit -n; LimitNOFILE= of a systemd unit)";
/// ENFILE
const NO_FILES_ON_HOST: &str = "this host has as many files open as it may: raise fs.file-max";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_keeps_its_order() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::num::ParseIntError);
        let error = ApiError::chain(500, &Outer("x".parse::<u8>().unwrap_err()));
        assert_eq!(error.causes, ["outer", "invalid digit found in string"]);
    }

    #[test]
    fn of_many_causes_the_first_are_said_and_how_many_there_are() {
        let error = ApiError::bad_request("body").because((0..CAUSES_MAX + 7).map(|n| format!("{n} is wrong")));
        assert_eq!(error.causes.len(), CAUSES_MAX + 2);
        assert_eq!(error.causes[CAUSES_MAX..], ["99 is wrong", "and 7 more"]);
    }

    #[test]
    fn nothing_is_said_twice_and_a_full_table_of_files_has_its_remedy() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open {path}: {source}; give a file that exists")]
        struct Open {
            path: &'static str,
            source: std::io::Error,
        }
        let causes = |errno| {
            let error = Open { path: "/k", source: std::io::Error::from_raw_os_error(errno) };
            ApiError::chain(500, &error).causes
        };
        assert_eq!(causes(2), ["cannot open /k: No such file or directory (os error 2); give a file that exists"]);
        assert!(causes(24).len() == 2 && causes(24)[1].contains("RLIMIT_NOFILE"), "{:?}", causes(24));
    }
}

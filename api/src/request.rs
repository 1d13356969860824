//! The endpoints: from method, path and body to a [`Request`], and the shape of the answer.

use std::error::Error;

use serde_json::Value;

use crate::API_PREFIX;
use crate::types::{UpdateRequest, VmConfig, foreign, from_body};

/// What a client asks for. Bodies are parsed and validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Ping,
    VmmShutdown,
    Create(Box<VmConfig>),
    Boot,
    Delete,
    Pause,
    Resume,
    Shutdown,
    Reboot,
    PowerButton,
    Nmi,
    Info,
    Counters,
    Update(UpdateRequest),
}

/// What a successful call returns.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// 204
    Empty,
    /// 200 without a text, which is what clients expect of vmm.shutdown.
    EmptyOk,
    /// 200
    Json(Value),
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

    /// Appends causes that lie deeper.
    pub fn because(mut self, causes: impl IntoIterator<Item = String>) -> Self {
        self.causes.extend(causes);
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

/// EMFILE
const NO_FILES: &str =
    "this process has as many files open as it may: raise RLIMIT_NOFILE (ulimit -n; LimitNOFILE= of a systemd unit)";
/// ENFILE
const NO_FILES_ON_HOST: &str = "this host has as many files open as it may: raise fs.file-max";

/// How the body of an endpoint becomes a request.
enum Build {
    NoBody(Request),
    Body(fn(&[u8]) -> Result<Request, ApiError>),
}

struct Route {
    name: &'static str,
    method: &'static str,
    build: Build,
}

const fn get(name: &'static str, request: Request) -> Route {
    Route { name, method: "GET", build: Build::NoBody(request) }
}

const fn put(name: &'static str, request: Request) -> Route {
    Route { name, method: "PUT", build: Build::NoBody(request) }
}

const fn put_body(name: &'static str, build: fn(&[u8]) -> Result<Request, ApiError>) -> Route {
    Route { name, method: "PUT", build: Build::Body(build) }
}

static ROUTES: &[Route] = &[
    get("vmm.ping", Request::Ping),
    put("vmm.shutdown", Request::VmmShutdown),
    put_body("vm.create", create),
    put("vm.boot", Request::Boot),
    put("vm.delete", Request::Delete),
    put("vm.pause", Request::Pause),
    put("vm.resume", Request::Resume),
    put("vm.shutdown", Request::Shutdown),
    put("vm.reboot", Request::Reboot),
    put("vm.power-button", Request::PowerButton),
    put("vm.nmi", Request::Nmi),
    get("vm.info", Request::Info),
    get("vm.counters", Request::Counters),
    put_body("vm.update", update),
];

fn create(body: &[u8]) -> Result<Request, ApiError> {
    if is_blank(body) {
        return Err(ApiError::bad_request("vm.create: the body is empty: send the configuration of the VM"));
    }
    let config: VmConfig = object("vm.create", body)?;
    config
        .validate()
        .map_err(|problems| ApiError::bad_request("vm.create: the configuration cannot be used").because(problems))?;
    Ok(Request::Create(Box::new(config.settled())))
}

fn update(body: &[u8]) -> Result<Request, ApiError> {
    if is_blank(body) {
        return Ok(Request::Update(UpdateRequest::default()));
    }
    let request: UpdateRequest = object("vm.update", body)?;
    request.validate().map_err(|problems| ApiError::bad_request("vm.update: bad request").because(problems))?;
    Ok(Request::Update(request))
}

fn object<T: serde::de::DeserializeOwned>(name: &str, body: &[u8]) -> Result<T, ApiError> {
    // serde reads an array as the fields of a struct in their order: nobody means that here.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::bad_request(format!("{name}: the body is a JSON array: send an object")));
    }
    from_body(body).map_err(|e| ApiError::bad_request(format!("{name}: the body is not what is expected")).because(e))
}

fn is_blank(body: &[u8]) -> bool {
    body.trim_ascii().is_empty()
}

impl Request {
    /// Finds the endpoint of `path` and parses the body for it.
    ///
    /// # Errors
    /// 404 for an unknown path, 400 for a wrong method or body.
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Self, ApiError> {
        let route = path.strip_prefix(API_PREFIX).and_then(|name| ROUTES.iter().find(|r| r.name == name));
        let Some(Route { name, method: wanted, build }) = route else {
            let error = ApiError::not_found(format!("{path}: there is no such endpoint in this build"));
            return Err(error.because(path.strip_prefix(API_PREFIX).and_then(foreign::no_endpoint)));
        };
        if method != *wanted {
            return Err(ApiError::bad_request(format!("{name}: the method is {method}: use {wanted}")));
        }
        match build {
            Build::Body(build) => build(body),
            Build::NoBody(_) if !is_blank(body) => {
                Err(ApiError::bad_request(format!("{name}: a body was sent: this endpoint takes none")))
            }
            Build::NoBody(request) => Ok(request.clone()),
        }
    }

    /// Name of the endpoint, such as `vm.boot`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ping => "vmm.ping",
            Self::VmmShutdown => "vmm.shutdown",
            Self::Create(_) => "vm.create",
            Self::Boot => "vm.boot",
            Self::Delete => "vm.delete",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::Shutdown => "vm.shutdown",
            Self::Reboot => "vm.reboot",
            Self::PowerButton => "vm.power-button",
            Self::Nmi => "vm.nmi",
            Self::Info => "vm.info",
            Self::Counters => "vm.counters",
            Self::Update(_) => "vm.update",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_builds_the_request_of_its_name() {
        for route in ROUTES {
            let body: &[u8] = if route.name == "vm.create" { br#"{"payload":{"kernel":"/k"}}"# } else { b"" };
            let request = Request::parse(route.method, &format!("{API_PREFIX}{}", route.name), body).unwrap();
            assert_eq!(request.name(), route.name);
        }
    }

    #[test]
    fn refusals() {
        let table: &[(&str, &str, &str, u16, &str)] = &[
            ("GET", "/", "", 404, "no such endpoint"),
            (
                "PUT",
                "/api/v1/vm.add-disk",
                "{}",
                404,
                "no such endpoint in this build: add-disk is not supported by this build",
            ),
            ("PUT", "/api/v1/vm.boot/", "", 404, "no such endpoint"),
            ("GET", "/api/v1/vm.boot", "", 400, "use PUT"),
            ("PUT", "/api/v1/vm.info", "", 400, "use GET"),
            ("PUT", "/api/v1/vm.boot", "{}", 400, "takes none"),
            ("PUT", "/api/v1/vm.create", " ", 400, "body is empty"),
            ("PUT", "/api/v1/vm.create", "[]", 400, "JSON array"),
            ("PUT", "/api/v1/vm.create", "{}", 400, "payload.kernel"),
            ("PUT", "/api/v1/vm.update", "[]", 400, "JSON array"),
            ("PUT", "/api/v1/vm.update", r#"{"sha256":"x"}"#, 400, "sha256sum"),
            ("PUT", "/api/v1/vm.update", r#"{"dryrun":true}"#, 400, "key `dryrun` is unknown"),
        ];
        for (method, path, body, status, message) in table {
            let error = Request::parse(method, path, body.as_bytes()).unwrap_err();
            assert_eq!(error.status, *status, "{method} {path}");
            assert!(error.to_string().contains(message), "{method} {path}: {error}");
        }
        let update = Request::parse("PUT", "/api/v1/vm.update", b"\n").unwrap();
        assert_eq!(update, Request::Update(UpdateRequest::default()));
    }

    #[test]
    fn a_chain_keeps_its_order() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::num::ParseIntError);
        let error = ApiError::chain(500, &Outer("x".parse::<u8>().unwrap_err()));
        assert_eq!(error.causes, ["outer", "invalid digit found in string"]);
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

//! The endpoints: one row for each, from which routes, admission, the subcommands of ch-remote and the OpenAPI document
//! follow. What an endpoint does is up to the [`Backend`](crate::server::Backend), whom the compiler holds to have an
//! answer to each [`Request`].

mod admission;
mod body;
mod not_yet;
mod openapi;

pub use admission::Admission;
pub use body::BodyRule;
pub use not_yet::{NOT_YET, not_yet};
pub use openapi::DOCUMENT;

use crate::reply::ApiError;
use crate::{API_PREFIX, types};
use Admission::{Always, In, WithoutVm};
use Method::{Get, Put};
use body::RequestBody;
use types::VmEvent;
use types::VmState::{Created, Paused, Running, Shutdown};

/// A row of the table.
#[derive(Debug)]
pub struct Endpoint {
    /// Below [`API_PREFIX`], such as `vm.boot`.
    pub name: &'static str,
    /// With which alone it is asked for.
    pub method: Method,
    /// The subcommand of ch-remote.
    pub command: Option<&'static str>,
    /// One line for people.
    about: &'static str,
    /// What is to come with the request.
    pub body: BodyRule,
    /// In which states of the VM it is served.
    pub admission: Admission,
    /// It waits for the end of a boot that is under way.
    pub needs_machine: bool,
    /// It is served while an update is made ready, when all else is answered 429.
    pub in_update: bool,
    /// What the event stream says before it is carried out, and once it was.
    pub begins: Option<VmEvent>,
    /// None too for a boot, whose end is told with its threads.
    pub ends: Option<VmEvent>,
}

/// Of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Changes nothing.
    Get,
    /// Does something.
    Put,
}

impl Method {
    /// As it is on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Get => "GET",
            Put => "PUT",
        }
    }
}

/// From an endpoint's name and a body to the request.
type Reader = fn(&str, &[u8]) -> Result<Request, ApiError>;

/// `Variant(body) -> answer { columns }`, with what it is for above. Without a body none is taken; without an answer
/// there is none (204), and `()` is one without a text (200).
macro_rules! endpoints {
    ($(
        $(#[doc = $about:literal])+
        $variant:ident $(($body:ty))? $(-> $answer:ty)? { $($column:ident: $value:expr,)* }
    )*) => {
        /// What a client asks for. Bodies are parsed and validated.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Request {
            $($(#[doc = $about])+ $variant $(($body))?,)*
        }

        impl Request {
            /// Its row of the table.
            pub fn endpoint(&self) -> &'static Endpoint {
                &ENDPOINTS[match self {
                    $(Self::$variant { .. } => Row::$variant,)*
                } as usize]
            }
        }

        enum Row {
            $($variant,)*
        }

        /// In the order of ch-remote's help.
        pub static ENDPOINTS: &[Endpoint] = &[$(Endpoint {
            about: concat!($($about),+),
            body: rule!($($body)?),
            $($column: $value,)*
        }),*];

        /// Those of the rows, in their order; apart from them, or ch-remote would be linked to all parsers.
        static READERS: &[Reader] = &[$(read!($variant $($body)?)),*];

        #[cfg(test)]
        fn signatures(schemas: &mut schemars::SchemaGenerator) -> Vec<Signature> {
            vec![$(Signature {
                variant: stringify!($variant),
                body: schema!(schemas $($body)?),
                answer: schema!(schemas $($answer)?),
            }),*]
        }
    };
}

macro_rules! rule {
    () => {
        BodyRule::None
    };
    ($body:ty) => {
        <$body as RequestBody>::RULE
    };
}

macro_rules! read {
    ($variant:ident) => {
        |name, bytes| body::none(name, bytes).map(|()| Request::$variant)
    };
    ($variant:ident $body:ty) => {
        |name, bytes| <$body as RequestBody>::read(name, bytes).map(Request::$variant)
    };
}

/// Types of a row, for the document.
#[cfg(test)]
struct Signature {
    variant: &'static str,
    body: Option<schemars::Schema>,
    answer: Option<schemars::Schema>,
}

#[cfg(test)]
macro_rules! schema {
    ($schemas:ident) => {
        None
    };
    ($schemas:ident $type:ty) => {
        Some($schemas.subschema_for::<$type>())
    };
}

endpoints! {
    /// Version, build and process id of the VMM
    Ping -> types::PingInfo {
        method: Get, name: "vmm.ping", command: Some("ping"),
        admission: Always, needs_machine: false, in_update: true,
        begins: None, ends: None,
    }
    /// Configuration and state of the VM
    Info -> types::VmInfo {
        method: Get, name: "vm.info", command: Some("info"),
        admission: In(&[Created, Running, Paused, Shutdown]), needs_machine: false, in_update: true,
        begins: None, ends: None,
    }
    /// Counters of the devices
    Counters -> types::Counters {
        method: Get, name: "vm.counters", command: Some("counters"),
        admission: In(&[Running, Paused]), needs_machine: true, in_update: true,
        begins: None, ends: None,
    }
    /// Create a VM from a JSON configuration
    Create(Box<types::VmConfig>) {
        method: Put, name: "vm.create", command: Some("create"),
        admission: WithoutVm, needs_machine: false, in_update: false,
        begins: None, ends: Some(VmEvent::Created {}),
    }
    /// Boot the VM that was created
    Boot {
        method: Put, name: "vm.boot", command: Some("boot"),
        admission: In(&[Created, Shutdown]), needs_machine: true, in_update: false,
        begins: Some(VmEvent::Booting {}), ends: None,
    }
    /// Pause the VM
    Pause {
        method: Put, name: "vm.pause", command: Some("pause"),
        admission: In(&[Running]), needs_machine: true, in_update: false,
        begins: Some(VmEvent::Pausing {}), ends: Some(VmEvent::Paused {}),
    }
    /// Resume the paused VM
    Resume {
        method: Put, name: "vm.resume", command: Some("resume"),
        admission: In(&[Paused]), needs_machine: true, in_update: false,
        begins: Some(VmEvent::Resuming {}), ends: Some(VmEvent::Resumed {}),
    }
    /// Reset the VM
    Reboot {
        method: Put, name: "vm.reboot", command: Some("reboot"),
        admission: In(&[Running, Paused]), needs_machine: true, in_update: false,
        begins: Some(VmEvent::Rebooting {}), ends: None,
    }
    /// Press the ACPI power button
    PowerButton {
        method: Put, name: "vm.power-button", command: Some("power-button"),
        admission: In(&[Running]), needs_machine: true, in_update: false,
        begins: None, ends: None,
    }
    /// Send a non-maskable interrupt to the guest
    Nmi {
        method: Put, name: "vm.nmi", command: Some("nmi"),
        admission: In(&[Running]), needs_machine: true, in_update: false,
        begins: None, ends: None,
    }
    /// Stop the VM; it can be booted again
    Shutdown {
        method: Put, name: "vm.shutdown", command: Some("shutdown"),
        admission: In(&[Running, Paused]), needs_machine: false, in_update: false,
        begins: None, ends: Some(VmEvent::Shutdown {}),
    }
    /// Delete the VM
    Delete {
        method: Put, name: "vm.delete", command: Some("delete"),
        admission: In(&[Created, Running, Paused, Shutdown]), needs_machine: false, in_update: false,
        begins: None, ends: Some(VmEvent::Deleted {}),
    }
    /// End the VMM
    VmmShutdown -> () {
        method: Put, name: "vmm.shutdown", command: Some("shutdown-vmm"),
        admission: Always, needs_machine: false, in_update: true,
        begins: None, ends: None,
    }
    /// Replace the VMM under the running guest
    Update(types::UpdateRequest) -> types::UpdateReport {
        method: Put, name: "vm.update", command: Some("update"),
        admission: Always, needs_machine: true, in_update: false,
        begins: None, ends: None,
    }
    /// This API, as an OpenAPI document
    OpenApi -> serde_json::Map<String, serde_json::Value> {
        method: Get, name: "openapi.json", command: None,
        admission: Always, needs_machine: false, in_update: true,
        begins: None, ends: None,
    }
}

impl Endpoint {
    /// What it is for: one line, for help and document.
    pub fn about(&self) -> &'static str {
        self.about.trim_start()
    }
}

impl Request {
    /// Finds the endpoint of `path` and parses the body for it.
    ///
    /// # Errors
    /// 404 for an unknown path, 400 for a wrong method or body.
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Self, ApiError> {
        let name = path.strip_prefix(API_PREFIX);
        let mut rows = ENDPOINTS.iter().zip(READERS);
        let Some((endpoint, read)) = name.and_then(|name| rows.find(|(endpoint, _)| endpoint.name == name)) else {
            let error = ApiError::not_found(format!("{path}: there is no such endpoint in this build"));
            return Err(error.because(name.and_then(not_yet)));
        };
        let (name, wanted) = (endpoint.name, endpoint.method.name());
        if method != wanted {
            return Err(ApiError::bad_request(format!("{name}: the method is {method}: use {wanted}")));
        }
        read(name, body)
    }

    /// Name of the endpoint, such as `vm.boot`.
    pub fn name(&self) -> &'static str {
        self.endpoint().name
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use types::UpdateRequest;

    #[test]
    fn every_route_builds_the_request_of_its_name() {
        for route in ENDPOINTS {
            let body: &[u8] = if route.name == "vm.create" { br#"{"payload":{"kernel":"/k"}}"# } else { b"" };
            let request = Request::parse(route.method.name(), &format!("{API_PREFIX}{}", route.name), body).unwrap();
            assert_eq!(request.name(), route.name);
        }
    }

    #[test]
    fn what_the_event_stream_says_of_requests() {
        let all = ENDPOINTS.iter().filter(|row| row.begins.is_some() || row.ends.is_some());
        let found: Vec<_> = all.map(|row| (row.name, row.begins.clone(), row.ends.clone())).collect();
        let expected = [
            ("vm.create", None, Some(VmEvent::Created {})),
            ("vm.boot", Some(VmEvent::Booting {}), None),
            ("vm.pause", Some(VmEvent::Pausing {}), Some(VmEvent::Paused {})),
            ("vm.resume", Some(VmEvent::Resuming {}), Some(VmEvent::Resumed {})),
            ("vm.reboot", Some(VmEvent::Rebooting {}), None),
            ("vm.shutdown", None, Some(VmEvent::Shutdown {})),
            ("vm.delete", None, Some(VmEvent::Deleted {})),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn no_name_is_there_twice() {
        let (mut names, mut commands) = (HashSet::new(), HashSet::new());
        for endpoint in ENDPOINTS {
            assert!(names.insert(endpoint.name), "{}", endpoint.name);
            assert!(endpoint.command.is_none_or(|command| commands.insert(command)), "{}", endpoint.name);
        }
        for (name, _) in NOT_YET {
            assert!(names.insert(name) && commands.insert(name), "{name}");
            assert!(!names.contains(format!("vm.{name}").as_str()), "{name} is there");
        }
    }

    #[test]
    fn the_guide_names_every_endpoint() {
        let guide = include_str!("../../../docs/guide.md");
        let section = guide.split("\n## ").find(|section| section.starts_with("REST\n")).unwrap();
        let words: HashSet<&str> = section
            .split(|c: char| c.is_whitespace() || ",;:`".contains(c))
            .map(|word| word.trim_end_matches('.'))
            .collect();
        for endpoint in ENDPOINTS {
            assert!(words.contains(endpoint.name), "{}", endpoint.name);
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
}

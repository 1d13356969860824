//! Whether a request makes sense in the present state: a pure function, so that it can be seen whole.

use super::Endpoint;
use crate::reply::ApiError;
use crate::types::VmState;

/// When an endpoint is served.
#[derive(Clone, Copy, Debug)]
pub enum Admission {
    /// Whether there is a VM or not.
    Always,
    /// Where there is none yet.
    WithoutVm,
    /// Where there is one in one of these states.
    In(&'static [VmState]),
}

impl Endpoint {
    /// `state`: None where there is no VM.
    ///
    /// # Errors
    /// 404 where there is no VM, 409 where there is one in another state.
    pub fn admit(&self, state: Option<VmState>) -> Result<(), ApiError> {
        let name = self.name;
        match (self.admission, state) {
            (Admission::Always, _) | (Admission::WithoutVm, None) => Ok(()),
            (Admission::WithoutVm, Some(_)) => Err(ApiError::conflict("there is a VM already: delete it first")),
            (Admission::In(_), None) => Err(ApiError::not_found(format!("{name}: there is no VM: create one first"))),
            (Admission::In(states), Some(state)) if states.contains(&state) => Ok(()),
            (Admission::In(states), Some(state)) => {
                let allowed = named(states);
                Err(ApiError::conflict(format!("{name}: the VM is {state:?}, it would have to be {allowed}")))
            }
        }
    }
}

pub(super) fn named(states: &[VmState]) -> String {
    states.iter().map(|state| format!("{state:?}")).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::super::ENDPOINTS;
    use super::*;

    /// Statuses without a VM, and with one in each state; 0 is admission.
    #[test]
    fn the_table() {
        use VmState::{Created, Paused, Running, Shutdown};
        let states = [None, Some(Created), Some(Running), Some(Paused), Some(Shutdown)];
        let expected = [
            ("vmm.ping", [0, 0, 0, 0, 0]),
            ("vm.info", [404, 0, 0, 0, 0]),
            ("vm.counters", [404, 409, 0, 0, 409]),
            ("vm.create", [0, 409, 409, 409, 409]),
            ("vm.boot", [404, 0, 409, 409, 0]),
            ("vm.pause", [404, 409, 0, 409, 409]),
            ("vm.resume", [404, 409, 409, 0, 409]),
            ("vm.reboot", [404, 409, 0, 0, 409]),
            ("vm.power-button", [404, 409, 0, 409, 409]),
            ("vm.nmi", [404, 409, 0, 409, 409]),
            ("vm.shutdown", [404, 409, 0, 0, 409]),
            ("vm.delete", [404, 0, 0, 0, 0]),
            ("vmm.shutdown", [0, 0, 0, 0, 0]),
            ("vm.update", [0, 0, 0, 0, 0]),
            ("openapi.json", [0, 0, 0, 0, 0]),
        ];
        let status = |endpoint: &Endpoint, state| endpoint.admit(state).err().map_or(0, |error| error.status);
        let found: Vec<_> = ENDPOINTS.iter().map(|row| (row.name, states.map(|state| status(row, state)))).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_refusal_says_what_is_and_what_would_have_to_be() {
        let boot = ENDPOINTS.iter().find(|row| row.name == "vm.boot").unwrap();
        let error = |state| boot.admit(state).unwrap_err().to_string();
        assert_eq!(error(None), "vm.boot: there is no VM: create one first");
        let running = "vm.boot: the VM is Running, it would have to be Created or Shutdown";
        assert_eq!(error(Some(VmState::Running)), running);
    }
}

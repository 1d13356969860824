//! Whether a request makes sense in the present state: a pure function, so that it can be seen whole.

use theseus_api::types::VmState;
use theseus_api::{ApiError, Request};

/// `state`: None where there is no VM.
pub fn admit(state: Option<VmState>, request: &Request) -> Result<(), ApiError> {
    use VmState::{Created, Paused, Running, Shutdown};
    let allowed: &[VmState] = match request {
        Request::Ping | Request::VmmShutdown | Request::Update(_) => return Ok(()),
        Request::Create(_) if state.is_none() => return Ok(()),
        Request::Create(_) => return Err(ApiError::conflict("there is a VM already: delete it first")),
        Request::Boot => &[Created, Shutdown],
        Request::Delete | Request::Info => &[Created, Running, Paused, Shutdown],
        Request::Pause => &[Running],
        Request::Resume => &[Paused],
        Request::Shutdown | Request::Reboot | Request::Counters => &[Running, Paused],
        Request::PowerButton | Request::Nmi => &[Running],
    };
    match state {
        None => Err(ApiError::not_found(format!("{}: there is no VM: create one first", request.name()))),
        Some(state) if allowed.contains(&state) => Ok(()),
        Some(state) => {
            let allowed: Vec<String> = allowed.iter().map(|state| format!("{state:?}")).collect();
            let (name, allowed) = (request.name(), allowed.join(" or "));
            Err(ApiError::conflict(format!("{name}: the VM is {state:?}, it would have to be {allowed}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use theseus_api::types::{UpdateRequest, VmConfig};

    #[test]
    fn the_table() {
        let config = || Request::Create(Box::<VmConfig>::default());
        let status = |state, request: &Request| admit(state, request).err().map(|error| error.status);
        assert_eq!(status(None, &config()), None);
        assert_eq!(status(Some(VmState::Created), &config()), Some(409));
        assert_eq!(status(None, &Request::Boot), Some(404));
        assert_eq!(status(Some(VmState::Running), &Request::Boot), Some(409));
        assert_eq!(status(Some(VmState::Shutdown), &Request::Boot), None);
        assert_eq!(status(Some(VmState::Paused), &Request::Pause), Some(409));
        assert_eq!(status(Some(VmState::Running), &Request::Resume), Some(409));
        assert_eq!(status(Some(VmState::Created), &Request::Nmi), Some(409));
        for state in [None, Some(VmState::Created), Some(VmState::Paused)] {
            assert_eq!(status(state, &Request::Update(UpdateRequest::default())), None);
        }
    }
}

//! Bodies of requests: from bytes to what has been checked.

use serde::de::DeserializeOwned;

use crate::reply::ApiError;
use crate::types::{UpdateRequest, VmConfig, from_body};

/// Whether an endpoint takes a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyRule {
    /// A body is an error, unless it is blank.
    None,
    /// An empty one means all defaults.
    Optional,
    /// An empty one is an error.
    Required,
}

/// What a body is read as.
pub(super) trait RequestBody: Sized {
    const RULE: BodyRule;

    /// # Errors
    /// 400, with all that is wrong. `name`: of the endpoint.
    fn read(name: &str, body: &[u8]) -> Result<Self, ApiError>;
}

impl RequestBody for Box<VmConfig> {
    const RULE: BodyRule = BodyRule::Required;

    fn read(name: &str, body: &[u8]) -> Result<Self, ApiError> {
        if is_blank(body) {
            let error = format!("{name}: the body is empty: send the configuration of the VM");
            return Err(ApiError::bad_request(error));
        }
        let config: VmConfig = object(name, body)?;
        let unusable = || ApiError::bad_request(format!("{name}: the configuration cannot be used"));
        config.validate().map_err(|problems| unusable().because(problems))?;
        Ok(Self::new(config.settled()))
    }
}

impl RequestBody for UpdateRequest {
    const RULE: BodyRule = BodyRule::Optional;

    fn read(name: &str, body: &[u8]) -> Result<Self, ApiError> {
        if is_blank(body) {
            return Ok(Self::default());
        }
        let request: Self = object(name, body)?;
        let bad = || ApiError::bad_request(format!("{name}: bad request"));
        request.validate().map_err(|problems| bad().because(problems))?;
        Ok(request)
    }
}

/// For an endpoint that takes none.
pub(super) fn none(name: &str, body: &[u8]) -> Result<(), ApiError> {
    if is_blank(body) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!("{name}: a body was sent: this endpoint takes none")))
}

fn object<T: DeserializeOwned>(name: &str, body: &[u8]) -> Result<T, ApiError> {
    // serde reads an array as the fields of a struct in their order: nobody means that here.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::bad_request(format!("{name}: the body is a JSON array: send an object")));
    }
    from_body(body).map_err(|e| ApiError::bad_request(format!("{name}: the body is not what is expected")).because(e))
}

fn is_blank(body: &[u8]) -> bool {
    body.trim_ascii().is_empty()
}

//! Requests of the API behind the HTTP parser: any body for any endpoint. What is accepted says the same when it is
//! sent again as it is shown.

use theseus_api::endpoint::ENDPOINTS;
use theseus_api::types::{EventLine, PingInfo, UpdateReport, UpdateRequest, VmConfig, VmInfo};
use theseus_api::{API_PREFIX, Request};

use crate::input::Input;

/// Bytes of a refusal for each byte of a request, and beside that: whoever asks for more has sent more.
const REFUSAL: usize = 16;
const REFUSAL_MIN: usize = 32 << 10;

/// What a client reads: answers and events, which may say more than it knows.
fn read_answer(choice: u8, text: &[u8]) {
    fn again<T: serde::de::DeserializeOwned + serde::Serialize + PartialEq>(text: &[u8]) {
        let Ok(value) = serde_json::from_slice::<T>(text) else { return };
        let shown = serde_json::to_vec(&value).expect("it can be shown");
        assert!(serde_json::from_slice::<T>(&shown).is_ok_and(|again| again == value), "{}", text.escape_ascii());
    }
    match choice % 5 {
        0 => again::<VmConfig>(text),
        1 => again::<VmInfo>(text),
        2 => again::<UpdateReport>(text),
        3 => again::<EventLine>(text),
        _ => again::<PingInfo>(text),
    }
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let Some(choice) = input.u8() else { return };
    let Some(endpoint) = ENDPOINTS.get(usize::from(choice)) else {
        return read_answer(choice, &data[1..]);
    };
    let body = &data[1..];
    let path = format!("{API_PREFIX}{}", endpoint.name);
    let parse = |body: &[u8]| Request::parse(endpoint.method.name(), &path, body);
    match parse(body) {
        Ok(request) => {
            assert_eq!(request.name(), endpoint.name);
            let shown = match &request {
                Request::Create(config) => serde_json::to_vec::<VmConfig>(config),
                Request::Update(update) => serde_json::to_vec::<UpdateRequest>(update),
                _ => Ok(Vec::new()),
            };
            let shown = shown.expect("it can be shown");
            assert_eq!(parse(&shown).as_ref(), Ok(&request), "{}", shown.escape_ascii());
        }
        Err(error) => {
            assert_eq!(error.status, 400, "{error}");
            let size = error.to_string().len();
            assert!(size > 0 && size <= REFUSAL_MIN + REFUSAL * body.len(), "{size} bytes of refusal");
        }
    }
}

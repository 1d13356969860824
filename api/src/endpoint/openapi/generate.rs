//! From the table to the document (OpenAPI 3.1, whose schemas are those of JSON Schema 2020-12).

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use serde_json::{Map, Value, json};

use super::super::{Admission, BodyRule, ENDPOINTS, Endpoint, Signature, admission, signatures};
use crate::types::{EventLine, VmEvent};

const JSON: &str = "application/json";

pub(super) fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut schemas = settings.with_transform(RecursiveTransform(on_one_line)).into_generator();
    let rows = ENDPOINTS.iter().zip(signatures(&mut schemas));
    let paths: Map<String, Value> = rows
        .map(|(endpoint, signature)| {
            let method = endpoint.method.name().to_lowercase();
            (format!("/{}", endpoint.name), json!({ method: operation(endpoint, &signature) }))
        })
        .collect();
    schemas.subschema_for::<EventLine>();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Theseus",
            "description": "On the unix socket of --api-socket. A key that is unknown is an error unless its value \
                            says nothing, such as null or false. The lines of --event-monitor are of the schema \
                            EventLine.",
            "version": "1",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost/api/v1" }],
        "paths": paths,
        "components": {
            "schemas": schemas.take_definitions(true),
            "responses": {
                "Error": {
                    "description": "400: a bad request; 403: a user who may not use the API; 404: no such endpoint, or \
                                    no VM; 409: a state that forbids the call, or an update that is refused; 429: too \
                                    much under way; 500: the VMM or the host failed",
                    "content": { JSON: { "schema": {
                        "description": "Causes, the outermost first",
                        "type": "array",
                        "items": { "type": "string" },
                    } } },
                },
            },
        },
    })
}

fn operation(endpoint: &Endpoint, Signature { variant, body, answer }: &Signature) -> Value {
    let (first, rest) = variant.split_at(1);
    let mut operation = json!({
        "operationId": format!("{}{rest}", first.to_lowercase()),
        "summary": endpoint.about(),
        "description": description(endpoint),
        "responses": responses(endpoint, answer.as_ref()),
    });
    if let Some(schema) = body {
        let required = endpoint.body == BodyRule::Required;
        operation["requestBody"] = json!({ "required": required, "content": { JSON: { "schema": schema } } });
    }
    if let Some(command) = endpoint.command {
        operation["x-ch-remote"] = command.into();
    }
    operation
}

fn description(endpoint: &Endpoint) -> String {
    let admission = match endpoint.admission {
        Admission::Always => "Served whether there is a VM or not".to_owned(),
        Admission::WithoutVm => "There must be no VM yet".to_owned(),
        Admission::In(states) => format!("The VM must be {}", admission::named(states)),
    };
    let boot = if endpoint.needs_machine { "; waits for the end of a boot that is under way" } else { "" };
    let update = if endpoint.in_update { "; also served while an update is made ready" } else { "" };
    let said: Vec<String> = [&endpoint.begins, &endpoint.ends].into_iter().flatten().map(event_name).collect();
    let events = if said.is_empty() { String::new() } else { format!("; the event stream says {}", said.join(", ")) };
    format!("{admission}{boot}{update}{events}.")
}

fn event_name(event: &VmEvent) -> String {
    json!(event)["event"].as_str().unwrap().to_owned()
}

fn responses(endpoint: &Endpoint, answer: Option<&Schema>) -> Value {
    let has_text = |schema: &&Schema| schema.get("type").and_then(Value::as_str) != Some("null");
    let mut responses = match (answer, answer.filter(has_text)) {
        (None, _) => json!({ "204": { "description": "Done" } }),
        (_, None) => json!({ "200": { "description": "Done" } }),
        (_, Some(schema)) => json!({ "200": { "description": "Done", "content": { JSON: { "schema": schema } } } }),
    };
    let error = json!({ "$ref": "#/components/responses/Error" });
    let statuses: &[&str] = match endpoint.admission {
        Admission::Always => &["default"],
        Admission::WithoutVm => &["default", "409"],
        Admission::In(_) => &["default", "404", "409"],
    };
    statuses.iter().for_each(|status| responses[*status] = error.clone());
    responses
}

/// Comments are wrapped; what is made of them is not.
fn on_one_line(schema: &mut Schema) {
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
}

#[test]
fn comments_are_on_one_line() {
    let mut schema = schemars::json_schema!({ "items": { "description": "one\ntwo" } });
    RecursiveTransform(on_one_line).transform(&mut schema);
    assert_eq!(schema.as_value()["items"]["description"], "one two");
}

//! The API for machines, as an OpenAPI document. It is generated from the table and the types of bodies and answers,
//! but not in this process: it is kept in the repository, where a test holds it against both, and served as it is.

#[cfg(test)]
mod generate;

/// What `openapi.json` answers.
pub const DOCUMENT: &str = include_str!("../../../openapi.json");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::super::{BodyRule, ENDPOINTS, Method};
    use super::*;
    use crate::{API_PREFIX, Request};

    fn kept() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    fn generated() -> String {
        format!("{:#}\n", generate::document())
    }

    #[test]
    fn the_document_is_what_the_table_and_the_types_say() {
        let remedy = "cargo test -p theseus-api -- --ignored write_the_document";
        assert!(DOCUMENT == generated(), "api/openapi.json is not what is generated: {remedy}");
    }

    #[test]
    #[ignore = "writes api/openapi.json"]
    fn write_the_document() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"), generated()).unwrap();
    }

    #[test]
    fn what_is_documented_is_served_and_what_is_served_is_documented() {
        let document = kept();
        let mut documented = BTreeSet::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            let path = format!("{API_PREFIX}{}", path.trim_start_matches('/'));
            for (method, operation) in operations.as_object().unwrap() {
                let method = method.to_uppercase();
                documented.insert((method.clone(), path.clone()));
                let required = operation["requestBody"]["required"].as_bool();
                let body = if required == Some(true) { r#"{"payload":{"kernel":"/k"}}"# } else { "" };
                Request::parse(&method, &path, body.as_bytes()).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
                let refused = Request::parse(&method, &path, b"{}").is_err();
                assert_eq!(refused, required != Some(false), "{method} {path}");
            }
        }
        let served = ENDPOINTS.iter().map(|row| (row.method.name().to_owned(), format!("{API_PREFIX}{}", row.name)));
        assert_eq!(documented, served.collect());
        assert!(ENDPOINTS.iter().all(|row| row.method == Method::Put || row.body == BodyRule::None));
    }

    /// What a generator of clients would stumble over.
    #[test]
    fn all_that_is_referred_to_is_there_and_nothing_speaks_of_our_code() {
        fn walk<'a>(value: &'a Value, see: &mut impl FnMut(&'a str, &'a Value)) {
            match value {
                Value::Object(map) => map.iter().for_each(|(key, value)| {
                    see(key, value);
                    walk(value, see);
                }),
                Value::Array(list) => list.iter().for_each(|value| walk(value, see)),
                _ => {}
            }
        }
        let document = kept();
        let (mut ids, mut count) = (BTreeSet::new(), 0);
        walk(&document, &mut |key, value| match (key, value.as_str()) {
            ("$ref", Some(to)) => {
                count += 1;
                assert!(document.pointer(to.trim_start_matches('#')).is_some(), "{to}");
            }
            ("operationId", Some(id)) => assert!(ids.insert(id), "{id}"),
            ("description", Some(text)) => {
                let of_code = ["[`", "::", "None ", "Some("];
                assert!(!of_code.iter().any(|word| text.contains(word)), "{text}");
            }
            _ => {}
        });
        assert!(count > 20 && ids.len() == ENDPOINTS.len(), "{count} {ids:?}");
        let boot = &document["components"]["schemas"]["CpusConfig"]["properties"]["boot_vcpus"];
        assert_eq!((boot["minimum"].as_u64(), boot["maximum"].as_u64()), (Some(1), Some(64)));
        assert!(DOCUMENT.is_ascii());
    }
}

//! Documents against a JSON Schema (2020-12), as far as `schema.json` uses it: a keyword that is not
//! known here is a failure, never let through.

use regex::Regex;
use serde_json::{Map, Value};

/// A schema.
pub struct Schema(Value);

impl Schema {
    /// The schema of a text.
    pub fn parse(text: &str) -> Self {
        Schema(serde_json::from_str(text).unwrap())
    }

    /// What is wrong with a document; nothing where nothing is.
    pub fn problems(&self, document: &Value) -> Vec<String> {
        let mut problems = Vec::new();
        self.check(&self.0, document, "", &mut problems);
        problems
    }

    /// Whether nothing is wrong with a document.
    pub fn is_valid(&self, document: &Value) -> bool {
        self.problems(document).is_empty()
    }

    fn check(&self, schema: &Value, value: &Value, place: &str, problems: &mut Vec<String>) {
        let schema = schema.as_object().expect("a schema is an object");
        for (keyword, rule) in schema {
            let holds = match keyword.as_str() {
                "$schema" | "$defs" | "title" | "description" => true,
                "$ref" => {
                    let pointer = rule.as_str().unwrap().strip_prefix('#').unwrap();
                    let target = self.0.pointer(pointer).expect(pointer);
                    self.check(target, value, place, problems);
                    true
                }
                "type" => match rule {
                    Value::Array(names) => names.iter().any(|name| is_of(value, name)),
                    name => is_of(value, name),
                },
                "const" => value == rule,
                "enum" => rule.as_array().unwrap().contains(value),
                "oneOf" => {
                    let choices = rule.as_array().unwrap().iter();
                    let fits = |choice: &&Value| {
                        let mut problems = Vec::new();
                        self.check(choice, value, place, &mut problems);
                        problems.is_empty()
                    };
                    choices.filter(fits).count() == 1
                }
                "required" | "properties" | "additionalProperties" => match value {
                    Value::Object(members) => {
                        self.check_members(schema, keyword, members, place, problems)
                    }
                    _ => true,
                },
                "items" | "minItems" | "maxItems" => match value {
                    Value::Array(items) => match keyword.as_str() {
                        "minItems" => items.len() as u64 >= rule.as_u64().unwrap(),
                        "maxItems" => items.len() as u64 <= rule.as_u64().unwrap(),
                        _ => {
                            for (index, item) in items.iter().enumerate() {
                                self.check(rule, item, &format!("{place}/{index}"), problems);
                            }
                            true
                        }
                    },
                    _ => true,
                },
                "pattern" => value
                    .as_str()
                    .is_none_or(|text| Regex::new(rule.as_str().unwrap()).unwrap().is_match(text)),
                "minLength" => value
                    .as_str()
                    .is_none_or(|text| text.chars().count() as u64 >= rule.as_u64().unwrap()),
                "minimum" | "maximum" | "exclusiveMinimum" => {
                    let limit = rule.as_f64().unwrap();
                    value.as_f64().is_none_or(|number| match keyword.as_str() {
                        "minimum" => number >= limit,
                        "maximum" => number <= limit,
                        _ => number > limit,
                    })
                }
                unknown => panic!("the schema has a keyword that is not checked: {unknown}"),
            };
            if !holds {
                problems.push(format!("{place}: {value} against {keyword} {rule}"));
            }
        }
    }

    fn check_members(
        &self,
        schema: &Map<String, Value>,
        keyword: &str,
        members: &Map<String, Value>,
        place: &str,
        problems: &mut Vec<String>,
    ) -> bool {
        let rule = &schema[keyword];
        match keyword {
            "required" => {
                let mut names = rule.as_array().unwrap().iter();
                names.all(|name| members.contains_key(name.as_str().unwrap()))
            }
            "properties" => {
                for (name, rule) in rule.as_object().unwrap() {
                    if let Some(member) = members.get(name) {
                        self.check(rule, member, &format!("{place}/{name}"), problems);
                    }
                }
                true
            }
            _ => {
                assert_eq!(rule, &Value::Bool(false), "the only form that is known");
                let known = schema["properties"].as_object().unwrap();
                members.keys().all(|name| known.contains_key(name))
            }
        }
    }
}

fn is_of(value: &Value, name: &Value) -> bool {
    match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        name => panic!("no type of JSON: {name}"),
    }
}

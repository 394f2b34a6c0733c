//! One setting on its way from "typed somewhere" to "checked".

use serde::Serialize;

use super::error::{ConfigError, Key, Origin, Place};

/// A setting that somebody may have typed.
pub(super) struct Setting<T> {
    pub(super) key: Key,
    pub(super) typed: Option<Value<T>>,
}

/// A value, with the place it comes from for the message if it is refused.
pub(super) struct Value<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

impl<T: Serialize> Setting<T> {
    /// The typed value, or the default.
    pub(super) fn or(self, default: T) -> Value<T> {
        let key = self.key;
        self.typed.unwrap_or_else(|| Value {
            place: Place {
                key,
                origin: Origin::Default,
                found: shown(&default),
            },
            value: default,
        })
    }

    /// The typed value; the error shows `example`.
    pub(super) fn required(self, example: &'static str) -> Result<Value<T>, ConfigError> {
        self.typed.ok_or(ConfigError::Missing {
            key: self.key,
            example,
        })
    }

    /// Refuses the key because the adapter is of another kind.
    pub(super) fn not_with(
        &self,
        kind: &'static str,
        belongs_to: &'static str,
    ) -> Result<(), ConfigError> {
        match &self.typed {
            None => Ok(()),
            Some(Value { place, .. }) => Err(ConfigError::WrongKind {
                place: place.clone(),
                belongs_to,
                kind,
            }),
        }
    }
}

impl<T> Value<T> {
    /// The value, when `is_allowed`; otherwise an error saying that it must be `allowed`.
    pub(super) fn check(
        self,
        allowed: impl Into<String>,
        is_allowed: impl FnOnce(&T) -> bool,
    ) -> Result<T, ConfigError> {
        if is_allowed(&self.value) {
            return Ok(self.value);
        }
        Err(ConfigError::Invalid {
            place: self.place,
            allowed: allowed.into(),
        })
    }

    /// The value unchecked: every value of its type is allowed.
    pub(super) fn any(self) -> T {
        self.value
    }
}

impl<T: PartialOrd + std::fmt::Display> Value<T> {
    /// The value, when it lies in `low..=high`.
    pub(super) fn between(self, low: T, high: T) -> Result<T, ConfigError> {
        self.check(format!("from {low} to {high}"), |value| {
            low <= *value && *value <= high
        })
    }
}

/// Real numbers, for checks shared by f32 and f64. A NaN passes none of them.
pub(super) trait Real: Copy {
    fn widen(self) -> f64;
}

impl Real for f32 {
    fn widen(self) -> f64 {
        self.into()
    }
}

impl Real for f64 {
    fn widen(self) -> f64 {
        self
    }
}

impl<T: Real> Value<T> {
    pub(super) fn above_zero(self) -> Result<T, ConfigError> {
        self.check("a finite number above 0", |x| {
            x.widen() > 0.0 && x.widen().is_finite()
        })
    }

    pub(super) fn not_negative(self) -> Result<T, ConfigError> {
        self.check("a finite number, 0 or more", |x| {
            x.widen() >= 0.0 && x.widen().is_finite()
        })
    }

    /// 0 included, 1 not.
    pub(super) fn below_one(self) -> Result<T, ConfigError> {
        self.check("a number from 0 to below 1", |x| {
            (0.0..1.0).contains(&x.widen())
        })
    }
}

/// A value as TOML.
pub(super) fn shown<T: Serialize>(value: &T) -> String {
    match toml::Value::try_from(value) {
        // A flag that is stored as f32, in the digits that were typed.
        Ok(toml::Value::Float(value)) if f64::from(value as f32) == value => {
            toml::Value::Float(shortest(value as f32)).to_string()
        }
        Ok(value) => value.to_string(),
        // TOML has no integers above i64::MAX and no paths outside UTF-8.
        Err(_) => serde_json::to_string(value).unwrap_or_else(|_| "(not UTF-8)".to_owned()),
    }
}

/// The f64 with the shortest digits that is this f32.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

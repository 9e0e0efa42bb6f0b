//! Python values of the non-tensor arguments: generous in the type, clear about the rest.

use std::borrow::Cow;

use mtlflashattn_core as core;
use pyo3::exceptions::PyOverflowError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyInt, PyString, PyTuple};

use crate::error::{Error, Result};

/// Longest `repr` that a message quotes.
const MAX_QUOTED: usize = 60;

/// What `value` is, for messages: numbers and strings are quoted, anything else is named by its type.
pub fn describe(value: &Bound<'_, PyAny>) -> String {
    if value.is_none() {
        return "None".into();
    }
    let kind = value.get_type();
    let name = kind.fully_qualified_name().map_or_else(|_| "object".into(), |n| n.to_string_lossy().into_owned());
    let is_short = value.is_instance_of::<PyInt>()
        || value.is_instance_of::<PyFloat>()
        || value.is_instance_of::<PyString>()
        || value.is_instance_of::<PyTuple>();
    match value.repr() {
        Ok(text) if is_short => {
            let text = text.to_string_lossy();
            if text.chars().count() <= MAX_QUOTED { format!("{text} ({name})") } else { with_article(&name) }
        }
        _ => with_article(&name),
    }
}

fn with_article(name: &str) -> String {
    let vowel = name.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']);
    format!("{} {name}", if vowel { "an" } else { "a" })
}

pub fn wrong_type(argument: &'static str, value: &Bound<'_, PyAny>, allowed: impl Into<Cow<'static, str>>) -> Error {
    Error::WrongType { argument, got: describe(value), allowed: allowed.into() }
}

/// A real number: anything with `__float__` or `__index__`.
pub fn float(argument: &'static str, value: &Bound<'_, PyAny>, allowed: &'static str) -> Result<f64> {
    if let Ok(exact) = value.cast_exact::<PyFloat>() {
        return Ok(exact.value());
    }
    reject_gradient(argument, value)?;
    value.extract().map_err(|_| wrong_type(argument, value, allowed))
}

/// `None` or a real number.
pub fn optional_float(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<Option<f64>> {
    if value.is_none() { Ok(None) } else { float(argument, value, "None or a real number").map(Some) }
}

/// A tensor that needs a gradient must not become a plain number without one.
fn reject_gradient(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<()> {
    match value.getattr_opt(intern!(value.py(), "requires_grad"))? {
        Some(requires_grad) if requires_grad.is_truthy()? => Err(Error::Problem(core::Error::Unsupported {
            argument,
            got: "a tensor that requires grad".into(),
            instead: "pass a Python number".into(),
        })),
        _ => Ok(()),
    }
}

/// A truth value: anything with `__bool__` but `None`.
pub fn truth(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<bool> {
    if let Ok(exact) = value.cast_exact::<PyBool>() {
        return Ok(exact.is_true());
    }
    let has_bool = !value.is_none() && value.hasattr(intern!(value.py(), "__bool__"))?;
    let truth = has_bool.then(|| value.is_truthy().ok()).flatten();
    truth.ok_or_else(|| wrong_type(argument, value, "True or False"))
}

/// A whole number: anything with `__index__`.
pub fn index(argument: &'static str, value: &Bound<'_, PyAny>, allowed: &'static str) -> Result<i64> {
    value.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            return Error::Problem(core::Error::Value {
                argument,
                got: describe(value),
                allowed: "integers of at most 64 bits".into(),
            });
        }
        wrong_type(argument, value, allowed)
    })
}

const WINDOW: &str = "window_size";
const WINDOW_ALLOWED: &str = "two integers (left, right), negative for no bound";

/// `window_size`: two whole numbers in a tuple, a list, a tensor or any other iterable.
pub fn window(value: &Bound<'_, PyAny>) -> Result<(i64, i64)> {
    if let Ok(exact) = value.cast_exact::<PyTuple>()
        && exact.len() == 2
    {
        let bound = |i| index(WINDOW, &*exact.get_borrowed_item(i)?, WINDOW_ALLOWED);
        return Ok((bound(0)?, bound(1)?));
    }
    let items = value.try_iter().map_err(|_| wrong_type(WINDOW, value, WINDOW_ALLOWED))?;
    let mut bounds = Vec::new();
    for item in items.take(3) {
        bounds.push(index(WINDOW, &item?, WINDOW_ALLOWED)?);
    }
    match *bounds {
        [left, right] => Ok((left, right)),
        _ => Err(Error::Problem(core::Error::Value {
            argument: WINDOW,
            got: value.str().map_or_else(|_| describe(value), |text| text.to_string_lossy().into_owned()),
            allowed: WINDOW_ALLOWED.into(),
        })),
    }
}

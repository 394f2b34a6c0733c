//! Comparing, and the lines that say how it went.

use std::collections::{BTreeMap, BTreeSet};

use mp_train::config::run::{Precision, ProductSums};

use super::Outcome;
use super::case::{Case, Tensor};
use super::limits::{Kind, Limit};

/// A tensor as the engine has it, laid out as the reference stores it.
pub struct Found {
    /// Shape; the reference may store only the first entries of the first dimension.
    pub shape: Vec<usize>,
    /// Values; `None` where the engine has none, as for a padded row that was cut off.
    pub values: Vec<Option<f64>>,
    /// Whether the engine never holds it and the test worked it out from what the engine uses.
    pub recomputed: bool,
}

impl Found {
    /// A tensor known everywhere.
    pub fn whole<T: Copy + Into<f64>>(shape: impl Into<Vec<usize>>, values: &[T]) -> Found {
        Found {
            shape: shape.into(),
            values: values.iter().map(|&value| Some(value.into())).collect(),
            recomputed: false,
        }
    }

    /// A single value.
    pub fn scalar(value: f32) -> Found {
        Found::whole([], &[value])
    }

    /// Forgets the entries that are not to be compared.
    pub fn keep(&mut self, entries: &[bool]) -> Outcome<()> {
        if entries.len() != self.values.len() {
            return Err(format!("{} entries, not {}", self.values.len(), entries.len()).into());
        }
        for (value, _) in self
            .values
            .iter_mut()
            .zip(entries)
            .filter(|(_, kept)| !**kept)
        {
            *value = None;
        }
        Ok(())
    }

    /// The same, worked out by the test.
    pub fn recomputed(self) -> Found {
        Found {
            recomputed: true,
            ..self
        }
    }
}

/// Tensors by the names of the reference.
pub type FoundTensors = BTreeMap<String, Found>;

/// A GPU rounds where the CPU does in f16, but sums in another order: its error may be so many times
/// the CPU's.
const OF_CPU: f64 = 4.0;
/// The same where products are summed in f16.
const OF_CPU_IN_F16: f64 = 8.0;

/// The error of each tensor of a run, by case, variant and name.
#[derive(Default)]
pub struct Errors(BTreeMap<[String; 3], f64>);

impl Errors {
    /// These cases in their order, each with what it is called on other folders of the model.
    pub fn cases<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<String> {
        let mut cases = Vec::new();
        for name in names {
            let titles: BTreeSet<&String> = self.0.keys().map(|[title, ..]| title).collect();
            let lead = format!("{name}@");
            let elsewhere = titles.into_iter().filter(|title| title.starts_with(&lead));
            cases.push(name.to_owned());
            cases.extend(elsewhere.cloned());
        }
        cases
    }

    /// The largest error of a case among tensors of one kind.
    pub fn largest(&self, case: &str, kind: Kind) -> Option<f64> {
        let of_case = self.0.iter().filter(|([name, ..], _)| name == case);
        let of_kind = of_case.filter(|([_, _, tensor], _)| Kind::of(tensor) == Some(kind));
        of_kind.map(|(_, &error)| error).reduce(f64::max)
    }
}

/// The lines of one case.
pub struct Report<'a> {
    case: String,
    precision: Precision,
    /// Of the CPU in f16, for a GPU.
    cpu_errors: Option<&'a Errors>,
    /// How many times these are allowed.
    of_cpu: f64,
    errors: Errors,
    lines: Vec<String>,
    failed: bool,
}

struct Worst {
    tensor: String,
    error: f64,
    limit: f64,
}

impl Worst {
    /// How much of the limit is used up; an error where none is allowed is beyond any share.
    fn share(&self) -> f64 {
        match self.error {
            0.0 => 0.0,
            error if error.is_nan() => f64::INFINITY,
            error => error / self.limit,
        }
    }
}

impl<'a> Report<'a> {
    /// For a backend that stores activations so, and that is held against `cpu_errors` where there are
    /// some.
    pub fn new(case: &str, precision: Precision, cpu_errors: Option<&'a Errors>) -> Report<'a> {
        Report {
            case: case.to_owned(),
            precision,
            cpu_errors,
            of_cpu: OF_CPU,
            errors: Errors::default(),
            lines: Vec::new(),
            failed: false,
        }
    }

    /// The same for products that are summed so.
    pub fn with_sums(mut self, sums: ProductSums) -> Self {
        self.of_cpu = match sums {
            ProductSums::F32 => OF_CPU,
            ProductSums::F16 => OF_CPU_IN_F16,
        };
        self
    }

    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Hands the errors over.
    pub fn into_errors(mut self, all: &mut Errors) {
        all.0.append(&mut self.errors.0);
    }

    /// Fails the case as a whole.
    pub fn fail(&mut self, why: String) {
        self.failed = true;
        self.lines.push(format!("{} - - FAIL ({why})", self.case));
    }

    /// Something that is not compared, and is said so.
    pub fn note(&mut self, what: &str) {
        self.lines.push(format!("{} - - ({what})", self.case));
    }

    /// A comparison of numbers that must be the same bits: another way to the same result.
    pub fn same(&mut self, variant: &str, difference: Option<String>) {
        let (error, verdict, why) = match difference {
            None => ("0", "ok", String::new()),
            Some(what) => ("differs", "FAIL", format!(" ({what})")),
        };
        self.failed |= verdict == "FAIL";
        let case = &self.case;
        self.lines
            .push(format!("{case}/{variant} {error} 0 {verdict}{why}"));
    }

    /// Compares all that was found with what the case expects under these names, and adds a line.
    /// What the case does not store is passed over; all that it stores must be found by one variant
    /// or another.
    pub fn compare(&mut self, case: &Case, variant: &str, found: &FoundTensors) -> Outcome<()> {
        let mut worst: Option<Worst> = None;
        let mut recomputed = Vec::new();
        for (name, found) in found {
            if !case.expects(name) {
                continue;
            }
            let kind = Kind::of(name).ok_or(format!("no limit is known for `{name}`"))?;
            let limit = kind.limit(self.precision, case.form);
            let limit = match self.precision {
                Precision::F32 => limit.allowing(case.float64_gap(name)),
                Precision::F16 => limit,
            };
            let expected = case.expected(name)?;
            let error = largest_error(limit, &expected, found)
                .map_err(|why| format!("{variant}: `{name}`: {why}"))?;
            let key = [&self.case[..], variant, name].map(str::to_owned);
            let limit_value = self.limit_value(limit, &key, &expected)?;
            self.errors.0.insert(key, error);
            if found.recomputed {
                recomputed.push(name.as_str());
            }
            let this = Worst {
                tensor: name.clone(),
                error,
                limit: limit_value,
            };
            if worst
                .as_ref()
                .is_none_or(|worst| this.share() > worst.share())
            {
                worst = Some(this);
            }
        }
        let worst = worst.ok_or(format!("{variant}: nothing to compare"))?;
        let verdict = if worst.share() <= 1.0 { "ok" } else { "FAIL" };
        self.failed |= verdict == "FAIL";
        let mut line = format!(
            "{}/{variant} {} {} {verdict} ({})",
            self.case,
            number(worst.error),
            number(worst.limit),
            worst.tensor
        );
        if !recomputed.is_empty() {
            line += &format!("; recomputed: {}", recomputed.join(", "));
        }
        self.lines.push(line);
        Ok(())
    }

    /// The limit, or what the CPU's error leaves of it.
    fn limit_value(&self, limit: Limit, key: &[String; 3], expected: &Tensor) -> Outcome<f64> {
        let Some(cpu) = self.cpu_errors else {
            return Ok(limit.value());
        };
        let cpu = cpu.0.get(key).ok_or(format!("the CPU has no {key:?}"))?;
        let least = limit.half_step(expected.largest());
        // What is exact stays so, and what is not compared is not compared here.
        Ok(limit.value().min(match limit {
            Limit::Finite => f64::INFINITY,
            _ => self.of_cpu * cpu.max(least),
        }))
    }
}

/// Two digits of an error.
pub fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value => format!("{value:.1e}"),
    }
}

/// The largest error over the values that both have; NaN where one of them is no number.
fn largest_error(limit: Limit, expected: &Tensor, found: &Found) -> Result<f64, String> {
    // A scalar is stored without a dimension or with one.
    let dimensions = |shape: &[usize]| match shape {
        [] => (1, Vec::new()),
        [first, rest @ ..] => (*first, rest.to_vec()),
    };
    let ((first, rest), (most, all)) = (dimensions(&expected.shape), dimensions(&found.shape));
    let fits = rest == all && first <= most;
    if !fits || found.values.len() != found.shape.iter().product::<usize>() {
        return Err(format!(
            "stored is {:?}, the engine has {:?}",
            expected.shape, found.shape
        ));
    }
    let largest = expected.largest();
    let (mut worst, mut compared) = (0.0, 0);
    for (expected, found) in expected.values.iter().zip(&found.values) {
        let Some(found) = found else { continue };
        let error = limit.error(*found, *expected, largest);
        compared += 1;
        if error.is_nan() || worst < error {
            worst = error;
        }
        if worst.is_nan() {
            break;
        }
    }
    match compared {
        0 => Err("not one value to compare".to_owned()),
        _ => Ok(worst),
    }
}

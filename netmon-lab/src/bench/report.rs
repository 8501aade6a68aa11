//! What the benchmark found: tables, as Markdown for people and as JSON for programs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::machine::Machine;
use super::numbers::Summary;

/// One cell of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A number, with the digits behind the point that are shown of it.
    Number(Number),
    /// What is said of several measurements.
    Spread(Summary),
}

/// See [`Cell::Number`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Number {
    value: f64,
    #[serde(skip)]
    digits: usize,
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Cell {
    fn from(value: u64) -> Self {
        number(value as f64, 0)
    }
}

/// Median and, in brackets, the least; nothing measured is shown as `–`.
pub fn spread(measured: &[f64]) -> Cell {
    Summary::of(measured.iter().copied()).map_or(number(f64::NAN, 0), Cell::Spread)
}

/// A number with so many digits behind the point. What is not a number is shown as `–`.
pub fn number(value: f64, digits: usize) -> Cell {
    Cell::Number(Number { value, digits })
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Spread(Summary { median, least }) => write!(f, "{median:.1} ({least:.1})"),
            Self::Number(Number { value, .. }) if !value.is_finite() => f.write_str("–"),
            Self::Number(Number { value, digits }) => f.write_str(&grouped(&format!("{value:.digits$}"))),
        }
    }
}

/// `1234567.8` as `1,234,567.8`.
fn grouped(number: &str) -> String {
    let (sign, number) = number.strip_prefix('-').map_or(("", number), |rest| ("-", rest));
    let (whole, rest) = number.split_at(number.find('.').unwrap_or(number.len()));
    let mut text = String::from(sign);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text + rest
}

/// A table with its title and what one must know to read it.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// Title.
    pub title: String,
    /// How to read it.
    pub note: String,
    /// Heads of the columns.
    pub columns: Vec<String>,
    /// Rows, each with as many cells as there are columns.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub fn new(title: &str, note: &str, columns: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            note: note.to_owned(),
            columns: columns.iter().map(|column| (*column).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Appends a row.
    ///
    /// # Panics
    /// When it has more or fewer cells than the table has columns.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells: Vec<_> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.columns.len(), "a row of another length in the table {}", self.title);
        self.rows.push(cells);
    }

    /// As Markdown, under a heading of the third level.
    pub fn markdown(&self) -> String {
        let mut text = format!("### {}\n\n", self.title);
        if !self.note.is_empty() {
            let _ = writeln!(text, "{}\n", self.note);
        }
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        text += &line(&self.columns);
        let numeric = |column: usize| {
            self.rows.iter().all(|row| !matches!(row[column], Cell::Text(_))) && !self.rows.is_empty()
        };
        let rulers: Vec<String> = (0..self.columns.len())
            .map(|column| if numeric(column) { "--:" } else { "---" }.to_owned())
            .collect();
        text += &line(&rulers);
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|cell| cell.to_string().replace('|', "\\|")).collect();
            text += &line(&cells);
        }
        text
    }
}

/// One of the numbers that netmon must reach, and what was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// What is measured.
    pub what: String,
    /// The limit, in words: `≤ 20 ns`.
    pub wanted: String,
    /// What was measured.
    pub measured: Cell,
    /// Whether it is within the limit.
    pub met: bool,
}

impl Target {
    /// At most `limit`.
    pub fn at_most(what: &str, limit: f64, measured: f64, digits: usize, unit: &str) -> Self {
        Self {
            what: what.to_owned(),
            wanted: format!("≤ {limit}{unit}"),
            measured: number(measured, digits),
            met: measured <= limit,
        }
    }

    /// At least `limit`.
    pub fn at_least(what: &str, limit: f64, measured: f64, digits: usize, unit: &str) -> Self {
        Self {
            what: what.to_owned(),
            wanted: format!("≥ {limit}{unit}"),
            measured: number(measured, digits),
            met: measured >= limit,
        }
    }
}

/// What one section found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// Tables, in the order in which they are shown.
    pub tables: Vec<Table>,
    /// Targets that this section measures.
    pub targets: Vec<Target>,
}

/// Prints the targets, and writes all findings into `json`, if it is given.
///
/// # Errors
/// The file cannot be written.
pub fn conclude(machine: &Machine, findings: &[Findings], json: Option<&Path>) -> Result<()> {
    println!("{}", targets(findings).markdown());
    let Some(file) = json else { return Ok(()) };
    let all = serde_json::json!({ "machine": machine, "findings": findings });
    fs::write(file, serde_json::to_vec_pretty(&all)?)
        .with_context(|| format!("cannot write {}", file.display()))
}

/// The targets of all sections as a table.
pub fn targets(findings: &[Findings]) -> Table {
    let mut table = Table::new("Targets", "", &["what", "wanted", "measured", "met"]);
    for target in findings.iter().flat_map(|findings| &findings.targets) {
        let met = if target.met { "yes" } else { "**no**" };
        table.row([
            target.what.as_str().into(),
            target.wanted.as_str().into(),
            target.measured.clone(),
            met.into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_what_is_none_is_a_dash() {
        let shown = |value, digits| number(value, digits).to_string();
        assert_eq!(
            [shown(1_234_567.89, 1), shown(-1000.0, 0), shown(999.0, 0), shown(0.1, 2), shown(f64::NAN, 1)],
            ["1,234,567.9", "-1,000", "999", "0.10", "–"]
        );
    }

    #[test]
    fn a_table_is_markdown_with_numbers_to_the_right() {
        let mut table = Table::new("Title", "Note.", &["a", "b"]);
        table.row(["x|y".into(), number(1.5, 1)]);
        assert_eq!(table.markdown(), "### Title\n\nNote.\n\n| a | b |\n| --- | --: |\n| x\\|y | 1.5 |\n");
    }

    #[test]
    fn a_target_that_was_not_measured_is_not_met() {
        assert!(!Target::at_most("x", 1.0, f64::NAN, 1, " ns").met);
        assert!(!Target::at_least("x", 1.0, f64::NAN, 1, "").met);
        assert!(Target::at_most("x", 1.0, 1.0, 1, " ns").met);
    }
}

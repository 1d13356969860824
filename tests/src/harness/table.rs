//! Tables in Markdown, which read well on a terminal too, and percentiles.

/// Columns are as wide as their widest cell; all but the first are aligned to the right.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<T: Into<String>>(head: impl IntoIterator<Item = T>) -> Self {
        Self { rows: vec![head.into_iter().map(Into::into).collect()] }
    }

    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.first().map_or(0, Vec::len);
        (0..columns)
            .map(|c| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0))
            .collect()
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let widths = self.widths();
        for (i, row) in self.rows.iter().enumerate() {
            for (c, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if c == 0 { write!(f, "| {cell:<width$} |")? } else { write!(f, " {cell:>width$} |")? }
            }
            writeln!(f)?;
            if i == 0 {
                for (c, width) in widths.iter().enumerate() {
                    if c == 0 {
                        write!(f, "|{}|", "-".repeat(width + 2))?
                    } else {
                        write!(f, "{}:|", "-".repeat(width + 1))?
                    }
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

/// The smallest value that at least `percent` of `values` do not exceed; 0 for none.
pub fn percentile(values: &[u64], percent: u64) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() as u64 * percent).div_ceil(100).max(1) as usize;
    sorted.get(rank - 1).copied().unwrap_or(0)
}

/// µs as ms with the digits that matter.
pub fn ms(us: u64) -> String {
    let ms = us as f64 / 1000.0;
    if us < 1000 { format!("{ms:.3}") } else { format!("{ms:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: Vec<u64> = (1..=50).rev().collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99), percentile(&values, 100)), (25, 50, 50));
        assert_eq!(percentile(&[7], 50), 7);
        assert_eq!(percentile(&[], 50), 0);
    }

    #[test]
    fn looks() {
        let mut table = Table::new(["phase", "p50"]);
        table.row(["exec", "12.5"]);
        assert_eq!(table.to_string(), "| phase |  p50 |\n|-------|-----:|\n| exec  | 12.5 |\n");
    }
}
